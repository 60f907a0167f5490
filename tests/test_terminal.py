"""What a terminal shows: the spinner, the footer, escape sequences made harmless; what a pipe gets instead."""

import re
import select
import subprocess
import threading
from threading import Event

import pytest

from conftest import XEROCTL
from loopback import (DONE, USAGE, Call, Gate, Hold, Reset, chunk, completion, json_response, sse, stream, stream_head)
from terminal import Terminal, screen

HELLO = json_response(completion())
HEL = sse(chunk("Hel"))
LO = sse(chunk("lo", finish="stop"), chunk(usage=USAGE, choices=[]), DONE)
REASONING = sse(chunk(delta={"reasoning_content": "Hm"}))
FOOTER = r"-- 3 tokens in \d+\.\ds \(\d+\.\d tok/s\)"
NASTY = "a\x1b[31mb\x1b]0;t\x07c\rd\x9b2Je\x7ff\tg\x00h\u202ei\nj"
HARMLESS = "a\u241b[31mb\u241b]0;t\u2407cd\ufffd2Je\u2421f\tg\u2400h\ufffdi\nj"


def ask(server, *options):
    return ("chat", "--endpoint", "my-endpoint", "--base-url", server.url + "/v1", "-m", "Hi", *options)


def moment(sock):
    """Say nothing for long enough that a spinner would be drawn."""
    select.select([sock], [], [], 0.4)


def frame(label):
    """Return the pattern of one drawing of the spinner."""
    return re.compile(r"\r[-|/\\] " + label)


# -- Spinner ---------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("options, answer", [((), [HELLO]), (("--stream", "--quiet"), [])], ids=["whole", "quiet"])
def test_an_answer_is_all_that_is_left_on_the_screen(terminal, server, options, answer):
    server.script(answer or [stream_head(), Call(moment), HEL, LO])
    child = terminal(*ask(server, *options))
    assert child.finish() == 0
    assert screen(child.output) == ["Hello!" if answer else "Hello"]


def test_the_spinner_counts_seconds_and_leaves_no_trace(terminal, server):
    gate = Event()
    server.script([Gate(gate), HELLO])
    child = terminal(*ask(server))
    child.expect(frame("waiting 0s\x1b"))
    child.expect(frame("waiting 1s\x1b"))
    assert screen(child.output)[0][2:] in ("waiting 0s", "waiting 1s")
    gate.set()
    assert child.finish() == 0
    assert screen(child.output) == ["Hello!"]
    assert child.output.endswith(b"\r\x1b[KHello!\r\n")


def test_the_spinner_is_gone_before_the_first_text(terminal, server):
    gate = Event()
    server.script([stream_head(), Call(moment), HEL, Gate(gate), LO])
    child = terminal(*ask(server, "--stream"))
    child.expect(frame("waiting"))
    child.expect("\r\x1b[KHel")
    assert screen(child.output) == ["Hel"]
    gate.set()
    assert child.finish() == 0
    assert re.fullmatch("Hello\n" + FOOTER, "\n".join(screen(child.output)))


@pytest.mark.smoke
def test_the_spinner_says_thinking_and_hides_the_thoughts(terminal, server):
    gate = Event()
    server.script([stream_head(), REASONING, Gate(gate), HEL, LO])
    child = terminal(*ask(server, "--stream"))
    child.expect(frame("thinking"))
    gate.set()
    assert child.finish() == 0
    assert re.fullmatch("Hello\n" + FOOTER, "\n".join(screen(child.output)))
    assert b"Hm" not in child.output


@pytest.mark.smoke
def test_a_connection_lost_while_thinking_is_not_retried(terminal, server):
    gate = Event()
    server.script([stream_head(), REASONING, Gate(gate), Reset()])
    child = terminal(*ask(server, "--stream"), columns=100)
    child.expect(frame("thinking"))
    gate.set()
    assert child.finish() == 8
    assert screen(child.output, columns=100) == [
        f"xeroctl: error: the reply was cut short: 127.0.0.1:{server.port} closed the connection"]


