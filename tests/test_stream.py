"""`xeroctl chat --stream`: text as it comes, the line after it, and streams of every shape."""

import contextlib
import json
import os
import re
import threading
import time

import pytest

from loopback import DONE, USAGE, Gate, Hold, Reset, Server, as_json, chunk, completion, head, http_chunk, json_response, sse, stream, stream_head

CUT = b"xeroctl: error: the reply was cut short: the stream ended before its end\n"
NO_REASON = b"xeroctl: note: the server gave no reason for the end: the answer may be incomplete\n"
FOOTER = re.compile(rb"-- (~?)(\d+) tokens in (\d+\.\d)s \((~?)(\d+\.\d) tok/s\)\n")
ROLE, HEL, LO, STOP = chunk(delta={"role": "assistant"}), chunk("Hel"), chunk("lo"), chunk(finish="stop")


def usage_chunk(usage=USAGE):
    return {**chunk(), "choices": [], "usage": usage}


@pytest.fixture
def quiet(chat, server):
    """Stream *reply*, steps of a script, quietly, and return the Result."""

    def quiet(*reply, options=("--quiet",)):
        server.script(list(reply))
        return chat("-m", "hi", "--stream", "--retries", "0", *options)

    return quiet


@pytest.fixture
def begin(start, server):
    """Start a stream that stays in the test's hands."""

    def begin(*options):
        return start("chat", "--endpoint", "e", "--base-url", server.url + "/v1", "-m", "hi", "--stream", *options)

    return begin


# -- As it comes -----------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
def test_text_is_on_the_pipe_before_the_server_sends_more(begin, server, chunked):
    wrap = http_chunk if chunked else bytes
    first, second = threading.Event(), threading.Event()
    server.script([stream_head(chunked=chunked), wrap(sse(ROLE, chunk("é"))), Gate(first), wrap(sse(chunk(" b"))), Gate(second),
                   wrap(sse(STOP, DONE)), http_chunk(b"") if chunked else b""])
    child = begin("--quiet")
    child.expect("é")
    assert child.stdout == "é".encode()
    first.set()
    child.expect(" b")
    assert child.stdout == "é b".encode()
    second.set()
    assert child.finish() == (0, "é b\n".encode(), b"")


@pytest.mark.smoke
def test_json_lines_are_on_the_pipe_before_the_server_sends_more(begin, server):
    gate = threading.Event()
    server.script([stream_head(), sse(HEL), Gate(gate), sse(STOP, DONE)])
    child = begin("-o", "json")
    child.expect("}\n")
    assert json.loads(child.stdout.decode()) == HEL
    gate.set()
    result = child.finish()
    assert (result.status, result.stderr) == (0, b"")
    assert [json.loads(line) for line in result.stdout.decode().split("\n")[:-1]] == [HEL, STOP]


@pytest.mark.smoke
def test_the_end_is_done_not_the_close(quiet, server):
    events = sse(HEL, STOP, DONE, chunk(" and more"), {"error": "late"})
    assert quiet(stream_head(), events, Hold()) == (0, b"Hel\n", b"")
    assert server.gone[0].wait(10)


# -- The line after it -----------------------------------------------


@pytest.mark.smoke
def test_the_footer_divides_the_servers_tokens_by_the_seconds_since_sending(begin, run, server):
    gate, started = threading.Event(), time.monotonic()
    server.script([stream_head(), Gate(gate), sse(HEL, LO, STOP, usage_chunk({"completion_tokens": 1000000}), DONE)])
    child = begin()
    server.wait_requests()
    sent = time.monotonic()
    run("--version")  # takes its time
    least = time.monotonic() - sent
    gate.set()
    result = child.finish()
    most = time.monotonic() - started
    assert (result.status, result.stdout) == (0, b"Hello\n")
    marks, tokens, seconds, more_marks, rate = FOOTER.fullmatch(result.stderr).groups()
    assert (marks, tokens, more_marks) == (b"", b"1000000", b"")
    assert 1000000 / most <= float(rate) <= 1000000 / least
    assert abs(1000000 / float(rate) - float(seconds)) < 0.051


