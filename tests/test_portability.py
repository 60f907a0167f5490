"""The tool where Python lacks what POSIX has: as on Windows, without its signals, modules, functions and its UTF-8."""

import contextlib
import json
import ntpath
import os
import re
import signal
import subprocess
from threading import Event

import pytest

import windows
from conftest import XEROCTL
from loopback import DONE, USAGE, Gate, Hold, chunk, completion, json_response, sse, stream, stream_head
from terminal import Terminal, screen

HELLO = json_response(completion())
HEL = stream_head() + sse(chunk("Hel"))
FOOTER = rb"-- 3 tokens in \d+\.\ds \(\d+\.\d tok/s\)\n"


@pytest.fixture(scope="session")
def command(command):
    """Return the words that start the tool as if on Windows."""
    interpreter, *tool = command(())
    return lambda options: [interpreter, windows.__file__, *tool]


@pytest.fixture
def warm():
    """None: each test starts the interpreter that becomes one of Windows."""


@pytest.fixture
def env(env, tmp_path):
    return {**env, "TMPDIR": str(tmp_path)}


def answer(text="Hello!"):
    return stream(chunk(text), chunk(finish="stop"), chunk(usage=USAGE, choices=[]), DONE)


def options(server, *more):
    return ("chat", "--endpoint", "my-endpoint", "--base-url", server.url + "/v1", "--retries", "0", *more)


def said(server, count):
    """Return the (role, content) pairs of request number *count*, counted from 1."""
    return [(message["role"], message["content"]) for message in server.requests[count - 1].json["messages"]]


@pytest.fixture
def talk(terminal, server):
    """Start a chat at a console and wait for its first prompt."""
    def talk(*more, **how):
        child = terminal(*options(server, "-i", *more), **how)
        child.expect("> ")
        return child
    return talk


def enter(child, line, *expected):
    """Type *line* and wait for *expected*, then for the next prompt."""
    child.send(line + b"\r" if isinstance(line, bytes) else line + "\r")
    for pattern in expected:
        child.expect(pattern)
    child.expect("\n> ")


def interrupt(child, *expected):
    """Press Ctrl+C until *expected* comes: one just before Python waits for a key is seen with the next key."""
    for timeout in (0.3, 0.3):
        child.send("\x03")
        with contextlib.suppress(AssertionError):
            for pattern in expected:
                child.expect(pattern, timeout)
            return
    child.send("\x03")
    for pattern in expected:
        child.expect(pattern)


def ended(child, stop):
    """Return what the child's `finish` returns after *stop*, done until it works: one just before a wait is not seen."""
    for _ in range(2):
        stop()
        with contextlib.suppress(AssertionError):
            return child.finish(1)
    stop()
    return child.finish()


# -- The simulation --------------------------------------------------


LOOKING = """
import os, signal
for name in {modules}:
    try:
        __import__(name)
    except ImportError:
        continue
    print(name)
print(os.name, *sorted(name for name in dir(signal) if name.startswith("SIG") and name[3] != "_"))
print(*[name for name in {functions} if hasattr(os, name) or hasattr(signal, name)])
"""


@pytest.mark.smoke
def test_the_simulation_lacks_what_windows_lacks(interpreter, env, tmp_path):
    script = tmp_path / "looking.py"
    script.write_text(LOOKING.format(modules=windows.MODULES, functions=windows.FUNCTIONS))
    seen = subprocess.check_output([interpreter, windows.__file__, str(script)], env=env)
    assert seen == b"nt SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM\n\n"


# -- One answer ------------------------------------------------------


@pytest.mark.parametrize("args", [("--help",), ("chat", "--help"), ("--version",)], ids=" ".join)
def test_help_and_version_are_those_of_every_system(run, interpreter, env, args):
    expected = subprocess.check_output([interpreter, str(XEROCTL), *args], env=env)
    assert run(*args) == (0, expected, b"")