def test_the_spinner_counts_down_to_a_retry(terminal, server):
    server.script(json_response({}, "503 Busy", {"Retry-After": "1"}), HELLO)
    child = terminal(*ask(server))
    child.expect(frame("HTTP 503, trying again in 1s"))
    child.expect(frame("HTTP 503, trying again now"))
    assert child.finish() == 0
    assert screen(child.output) == ["Hello!"]


def test_an_error_stands_alone_after_the_spinner(terminal, server):
    server.script([Call(moment), json_response({"error": {"message": "no such model"}}, "400 Bad Request")])
    child = terminal(*ask(server))
    child.expect(frame("waiting"))
    assert child.finish() == 4
    assert screen(child.output) == ["xeroctl: error: HTTP 400: no such model"]


@pytest.mark.parametrize("columns", [20, 1])
def test_the_spinner_fits_a_narrow_terminal(terminal, server, columns):
    server.script(json_response({}, "503 Busy", {"Retry-After": "1"}), [Call(moment), json_response(completion("Hi"))])
    child = terminal(*ask(server), columns=columns)
    assert child.finish() == 0
    drawn = re.findall(rb"\r([^\r\n\x1b]*)\x1b\[K", child.output)
    assert max(map(len, drawn)) == min(columns - 1, 28)
    assert "".join(screen(child.output, columns=columns)) == "Hi"


@pytest.mark.needs("utf-8-terminal")
def test_a_server_cannot_drive_the_terminal_through_the_spinner(terminal, server):
    code = "日本" * 30 + "\x1b]0;t\x07\x1b[2J\nline"
    server.script(json_response({"error": {"message": "no", "code": code}}, "503 Busy", {"Retry-After": "1"}), HELLO)
    child = terminal(*ask(server, "--retries", "1"), columns=40)
    assert child.finish() == 0
    assert screen(child.output, columns=40) == ["Hello!"]
    assert b"\x1b]" not in child.output and b"\x1b[2J" not in child.output