@pytest.mark.smoke
@pytest.mark.parametrize("usage, tokens", [
    (None, b"~2"), ({}, b"~2"), ({"prompt_tokens": 9}, b"~2"), ({"completion_tokens": None}, b"~2"),
    ({"completion_tokens": "3"}, b"~2"), ({"completion_tokens": 0}, b"0"), ({"completion_tokens": 3}, b"3"),
    ({"completion_tokens": 10 ** 400}, b"~2"), ({"completion_tokens": -10 ** 400}, b"~2"),
], ids=lambda value: str(value)[:30])
def test_a_count_of_chunks_is_marked(quiet, usage, tokens):
    result = quiet(stream(ROLE, HEL, LO, STOP, usage_chunk(usage), DONE), options=())
    assert (result.status, result.stdout) == (0, b"Hello\n")
    marks, number, _, more_marks, _ = FOOTER.fullmatch(result.stderr).groups()
    assert (marks + number, more_marks) == (tokens, marks)


@pytest.mark.smoke
def test_show_usage_adds_the_first_token_and_the_finish_reason(quiet):
    usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": 4}, "completion_tokens_details": {"reasoning_tokens": 2}}
    result = quiet(stream(HEL, STOP, usage_chunk(usage), DONE), options=["--show-usage"])
    assert (result.status, result.stdout) == (0, b"Hel\n")
    footer, rest = result.stderr.decode().split("\n", 1)
    assert footer.startswith("-- 3 tokens in ")
    assert re.sub(r"\b0\.\d+", "0.0", rest).split("\n") == [
        "prompt tokens:       9", "completion tokens:   3", "total tokens:        12", "cached tokens:       4",
        "reasoning tokens:    2", "seconds:             0.0", "first token seconds: 0.0", "finish reason:       stop",
        "id:                  chatcmpl-1", ""]


@pytest.mark.smoke
def test_show_usage_with_json_lines_is_one_object_on_stderr(quiet):
    result = quiet(stream(HEL, STOP, DONE), options=["--show-usage", "-o", "json"])
    said = json.loads(result.stderr.decode())
    assert 0 <= said.pop("first_token_seconds") <= said.pop("seconds") < 20
    assert said == {"kind": "token_usage", "finish_reason": "stop", "id": "chatcmpl-1"}


@pytest.mark.smoke
@pytest.mark.parametrize("events", [
    [HEL, chunk("lo", finish="stop", usage=USAGE)],
    [chunk("Hel", usage={"completion_tokens": 1}), chunk("lo", usage={"completion_tokens": 2}), chunk(finish="stop", usage=USAGE)],
    [usage_chunk(), HEL, LO, STOP],
    [HEL, LO, STOP, {**usage_chunk(), "choices": None}],
    [HEL, LO, STOP, {"object": "chat.completion.chunk", "usage": USAGE, "choices": []}, chunk(usage=None)],
], ids=["last text chunk", "every chunk", "first", "null choices", "null after it"])
def test_usage_is_found_wherever_it_stands(quiet, events):
    result = quiet(stream(*events, DONE), options=())
    assert (result.status, result.stdout) == (0, b"Hello\n")
    assert result.stderr.startswith(b"-- 3 tokens in ")


@pytest.mark.smoke
def test_the_reason_for_the_end_is_said_before_the_footer(quiet):
    result = quiet(stream(HEL, LO, chunk(finish="length"), DONE), options=())
    warning, footer = result.stderr.split(b"\n", 1)
    assert warning == b"xeroctl: warning: the answer was cut at the token limit (finish reason length)"
    assert FOOTER.fullmatch(footer)


# -- Shapes of streams -----------------------------------------------

SHAPES = {
    "first chunk without choices": [chunk(choices=[]), HEL, LO, STOP, DONE],
    "null content": [chunk(delta={"role": "assistant", "content": None}), HEL, LO, STOP, DONE],
    "no finish_reason key": [{"choices": [{"delta": {"content": "Hel"}}]}, LO, STOP, DONE],
    "finish reason on the last text": [HEL, chunk("lo", finish="stop"), DONE],
    "no done": [HEL, LO, STOP],
    "refusal": [chunk(delta={"refusal": "Hel"}), chunk(delta={"refusal": "lo"}), STOP, DONE],
    "reasoning_content": [chunk(delta={"reasoning_content": "Hm."}), HEL, LO, STOP, DONE],
    "reasoning": [chunk(delta={"reasoning": "Hm.", "content": ""}), HEL, chunk(delta={"reasoning": "?"}), LO, STOP, DONE],
    "another choice": [HEL, chunk(choices=[{"index": 1, "delta": {"content": "no"}}]), LO, STOP, DONE],
    "vendor events": [b"event: x_metrics\ndata: not JSON\n\n", HEL, b'event: x_error\ndata: {"error": "no"}\n\n', LO, STOP, DONE],
    "comments": [b": ping\n\n:\n\n", HEL, b":\n: keep-alive\n", LO, STOP, DONE],
    "fields to skip": [b"id: 7\nretry: 10\nnonsense\nfoo: bar\n", HEL, LO, STOP, DONE],
    "message events": [b"event: message\n" + sse(HEL), LO, STOP, DONE],
    "empty data": [b"data:\n\ndata\n\n", HEL, LO, STOP, DONE],
    "byte-order mark": [b"\xef\xbb\xbf" + sse(HEL), LO, STOP, DONE],
    "no space": [sse(HEL, LO, STOP, DONE).replace(b"data: ", b"data:")],
    "CRLF": [sse(HEL, LO, STOP, DONE).replace(b"\n", b"\r\n")],
    "CR": [sse(HEL, LO, STOP, DONE).replace(b"\n", b"\r")],
    "several data lines": [json.dumps(HEL, indent=1).encode().replace(b"\n", b"\ndata: ").join([b"data: ", b"\n\n"]), LO, STOP, DONE],
    "a vendor's object": [{"object": "x", "x_data": 1}, HEL, LO, STOP, DONE],
}