@pytest.mark.smoke
@pytest.mark.parametrize("more, printed", [
    (("-m", "héllo"), b"Hello!\n"),
    (("-m", "héllo", "-o", "json"), json.dumps(completion(), indent=2).encode() + b"\n"),
    (("-m", "héllo", "-q", "--stream"), b"Hello!\n"),
], ids=["whole", "json", "streamed"])
def test_an_answer_goes_to_a_pipe(run, server, more, printed):
    server.script(answer() if "--stream" in more else HELLO)
    assert run(*options(server, *more)) == (0, printed, b"")
    assert said(server, 1) == [("user", "héllo")]


@pytest.mark.smoke
def test_a_prompt_comes_from_a_pipe_in_utf_8_with_any_line_ends(run, server):
    server.script(HELLO)
    assert run(*options(server), stdin="\ufeffhéllo 😀\r\nyou\r\n".encode()) == (0, b"Hello!\n", b"")
    assert said(server, 1) == [("user", "héllo 😀\nyou")]


@pytest.mark.smoke
@pytest.mark.parametrize("more", [(), ("--stream", "-q")], ids=["whole", "streamed"])
def test_a_console_gets_what_its_code_page_has_and_a_pipe_gets_utf_8(terminal, run, server, more):
    text = "“héllo” 😀 日 €"
    server.always(answer(text) if more else json_response(completion(text)))
    child = terminal(*options(server, "-m", "Hi", *more), stderr=subprocess.PIPE, env={"TERM": None})
    assert run(*options(server, "-m", "Hi", *more)) == (0, text.encode() + b"\n", b"")
    assert (child.finish(), child.output, child.stderr) == (0, text.encode("cp1252", "replace") + b"\r\n", b"")


@pytest.mark.smoke
def test_json_on_a_console_is_json_whatever_the_code_page_lacks(terminal, server):
    document = completion("héllo 😀 日")
    server.script(json_response(document))
    child = terminal(*options(server, "-m", "Hi", "-o", "json"), stderr=subprocess.PIPE)
    assert (child.finish(), child.stderr) == (0, b"")
    assert json.loads(child.output.decode("cp1252")) == document


@pytest.mark.smoke
def test_an_error_on_a_console_has_what_its_code_page_has(terminal, server):
    server.script(json_response({"error": {"message": "né 日"}}, "400 Bad Request"))
    child = terminal(*options(server, "-m", "Hi"), stdout=subprocess.PIPE, env={"TERM": None})
    assert (child.finish(), child.output) == (4, b"xeroctl: error: HTTP 400: n\xe9 ?\r\n")


@pytest.mark.smoke
def test_the_spinner_leaves_no_trace_on_a_console(terminal, server):
    gate = Event()
    server.script([Gate(gate), HELLO])
    child = terminal(*options(server, "-m", "Hi"))
    child.expect("waiting")
    gate.set()
    assert child.finish() == 0
    assert screen(child.output) == ["Hello!"]


def test_the_practice_endpoint_answers(run):
    result = run("chat", "--demo", "-m", "Hi")
    assert (result.status, result.stderr, b"Hi" in result.stdout) == (0, b"", True)


@pytest.mark.smoke
def test_the_other_commands_run(start, server):
    server.always(json_response({"object": "list", "data": [{"id": "m-1", "object": "model"}], "has_more": False}))
    commands = ["models --endpoint e", "completions --endpoint e", "status", "completion bash", "help chat"]
    children = [start(*words.split(), "-q", "--base-url", server.url + "/v1") for words in commands]
    results = [child.finish() for child in children]
    assert [(result.status, result.stderr) for result in results] == [(0, b"")] * len(commands)
    assert [b"m-1" in result.stdout for result in results] == [True, True, False, False, False]


# -- Failures --------------------------------------------------------