def test_a_spinner_that_was_kept_from_its_start_can_be_stopped(xeroctl, monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    spinner = xeroctl.Spinner(None, "waiting")
    monkeypatch.setattr(threading.Thread, "start", start)
    spinner.start()
    spinner.stop()


@pytest.mark.parametrize("options", [(), ("--plain",)], ids=["styled", "plain"])
def test_one_spinner_is_drawn_and_never_over_the_answer(terminal, server, options):
    gates = [Event(), Event(), Event()]
    server.script(json_response({}, "503 Busy", {"Retry-After": "1"}),
                  [stream_head(), Call(moment), sse(chunk("# Ti")), Gate(gates[0]), Call(moment), sse(chunk("tle\n**He")),
                   Gate(gates[1]), Call(moment), sse(chunk("llo** y")), Gate(gates[2]), Call(moment),
                   sse(chunk("ou", finish="stop"), chunk(usage=USAGE, choices=[]), DONE)])
    child = terminal(*ask(server, "--stream", *options))
    child.expect(frame("HTTP 503, trying again in 1s"))
    child.expect(frame("waiting"))
    for text, lines, gate in (("Ti", ["# Ti"], gates[0]), ("He", ["# Title", "**He"], gates[1]), (" y", ["# Title", "**Hello** y"], gates[2])):
        child.expect(text)
        assert screen(child.output) == lines
        gate.set()
    assert child.finish() == 0
    before, answer = child.output.decode().split("# Ti", 1)
    assert not re.search(frame(""), answer) and "\r\x1b[K" not in answer
    assert before.count("\r\x1b[K") in (2, 3) and re.search("\r\x1b\\[K(\x1b\\[1m)?$", before)
    assert screen(child.output)[:2] == ["# Title", "**Hello** you"]
    assert re.fullmatch(FOOTER, screen(child.output)[2])


@pytest.mark.smoke
def test_ctrl_c_leaves_no_spinner(terminal, server):
    server.script([Hold()])
    child = terminal(*ask(server))
    child.expect(frame("waiting"))
    child.send("\x03")
    assert child.finish() == 130
    assert screen(child.output) in ([], ["^C"])


@pytest.mark.parametrize("changes, options", [
    ({"NO_COLOR": "1"}, ()), ({"NO_COLOR": "0"}, ()), ({"TERM": "dumb"}, ()), ({"TERM": None}, ()), ({}, ("--quiet",)),
], ids=repr)
def test_there_is_no_spinner_where_it_is_not_wanted(terminal, server, changes, options):
    server.script([Call(moment), HELLO])
    child = terminal(*ask(server, *options), env=changes)
    assert (child.finish(), child.output) == (0, b"Hello!\r\n")


@pytest.mark.smoke
def test_without_a_spinner_a_retry_is_a_line(terminal, server):
    server.script(json_response({}, "503 Busy", {"Retry-After": "0"}), HELLO)
    child = terminal(*ask(server), env={"NO_COLOR": "1"})
    assert (child.finish(), child.output) == (
        0, b"xeroctl: note: HTTP 503, trying again in 0.1 s\r\nHello!\r\n")


def test_a_background_job_draws_no_spinner(interpreter, env, server):
    server.script([Call(moment), HELLO])
    line = ["bash", "-c", 'set -m; "$@" & set +m; wait $!', "bash", interpreter, str(XEROCTL), *ask(server)]
    with Terminal(line, env) as child:
        assert (child.finish(), child.output) == (0, b"Hello!\r\n")


# -- stdout and stderr apart -----------------------------------------


@pytest.mark.parametrize("changes, footer", [
    ({}, "\x1b[2m{}\x1b[0m"), ({"NO_COLOR": "1"}, "{}"), ({"TERM": "dumb"}, "{}"),
], ids=repr)
def test_the_footer_is_dim_where_there_is_colour(terminal, server, changes, footer):
    server.script([stream_head(), HEL, LO])
    child = terminal(*ask(server, "--stream"), env=changes)
    assert child.finish() == 0
    start, end = map(re.escape, footer.split("{}"))
    assert re.search(f"Hello\r\n{start}{FOOTER}{end}\r\n".encode() + rb"\Z", child.output)


@pytest.mark.smoke
def test_a_pipe_gets_a_plain_footer(run, server):
    server.script([stream_head(), Call(moment), HEL, LO])
    result = run(*ask(server, "--stream"))
    assert (result.status, result.stdout) == (0, b"Hello\n")
    assert re.fullmatch(FOOTER + "\n", result.stderr.decode())


def test_stdout_in_a_pipe_is_unchanged_though_stderr_is_a_terminal(terminal, server):
    server.script([stream_head(), Call(moment), sse(chunk(NASTY)), LO])
    child = terminal(*ask(server, "--stream"), stdout=subprocess.PIPE)
    assert (child.finish(), child.stdout) == (0, (NASTY + "lo\n").encode())
    assert re.search(frame("waiting").pattern.encode(), child.output)
    assert re.fullmatch(FOOTER, "\n".join(screen(child.output)))


@pytest.mark.needs("utf-8-terminal")
def test_stderr_in_a_pipe_is_plain_though_stdout_is_a_terminal(terminal, server):
    server.script([stream_head(), Call(moment), sse(chunk(NASTY)), LO])
    child = terminal(*ask(server, "--stream"), stderr=subprocess.PIPE)
    assert (child.finish(), child.output.decode()) == (0, (HARMLESS + "lo\n").replace("\n", "\r\n"))
    assert re.fullmatch(FOOTER + "\n", child.stderr.decode())


# -- Text that would drive the terminal ------------------------------


@pytest.mark.smoke
@pytest.mark.needs("utf-8-terminal")
@pytest.mark.parametrize("options, answer", [
    ((), json_response(completion(NASTY))),
    (("--stream",), stream(*[chunk(character) for character in NASTY], chunk(finish="stop"), DONE)),
], ids=["whole", "a character a chunk"])
def test_an_answer_cannot_drive_the_terminal(terminal, server, options, answer):
    server.script(answer)
    child = terminal(*ask(server, *options), stderr=subprocess.PIPE)
    assert (child.finish(), child.output.decode()) == (0, (HARMLESS + "\n").replace("\n", "\r\n"))


def test_a_pipe_gets_the_text_unchanged(run, server):
    server.script(json_response(completion(NASTY)))
    assert run(*ask(server)) == (0, (NASTY + "\n").encode(), b"")


@pytest.mark.needs("utf-8-terminal")
@pytest.mark.parametrize("answer", [
    json_response(completion("x", id=NASTY, model=NASTY)),
    json_response({"error": {"message": NASTY, "code": NASTY}}, "404 Not Found"),
    json_response({}, "404 \x1b[31mNot", {"X-Request-ID": "r\x1b[31m\x9b1"}),
    stream(chunk("x", finish="\x1b[31m"), {"error": NASTY}),
], ids=["id", "error", "headers", "finish reason"])
def test_nothing_else_that_a_server_sends_drives_the_terminal(terminal, server, answer):
    server.script(answer)
    child = terminal(*ask(server, "--show-usage", "--verbose"))
    child.finish()
    text = re.sub(r"\x1b\[(2m|31m|0m|K)", "", child.output.decode())
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", text)
    assert "\u241b" in text


def test_json_on_a_terminal_is_harmless_too(terminal, server):
    server.script(json_response(completion(NASTY)))
    child = terminal(*ask(server, "-o", "json"), stderr=subprocess.PIPE)
    assert child.finish() == 0
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]", child.output.decode())


