"""The interactive chat as a person meets it at a terminal, and as a script does through pipes."""

import base64
import contextlib
import ctypes.util
import json
import os
import random
import re
import select
import signal
import stat
import subprocess
from threading import Event

import pytest

from conftest import XEROCTL
from loopback import DONE, USAGE, Gate, Hold, Reset, Server, chunk, json_response, sse, stream, stream_head
from terminal import screen

PROMPT = re.compile(rb"[\r\n](?:\x1b\[\?2004h)?(?:\x1b\[1m)?> (?:\x1b\[0m)?")
MORE = re.compile(rb"[\r\n](?:\x1b\[\?2004h)?(?:\x1b\[1m)?\. (?:\x1b\[0m)?")
UP, DOWN, LEFT = "\x1b[A", "\x1b[B", "\x1b[D"
HEL = sse(chunk("Hel"))
LO = sse(chunk("lo", finish="stop"), chunk(usage=USAGE, choices=[]), DONE)
PLAIN_C = {"LC_ALL": "C", "LANG": None, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
TURN = [("user", "one"), ("assistant", "eins")]
NEW = [("user", "two")]
CODE = "def f():\n\tif True:\n\t\treturn 'é 😀'\n\nprint(f())"


def answer(text="Hello!", **more):
    return stream(chunk(text, **more), chunk(finish="stop"), chunk(usage=USAGE, choices=[]), DONE)


def failure(status="500 Broken", message="boom"):
    return json_response({"error": {"message": message}}, status)


def options(server, *more):
    return ("chat", "-i", "--endpoint", "my-endpoint", "--base-url", server.url + "/v1", "--retries", "0", *more)


def said(server, count):
    """Return the (role, content) pairs of request number *count*, counted from 1."""
    return [(message["role"], message["content"]) for message in server.requests[count - 1].json["messages"]]


def well_formed(pairs):
    roles = [role for role, _ in pairs]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * len(roles)
    return roles == expected[:len(roles)] and len(roles) % 2 == 1 and all(content.strip() for _, content in pairs)


def enter(child, text, columns=80):
    """Type *text* and Enter, wait for the next prompt, and return the lines that came between."""
    start = len(child.output)
    child.send(text + "\r")
    child.expect(PROMPT)
    return screen(child.output[start:], columns, 100)[1:-2]


def interrupt(child, *expected):
    """Press Ctrl+C until *expected* comes: one just before Python waits for a key is seen with the next key."""
    for timeout in (1, 1, 10):
        child.send("\x03")
        with contextlib.suppress(AssertionError) if timeout == 1 else contextlib.ExitStack():
            for pattern in expected:
                child.expect(pattern, timeout)
            return


def leave(child, keys="/quit\r", status=0):
    child.send(keys)
    assert child.finish() == status
    for complaint in (b"Warning", b"Exception ignored", b"\x01", b"\x02"):
        assert complaint not in child.output


@pytest.fixture
def talk(terminal, server):
    """Start a chat at a terminal and wait for its first prompt."""
    def talk(*more, **how):
        child = terminal(*options(server, *more), **how)
        child.expect(PROMPT)
        return child
    return talk


@pytest.fixture
def pipe(run, server):
    """Run a chat on pipes; return its status, the text of its stdout, the lines of its stderr."""
    def pipe(text, *more, **how):
        data = text if isinstance(text, bytes) else text.encode()
        result = run(*options(server, *more), stdin=data, **how)
        return result.status, result.stdout.decode(), result.stderr.decode().splitlines()
    return pipe


@pytest.fixture
def state(env):
    """The folder where xeroctl keeps its state."""
    return os.path.join(env["HOME"], ".local", "state", "xeroctl")


def kept(state):
    """Return the paths of the conversations on disk."""
    folder = os.path.join(state, "conversations")
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))] if os.path.isdir(folder) else []