def test_each_kind_of_failure_has_its_status_and_its_line(start, server):
    server.always(json_response({"error": {"message": "né"}}, "400 Bad Request"))
    closed = ("chat", "--endpoint", "e", "-m", "Hi", "--retries", "0", "--base-url", "http://127.0.0.1:1/v1")
    cases = [
        (options(server, "-m", "Hi"), 4, "xeroctl: error: HTTP 400: né\n"),
        (options(server, "-m", "Hi", "-o", "json"), 4, None),
        (closed, 6, "xeroctl: error: 127.0.0.1:1 refused the connection: is the server running?\n"),
        (options(server, "-m", " "), 9, "xeroctl: error: the message is empty\n"),
        (("nonsense",), 2, None),
        (options(server, "-m", "Hi", "--from-file", "gone.txt"), 2,
         "xeroctl: error: cannot read gone.txt: No such file or directory\n"),
    ]
    children = [start(*args) for args, _, _ in cases]
    for (args, status, line), child in zip(cases, children):
        result = child.finish()
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (status, b"", 1), args
        assert line is None or result.stderr.decode() == line, args


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_gives_its_status_since_no_process_can_die_of_it(start, server, number):
    server.script([HEL, Hold()])
    child = start(*options(server, "-m", "Hi", "--stream"))
    child.expect("Hel")
    assert ended(child, lambda: child.signal(number)) == (128 + number, b"Hel\n", b"")
    assert child.process.returncode == 128 + number


def test_ctrl_c_at_a_console_ends_a_single_question(terminal, server):
    server.script([HEL, Hold()])
    child = terminal(*options(server, "-m", "Hi", "--stream"))
    child.expect("Hel")
    assert (ended(child, lambda: child.send("\x03")), child.process.returncode) == (130, 130)


# -- Chat ------------------------------------------------------------


def test_a_chat_goes_over_pipes(run, server, tmp_path):
    server.script(answer("eins é"), answer("zwei 😀"))
    lines = "one\r\n/save kept.json\r\n/clear\r\n/load kept.json\r\ntwo\r\n/edit\r\n/quit\r\nthree\r\n"
    result = run(*options(server, "-i"), stdin=lines.encode(), cwd=str(tmp_path))
    assert (result.status, result.stdout) == (2, "eins é\nzwei 😀\n".encode())
    assert re.sub(FOOTER, b"", result.stderr) == (
        b"saved 2 messages to kept.json\nloaded 2 messages from kept.json\nxeroctl: error: /edit needs a terminal\n"
        b"tokens: 18 prompt, 6 completion; messages: 4\n")
    assert said(server, 2) == [("user", "one"), ("assistant", "eins é"), ("user", "two")]


def test_a_chat_is_held_at_a_console(talk, server, env, tmp_path):
    server.script(answer("eins é"), [HEL, Hold()], answer("drei 日"))
    child = talk(cwd=str(tmp_path))
    enter(child, "h\xe9llo".encode("cp1252"), b"eins \xe9\r\n")
    enter(child, "/save kept.json", "saved 2 messages to kept.json")
    enter(child, "/load kept.json", "loaded 2 messages from kept.json")
    interrupt(child, "Ctrl+D or /quit ends the session\r\n", "\n> ")
    child.send("two\r")
    child.expect("Hel")
    child.send("\x03")
    child.expect("\n> ")
    enter(child, "three\\\rlines", "drei ?\r\n")
    child.send("\x04")
    child.expect("tokens: ~18 prompt, ~7 completion; messages: 6\r\n")
    assert child.finish() == 0
    assert said(server, 3) == [("user", "héllo"), ("assistant", "eins é"), ("user", "two"), ("assistant", "Hel"),
                               ("user", "three\nlines")]
    history = os.path.join(env["HOME"], ".local", "state", "xeroctl", "history")
    with open(history, "rb") as file:
        assert [json.loads(line.decode()) for line in file] == [
            "héllo", "/save kept.json", "/load kept.json", "two", "three\nlines"]


@pytest.mark.smoke
def test_the_end_of_the_input_leaves_the_line_of_the_prompt(talk):
    child = talk()
    child.send("\x04")
    assert child.finish() == 0
    assert screen(child.output)[-1] == "tokens: 0 prompt, 0 completion; messages: 0"