def test_streams_of_all_shapes_are_read(start):
    with contextlib.ExitStack() as stack:
        children = {}
        for name, events in SHAPES.items():
            server = stack.enter_context(Server())
            server.script(stream(*events))
            children[name] = start("chat", "--endpoint", "e", "--base-url", server.url, "-m", "hi", "--stream", "--quiet")
        for name, child in children.items():
            assert child.finish() == (0, b"Hello\n", b""), name


@pytest.mark.smoke
def test_a_line_separator_is_text(quiet):
    assert quiet(stream(chunk("a\u2028b\u0085c\x0bd"), STOP, DONE)) == (0, "a\u2028b\u0085c\x0bd\n".encode(), b"")


@pytest.mark.smoke
def test_done_without_a_reason_draws_a_note(quiet):
    result = quiet(stream(HEL, LO, DONE), options=())
    assert (result.status, result.stdout) == (0, b"Hello\n")
    assert result.stderr.startswith(NO_REASON) and FOOTER.fullmatch(result.stderr[len(NO_REASON):])


@pytest.mark.smoke
@pytest.mark.parametrize("headers", [{"Content-Type": "application/json"}, {"Content-Type": "text/plain"}, {}], ids=str)
def test_plain_json_is_an_answer_though_a_stream_was_asked_for(quiet, headers):
    result = quiet(head("200 OK", headers), as_json(completion()), options=())
    assert (result.status, result.stdout) == (0, b"Hello!\n")
    assert FOOTER.fullmatch(result.stderr).group(2) == b"3"


@pytest.mark.smoke
def test_plain_json_is_one_line_with_json(quiet):
    line = json.dumps(completion("é"), ensure_ascii=False, separators=(",", ":")).encode()
    assert quiet(json_response(completion("é")), options=["-o", "json"]) == (0, line + b"\n", b"")


@pytest.mark.smoke
def test_a_stream_without_its_content_type_is_read(quiet):
    assert quiet(head("200 OK"), sse(HEL, STOP, DONE)) == (0, b"Hel\n", b"")


@pytest.mark.smoke
def test_json_lines_keep_every_field_in_its_order(quiet):
    chunks = [chunk("é 😀\u2028", x_vendor={"z": 1, "a": [None, 1.5, -0.0]}, choices_order=1), STOP, usage_chunk()]
    printed = [json.dumps(item, ensure_ascii=False) + "\n" for item in chunks]
    assert quiet(stream(*chunks, DONE), options=["-o", "json"]) == (0, "".join(printed).encode(), b"")


@pytest.mark.smoke
def test_a_json_line_is_what_the_server_wrote(quiet):
    odd = rb'{ "choices":[], "n":1.0e2,"big":123456789012345678901234567890, "s":"\u00e9\ud83d\/" ,"s":2}'
    spread = odd.replace(b', "n"', b',\ndata: "n"')
    events = [b"data: " + odd + b"\n\n", b"data:" + spread + b"\n\n", sse(STOP, DONE)]
    printed = quiet(stream(*events), options=["-o", "json"]).stdout.split(b"\n")
    assert printed[0] == odd
    assert printed[1] == rb'{"choices":[],"n":100.0,"big":123456789012345678901234567890,"s":2}'


# -- Cut short -------------------------------------------------------

