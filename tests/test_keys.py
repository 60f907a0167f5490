"""Keys at a real terminal that reach past the line: Ctrl+Z, Ctrl+backslash, pasting during a reply, completion."""

import contextlib
import os
import re
import shutil
from threading import Event

import pytest

from conftest import changed
from loopback import Gate, Hold, json_response, stream_head
from terminal import Terminal, screen
from test_interactive import CODE, HEL, LO, MORE, PROMPT, answer, enter, leave, options, said
from test_interactive import talk  # noqa: F401 (a fixture)

SHELL = "$ "
MODES = re.compile(rb"(-?icanon)\b.*?(-?echo)\b", re.DOTALL)


@pytest.fixture
def shell(command, server, env, interpreter):
    """Start a chat from an interactive shell at a terminal, and wait for its first prompt."""
    started = []

    def shell(words, *more, **changes):
        words = [shutil.which(words[0]) or pytest.skip(f"no {words[0]}"), *words[1:]]
        variables = {"PS1": SHELL, "ENV": "", "HISTFILE": "", **changes}
        child = Terminal(words, changed(env, variables))
        started.append(child)
        child.expect(SHELL)
        child.send(" ".join([*command([]), *options(server, *more)]) + "\r")
        child.expect(PROMPT)
        return child

    yield shell
    for child in started:
        child.kill()


SHELLS = pytest.mark.parametrize("words", [["bash", "--norc", "--noprofile", "-i"], ["dash", "-i"]], ids=["bash", "dash"])


def modes(child):
    """Return the modes of the terminal as its shell sees them."""
    child.send("stty -a\r")
    found = [mode.decode() for mode in child.expect(MODES).groups()]
    child.expect(SHELL)
    return found


def stop(child):
    """Press Ctrl+Z until the shell says that the chat stopped: one just before a wait for a key is seen with the next."""
    for timeout in (1, 1, 10):
        child.send("\x1a")
        with contextlib.suppress(AssertionError) if timeout == 1 else contextlib.ExitStack():
            child.expect("topped", timeout)
            child.expect(SHELL)
            return


# -- Ctrl+Z ----------------------------------------------------------


@SHELLS
@pytest.mark.needs("readline")
def test_ctrl_z_at_the_prompt_leaves_the_shell_as_it_was_and_comes_back_with_the_line(shell, server, words):
    server.script(answer(), answer())
    child = shell(words)
    enter(child, "one")
    child.send("half ty")
    child.expect("half ty")
    stop(child)
    if words[0] == "dash":  # bash sets the modes itself
        assert modes(child) == ["icanon", "echo"]
        assert child.output.rfind(b"\x1b[?2004l") > child.output.rfind(b"half ty")
    child.send("fg\r")
    child.expect(PROMPT)
    child.expect("half ty")
    assert enter(child, "ped")[0] == "Hello!"
    assert said(server, 2)[-1] == ("user", "half typed")
    child.send("/quit\r")
    child.expect(SHELL)


@SHELLS
@pytest.mark.smoke
def test_ctrl_z_in_a_reply_stops_and_comes_back_to_it(shell, server, words):
    gate = Event()
    server.script([stream_head(), HEL, Gate(gate), LO], answer())
    child = shell(words)
    child.send("one\r")
    child.expect("Hel")
    stop(child)
    if words[0] == "dash":
        assert modes(child) == ["icanon", "echo"]
    gate.set()
    child.send("fg\r")
    child.expect("lo")
    child.expect(PROMPT)
    assert enter(child, "two")[0] == "Hello!"
    child.send("/quit\r")
    child.expect(SHELL)


@pytest.mark.needs("readline")
@pytest.mark.parametrize("where", ["prompt", "reply"])
def test_ctrl_backslash_leaves_the_terminal_as_it_was(shell, server, where):
    server.script([stream_head(), HEL, Hold()])
    child = shell(["dash", "-i"])
    if where == "reply":
        child.send("one\r")
        child.expect("Hel")
    child.send("\x1c")
    child.expect(SHELL)
    assert modes(child) == ["icanon", "echo"]
    assert child.output.rfind(b"\x1b[?2004l") > child.output.rfind(b"\x1b[?2004h")


def test_ctrl_c_and_the_end_leave_the_terminal_as_it_was(shell, server):
    server.script([stream_head(), HEL, Hold()])
    child = shell(["dash", "-i"])
    child.send("one\r")
    child.expect("Hel")
    child.send("\x03")
    child.expect(PROMPT)
    child.send("/quit\r")
    child.expect(SHELL)
    assert modes(child) == ["icanon", "echo"]


# -- Typed and pasted during a reply ---------------------------------


@pytest.mark.smoke
@pytest.mark.needs("readline", "utf-8-terminal")
def test_a_block_that_is_pasted_during_a_reply_is_one_message(talk, server):
    gate = Event()
    server.script([stream_head(), HEL, Gate(gate), LO], answer())
    child = talk()
    child.send("one\r")
    child.expect("Hel")
    assert child.output.rfind(b"\x1b[?2004h") > child.output.rfind(b"\x1b[?2004l")
    child.send(f"\x1b[200~{CODE}\x1b[201~")
    gate.set()
    child.expect(PROMPT)
    assert "Hello" in screen(child.output)
    child.expect("print(f())")
    enter(child, "")
    leave(child)
    assert said(server, 2)[-1] == ("user", CODE)
    assert len(server.requests) == 2