def test_quit_ends_a_chat_at_a_console(talk):
    child = talk("-q")
    child.send("/quit\r")
    assert (child.finish(), child.output.count(b"\n")) == (0, 1)


def test_an_editor_is_needed_and_notepad_is_the_usual_one(talk, server, tmp_path):
    child = talk(columns=200)
    child.send("/edit\r")
    child.expect(re.compile(r"error\S*: cannot run notepad: [^\r]*No such file[^\r]*: set VISUAL or EDITOR\r\n"))
    child.send("/quit\r")
    assert child.finish() == 0


def test_an_editor_writes_a_message(talk, server, tmp_path):
    editor = tmp_path / "my-ed"
    editor.write_text("#!/bin/sh\nprintf 'one\\r\\ntw\\303\\266\\r\\n' >\"$1\"\n")
    editor.chmod(0o755)
    server.script(answer())
    child = talk(env={"EDITOR": str(editor)})
    enter(child, "/edit", "Hello!")
    assert said(server, 1) == [("user", "one\ntwö")]
    assert sorted(os.listdir(str(tmp_path))) == ["home", "my-ed"]


# -- Settings --------------------------------------------------------


def test_deployments_are_added_chosen_and_removed(run, env, server):
    path = os.path.join(env["HOME"], ".config", "xeroctl", "config.toml")
    url = "http://127.0.0.1:1/v1"
    assert run("config", "path") == (0, path.encode() + b"\n", b"")
    for name, key in (("a", "xero_aaaaaaaaaaaaaaaa"), ("b", "-")):
        assert run("config", "add", name, "--base-url", url, "--api-key", key, "-q",
                   stdin=b"xero_bbbbbbbbbbbbbbbb\r\n") == (0, b"", b"")
    os.chmod(path, 0o666)
    assert run("config", "use", "b") == (0, b"", b"xeroctl: note: b is the current context\n")
    listed = run("config", "list")
    assert (listed.status, listed.stderr) == (0, b"")
    assert [line.split(b"\t")[:3] for line in listed.stdout.splitlines()] == [
        [b"a", b"", url.encode()], [b"b", b"*", url.encode()]]
    assert run("config", "remove", "a", "-q") == (0, b"", b"")
    with open(path, "rb") as file:
        assert file.read().split() == (
            b'current = "b" [deployment.b] base_url = "%b" api_key = "xero_bbbbbbbbbbbbbbbb"' % url.encode()).split()


def test_a_deployment_is_asked_for_at_a_console(terminal, server, env):
    server.script(json_response({"data": []}))
    child = terminal("config", "init", columns=200)
    replies = (("name [default]: ", ""), ("completions): ", server.url + "/v1"), ("none: ", "xero_aaaaaaaaaaaaaaaa"))
    for question, reply in (*replies, ("endpoint [", "")):
        child.expect(question)
        child.send(reply + "\r")
    child.expect("added default to ")
    assert child.finish() == 0
    assert server.requests[0].headers["authorization"] == "Bearer xero_aaaaaaaaaaaaaaaa"


def test_a_command_prints_the_key(run, server, env):
    folder = os.path.join(env["HOME"], ".config", "xeroctl")
    os.makedirs(folder)
    with open(os.path.join(folder, "config.toml"), "w") as file:
        file.write(f'current = "a"\n[deployment.a]\nbase_url = "{server.url}/v1"\n'
                   'api_key_command = "printf \'%s\\\\r\\\\n\' xero_aaaaaaaaaaaaaaaa"\n')
    server.script(HELLO)
    assert run("chat", "--endpoint", "e", "-m", "Hi") == (0, b"Hello!\n", b"")
    assert server.requests[0].headers["authorization"] == "Bearer xero_aaaaaaaaaaaaaaaa"