SMALL = sse(chunk("Hé"), b": ping\r\n\r\n", chunk(" 😀"), STOP, usage_chunk(), DONE)
FIRST, SECOND, FINISHED = (SMALL.index(part) + len(part) for part in (sse(chunk("Hé")), sse(chunk(" 😀")), sse(STOP)))
CUTS = [1, FIRST - 2, FIRST - 1, FIRST, FIRST + 3, SECOND - 40, SECOND - 1, SECOND, FINISHED - 2, FINISHED - 1, FINISHED, len(SMALL) - 3]


@pytest.mark.smoke
def test_cuts_change_nothing_for_the_decoder(xeroctl):
    def events(*pieces):
        decoder = xeroctl.EventDecoder()
        return [event for piece in pieces for event in decoder.feed(piece)]

    for data in (SMALL, SMALL.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + SMALL.replace(b"\r\n", b"\n").replace(b"\n", b"\r")):
        whole = events(data)
        assert [event.data for event in whole] == [line[6:] for line in SMALL.decode().split("\n") if line.startswith("data: ")]
        for cut in range(len(data) + 1):
            assert events(data[:cut], data[cut:]) == whole
            assert events(data[:cut]) == whole[:len(events(data[:cut]))]
        assert events(*(data[index:index + 1] for index in range(len(data)))) == whole


def test_a_stream_that_is_cut_keeps_its_text_and_says_so(start, server):
    command = ["chat", "--endpoint", "e", "--base-url", server.url + "/v1", "-m", "hi", "--stream", "--retries", "0", "--quiet"]
    for cut in CUTS:
        server.script([stream_head(), SMALL[:cut]])
        text = ("Hé" if cut >= FIRST else "") + (" 😀" if cut >= SECOND else "")
        printed = (text + "\n").encode() if text else b""
        whole = cut >= FINISHED
        assert start(*command).finish() == (0 if whole else 8, printed, b"" if whole else CUT), cut


@pytest.mark.smoke
@pytest.mark.parametrize("end, line", [
    (Reset(), b"xeroctl: error: the reply was cut short: 127.0.0.1:%d closed the connection\n"), (b"", CUT),
], ids=["reset", "close"])
def test_an_answer_that_breaks_off_ends_in_a_newline_and_status_8(begin, server, end, line):
    gate = threading.Event()
    server.script([stream_head(), sse(ROLE, HEL), Gate(gate), end])
    child = begin()
    child.expect("Hel")
    gate.set()
    assert child.finish() == (8, b"Hel\n", line % server.port if b"%d" in line else line)


@pytest.mark.smoke
def test_a_chunked_stream_without_its_last_chunk_is_whole_if_it_has_a_reason(quiet):
    assert quiet(stream_head(chunked=True), http_chunk(sse(HEL, STOP))) == (0, b"Hel\n", b"")
    result = quiet(stream_head(chunked=True), http_chunk(sse(HEL)))
    assert (result.status, result.stdout) == (8, b"Hel\n")
    assert result.stderr.startswith(b"xeroctl: error: the reply was cut short: ")


@pytest.mark.smoke
def test_json_lines_of_a_stream_that_is_cut_stay_lines(quiet):
    result = quiet(stream(HEL, b"data: {"), options=["-o", "json"])
    assert (result.status, json.loads(result.stdout.decode())) == (8, HEL)
    assert json.loads(result.stderr.decode())["kind"] == "cut_short"


# -- Errors inside a stream ------------------------------------------


@pytest.mark.parametrize("event, status, message", [
    ({"error": {"message": "no"}}, 5, "no"),
    ({"error": "no"}, 5, "no"),
    ({"error": {"message": "no", "code": 500}}, 5, "no"),
    ({"error": {"message": "no", "code": 401}}, 3, "no: set XEROTIER_API_KEY or give --api-key"),
    ({"error": {"message": "no", "code": 400, "type": "bad"}}, 4, "no"),
    ({"error": {"message": "no", "code": 429}}, 7, "no: wait, or raise --retries"),
    ({"error": {"message": "no", "code": 7}}, 5, "no"),
    ({"object": "error", "message": "no", "code": 400}, 4, "no"),
    (b"event: error\ndata: no\n\n", 5, "no"),
    (b'event: error\ndata: {"message": "no"}\n\n', 5, "no"),
    (b'event: error\ndata: {"error": {"message": "no", "code": 503}}\n\n', 5, "no"),
    (b"event: error\ndata:\n\n", 5, "no reason given"),
    (b"data: no\n\n", 5, "the stream holds something that is not JSON"),
    (b"data: " + b"[" * 100000 + b"\n\n", 5, "the stream holds something that is not JSON"),
    (b"data: []\n\n", 5, "error in the reply: not a completion: []"),
], ids=lambda value: ascii(value)[:60])
def test_an_error_inside_a_stream_is_an_error(quiet, event, status, message):
    result = quiet(stream(HEL, event, LO, STOP, DONE))
    assert (result.status, result.stdout) == (status, b"Hel\n")
    assert re.fullmatch(rf"xeroctl: error: (error in the reply( \(\w+\))?: )?{re.escape(message)}\n", result.stderr.decode())