@pytest.mark.needs("readline")
@pytest.mark.parametrize("when", ["during a reply", "at the prompt"])
def test_a_line_of_6000_characters_is_whole(talk, server, when):
    gate = Event()
    server.script([stream_head(), HEL, Gate(gate), LO], answer())
    line = "".join(f"{number:06}" for number in range(1000))
    child = talk()
    child.send("one\r")
    child.expect("Hel")
    if when == "during a reply":
        child.send(line[:4000])  # as much as a terminal holds
    gate.set()
    child.expect(PROMPT)
    child.send(line[4000 if when == "during a reply" else 0:])
    child.send("\r")
    child.expect("Hello!")
    child.expect(PROMPT)
    leave(child)
    assert said(server, 2)[-1] == ("user", line)


@pytest.mark.needs("readline")
def test_a_tab_in_pasted_text_never_completes(talk, server):
    server.always(answer())
    child = talk()
    enter(child, "\x1b[200~/he\tx\x1b[201~\x01 ")
    child.send("a\tb\r")
    child.expect(PROMPT)
    leave(child)
    assert [said(server, count)[-1][1] for count in (1, 2)] == ["/he\tx", "a\tb"]


def test_without_readline_a_line_that_the_terminal_cuts_is_refused(talk, server, tmp_path):
    (tmp_path / "readline.py").write_text("raise ImportError('no readline here')\n")
    child = talk(env={"PYTHONPATH": str(tmp_path)})
    assert "cut the line" in "".join(enter(child, "x" * 5000))
    leave(child)
    assert server.requests == []


@pytest.mark.needs("readline")
def test_what_is_typed_during_a_reply_is_not_shown_twice(talk, server):
    gate = Event()
    server.script([stream_head(), HEL, Gate(gate), LO], answer())
    child = talk()
    child.send("one\r")
    child.expect("Hel")
    child.send("/tokens\r")
    gate.set()
    child.expect(PROMPT)
    child.expect("messages: 2")
    child.expect(PROMPT)
    leave(child)
    assert child.output.count(b"/tokens") == 1


# -- Ends ------------------------------------------------------------


@pytest.mark.smoke
def test_ctrl_d_on_a_continuation_line_ends_that_line(talk, server):
    server.script(answer())
    child = talk()
    child.send("one\\\r")
    child.expect(MORE)
    child.send("\x04")
    child.expect("Hello!")
    child.expect(PROMPT)
    leave(child)
    assert said(server, 1) == [("user", "one")]


@pytest.mark.needs("readline")  # without it the prompt is written to stderr
def test_a_closed_stderr_is_no_reason_to_end(terminal, server):
    server.always(answer())
    reader, writer = os.pipe()
    child = terminal(*options(server), stderr=writer)
    os.close(reader)
    os.close(writer)
    child.expect("> ")
    child.send("one\r")
    child.expect("Hello!")
    child.expect("> ")
    leave(child, "\x04")


# -- Completion ------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.needs("readline")
def test_candidates_are_shown_as_words(talk, server, tmp_path):
    for name in ("one.json", "only.json"):
        (tmp_path / name).write_text("[]")
    child = talk(cwd=str(tmp_path))
    child.send("/load o\t\t\t")
    child.expect(re.compile(r"\none\.json +only\.json"))
    child.expect("/load on")
    child.send("ly\t\r")
    child.expect("loaded 0 messages from only.json")
    child.expect(PROMPT)
    leave(child)


@pytest.mark.needs("readline")
def test_models_are_asked_for_once(talk, server):
    server.script(json_response({"data": [{"id": "llama-3"}, {"id": "qwen"}]}), answer())
    child = talk()
    assert enter(child, "/model l\t")[-1] == "model: llama-3"
    assert enter(child, "/model q\t")[-1] == "model: qwen"
    enter(child, "one")
    leave(child)
    assert (server.requests[0].target, server.requests[1].json["model"]) == ("/my-endpoint/v1/models", "qwen")


@pytest.mark.needs("readline")
@pytest.mark.parametrize("script", [Hold(), json_response({}, "404 Not Found")], ids=["silent", "404"])
def test_a_server_that_names_no_models_holds_nothing_up(talk, server, script):
    server.script(script)
    child = talk()
    child.send("/model l\tx\r")
    child.expect("model: lx", timeout=5)
    child.expect(PROMPT)
    leave(child)


@pytest.mark.needs("readline")
def test_ctrl_c_while_models_are_asked_for_is_not_lost(talk, server):
    server.script(Hold())
    child = talk()
    child.send("/model l\t")
    server.wait_requests(1)
    child.send("\x03")
    child.expect(PROMPT, timeout=5)
    leave(child)


@pytest.mark.needs("readline")
def test_deployments_and_options_are_candidates(talk, run, server, env):
    for name in ("prod", "staging"):
        run("config", "add", name, "--base-url", "https://example.com", "--api-key", "-", stdin=b"key-of-a-deployment\n")
    child = talk()
    child.send("/context st\t")
    child.expect("aging")
    child.send("\x15/set temp\t")
    child.expect("temperature ")
    enter(child, "0.5")
    leave(child)
    assert b"temperature: 0.5" in child.output