@pytest.fixture
def on_windows(xeroctl, monkeypatch):
    """Call a function of the tool with the paths of Windows, and these *variables*."""
    def call(name, *args, **variables):
        with monkeypatch.context() as patch:
            for variable in ("XDG_CONFIG_HOME", "XDG_STATE_HOME"):
                patch.delenv(variable, raising=False)
            for variable, value in dict(variables, USERPROFILE=r"C:\Users\Zoë").items():
                patch.setenv(variable, value)
            patch.setattr(os, "path", ntpath)
            return getattr(xeroctl, name)(*args)
    return call


@pytest.mark.parametrize("folder, path", [
    (None, r"C:\Users\Zoë\.config\xeroctl\config.toml"), ("", r"C:\Users\Zoë\.config\xeroctl\config.toml"),
    (r"C:\My Files", r"C:\My Files\xeroctl\config.toml"), ("C:/cfg/", r"C:/cfg/xeroctl\config.toml"),
    (r"\\host\share\cfg", r"\\host\share\cfg\xeroctl\config.toml"),
    ("cfg", r"C:\Users\Zoë\.config\xeroctl\config.toml"), ("C:cfg", r"C:\Users\Zoë\.config\xeroctl\config.toml"),
])
def test_the_config_file_has_a_path_of_windows(on_windows, folder, path):
    assert on_windows("config_path", **({} if folder is None else {"XDG_CONFIG_HOME": folder})) == path


def test_the_state_has_a_path_of_windows(on_windows):
    assert on_windows("state_path", "history") == r"C:\Users\Zoë\.local\state\xeroctl\history"
    assert on_windows("state_path", "history", XDG_STATE_HOME=r"D:\state") == r"D:\state\xeroctl\history"


@pytest.mark.parametrize("text, path", [
    (r"C:\My Files\é 日.json", r"C:\My Files\é 日.json"), (r"~\a.json", r"C:\Users\Zoë\a.json"),
    ("~/a.json", r"C:\Users\Zoë/a.json"), ("a.json", "a.json"), (r"..\a.json", r"..\a.json"),
])
def test_a_file_name_of_windows_is_taken_as_it_is(on_windows, text, path):
    assert on_windows("native_path", text) == path


# -- Other encodings -------------------------------------------------


@pytest.fixture
def elsewhere(request, interpreter, env):
    """Start the tool on a terminal of this system, with another encoding, and return its Terminal."""
    def elsewhere(encoding, *args):
        child = Terminal([interpreter, str(XEROCTL), *args], {**env, "PYTHONIOENCODING": encoding})
        request.addfinalizer(child.kill)
        return child
    return elsewhere


@pytest.mark.needs("readline")
def test_a_line_comes_back_with_up_as_it_was_typed(elsewhere, server):
    server.always(answer())
    child = elsewhere("latin-1", *options(server, "-i"))
    for keys in ("héllo\r", "\x1b[A\r", "\x04"):
        child.expect("> ")
        child.send(keys)
    assert child.finish() == 0
    assert said(server, 2)[-1] == said(server, 1)[-1]


def test_a_key_that_is_typed_and_no_text_is_an_error_of_one_line(elsewhere):
    child = elsewhere("utf-8", "config", "add", "a", "--base-url", "http://127.0.0.1:1/v1", "--api-key", "-")
    child.expect("shown: ")
    child.send(b"xero_\xff\r")
    assert child.finish() == 2
    assert len(screen(child.output)) <= 2


def test_a_reply_that_is_typed_and_no_text_is_asked_for_again(elsewhere):
    child = elsewhere("utf-8:strict", "config", "init")
    for keys in (b"\xff\r", b"\x04"):
        child.expect("name [default]: ")
        child.send(keys)
    child.expect("nothing was written")
    assert child.finish() == 2


# -- The source ------------------------------------------------------


def test_the_source_asks_for_no_version_and_no_platform_by_name():
    source = XEROCTL.read_text(encoding="utf-8")
    assert [name for name in ("sys.version", "sys.platform", "platform.system", "hexversion") if name in source] == []