@pytest.fixture
def bash_pipe(start, server, interpreter, env):
    """Send lines to a chat whose output only head reads."""
    server.always(answer())

    def bash_pipe(lines):
        words = ["bash", "-c", '"$@" | head -n 1', "bash", interpreter, str(XEROCTL), *options(server, "-q")]
        done = subprocess.run(words, input=lines.encode(), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return done.returncode, done.stdout, done.stderr

    return bash_pipe


def program(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


# -- The loop --------------------------------------------------------


@pytest.mark.smoke
def test_the_whole_conversation_is_sent_each_turn_and_streamed(talk, server):
    server.script(answer("eins"), answer("zwei\n"))
    child = talk("--system", "be short", "--temperature", "0", "--seed", "7")
    assert enter(child, "one")[0] == "eins"
    assert enter(child, "two")[0] == "zwei"
    leave(child)
    assert server.requests[1].json == {
        "model": "my-endpoint", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4096,
        "temperature": 0, "seed": 7, "messages": [
            {"role": "system", "content": "be short"}, {"role": "user", "content": "one"},
            {"role": "assistant", "content": "eins"}, {"role": "user", "content": "two"}],
    }


def test_the_first_turn_is_a_message_whatever_it_looks_like(talk, server):
    server.script(answer())
    leave(talk("-m", "/help"))
    assert said(server, 1) == [("user", "/help")]


def test_the_message_option_is_the_first_turn(talk, server, tmp_path):
    (tmp_path / "persona.txt").write_text("be kind\n")
    server.script(answer("eins"), answer())
    child = talk("-m", "one", "--from-file", str(tmp_path / "persona.txt"), "--max-tokens", "5", "--model", "llama")
    enter(child, "two")
    leave(child)
    body = server.requests[1].json
    assert said(server, 2) == [("system", "be kind")] + TURN + [("user", "two")]
    assert (body["max_tokens"], body["model"]) == (5, "llama")


@pytest.mark.parametrize("more", [("-o", "json"), ("--dry-run",), ("-o", "json", "-m", "Hi")])
def test_what_goes_with_one_answer_only_is_refused(pipe, more):
    status, out, lines = pipe("one\n", *more)
    assert (status, out, len(lines)) == (2, "", 1)
    assert "--interactive" in lines[0]


def test_the_practice_endpoint_can_be_talked_to(terminal):
    child = terminal("chat", "--interactive", "--demo")
    child.expect(PROMPT)
    assert "You wrote: Hi" in "\n".join(enter(child, "Hi"))
    assert b"endpoint: demo | model: practice | tokens: 1/" in child.output
    leave(child)


@pytest.mark.smoke
def test_a_limit_by_its_newer_name_takes_the_place_of_ours(pipe, server):
    server.script(answer())
    assert pipe("one\n", "--param", "max_completion_tokens=5")[0] == 0
    body = server.requests[0].json
    assert (body["max_completion_tokens"], "max_tokens" in body) == (5, False)


# -- Bar and prompt --------------------------------------------------


@pytest.mark.parametrize("usage, totals", [
    ({"prompt_tokens": 9, "completion_tokens": 3}, "9 prompt, 3 completion"),
    ({"completion_tokens": 3}, "~0 prompt, ~3 completion"), ({"prompt_tokens": 9}, "~9 prompt, ~1 completion"),
], ids=str)
def test_totals_are_exact_only_where_the_server_gives_both(pipe, server, usage, totals):
    server.script(stream(chunk("Hello!", finish="stop"), chunk(usage=usage, choices=[]), DONE))
    assert pipe("one\n")[2][-1] == f"tokens: {totals}; messages: 2"


def test_the_bar_tells_endpoint_model_tokens_and_messages(talk, server):
    server.script(answer(), stream(chunk("no usage", finish="stop"), DONE))
    child = talk()
    enter(child, "one")
    enter(child, "two")
    leave(child, "\x04")
    bars = re.findall(r"\x1b\[2m(endpoint: .*?)\x1b\[0m\r\n", child.output.decode())
    assert bars == [
        "endpoint: my-endpoint | tokens: 0/0 | msgs: 0",
        "endpoint: my-endpoint | model: test-model | tokens: 9/3 | msgs: 2",
        "endpoint: my-endpoint | model: test-model | tokens: ~9/~4 | msgs: 4",
    ]


def test_a_terminal_is_greeted_once_unless_it_wants_quiet(talk, terminal, pipe, server):
    server.always(answer())
    greeting = "/help lists the commands, Ctrl+D ends the session"
    child = talk()
    enter(child, "one")
    leave(child)
    assert screen(child.output)[0] == greeting
    assert child.output.decode().count(greeting) == 1
    child = terminal(*options(server, "-q"))
    child.expect("> ")
    leave(child)
    assert greeting.encode() not in child.output
    assert greeting not in pipe("one\n")[2]


@pytest.mark.needs("readline")
def test_a_narrow_terminal_gets_a_short_bar_and_a_prompt_whose_colour_has_no_width(talk, server):
    server.script(answer())
    child = talk(columns=20)
    assert screen(child.output, 20) == ["/help lists the comm", "msgs: 0", ">"]
    assert b"\x1b[1m> \x1b[0m" in child.output
    child.send("abcdefghijklmnopqrstuvwxyz\x01X")
    child.send("\r")
    child.expect(PROMPT)
    assert screen(child.output, 20, 50)[2:5] == ["> Xabcdefghijklmnopq", "rstuvwxyz", "Hello!"]
    assert said(server, 1) == [("user", "Xabcdefghijklmnopqrstuvwxyz")]
    leave(child)


@pytest.mark.needs("readline", "utf-8-terminal", "wide-readline")
def test_wide_characters_in_a_narrow_prompt_line_arrive_whole(talk, server):
    server.script(answer("日本語" * 5))
    child = talk(columns=20)
    enter(child, "日本語日本語日本語😀é\x01e\u0301\x05!", 20)
    leave(child)
    assert said(server, 1) == [("user", "e\u0301日本語日本語日本語😀é!")]


@pytest.mark.smoke
@pytest.mark.parametrize("model", ["a\tb" * 9, "日本" * 20, "\x1b[31mred\r\n"], ids=repr)
def test_no_model_name_makes_the_bar_wrap(talk, server, model):
    server.script(answer(model=model))
    child = talk(columns=40)
    enter(child, "one", 40)
    shown = screen(child.output, 40)
    assert "tokens: 9/3 | msgs: 2" in shown[-2] and (shown[-3], shown[-1]) == ("", ">")
    leave(child)


@pytest.mark.parametrize("changes, pattern", [({"NO_COLOR": "1"}, rb"\x1b\[[\d;]*m"), ({"TERM": "dumb"}, rb"\x1b")])
def test_nothing_is_coloured_where_colour_is_not_wanted(talk, server, changes, pattern):
    server.script(answer())
    child = talk(env=changes)
    assert enter(child, "one")[0] == "Hello!"
    leave(child)
    assert not re.search(pattern, child.output)


# -- The line editor -------------------------------------------------


@pytest.mark.needs("readline")
def test_the_keys_of_the_manual_edit_the_line(talk, server):
    server.always(answer())
    child = talk()
    for keys in ("world\x01hello \x05!", "junk\x15good", "gooddrunk" + 5 * LEFT + "\x0b", "good \x01\x05junk\x17"):
        enter(child, keys)
    enter(child, UP + UP + UP + DOWN)
    leave(child)
    contents = [said(server, count)[-1][1] for count in range(1, 6)]
    assert contents == ["hello world!", "good", "good", "good", "good"]


@pytest.mark.needs("readline")
def test_tab_completes_commands_and_file_names(talk, server, env, tmp_path):
    saved = json.dumps([{"role": role, "content": content} for role, content in TURN])
    (tmp_path / "my chat.json").write_text(saved)
    (tmp_path / "home" / "at home.json").write_text(saved)
    child = talk(cwd=str(tmp_path))
    assert "loaded 2 messages from my chat.json" in enter(child, "/lo\tmy\t")[-1]
    assert f"loaded 2 messages from {env['HOME']}/at home.json" in "".join(enter(child, "/load ~/at\t"))
    assert enter(child, "/tok\t")[-1].startswith("tokens: ")
    leave(child, "/qu\t\r")


@pytest.mark.smoke
@pytest.mark.needs("readline")
def test_history_lasts_across_sessions_and_is_private(talk, server, state):
    server.always(answer())
    for keys in ("first", UP):
        child = talk()
        enter(child, keys)
        leave(child, "\x04")
    assert [said(server, 2), stat.S_IMODE(os.stat(state + "/history").st_mode)] == [[("user", "first")], 0o600]
    assert stat.S_IMODE(os.stat(state).st_mode) == 0o700


@pytest.mark.needs("readline", "utf-8-terminal")
def test_a_history_entry_of_many_lines_comes_back_whole(talk, server):
    server.always(answer())
    child = talk()
    enter(child, f"\x1b[200~{CODE}\x1b[201~")
    leave(child, "\x04")
    child = talk()
    enter(child, UP)
    leave(child)
    assert said(server, 2) == [("user", CODE)]


@pytest.mark.needs("readline")
def test_a_history_that_cannot_be_kept_draws_one_notice(talk, server):
    server.always(answer())
    child = talk(env={"XDG_STATE_HOME": "/dev/null/state"})
    for keys in ("one", "two", UP + UP):
        enter(child, keys)
    leave(child)
    assert child.output.count(b"no history") == 1
    assert child.output.count(b"is not kept") == 1
    assert said(server, 3)[-1] == ("user", "one")


@pytest.mark.parametrize("place", ["history", "load"])
def test_a_nul_character_in_an_old_question_is_no_crash(talk, server, state, tmp_path, place):
    os.makedirs(state)
    if place == "history":
        with open(state + "/history", "w") as file:
            file.write('"a\\u0000b"\n"fine"\n')
    (tmp_path / "open.json").write_text(json.dumps([{"role": "user", "content": "a\0b"}]))
    child = talk()
    if place == "load":
        enter(child, f"/load {tmp_path}/open.json")
    leave(child)


@pytest.mark.smoke
@pytest.mark.needs("readline", "utf-8-terminal")
@pytest.mark.parametrize("changes", [{"LC_ALL": "C"}, PLAIN_C, {"LC_ALL": "C.UTF-8"}], ids=["C", "bare C", "UTF-8"])
def test_what_is_typed_is_utf8_in_every_locale(talk, server, changes):
    server.always(answer("ä 😀"))
    child = talk(env=changes)
    enter(child, "héllo 日本 😀")
    enter(child, UP)
    leave(child)
    assert [said(server, count)[-1][1] for count in (1, 2)] == ["héllo 日本 😀"] * 2


def test_a_file_name_that_the_locale_cannot_hold_is_no_crash(pipe, server, tmp_path):
    server.script(answer())
    status, out, lines = pipe("one\n/save é.json\n/load é.json\n", env=PLAIN_C, cwd=str(tmp_path))
    assert (status, out) == (0, "Hello!\n")
    assert os.listdir(os.fsencode(str(tmp_path))).count("é.json".encode()) == 1


def test_everything_else_works_without_readline(talk, server, tmp_path):
    (tmp_path / "readline.py").write_text("raise ImportError('no readline here')\n")
    server.script(answer("eins"), answer())
    child = talk(env={"PYTHONPATH": str(tmp_path)})
    assert enter(child, "one")[0] == "eins"
    interrupt(child, "/quit", PROMPT)
    child.send("two\\\r")
    child.expect(MORE)
    enter(child, "lines")
    leave(child, "\x04")
    assert said(server, 2) == TURN + [("user", "two\nlines")]


def test_libedit_serves_as_well(interpreter, talk, server):
    library = ctypes.util.find_library("edit")
    env = {"LD_PRELOAD": library or ""}
    probe = "import readline; print('libedit' in readline.__doc__)"
    if not library or subprocess.run([interpreter, "-c", probe], env=env, stdout=subprocess.PIPE).stdout != b"True\n":
        pytest.skip("libedit cannot take readline's place here")
    server.always(answer())
    child = talk(env=env)
    enter(child, "one")
    child.send(UP)
    child.expect("one")
    enter(child, "")
    child.send("/tok\t\r")
    child.expect("messages: 4")
    child.expect(PROMPT)
    leave(child)
    assert said(server, 2)[-1] == ("user", "one")
    assert b"\x01" not in child.output


# -- Messages of many lines ------------------------------------------


@pytest.mark.smoke
@pytest.mark.needs("readline", "utf-8-terminal")
@pytest.mark.parametrize("pasted", [
    CODE, CODE.replace("\n", "\r"), "/help\nis no command here", "one\n\ntwo\n"], ids=repr)
def test_a_pasted_block_is_one_message(talk, server, pasted):
    server.always(answer())
    child = talk()
    enter(child, f"\x1b[200~{' ' * (pasted[0] == '/')}{pasted}\x1b[201~")
    leave(child)
    assert (len(server.requests), said(server, 1)) == (1, [("user", pasted.replace("\r", "\n").strip())])


def test_a_backslash_continues_the_message(talk, server):
    server.script(answer())
    child = talk()
    for line in ("one\\", "two \\"):
        child.send(line + "\r")
        child.expect(MORE)
    enter(child, "three")
    leave(child)
    assert said(server, 1) == [("user", "one\ntwo \nthree")]


@pytest.mark.parametrize("variables", [("EDITOR",), ("VISUAL",)])
def test_an_editor_writes_the_message_into_a_private_file(talk, server, tmp_path, variables):
    editor = program(tmp_path / "my-ed", 'stat -c %a "$1" >"$MODE"; cat "$1" >>"$MODE"; printf "one\\ntwo é\\n" >"$1"')
    server.script(answer())
    env = {"EDITOR": "false", "MODE": str(tmp_path / "mode"), **dict.fromkeys(variables, editor)}
    child = talk(env=env)
    assert enter(child, "/edit a draft")[0] == "Hello!"
    leave(child)
    assert said(server, 1) == [("user", "one\ntwo é")]
    assert (tmp_path / "mode").read_text() == "600\na draft"


@pytest.mark.parametrize("editor", ["false", "true", "/no/such/editor", "'"])
def test_an_editor_that_fails_sends_nothing(talk, server, editor):
    child = talk(env={"EDITOR": editor})
    assert enter(child, "/edit")[0].startswith("xeroctl: error: ")
    leave(child)
    assert server.requests == []


@pytest.mark.smoke
@pytest.mark.parametrize("text, how, words", [
    ("written", "exit 1", "my-ed failed: nothing was sent: what it saved is in "), ("\\351", "", "is not UTF-8 text"),
], ids=["status 1", "Latin-1"])
def test_what_an_editor_saved_stays_where_it_is_not_sent(talk, server, tmp_path, text, how, words):
    editor = program(tmp_path / "my-ed", f'printf "{text}" >"$1"; printf %s "$1" >"$NAME"; {how}')
    child = talk(env={"EDITOR": editor, "NAME": str(tmp_path / "name"), "TMPDIR": str(tmp_path)}, columns=200)
    line = "".join(enter(child, "/edit", 200))
    name = (tmp_path / "name").read_text()
    assert name in line and words in line
    leave(child)
    with open(name, "rb") as file:
        assert file.read() == (b"written" if how else b"\xe9")


def test_what_an_editor_saved_outlives_a_signal(talk, server, tmp_path):
    editor = program(tmp_path / "my-ed", 'printf written >"$1"; printf %s "$1" >"$NAME"; echo ready; exec sleep 60')
    child = talk(env={"EDITOR": editor, "NAME": str(tmp_path / "name"), "TMPDIR": str(tmp_path)}, columns=200)
    child.send("/edit\r")
    child.expect("ready")
    child.signal(signal.SIGTERM)
    assert child.finish() == 128 + signal.SIGTERM
    name = (tmp_path / "name").read_text()
    assert f"what {editor} saved is in {name}".encode() in child.output
    with open(name) as file:
        assert file.read() == "written"


def test_ctrl_c_in_an_editor_is_the_editors_own_business(talk, server, tmp_path):
    editor = program(tmp_path / "my-ed", "trap 'echo kept >\"$1\"; exit 0' INT; echo ready; read -r line")
    server.script(answer())
    child = talk(env={"EDITOR": editor})
    child.send("/edit\r")
    child.expect("ready")
    child.send("\x03")
    child.expect(PROMPT)
    child.send("junk")
    child.expect("junk")
    interrupt(child, PROMPT)
    leave(child)
    assert said(server, 1) == [("user", "kept")]


def test_a_draft_that_the_editor_left_as_it_was_is_not_sent(talk, server):
    child = talk(env={"EDITOR": "true"})
    assert enter(child, "/edit a draft")[0].startswith("xeroctl: error: nothing was sent: true ")
    leave(child)
    assert server.requests == []


def test_a_draft_that_is_saved_unchanged_is_sent(talk, server, tmp_path):
    server.script(answer())
    child = talk(env={"EDITOR": program(tmp_path / "my-ed", 'cat "$1" >"$1.new"; mv "$1.new" "$1"')})
    assert enter(child, "/edit a draft")[0] == "Hello!"
    leave(child)
    assert said(server, 1) == [("user", "a draft")]


def test_an_editor_begins_with_the_question_that_failed_else_the_last_one(talk, server, tmp_path):
    editor = program(tmp_path / "my-ed", 'cp "$1" "$SEEN"; printf more >>"$1"')
    server.script(answer("eins"), answer("zwei"), failure(), answer())
    child = talk(env={"EDITOR": editor, "SEEN": str(tmp_path / "seen")})
    enter(child, "one")
    enter(child, "/edit")
    assert (tmp_path / "seen").read_text() == "one"
    enter(child, "three")
    enter(child, "/edit")
    assert (tmp_path / "seen").read_text() == "three"
    leave(child)
    assert [pair[1] for pair in said(server, 4)] == ["one", "eins", "onemore", "zwei", "threemore"]


def test_a_missing_temporary_folder_is_one_line(talk, server, tmp_path):
    missing = program(tmp_path / "python-tempfile-probe", "exit 0")
    child = talk(env={"EDITOR": missing, "PYTHONPATH": str(tmp_path)}, cwd=str(tmp_path))
    (tmp_path / "tempfile.py").write_text("def mkdtemp(**unused): raise FileNotFoundError(2, 'No such file', '/tmp')\n"
                                          "def mkstemp(**unused): raise FileNotFoundError(2, 'No such file', '/tmp')\n")
    assert enter(child, "/edit")[0].startswith("xeroctl: error: no temporary folder")
    leave(child)


# -- Slash commands --------------------------------------------------


@pytest.mark.smoke
def test_help_lists_every_command_and_key(pipe, xeroctl):
    status, out, lines = pipe("/help\n")
    for name in [command.name for command in xeroctl.CHAT_COMMANDS] + [
            "Up", "Down", "Tab", "Ctrl+A", "Ctrl+E", "Ctrl+U", "Ctrl+K", "Ctrl+W", "Ctrl+C", "Ctrl+D"]:
        assert any(re.search(r"(?:^|\s|,)" + re.escape(name) + r"\b", line) for line in lines), name
    assert (status, out) == (0, "")


def test_clear_keeps_the_system_message(pipe, server):
    server.always(answer("eins"))
    pipe("one\n/clear\ntwo\n", "--system", "be short")
    assert said(server, 2) == [("system", "be short"), ("user", "two")]


def test_the_system_message_is_shown_and_set(pipe, server):
    server.always(answer("eins"))
    lines = pipe("/system\none\n/system be kind\ntwo\n/system\n")[2]
    assert (lines[0], lines[-2]) == ("system: none", "system: be kind")
    assert said(server, 2) == [("system", "be kind")] + TURN + [("user", "two")]


def test_a_conversation_is_saved_without_the_key_and_loaded(pipe, server, tmp_path):
    server.always(answer("eins"))
    path = tmp_path / "my chat.json"
    status, out, lines = pipe(f"one\n/save {path}\n/clear\n/load {path}\ntwo\n/save {path}\n",
                              "--api-key", "xero_secret_key", "--system", "s")
    assert (status, out, said(server, 2)) == (0, "eins\neins\n", [("system", "s")] + TURN + [("user", "two")])
    document = json.loads(path.read_text())
    assert {**document, "saved_at": 0, "messages": len(document["messages"])} == {
        "format": "xeroctl-conversation", "version": 1, "endpoint": "my-endpoint", "model": "test-model",
        "saved_at": 0, "messages": 5}
    assert (stat.S_IMODE(path.stat().st_mode), "secret" in path.read_text()) == (0o600, False)


@pytest.mark.smoke
@pytest.mark.parametrize("content", [b"my diary\n", b"[]", b'{"messages": []}', b"\xff", b""], ids=repr)
def test_a_file_that_is_no_saved_conversation_is_not_overwritten(pipe, tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    status, out, lines = pipe(f"/save {path}\n")
    assert (status, out, path.read_bytes()) == (2, "", content)
    assert str(path) in lines[0]


@pytest.mark.parametrize("argument", ["", "/dev/null/x", "missing/x", ".", "a\0b"], ids=repr)
@pytest.mark.parametrize("name", ["/save", "/load"])
def test_a_file_name_that_does_not_work_is_one_line(pipe, tmp_path, name, argument):
    status, out, lines = pipe(f"{name} {argument}\n", cwd=str(tmp_path))
    assert (status, out, len(lines)) == (2, "", 2)
    assert lines[0].startswith("xeroctl: error: ")


def test_a_bad_file_changes_nothing_and_says_where_it_is_bad(talk, server, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps([{"role": "user", "content": "x"}, {"content": "y"}]))
    server.always(answer("eins"))
    child = talk("--system", "s", cwd=str(tmp_path))
    enter(child, "one")
    assert enter(child, "/load bad.json") == ["xeroctl: error: bad.json: messages[1]: no message: it has no role"]
    enter(child, "two")
    leave(child)
    assert said(server, 2) == [("system", "s")] + TURN + [("user", "two")]


def test_a_command_that_fails_ends_a_piped_chat_with_its_status(pipe, server, tmp_path):
    server.script(answer("eins"), failure())
    status, out, lines = pipe("one\nfails\n/load missing.json\ntwo\n", cwd=str(tmp_path))
    assert (status, out, len(server.requests)) == (5, "eins\n", 2)
    assert pipe("/load missing.json\ntwo\n", cwd=str(tmp_path))[:2] == (2, "")


def test_a_loaded_last_question_is_counted_and_asked_at_once_by_a_piped_chat(pipe, server, tmp_path):
    messages = [{"role": role, "content": content} for role, content in TURN + [("user", "two")]]
    (tmp_path / "f.json").write_text(json.dumps(messages))
    server.script(answer("zwei"), answer("drei"))
    status, out, lines = pipe("/load f.json\nthree\n", cwd=str(tmp_path))
    assert (status, out, lines[0]) == (0, "zwei\ndrei\n", "loaded 3 messages from f.json")
    assert said(server, 1) == TURN + [("user", "two")]
    assert said(server, 2) == TURN + [("user", "two"), ("assistant", "zwei"), ("user", "three")]


def test_a_loaded_last_question_is_asked_by_retry_at_a_terminal(talk, server, tmp_path):
    (tmp_path / "f.json").write_text(json.dumps([{"role": "user", "content": "one?"}]))
    server.script(answer())
    child = talk(cwd=str(tmp_path))
    assert enter(child, "/load f.json") == ["loaded 1 message from f.json",
                                            "its last question has no answer: /retry asks it"]
    assert enter(child, "/retry")[0] == "Hello!"
    leave(child)


def test_what_people_have_is_loaded_with_a_note_and_sent_as_it_is(pipe, server, tmp_path):
    messages = [
        {"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "a", "name": "ann"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "17"}, {"role": "system", "content": "be kind"}]
    (tmp_path / "f.json").write_text(json.dumps(messages))
    server.script(answer())
    status, _, lines = pipe("/load f.json\nc\n/save g.json\n", cwd=str(tmp_path))
    assert (status, server.requests[0].json["messages"]) == (0, messages + [{"role": "user", "content": "c"}])
    assert lines[1].startswith("xeroctl: note: messages[0]: the role is 'assistant' where 'user' is usual")
    assert json.loads((tmp_path / "g.json").read_text())["messages"][:6] == messages


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_only_a_regular_file_is_loaded(pipe, tmp_path, make):
    make(str(tmp_path / "f"))
    assert pipe("/load f\n", cwd=str(tmp_path))[2][0].startswith("xeroctl: error: cannot read f: ")


@pytest.mark.needs("readline")
def test_a_loaded_question_without_an_answer_is_back_with_up(talk, server, tmp_path):
    messages = [{"role": role, "content": content} for role, content in TURN + [("user", "two")]]
    (tmp_path / "f.json").write_text(json.dumps({"messages": messages}))
    server.script(answer())
    child = talk(cwd=str(tmp_path))
    enter(child, "/load f.json")
    enter(child, UP)
    leave(child)
    assert said(server, 1) == TURN + [("user", "two")]


@pytest.mark.smoke
@pytest.mark.needs("readline")
def test_a_loaded_question_that_looks_like_a_command_comes_back_with_up_as_a_message(talk, server, tmp_path):
    (tmp_path / "c.json").write_text('[{"role": "user", "content": "/etc what?"}]')
    server.script(answer())
    child = talk(cwd=str(tmp_path))
    enter(child, "/load c.json")
    assert enter(child, UP)[0] == "Hello!"
    leave(child)
    assert said(server, 1) == [("user", "/etc what?")]


def test_a_blank_system_message_is_saved_and_loaded(pipe, server, tmp_path):
    server.always(answer("eins"))
    path = tmp_path / "c.json"
    assert pipe(f"one\n/save {path}\n/load {path}\ntwo\n", "--system", " ")[0] == 0
    assert said(server, 2) == [("system", " ")] + TURN + [("user", "two")]


def test_tokens_outlive_clear_load_and_undo(pipe, server):
    server.always(answer("eins"))
    lines = pipe("one\ntwo\n/undo\n/clear\n/tokens\n")[2]
    assert lines[-2] == lines[-1] == "tokens: 18 prompt, 6 completion; messages: 0"


def test_retry_replaces_the_answer_and_keeps_the_old_one_when_it_fails(pipe, server):
    server.script(answer("eins"), failure(), answer("two"), answer("EINS"), answer())
    status, out, _ = pipe("one\n/retry\ntwo\n/undo\n/retry\nthree\n")
    assert (status, out) == (5, "eins\ntwo\nEINS\nHello!\n")
    assert said(server, 2) == [("user", "one")]
    assert said(server, 3) == TURN + [("user", "two")]
    assert said(server, 5) == [("user", "one"), ("assistant", "EINS"), ("user", "three")]


@pytest.mark.smoke
def test_a_retry_that_breaks_off_keeps_the_old_answer(pipe, server):
    server.script(answer("eins"), [stream_head(), HEL, sse({"error": "no"})], answer())
    assert pipe("one\n/retry\ntwo\n")[:2] == (5, "eins\nHel\nHello!\n")
    assert said(server, 3) == TURN + [("user", "two")]


def test_ctrl_c_in_a_retry_keeps_what_came_of_the_new_answer(talk, server):
    server.script(answer("eins"), [stream_head(), HEL, Hold()], answer())
    child = talk()
    enter(child, "one")
    child.send("/retry\r")
    child.expect("Hel")
    child.send("\x03")
    child.expect(PROMPT, timeout=5)
    enter(child, "two")
    leave(child)
    assert said(server, 3) == [("user", "one"), ("assistant", "Hel"), ("user", "two")]


@pytest.mark.parametrize("name", ["/retry", "/undo", "/edit", "/show", "/drop", "/copy", "/save", "/load"])
def test_a_command_that_has_nothing_to_work_on_is_one_line(pipe, name):
    status, out, lines = pipe(name + "\n")
    assert (status, out, len(lines)) == (2, "", 2)


@pytest.mark.parametrize("line, nearest", [
    ("/hlep", "/help"), ("/sav x", "/save"), ("/retr", "/retry"), ("/", None), ("/etc/passwd", None), ("/x", None)])
def test_an_unknown_command_is_never_sent_and_names_a_near_one(pipe, server, line, nearest):
    status, out, lines = pipe(line + "\n")
    assert (status, out, server.requests) == (2, "", [])
    assert (f"did you mean {nearest}?" in lines[0]) == bool(nearest) and "space" in lines[0]


@pytest.mark.parametrize("line", ["/quit", "/QUIT", "/exit", "/bye", "/q", "/Exit"])
def test_a_chat_is_left_by_what_people_type(pipe, server, line):
    assert pipe(line + "\none\n")[:2] == (0, "")


@pytest.mark.parametrize("line", ["/help me", "/clear all", "/tokens x", "/retry now", "/quit please"])
def test_an_argument_that_a_command_does_not_take_is_refused(pipe, line):
    status, out, lines = pipe(line + "\n")
    assert (status, out) == (2, "")
    assert f"{line.split()[0]} takes no argument" in lines[0]


def test_a_question_mark_is_help(pipe):
    assert "/help" in pipe("/?\n")[2][0]


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_a_file_name_work(pipe, server, tmp_path, quote):
    server.script(answer())
    assert pipe(f"one\n/save {quote}my chat.json{quote}\n", cwd=str(tmp_path))[0] == 0
    assert (tmp_path / "my chat.json").exists()


def test_a_leading_space_sends_a_line_that_looks_like_a_command(pipe, server):
    server.script(answer())
    assert pipe(" /etc/passwd is what?\n")[:2] == (0, "Hello!\n")
    assert said(server, 1) == [("user", "/etc/passwd is what?")]


# -- Interrupts and ends ---------------------------------------------


@pytest.mark.smoke
def test_ctrl_c_at_an_empty_prompt_says_how_to_leave(talk, server):
    child = talk()
    interrupt(child, "/quit", PROMPT)
    leave(child)


def test_ctrl_c_at_a_prompt_drops_the_line(talk, server):
    server.script(answer())
    child = talk()
    child.send("junk")
    child.expect("junk")
    interrupt(child, PROMPT)
    enter(child, "one")
    leave(child)
    assert said(server, 1) == [("user", "one")]


def test_a_ctrl_c_key_that_is_held_down_leaves_the_chat_alive(talk, server):
    server.always(answer())
    child = talk()
    enter(child, "one")
    for _ in range(200):
        child.signal(signal.SIGINT)
        select.select([], [], [], 0.001)  # no keyboard is faster
    for timeout in (2, 2, 10):  # the last one may be seen with the next key, and takes that line with it
        child.send("two\r")
        with contextlib.suppress(AssertionError) if timeout == 2 else contextlib.ExitStack():
            child.expect("Hello!", timeout)
            break
    child.expect(PROMPT)
    leave(child)
    assert said(server, 2)[-1] == ("user", "two")


def test_ctrl_c_in_a_retry_before_its_first_token_keeps_the_old_answer(talk, server):
    server.script(answer("eins"), [stream_head(), Hold()], answer())
    child = talk()
    enter(child, "one")
    child.send("/retry\r")
    server.wait_requests(2)
    interrupt(child, "stopped: the old answer stays", PROMPT)
    enter(child, "two")
    leave(child)
    assert said(server, 3) == TURN + [("user", "two")]


@pytest.mark.needs("readline")
def test_ctrl_c_before_the_first_token_takes_the_question_back(talk, server):
    server.script(answer("eins"), Hold(), answer())
    child = talk()
    enter(child, "one")
    child.send("two\r")
    server.wait_requests(2)
    child.send("\x03")
    child.expect(PROMPT, timeout=5)
    assert server.gone[1].wait(5)
    enter(child, UP)
    leave(child)
    assert said(server, 3) == TURN + [("user", "two")]


@pytest.mark.needs("readline")
def test_keys_typed_during_a_reply_wait_for_the_next_prompt(talk, server):
    gate = Event()
    server.script([stream_head(), HEL, Gate(gate), LO], answer())
    child = talk()
    child.send("one\r")
    child.expect("Hel")
    child.send("typed ahead")
    gate.set()
    child.expect(PROMPT)
    assert "Hello" in screen(child.output)
    child.expect("typed ahead")
    leave(child, "\r/quit\r")
    assert said(server, 2)[2:] == [("user", "typed ahead")]


@pytest.mark.needs("readline")
def test_ctrl_c_in_a_continued_message_leaves_its_start_in_the_history(talk, server):
    child = talk()
    child.send("one\\\r")
    child.expect(MORE)
    interrupt(child, PROMPT)
    child.send(UP)
    child.expect("one")
    child.send("\x15")
    leave(child)


def test_ctrl_c_while_a_pipe_is_answered_ends_the_chat(start, server):
    server.script([stream_head(), HEL, Hold()])
    child = start(*options(server))
    child.send(b"one\ntwo\n")
    child.expect("Hel")
    child.signal(signal.SIGINT)
    result = child.finish()
    assert (result.status, result.stdout) == (130, b"Hel\n")


@pytest.mark.smoke
@pytest.mark.needs("readline")
def test_a_signal_in_a_continued_message_leaves_its_start_in_the_history(talk, server, state):
    child = talk()
    child.send("one\\\r")
    child.expect(MORE)
    end(child, "SIGTERM")
    with open(os.path.join(state, "history")) as file:
        assert file.read() == '"one\\\\"\n'


def test_a_reader_that_goes_from_a_pipe_leaves_no_file(bash_pipe, state):
    assert bash_pipe("one\ntwo\nthree\n") == (0, b"Hello!\n", b"")
    assert not os.path.exists(state)


def test_our_own_crash_leaves_the_conversation_on_disk_and_shows_its_traceback(interpreter, server, env, tmp_path):
    server.script(answer("eins"))
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import xeroctl\n"
            "xeroctl.footer_line = None\nsys.exit(xeroctl.main())")
    words = [interpreter, "-c", code, str(XEROCTL.parent), *options(server, "--conversation", str(tmp_path / "c.json"))]
    done = subprocess.run(words, input=b"one\n", env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=20)
    assert (done.returncode, done.stdout) == (1, b"eins\n")
    assert b"Traceback" in done.stderr
    assert json.loads((tmp_path / "c.json").read_text())["messages"][1]["content"] == "eins"


def test_ctrl_c_in_a_reply_keeps_what_came(talk, server):
    server.script([stream_head(), HEL, Hold()], answer())
    child = talk()
    child.send("one\r")
    child.expect("Hel")
    child.send("\x03")
    child.expect(PROMPT, timeout=5)
    assert server.gone[0].wait(5)
    enter(child, "two")
    leave(child)
    assert said(server, 2) == [("user", "one"), ("assistant", "Hel"), ("user", "two")]


@pytest.mark.parametrize("keys", ["\x04", "/quit\r"], ids=["Ctrl+D", "/quit"])
def test_the_end_says_how_to_continue_and_prints_the_totals(talk, server, keys):
    server.script(answer())
    child = talk()
    enter(child, "one")
    leave(child, keys)
    assert screen(child.output)[-2:] == [
        "to continue: xeroctl chat --continue", "tokens: 9 prompt, 3 completion; messages: 2"]


ENDS = {"SIGTERM": 143, "SIGHUP": 129, "hangup": 129}


def end(child, how):
    """End the chat.  A signal that comes just before Python waits for a key is seen with the next one: repeat it."""
    if how == "hangup":
        child.hangup()
    while how != "hangup" and child.process.poll() is None:
        child.signal(getattr(signal, how))
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(0.5)
    assert child.finish() == ENDS[how]


@pytest.mark.parametrize("partial", [False, True], ids=["prompt", "reply"])
@pytest.mark.parametrize("how", sorted(ENDS))
def test_a_conversation_outlives_a_signal(talk, pipe, server, state, how, partial):
    server.script(answer("eins"), [stream_head(), HEL, Hold()] if partial else answer("Hel"), answer())
    child = talk()
    enter(child, "one")
    if partial:
        child.send("two\r")
        child.expect("Hel")
    else:
        enter(child, "two")
    end(child, how)
    [path] = kept(state)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert pipe(f"/load {path}\nthree\n")[0] == 0
    assert said(server, 3) == TURN + [("user", "two"), ("assistant", "Hel"), ("user", "three")]


def test_ctrl_d_ends_the_line_of_the_prompt_on_a_dumb_terminal(talk, server):
    child = talk(env={"TERM": "dumb"})
    leave(child, "\x04")
    assert screen(child.output)[-2:] == [">", "tokens: 0 prompt, 0 completion; messages: 0"]


def test_sigterm_at_the_prompt_starts_a_new_line_first(talk, server):
    child = talk()
    end(child, "SIGTERM")
    assert b"\n" in child.output.rpartition(b"> ")[2]


def test_a_conversation_that_cannot_be_kept_is_said_to_be_lost_once(talk, server):
    server.always(answer())
    child = talk(env={"XDG_STATE_HOME": "/dev/null/state"})
    enter(child, "one")
    enter(child, "two")
    leave(child)
    assert (child.output.count(b"the conversation is not kept"), b"to continue" in child.output) == (1, False)


# -- Failures --------------------------------------------------------


@pytest.mark.parametrize("script, kept", [
    ([failure()], []), ([failure("401 No")], []), ([Reset()], []), ([b"junk\r\n\r\n"], []),
    ([stream_head()], []),
    ([stream_head(), HEL, sse({"error": {"message": "bad"}})], [("user", "two"), ("assistant", "Hel")]),
    ([stream_head(), HEL], [("user", "two"), ("assistant", "Hel")]),
    ([stream_head(), sse(chunk("  ")), Reset()], []),
    ([answer("")], []),
], ids=["500", "401", "reset", "junk", "no events", "error in the stream", "cut short", "blanks", "empty"])
def test_a_failure_keeps_the_chat_alive_and_its_messages_well_formed(talk, server, script, kept):
    server.script(answer("eins"), script, answer())
    child = talk()
    enter(child, "one")
    enter(child, "two")
    assert enter(child, "three")[0] == "Hello!"
    leave(child)
    assert said(server, 3) == TURN + kept + [("user", "three")]


def test_a_resize_in_a_reply_breaks_nothing(talk, server):
    gate = Event()
    server.script([stream_head(), HEL, Gate(gate), LO], answer())
    child = talk()
    child.send("one\r")
    child.expect("Hel")
    child.resize(20, 10)
    gate.set()
    child.expect("lo")
    child.expect(PROMPT)
    assert b"\x1b[2mmsgs: 2\x1b[0m\r\n" in child.output
    child.send("x" * 30 + "\r")
    child.expect(PROMPT)
    leave(child)
    assert said(server, 2)[1:] == [("assistant", "Hello"), ("user", "x" * 30)]


# -- Pipes -----------------------------------------------------------


def test_each_line_of_a_pipe_is_a_turn_and_stdout_is_the_answers(pipe, server):
    server.script(answer("eins"), answer("zwei\n"), answer("é 😀"))
    status, out, lines = pipe("one\n\n   \ntwo\r\nthree", "--quiet")
    assert (status, out, lines) == (0, "eins\nzwei\né 😀\n", [])
    assert said(server, 3) == TURN + [("user", "two"), ("assistant", "zwei\n"), ("user", "three")]


def test_a_pipe_gets_no_bar_and_no_prompt(pipe, server):
    server.script(answer())
    status, out, lines = pipe("one\n")
    assert re.fullmatch(r"-- 3 tokens in .*\ntokens: 9 prompt, 3 completion; messages: 2", "\n".join(lines))


def test_the_first_failure_decides_the_status_once_all_lines_were_tried(pipe, server):
    server.script(failure("429 Slow"), answer("zwei"), failure(), answer("vier"))
    status, out, _ = pipe("one\ntwo\nthree\nfour\n")
    assert (status, out) == (7, "zwei\nvier\n")
    assert said(server, 4) == [("user", "two"), ("assistant", "zwei"), ("user", "four")]


@pytest.mark.smoke
def test_a_line_that_is_not_utf8_is_one_failed_turn(pipe, server):
    server.script(answer())
    status, out, lines = pipe(b"caf\xe9\ntwo\n")
    assert (status, out, said(server, 1)) == (9, "Hello!\n", [("user", "two")])
    assert "UTF-8" in lines[0]


def test_a_standard_input_that_cannot_be_read_ends_the_chat(start, server):
    descriptor = os.open(os.devnull, os.O_WRONLY)
    child = start(*options(server), stdin=descriptor)
    os.close(descriptor)
    result = child.finish()
    assert (result.status, result.stderr.count(b"cannot read standard input")) == (2, 1)


def test_a_pipe_ends_at_quit_and_leaves_no_history(pipe, server, state):
    server.script(answer())
    assert pipe("one\n/quit\ntwo\n")[:2] == (0, "Hello!\n")
    assert not os.path.exists(state)


def test_ctrl_c_while_a_pipe_is_silent_ends_the_chat(start, server):
    server.script(answer())
    child = start(*options(server))
    child.send(b"one\n")
    child.expect("Hello!\n")
    while child.process.poll() is None:  # a signal just before Python waits for a line is seen with the next one
        child.signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(0.5)
    assert child.finish().status == 130


def test_with_stdout_in_a_pipe_the_prompt_goes_to_stderr(talk, server):
    server.script(answer("eins"), answer("zwei"))
    child = talk(stdout=subprocess.PIPE)
    enter(child, "one")
    enter(child, "two")
    leave(child, "\x04")
    assert (child.stdout, said(server, 2)) == (b"eins\nzwei\n", TURN + [("user", "two")])


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_each_request_is_well_formed(talk, server, tmp_path, seed):
    dice = random.Random(seed)
    scripts = [[answer("yes")], [failure()], [Reset()], [stream_head(), HEL], [stream_head(), sse(chunk(" "))],
               [stream_head(), HEL, sse({"error": "bad"})], [answer("")], [answer("\n")]]
    lines = ["/undo", "/retry", "/clear", "/save saved.json", "/load saved.json", "/system be kind", "/system",
             "/nonsense", "/drop", "/system -", "/load 1"]
    server.script(*(dice.choice(scripts) if dice.random() < 0.6 else answer("ok") for _ in range(60)))
    child = talk(cwd=str(tmp_path), columns=200)
    for number in range(60):
        child.send((dice.choice(lines) if dice.random() < 0.5 else f"question {number}") + "\r")
        if child.expect(re.compile(rb"Write over it|" + PROMPT.pattern)).group() == b"Write over it":
            child.send("y\r")
            child.expect(PROMPT)
    leave(child)
    assert len(server.requests) > 20
    for count in range(1, len(server.requests) + 1):
        assert well_formed(said(server, count)), said(server, count)


# -- Settings between turns ------------------------------------------


def test_a_model_is_set_shown_and_unset(pipe, server):
    server.always(answer())
    lines = pipe("/model\n/model llama\none\n/model -\ntwo\n")[2]
    assert [line for line in lines if line.startswith("model")] == [
        "model: none asked for", "model: llama", "model: none asked for"]
    assert [request.json["model"] for request in server.requests] == ["llama", "my-endpoint"]


@pytest.mark.parametrize("line, field, value", [
    ("temperature 0", "temperature", 0), ("max_tokens 7", "max_tokens", 7), ("--top-p 0.5", "top_p", 0.5),
    ("SEED -3", "seed", -3), ("presence_penalty -2", "presence_penalty", -2),
    ("frequency-penalty 1.5", "frequency_penalty", 1.5)])
def test_a_sampling_option_is_set_and_unset(pipe, server, line, field, value):
    server.always(answer())
    assert pipe(f"/set {line}\none\n/set {field} -\ntwo\n")[0] == 0
    first, second = (request.json for request in server.requests)
    assert (first[field], field in second) == (value, False)


@pytest.mark.parametrize("line", ["temperature 3", "temperature x", "max_tokens 0", "max_tokens 1.5", "colour red",
                                  "temperature", "reasoning maybe", "temperature nan", "seed 1e3"])
def test_a_sampling_option_that_is_wrong_is_refused(pipe, server, line):
    status, out, lines = pipe(f"/set {line}\none\n")
    assert (status, out, server.requests) == (2, "", [])
    assert lines[0].startswith("xeroctl: error: ")


def test_set_alone_shows_every_option(pipe):
    lines = pipe("/set\n", "--temperature", "0.5", "--param", "top_k=40")[2]
    assert lines[:8] == ["max_tokens: 4096", "temperature: 0.5", "top_p: -", "frequency_penalty: -", "presence_penalty: -",
                         "seed: -", "top_k: 40", "reasoning: off"]


def test_reasoning_is_shown_once_that_is_set(pipe, server):
    server.always(stream(chunk(delta={"reasoning_content": "hm"}), chunk("Hi", finish="stop"), DONE))
    lines = pipe("one\n/set reasoning on\ntwo\n/set reasoning off\nthree\n")[2]
    assert sum("hm" in line for line in lines) == 1


def test_an_endpoint_is_set_between_turns(pipe, server):
    server.always(answer())
    lines = pipe("/endpoint\n/endpoint other\none\n")[2]
    assert (lines[:2], server.requests[0].target) == (
        ["endpoint: my-endpoint", "endpoint: other"], "/other/v1/chat/completions")


def test_another_context_gets_neither_key_nor_headers_of_the_command_line(pipe, run, server):
    with Server() as other:
        other.always(answer("from the other"))
        run("config", "add", "other", "--base-url", other.url, "--api-key", "-", "--endpoint", "theirs",
            stdin=b"key-of-the-other\n")
        server.always(answer())
        status, out, _ = pipe("one\n/context other\ntwo\n", "--api-key", "key-of-the-first", "--header", "X-Team: secret")
    assert (status, out) == (0, "Hello!\nfrom the other\n")
    [request] = other.requests
    assert (request.headers["authorization"], "x-team" in request.headers) == ("Bearer key-of-the-other", False)
    assert request.target == "/theirs/v1/chat/completions"
    assert len(request.json["messages"]) == 3


def test_a_context_that_does_not_exist_changes_nothing(talk, server):
    server.script(answer())
    child = talk()
    assert enter(child, "/context nowhere")[0].startswith("xeroctl: error: ")
    assert enter(child, "one")[0] == "Hello!"
    leave(child)


# -- Looking back ----------------------------------------------------


def test_show_shows_the_last_turns(pipe, server):
    server.script(answer("eins"), answer("zwei\nzwei"))
    lines = pipe("one\ntwo\n/show\n/show 9\n", "-q", "--system", "s")[2]
    assert lines[:11] == ["> two", "zwei", "zwei", "", "> one", "eins", "", "> two", "zwei", "zwei", ""]


@pytest.mark.parametrize("line", ["/show 0", "/show x", "/undo -1", "/drop 1.5", "/drop all"])
def test_a_count_of_turns_is_a_number(pipe, server, line):
    server.always(answer())
    status, _, lines = pipe(f"one\n{line}\n")
    assert (status, any("not a number" in line for line in lines)) == (2, True)


def test_several_turns_are_taken_back_and_the_oldest_dropped(pipe, server):
    server.always(answer("a"))
    pipe("one\ntwo\nthree\nfour\n/undo 2\n/drop\nfive\n", "--system", "s")
    assert said(server, 5) == [("system", "s"), ("user", "two"), ("assistant", "a"), ("user", "five")]


def test_a_full_context_names_drop_and_tokens_the_last_prompt(talk, server):
    server.script(answer("eins"), failure("400 Bad Request", "the request exceeds the available context size"), answer())
    child = talk()
    enter(child, "one")
    assert "last prompt: 9 tokens" in enter(child, "/tokens")
    assert any("/drop" in line for line in enter(child, "two"))
    enter(child, "/drop")
    enter(child, "/retry")
    leave(child)
    assert said(server, 3) == NEW


def test_retry_and_undo_act_on_the_question_that_failed(talk, server):
    server.script(answer("eins"), failure(), answer("zwei"), failure(), answer("drei"))
    child = talk()
    for line in ("one", "two", "/retry", "three"):
        enter(child, line)
    assert enter(child, "/undo") == ["took back: three"]
    assert enter(child, "four")[0] == "drei"
    leave(child)
    assert said(server, 3) == TURN + NEW
    assert said(server, 5) == TURN + NEW + [("assistant", "zwei"), ("user", "four")]


def test_retry_after_ctrl_c_asks_the_question_that_was_stopped(talk, server):
    server.script(answer("eins"), Hold(), answer("zwei"))
    child = talk()
    enter(child, "one")
    child.send("two\r")
    server.wait_requests(2)
    interrupt(child, "/retry asks again", PROMPT)
    assert enter(child, "/retry")[0] == "zwei"
    leave(child)
    assert said(server, 3) == TURN + NEW


@pytest.mark.parametrize("text", ["", " \n "], ids=repr)
def test_an_empty_answer_is_a_failure_and_retry_asks_again(pipe, server, text):
    server.script(answer(text), answer("zwei"))
    status, out, _ = pipe("two\n/retry\n")
    assert (status, out.strip()) == (5, "zwei")
    assert said(server, 2) == NEW


# -- Files and the clipboard -----------------------------------------


def test_attached_files_go_with_the_next_message(pipe, server, tmp_path):
    server.always(answer())
    (tmp_path / "a.log").write_text("boom\n")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    lines = pipe('/attach a.log\n/attach "b.png"\n/attach\none\ntwo\n/attach\n/save c.json\n', cwd=str(tmp_path))[2]
    assert lines[0] == "with the next message: a.log, 5 bytes"
    assert lines[3:5] == ["with the next message: a.log, 5 bytes", "with the next message: b.png, 12 bytes"]
    assert "no file waits for the next message" in lines
    text, image = server.requests[0].json["messages"][0]["content"]
    assert "one" in text["text"] and "a.log" in text["text"] and "boom" in text["text"]
    assert image["type"] == "image_url"
    assert said(server, 2)[-1] == ("user", "two")
    assert json.loads((tmp_path / "c.json").read_text())["messages"][0] == server.requests[0].json["messages"][0]


def test_files_of_the_command_line_go_with_the_first_message(pipe, server, tmp_path):
    server.always(answer())
    (tmp_path / "a.log").write_text("boom\n")
    pipe("one\ntwo\n", "-a", "a.log", cwd=str(tmp_path))
    assert "boom" in said(server, 1)[0][1] and said(server, 2)[-1] == ("user", "two")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_only_a_regular_file_is_attached_in_a_chat(pipe, tmp_path, make):
    make(str(tmp_path / "f"))
    status, _, lines = pipe("/attach f\n", cwd=str(tmp_path))
    assert (status, lines[0]) == (9, "xeroctl: error: cannot read f: it is not a regular file")


def test_a_file_that_cannot_be_attached_ends_a_piped_chat_with_status_9(pipe, server, tmp_path):
    assert pipe("/attach missing.log\none\n", cwd=str(tmp_path))[:2] == (9, "")


@pytest.mark.parametrize("line, text", [("/copy", "See:\n```py\nx = 1\n```\nand\n```\ny é\n```\n"), ("/copy code", "y é")])
@pytest.mark.parametrize("tmux", [False, True])
def test_the_last_answer_is_copied_to_the_clipboard_of_the_terminal(talk, server, line, text, tmux):
    server.script(answer("See:\n```py\nx = 1\n```\nand\n```\ny é\n```\n"))
    child = talk(env={"TMUX": "x"} if tmux else None)
    enter(child, "one")
    child.send(line + "\r")
    child.expect("copied ")
    [data] = re.findall(rb"\n?(?<!\x1b)\x1b\]52;c;([A-Za-z0-9+/=]*)\x07", child.output)
    assert base64.b64decode(data).decode().rstrip("\n") == text.rstrip("\n")
    assert (b"\x1bPtmux;\x1b\x1b]52;c;" + data + b"\x07\x1b\\" in child.output) == tmux
    child.expect(PROMPT)
    leave(child)


@pytest.mark.parametrize("reply, line, words", [
    ("no code", "/copy code", "no code block"), ("x" * 74001, "/copy", "too much"), ("a", "/copy all", "/copy takes")])
def test_what_cannot_be_copied_is_one_line(talk, server, reply, line, words):
    server.script(answer(reply))
    child = talk()
    enter(child, "one")
    child.send(line + "\r")
    child.expect(words)
    child.expect(PROMPT)
    leave(child)
    assert b"]52;" not in child.output


def test_a_blank_line_stands_between_turns(talk, server):
    server.always(answer())
    child = talk()
    enter(child, "one")
    enter(child, "/tokens")
    enter(child, "two")
    leave(child)
    shown = screen(child.output, 80, 40)
    assert [shown[index - 1] == "" for index, line in enumerate(shown) if line.startswith("endpoint")] == [
        False, True, False, True]


@pytest.mark.needs("readline")
def test_a_line_that_begins_with_a_blank_is_recalled_and_not_kept(talk, server, state):
    server.always(answer())
    child = talk()
    for line in (" secret", "one", "one"):
        enter(child, line)
    enter(child, UP + UP)
    leave(child)
    assert said(server, 4)[-1] == ("user", " secret")
    with open(os.path.join(state, "history")) as file:
        assert file.read() == '"one"\n"/quit"\n'


def test_a_history_that_is_no_regular_file_is_left_alone_with_a_note(talk, server, state):
    server.always(answer())
    os.makedirs(os.path.join(state, "history"))
    child = talk()
    enter(child, "one")
    enter(child, "two")
    leave(child)
    assert child.output.count(b"is not a regular file") == 1