@pytest.mark.needs("python-variables", "utf-8-terminal")
def test_a_terminal_that_cannot_show_a_character_gets_another(terminal, server):
    server.script(json_response(completion("héllo 😀")))
    child = terminal(*ask(server), env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
                     stderr=subprocess.PIPE)
    assert (child.finish(), child.output) == (0, b"h?llo ?\r\n")


def test_a_question_is_not_waited_for_at_a_terminal(terminal):
    child = terminal("chat", "--endpoint", "e", "--base-url", "http://127.0.0.1:1/v1")
    assert (child.finish(), child.output) == (
        2, b"xeroctl: \x1b[31merror\x1b[0m: no message: give -m TEXT, or pipe one in\r\n")


def test_a_typed_question_is_read_on_request(terminal, server):
    server.script(HELLO)
    child = terminal("chat", "--endpoint", "e", "--base-url", server.url + "/v1", "-m", "-", stdout=subprocess.PIPE)
    child.send("How are you?\n\x04")
    assert (child.finish(), child.stdout) == (0, b"Hello!\n")
    assert server.requests[0].json["messages"][0]["content"] == "How are you?"


# -- Markdown --------------------------------------------------------

ANSWER = "# Title\n\nSome **strong** words that go on beyond the edge.\n\n- an item that does not fit into one line\n\n```py\nx = '*'\n```\n"
WRAPPED = ["# Title", "", "Some **strong** words that go on beyond", "the edge.", "",
           "- an item that does not fit into one", "  line", "", "```py", "x = '*'", "```"]


def answers(text):
    """Return an answer that is whole and one that is streamed, both *text*."""
    pieces = [chunk(text[start:start + 3]) for start in range(0, len(text), 3)]
    return json_response(completion(text)), stream(*pieces, chunk(finish="stop"), DONE)


@pytest.mark.smoke
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("changes, styles", [({}, {"1", "36", "0"}), ({"NO_COLOR": "1"}, set())], ids=["styled", "NO_COLOR"])
def test_a_terminal_gets_styled_markdown_wrapped_at_words(terminal, server, changes, styles, streamed):
    server.script(answers(ANSWER)[streamed])
    child = terminal(*ask(server, "--quiet", *["--stream"] * streamed), env=changes, columns=40)
    assert child.finish() == 0
    assert screen(child.output, columns=40) == WRAPPED
    assert set(re.findall(r"\x1b\[(.*?)m", child.output.decode())) == styles