@pytest.mark.smoke
def test_an_error_before_any_text_leaves_stdout_empty(quiet):
    line = b"xeroctl: error: error in the reply: no\n"
    assert quiet(stream(ROLE, {"error": "no"}, HEL, STOP, DONE)) == (5, b"", line)


@pytest.mark.parametrize("reply, status, line", [
    (stream(), 8, CUT),
    (stream(b": ping\n\n"), 8, CUT),
    (stream(DONE), 5, b"xeroctl: error: the reply holds no answer\n"),
    (stream(ROLE, usage_chunk(), DONE), 5, b"xeroctl: error: the reply holds no answer\n"),
    (stream_head() + b"<html></html>", 8, CUT),
    (head("200 OK", {"Content-Type": "text/html"}) + b"<html></html>", 5, b"xeroctl: error: the reply is an HTML page: check the base URL\n"),
], ids=["empty", "pings", "only done", "no text", "HTML as a stream", "HTML"])
def test_a_stream_without_an_answer_is_a_failure(quiet, reply, status, line):
    assert quiet(reply) == (status, b"", line)


# -- Memory ----------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is read from /proc")
def test_memory_stays_flat_however_long_the_stream(run, server):
    driver = (
        "import os, re, sys\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[1]))\n"
        "import xeroctl\n"
        "status = xeroctl.main(sys.argv[2:])\n"
        "with open('/proc/self/status') as file:\n"
        "    sys.stderr.write(re.search(r'VmHWM:\\s*(\\d+) kB', file.read()).group(1))\n"
        "sys.exit(status)\n"
    )

    def peak(count):
        server.script([stream_head(), sse(chunk("x")) * count, sse(STOP, DONE)])
        result = run("chat", "--endpoint", "e", "--base-url", server.url, "-m", "hi", "--stream", "--quiet", timeout=60,
                     interpreter_options=("-c", driver))
        assert (result.status, result.stdout) == (0, b"x" * count + b"\n")
        return int(result.stderr)

    assert peak(100000) < peak(1000) + 2000


@pytest.mark.smoke
def test_a_whole_message_in_the_last_chunk_is_not_shown_again(quiet):
    last = chunk("", "stop")
    last["choices"][0]["message"] = {"role": "assistant", "content": "Hello world"}
    last["choices"][0]["delta"] = {}
    assert quiet(stream(chunk("Hello "), chunk("world"), last, DONE)) == (0, b"Hello world\n", b"")


def test_a_number_that_json_lacks_spoils_no_reply(run, quiet, server):
    odd = json.dumps(chunk("Hel", logprobs=[float("-inf"), float("nan")])).encode()
    events = b"data: " + odd + b"\n\n" + sse(LO, STOP, DONE)
    assert quiet(stream(events)) == (0, b"Hello\n", b"")
    lines = quiet(stream(events), options=["--quiet", "-o", "json"]).stdout.decode().split("\n")
    assert json.loads(lines[0], parse_constant=pytest.fail)["logprobs"] == [None, None]
    server.script(json_response({**completion(), "logprobs": float("inf")}))
    result = run("chat", "--endpoint", "e", "--base-url", server.url, "-m", "hi", "-o", "json")
    assert json.loads(result.stdout.decode(), parse_constant=pytest.fail)["logprobs"] is None


def test_the_rate_after_the_first_token_has_its_name(begin, server):
    gate = threading.Event()
    server.script([stream_head(), sse(HEL), Gate(gate), sse(LO, STOP, usage_chunk(), DONE)])
    child = begin("--quiet", "--show-usage")
    child.expect("Hel")
    gate.set()
    result = child.finish()
    assert (result.status, result.stdout) == (0, b"Hello\n")
    assert re.search(r"^tokens/s after the first: +\d+\.\d+$", result.stderr.decode(), re.MULTILINE)