@pytest.mark.parametrize("changes, options", [({"TERM": "dumb"}, ()), ({"TERM": None}, ()), ({}, ("--plain",)), ({"NO_COLOR": "1"}, ("--plain",))],
                         ids=repr)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_plain_terminal_gets_the_text_as_it_is(terminal, server, changes, options, streamed):
    server.script(answers(ANSWER)[streamed])
    child = terminal(*ask(server, "--quiet", *["--stream"] * streamed, *options), env=changes, columns=40)
    assert (child.finish(), child.output.decode()) == (0, ANSWER.replace("\n", "\r\n"))


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_pipe_gets_markdown_as_it_is(run, server, streamed):
    server.script(answers(ANSWER)[streamed])
    assert run(*ask(server, "--quiet", *["--stream"] * streamed)) == (0, ANSWER.encode(), b"")


def test_a_window_that_changes_during_a_reply_wraps_the_rest(terminal, server):
    gate = Event()
    server.script([stream_head(), sse(chunk("one two three four five six ")), Gate(gate),
                   sse(chunk("seven eight nine ten", finish="stop"), DONE)])
    child = terminal(*ask(server, "--stream", "--quiet"), columns=40)
    child.expect("six")
    child.resize(20, 24)
    gate.set()
    assert child.finish() == 0
    assert child.output.decode() == "one two three four five six \r\nseven eight nine \r\nten\r\n"


def test_an_interrupt_leaves_no_style(terminal, server):
    server.script([stream_head(), sse(chunk("**strong")), Hold()])
    child = terminal(*ask(server, "--stream"))
    child.expect("strong")
    child.send("\x03")
    assert child.finish() == 130
    assert b"\x1b[1m**strong\x1b[0m" in child.output
    assert child.output.count(b"\x1b[1m") == 1


# -- Reasoning -------------------------------------------------------

THOUGHT = "<think>\nHm, so.\n</think>\n\nYes"


@pytest.mark.smoke
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_what_is_inside_think_is_dim_on_a_terminal(terminal, server, streamed):
    server.script(answers(THOUGHT)[streamed])
    child = terminal(*ask(server, "--quiet", *["--stream"] * streamed))
    assert child.finish() == 0
    assert screen(child.output) == ["<think>", "Hm, so.", "</think>", "", "Yes"]
    dim = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", child.output.decode(), re.DOTALL))
    assert "".join(dim.split()) == "<think>Hm,so.</think>"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_pipe_gets_what_is_inside_think(run, server, streamed):
    server.script(answers(THOUGHT)[streamed])
    assert run(*ask(server, "--quiet", *["--stream"] * streamed)) == (0, (THOUGHT + "\n").encode(), b"")


@pytest.mark.parametrize("answer", [
    answers(THOUGHT)[0], answers(THOUGHT)[1], stream(chunk(delta={"reasoning_content": "Hm, "}), chunk(delta={"reasoning": "so."}), chunk("Yes", "stop"), DONE),
    json_response(completion("Yes", message={"reasoning_content": "Hm, so."})),
], ids=["whole", "streamed", "fields", "a field"])
def test_reasoning_is_shown_on_stderr_on_request(run, terminal, server, answer):
    server.script(answer, answer)
    options = ("--quiet", "--show-reasoning", *["--stream"] * (b"event-stream" in answer))
    assert run(*ask(server, *options)) == (0, b"Yes\n", b"Hm, so.\n")
    child = terminal(*ask(server, *options), stdout=subprocess.PIPE)
    assert (child.finish(), child.stdout) == (0, b"Yes\n")
    assert screen(child.output) == ["Hm, so."] and b"\x1b[2mHm" in child.output
