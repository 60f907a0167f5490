"""`xeroctl batch`: lines in, lines out, retries, resuming and ends, against a server with a schedule of its own."""

import collections
import contextlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest

import paced
from loopback import Hold, chunk, completion, head, http_chunk, json_response, response, stream
from terminal import wait_until

BACK_AT_ONCE = {"retry_after": 0}


@pytest.fixture(scope="module")
def endpoint():
    """A server with an endpoint for each way to behave."""
    with paced.Server(
        good={}, slow={"delay_ms": 150}, slower={"delay_ms": 3000}, hanging={"delay_ms": 60000},
        limited={"share": {"429": 0.3}, **BACK_AT_ONCE}, bucket={"per_second": 20, "retry_after": 1},
        full={"share": {"429": 1}, **BACK_AT_ONCE}, broken={"share": {"500": 1}, **BACK_AT_ONCE},
        refusing={"share": {"401": 1}}, flaky={"share": {"500": 0.1, "reset": 0.1}, **BACK_AT_ONCE},
        cut={"share": {"cut": 1}}, garbage={"share": {"garbage": 1}}, closing={"close": True},
        late={"first": {"fails first": "500"}, **BACK_AT_ONCE}, patient={"share": {"429": 1}, "retry_after": 100},
        kill={"delay_ms": 30}, edited={}, waiting={"first": {"fails first": "500"}, "retry_after": 50},
    ) as server:
        yield server


@pytest.fixture
def batch(run, endpoint):
    """Run batch on text, or on a list of requests, and return its Result with the parsed lines as `.results`."""

    def batch(slug, text, *args, **options):
        if not isinstance(text, (str, bytes)):
            text = "".join(json.dumps(item) + "\n" for item in text)
        data = text.encode() if isinstance(text, str) else text
        result = run("batch", "-e", slug, "--base-url", endpoint.url, *args, stdin=data, **options)
        return Batched(*result, results_of(result.stdout))

    return batch


Batched = collections.namedtuple("Batched", "status stdout stderr results")


def results_of(data):
    """Return the parsed lines of results; each is a whole one."""
    assert data.endswith(b"\n") or not data
    lines = data.decode().split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return None  # -o text


def answer(result):
    return result["response"]["body"]["choices"][0]["message"]["content"]


def numbered(count):
    return "".join(f"line {number}\n" for number in range(1, count + 1))


# -- Lines in --------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("line, custom_id, messages", [
    ("What is 2+2?", "1", [{"role": "user", "content": "What is 2+2?"}]),
    ("  blanks and \\ stay ", "1", [{"role": "user", "content": "  blanks and \\ stay "}]),
    ("[1]", "1", [{"role": "user", "content": "[1]"}]),
    ({"message": "hi"}, "1", [{"role": "user", "content": "hi"}]),
    ({"prompt": "hi", "id": 7}, 7, [{"role": "user", "content": "hi"}]),
    ({"prompt": "hi", "id": "a", "custom_id": "b"}, "b", [{"role": "user", "content": "hi"}]),
    ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "1", [{"role": "user", "content": "x", "name": "n"}]),
    ({"custom_id": "c", "method": "POST", "url": "/v1/chat/completions",
      "body": {"model": "m", "messages": [{"role": "user", "content": "x"}]}}, "c", [{"role": "user", "content": "x"}]),
], ids=str)
def test_a_line_is_a_request(batch, endpoint, line, custom_id, messages):
    text = line if isinstance(line, str) else json.dumps(line)
    done = batch("good", text)  # without a line end
    assert done.status == 0
    assert [result["custom_id"] for result in done.results] == [custom_id]
    sent = endpoint.log()[-1]["body"]
    assert (sent["messages"], sent["stream"]) == (messages, False)


@pytest.mark.parametrize("line, words", [
    ("{", "line 1"), ("{\"id\": 1}", "no message"), ("{\"message\": \"\"}", "empty"), ("{\"message\": 5}", "no message"),
    ("{\"messages\": []}", "messages"), ("{\"messages\": \"x\"}", "messages"), ("{\"messages\": [1]}", "object"),
    ("{\"body\": 1}", "body"), ("{\"body\": {}}", "messages"), ("{\"method\": \"GET\", \"body\": {\"messages\": [{}]}}", "POST"),
    ("{\"url\": \"/v1/embeddings\", \"body\": {\"messages\": [{}]}}", "url"), ("{\"id\": [], \"message\": \"x\"}", "id"),
    ("{\"messages\": [{\"role\": []}], \"id\": {}}", "id"),
    ("{\"message\": \"hi\", \"endpoint\": \"x\"}", "unknown field, endpoint"), ("{\"messages\": [{}], \"n\": 2}", "unknown field, n"),
    (b"\xff\xfe", "utf-8"), ("{" + 100000 * "[", "line 1"),
], ids=lambda value: str(value)[:50])
def test_a_line_that_cannot_be_read_fails_alone(batch, line, words):
    data = line if isinstance(line, bytes) else line.encode()
    done = batch("good", data + b"\nfine\n")
    bad, good = sorted(done.results, key=lambda result: result["error"] is None)
    assert done.status == 9
    assert (bad["response"], bad["error"]["kind"], str(bad["custom_id"])) == (None, "input", "1")
    assert words in bad["error"]["message"]
    assert (answer(good), good["custom_id"]) == ("echo: fine", "2")


def test_a_bad_line_keeps_its_name(batch):
    done = batch("good", [{"custom_id": "mine", "messages": 5}])
    assert done.results[0]["custom_id"] == "mine"


def test_blank_lines_are_skipped_and_counted(batch):
    done = batch("good", "\none\r\n  \n\ntwo\n\n")
    assert sorted((result["custom_id"], answer(result)) for result in done.results) == [("2", "echo: one"), ("5", "echo: two")]
    assert b"4 blank lines" in done.stderr


def test_options_are_what_a_line_does_not_say(batch, endpoint):
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}]}
    body = {"body": {"messages": [{"role": "user", "content": "b"}], "temperature": 1, "model": "m", "stream": True,
                     "stream_options": {"include_usage": True}}}
    batch("good", [own, body], "--system", "S", "--temperature", "0", "--max-tokens", "5", "--param", "top_k=3",
          "-H", "X-Team: t")
    first, second = sorted(endpoint.log()[-2:], key=lambda entry: entry["message"])
    assert first["body"]["messages"] == own["messages"]
    assert second["body"]["messages"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "b"}]
    assert (first["body"]["temperature"], second["body"]["temperature"]) == (0, 1)
    assert (first["body"]["model"], second["body"]["model"]) == ("good", "m")
    for entry in (first, second):
        assert (entry["body"]["max_tokens"], entry["body"]["top_k"], entry["headers"]["x-team"]) == (5, 3, "t")
        assert (entry["body"]["stream"], "stream_options" in entry["body"]) == (False, False)


def test_from_a_file(batch, tmp_path):
    path = tmp_path / "requests.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo")
    done = batch("good", b"", str(path), "--ordered")
    assert [answer(result) for result in done.results] == ["echo: one", "echo: two"]


def test_a_file_that_is_missing(batch):
    done = batch("good", b"", "nowhere.txt")
    assert (done.status, b"cannot read nowhere.txt" in done.stderr) == (2, True)


# -- Lines out -------------------------------------------------------


@pytest.mark.smoke
def test_a_result_has_the_form_of_a_batch(batch):
    done = batch("good", [{"custom_id": "a", "message": "Grüße \u2028 \\"}])
    result, = done.results
    assert list(result) == ["id", "custom_id", "response", "error"]
    assert list(result["response"]) == ["status_code", "request_id", "body"]
    assert (result["response"]["status_code"], result["error"]) == (200, None)
    assert result["response"]["request_id"].startswith("r-")
    assert (result["response"]["body"]["usage"]["total_tokens"], answer(result)) == (9, "echo: Grüße \u2028 \\")
    assert result["id"].startswith("req_")
    assert done.stderr.startswith(b"1 answered, 0 failed, ")
    assert batch("good", [{"custom_id": "a", "message": "Grüße \u2028 \\"}]).results[0]["id"] == result["id"]
    assert batch("good", [{"custom_id": "a", "message": "other"}]).results[0]["id"] != result["id"]


@pytest.mark.parametrize("slug, status, kind, code, http", [
    ("refusing", 3, "auth", "scripted", 401), ("broken", 5, "server", "scripted", 500), ("full", 7, "rate_limit", "scripted", 429),
    ("cut", 8, "cut_short", None, 200), ("garbage", 5, "server", None, None), ("patient", 7, "rate_limit", "scripted", 429),
])
def test_a_failure_is_told_in_its_line(batch, slug, status, kind, code, http):
    done = batch(slug, "one\n")
    result, = done.results
    assert (done.status, result["error"]["kind"], result["error"]["code"]) == (status, kind, code)
    assert (result["response"] and result["response"]["status_code"]) == http
    if code:
        assert result["response"]["body"]["error"]["message"].startswith("failed with")


def test_nobody_there(run):
    done = run("batch", "-e", "x", "--base-url", "http://127.0.0.1:1", "--retries", "0", stdin=b"one\n")
    result, = results_of(done.stdout)
    assert (done.status, result["response"], result["error"]["kind"]) == (6, None, "network")


def test_the_body_is_the_servers_document(run, server):
    document = {"id": "c", "choices": [{"message": {"content": "x", "extra": [1.5, None, "é😀"]}}], "x": {"y": 1e300}}
    server.script([json_response(document)])
    done = run("batch", "-e", "x", "--base-url", server.url, stdin=b"one\n")
    assert results_of(done.stdout)[0]["response"]["body"] == document


def test_broken_chunks_are_not_waited_for(run, server):
    head_of_chunks = head("200 OK", {"Content-Type": "application/json", "Transfer-Encoding": "chunked"})
    server.script([head_of_chunks, http_chunk(b'{"choices":'), b"zz\r\nx\r\n", Hold()])
    done = run("batch", "-e", "x", "--base-url", server.url, "--timeout", "600", stdin=b"one\n", timeout=10)
    result, = results_of(done.stdout)
    assert (done.status, result["error"]["kind"], result["response"]["status_code"]) == (8, "cut_short", 200)
    assert result["error"]["message"] == f"the reply was cut short: 127.0.0.1:{server.port} sent an invalid chunk size"


def test_an_empty_answer_is_a_failure(run, server):
    server.script([json_response(completion(""))])
    done = run("batch", "-e", "x", "--base-url", server.url, stdin=b"one\n")
    result, = results_of(done.stdout)
    assert (done.status, result["error"]["kind"], result["response"]["status_code"]) == (5, "server", 200)


def test_a_stream_that_nobody_asked_for_is_put_together(run, server):
    calls = [{"index": 0, "id": "c1", "function": {"name": "f", "arguments": '{"a'}}]
    more = [{"index": 0, "function": {"arguments": '": 1}'}}]
    server.script([stream(
        chunk("Hel"), chunk("lo", delta={"reasoning_content": "hm"}), chunk(delta={"tool_calls": calls}), chunk(delta={"tool_calls": more}),
        chunk(finish="stop"), {"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}, b"data: [DONE]\n\n")])
    done = run("batch", "-e", "x", "--base-url", server.url, stdin=b"one\n")
    result, = results_of(done.stdout)
    body = result["response"]["body"]
    assert (done.status, result["error"], body["id"], body["object"], body["model"]) == (0, None, "chatcmpl-1", "chat.completion", "test-model")
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": "Hello", "reasoning_content": "hm", "tool_calls": [call]}
    assert body["choices"] == [{"index": 0, "message": message, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}


def test_a_stream_of_one_chunk_is_put_together(run, server):
    server.script([stream(chunk("all", finish="stop"))])
    done = run("batch", "-e", "x", "--base-url", server.url, stdin=b"one\n")
    assert answer(results_of(done.stdout)[0]) == "all"


def test_an_answer_that_is_not_json_as_the_schema_asks(run, server, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    own = {"body": {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "text"}}}
    for line, text, status in ((b"one\n", "no JSON", 5), (b"one\n", "{}", 0), (json.dumps(own).encode(), "no JSON", 0)):
        server.script([json_response(completion(text))])
        done = run("batch", "-e", "x", "--base-url", server.url, "--schema", str(schema), stdin=line)
        result, = results_of(done.stdout)
        assert (done.status, answer(result)) == (status, text)
        assert (result["error"] and result["error"]["kind"]) == ("server" if status else None)


@pytest.mark.parametrize("args", [["-o", "text"], ["-q"], []], ids=str)
def test_answers_that_ended_early_are_counted_and_told(run, server, args):
    for reason in ("stop", "length", "content_filter"):
        server.script([json_response(completion("x", finish=reason))])
    done = run("batch", "-e", "x", "--base-url", server.url, "--concurrency", "1", *args, stdin=b"one\ntwo\nthree\n")
    assert (done.status, done.stdout.count(b"\n")) == (0, 3)
    warning = (b"xeroctl: warning: 2 answers ended early, first in line 2: "
               b"the answer was cut at the token limit (finish reason length)\n")
    assert done.stderr.count(warning) == 1
    assert (b"3 answered, 0 failed, 2 ended early, " in done.stderr) == ("-q" not in args)


@pytest.mark.parametrize("args, status", [(["-o", "text"], 5), ([], 0)], ids=str)
def test_a_tool_call_is_no_line_of_text(run, server, args, status):
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    server.script([json_response(completion(None, finish="tool_calls", message={"tool_calls": calls}))])
    done = run("batch", "-e", "x", "--base-url", server.url, *args, stdin=b"one\n")
    assert (done.status, done.stdout == b"\n") == (status, status == 5)


@pytest.mark.parametrize("depth", range(950, 1000, 7))
def test_a_line_nested_deep_fails_alone(run, server, depth):
    server.always(json_response(completion("fine")))
    line = '{"messages": [{"role": "user", "content": "x", "y": ' + depth * "[" + depth * "]" + "}]}\n"
    done = run("batch", "-e", "x", "--base-url", server.url, "--ordered", stdin=line.encode() + b"fine\n")
    deep, fine = results_of(done.stdout)
    assert (deep["custom_id"], fine["error"], b"Traceback" in done.stderr) == ("1", None, False)


@pytest.mark.parametrize("depth", [900, 960, 975, 980, 985, 990])
def test_a_reply_nested_deep_fails_alone(run, server, depth):
    text = json.dumps(completion("x"))[:-1] + ', "y": ' + depth * "[" + depth * "]" + "}"
    server.script([response(text.encode(), headers={"Content-Type": "application/json"})])
    server.script([json_response(completion("fine"))])
    done = run("batch", "-e", "x", "--base-url", server.url, "--ordered", "--concurrency", "1", stdin=b"one\ntwo\n")
    assert b"Traceback" not in done.stderr
    assert answer(json.loads(done.stdout.decode().split("\n")[1])) == "fine"


@pytest.mark.parametrize("args, words", [
    (["-q"], None), (["-o", "json"], '{"kind": "note", "message": "1 failure: waiting up to 5 s'), ([], "note: 1 failure: waiting up to 5 s"),
], ids=str)
def test_the_word_on_waiting_is_a_note(start, endpoint, args, words):
    child = start("batch", "-e", "slow", "--base-url", endpoint.url, "--max-failures", "1", *args)
    child.send(b"one\n{\n")
    done = child.finish()
    assert (done.status, done.stdout.count(b"\n")) == (9, 2)
    assert (words or "").encode() in done.stderr
    assert (b"waiting" in done.stderr) == (words is not None)


@pytest.mark.parametrize("count", [3, 200])
def test_ordered(batch, count):
    done = batch("flaky", numbered(count), "--ordered", "--concurrency", "16", "--retries", "9")
    assert [answer(result) for result in done.results] == [f"echo: line {number}" for number in range(1, count + 1)]


def test_text_is_a_line_each(batch):
    lines = [{"message": "a\nb\\c\r\u2028\u0085\x0c"}, {"message": ""}, "plain"]
    done = batch("good", lines[:2] + [{"message": "plain"}], "-o", "text")
    assert done.stdout.decode() == "echo: a\\nb\\\\c\\r\\u2028\\u0085\\f\n\necho: plain\n"
    assert done.status == 9


@pytest.mark.parametrize("args, words", [
    (["-o", "text", "--results", "f"], "--results"), (["--concurrency", "0"], "--concurrency"), (["--stream"], "--stream"),
    (["--max-failures", "0"], "--max-failures"),
])
def test_wrong_options(batch, args, words):
    done = batch("good", "one\n", *args)
    assert (done.status, words in done.stderr.decode(), done.stdout) == (2, True, b"")


def test_quiet(batch):
    assert batch("good", "one\n", "-q").stderr == b""


def test_dry_run_sends_nothing(batch, endpoint):
    before = len(endpoint.log())
    done = batch("good", "one\ntwo\n", "--dry-run")
    assert (done.status, done.stdout.count(b"curl ")) == (0, 2)
    assert len(endpoint.log()) == before


def test_demo(run):
    done = run("batch", "--demo", "-o", "text", stdin=b"one\ntwo\n")
    assert (done.status, done.stdout.count(b"\n")) == (0, 2)
    assert b"You wrote: one" in done.stdout.split(b"\n")[0]


# -- Retries ---------------------------------------------------------


def test_each_is_answered_once_through_resets_and_errors(batch):
    done = batch("flaky", numbered(300), "--retries", "9", "--concurrency", "32")
    assert done.status == 0
    assert sorted(answer(result) for result in done.results) == sorted(f"echo: line {number}" for number in range(1, 301))


def test_a_rate_limit_is_met_without_a_storm(batch, endpoint):
    before = len(endpoint.log())
    done = batch("limited", numbered(300), "--concurrency", "32", timeout=60)
    assert done.status == 0
    assert len({answer(result) for result in done.results}) == len(done.results) == 300
    assert len(endpoint.log()) - before <= 600


def test_a_server_that_takes_so_many_a_second(batch, endpoint):
    before = len(endpoint.log())
    done = batch("bucket", numbered(60), "--concurrency", "32", timeout=60)
    assert (done.status, len(done.results)) == (0, 60)
    assert len(endpoint.log()) - before <= 120


def test_no_retries(batch, endpoint):
    before = len(endpoint.log())
    done = batch("full", numbered(3), "--retries", "0")
    assert (done.status, len(done.results), len(endpoint.log()) - before) == (7, 3, 3)


def test_a_server_that_closes_after_each_answer(batch, endpoint):
    before = len(endpoint.log())
    done = batch("closing", numbered(40), "--retries", "0", "--concurrency", "4")
    assert (done.status, len(done.results), len(endpoint.log()) - before) == (0, 40, 40)


def test_the_status_is_that_of_the_first_failure(batch, tmp_path):
    assert batch("late", f"one\nfails first {tmp_path}\n", "--retries", "0").status == 5
    assert batch("refusing", "{\n" + numbered(3)).status == 9


def test_max_failures(batch, endpoint):
    before = len(endpoint.log())
    done = batch("refusing", numbered(100), "--max-failures", "5", "--concurrency", "2")
    assert (done.status, 5 <= len(done.results) <= 7) == (3, True)
    assert len(endpoint.log()) - before <= 7


def test_connections_stay_open(run, server):
    server.script([json_response(completion("one")), Hold()])
    done = run("batch", "-e", "x", "--base-url", server.url, stdin=b"one\n")
    assert (done.status, len(server.requests)) == (0, 1)
    assert server.requests[0].headers["host"] == server.url[7:]
    assert "close" not in server.requests[0].headers.get("connection", "")


# -- Resuming --------------------------------------------------------


def test_what_is_answered_is_not_asked_again(batch, endpoint, tmp_path):
    path = tmp_path / "results.jsonl"
    args = ["--results", str(path), "--retries", "0"]
    lines = [f"{number} fails first {tmp_path}" if number == 2 else f"{number}" for number in range(1, 5)]
    first = batch("late", "\n".join(lines), *args)
    assert (first.status, first.stdout) == (5, b"")
    second = batch("late", "\n".join(lines), *args)
    assert second.status == 0
    assert b"3 answered before" in second.stderr
    good = [result for result in results_of(path.read_bytes()) if not result["error"]]
    assert sorted(answer(result) for result in good) == [f"echo: {line}" for line in lines]


def test_a_line_that_was_edited_is_asked_again(batch, endpoint, tmp_path):
    path = tmp_path / "results.jsonl"
    batch("edited", numbered(3), "--results", str(path))
    before = len(endpoint.log())
    batch("edited", numbered(3).replace("line 2", "edited"), "--results", str(path))
    assert [entry["message"] for entry in endpoint.log()[before:]] == ["edited"]


@pytest.mark.parametrize("rest, asked", [(b'{"id":"req_12', 1), (b'{"id":"re', 1), (b"", 0)])
def test_a_half_written_line_is_cut_off(batch, endpoint, tmp_path, rest, asked):
    path = tmp_path / "results.jsonl"
    batch("good", numbered(2), "--results", str(path), "--ordered")
    first, second = path.read_bytes().split(b"\n")[:2]
    path.write_bytes(first + b"\n" + (rest or second))
    before = len(endpoint.log())
    assert batch("good", numbered(2), "--results", str(path)).status == 0
    assert len(endpoint.log()) - before == asked
    assert len(results_of(path.read_bytes())) == 2


RESULT = (b'{"id":"req_1","custom_id":"1","response":{"status_code":200,"request_id":null,"body":{}},"error":null}\n')
HALF = RESULT[:40]


@pytest.mark.parametrize("text", [
    b"What is this?\nAnd this?", b"What is this?", b'{"id": 1, "message": "hi"}\n', b'{"id":"a","prompt":"b"}', b'{"id": 1, broken\n',
    b'{"id"', b"{", b"{\n}\n", b"\x00\x00", b"[1]\n", b'["id","custom_id","response","error"]', b'"id"', b"null\n", b"\xff\n",
    RESULT + b'{"id": 2, "message": "hi"}\n', RESULT + b'{"id":"x', RESULT + b"notes\n" + HALF, HALF + b"\nnotes\n",
    RESULT.replace(b'"1"', b"[1]"),
], ids=lambda text: str(text[-30:]))
def test_a_file_of_something_else_is_left_alone(batch, tmp_path, text):
    path = tmp_path / "questions.txt"
    path.write_bytes(text)
    done = batch("good", "one\n", "--results", str(path))
    assert (done.status, b"other things" in done.stderr) == (2, True)
    assert path.read_bytes() == text


@pytest.mark.parametrize("end, kept", [(b"", b""), (HALF, b""), (RESULT[:-1], RESULT), (HALF + b"\n", HALF + b"\n")])
def test_a_half_line_before_others_is_skipped(batch, tmp_path, end, kept):
    path = tmp_path / "results.jsonl"
    before = RESULT + HALF + RESULT + RESULT
    path.write_bytes(before + end)
    done = batch("good", "one\n", "--results", str(path))
    assert done.status == 0
    assert (f"{2 if end == kept != b'' else 1} half-written line").encode() in done.stderr
    lines = path.read_bytes()
    assert lines.startswith(before + kept)
    assert len(results_of(lines[len(before + kept):])) == 1


@pytest.mark.parametrize("path, status", [("/dev/null", 0), ("/dev/full", 1)])
def test_results_that_cannot_be_read_again(batch, path, status):
    done = batch("good", "one\n", "--results", path)
    assert (done.status, done.stdout, b"cannot write the results" in done.stderr) == (status, b"", status == 1)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("args", [["PIPE"], ["--results", "PIPE"]], ids=str)
def test_a_pipe_without_another_end_is_not_deaf(start, endpoint, tmp_path, args, number, status):
    pipe = tmp_path / "pipe"
    os.mkfifo(str(pipe))
    child = start("batch", "-e", "good", "--base-url", endpoint.url, *[arg.replace("PIPE", str(pipe)) for arg in args])
    child.end_input()
    child.wait_until_handled(signal.SIGTERM)
    child.signal(number)
    assert child.finish().status == status


def test_pipes_with_a_name(start, endpoint, tmp_path):
    source, results = tmp_path / "source", tmp_path / "results"
    for path in (source, results):
        os.mkfifo(str(path))
    child = start("batch", "-e", "good", "--base-url", endpoint.url, str(source), "--results", str(results))
    source.write_text("one\n")
    assert answer(results_of(results.read_bytes())[0]) == "echo: one"
    assert child.finish().status == 0


def test_results_to_dev_stdout(batch):
    done = batch("good", "one\n", "--results", "/dev/stdout")
    assert (done.status, answer(done.results[0])) == (0, "echo: one")


def test_results_are_not_read_as_requests(batch, endpoint, tmp_path):
    path = tmp_path / "both"
    path.write_bytes(RESULT)
    done = batch("good", b"", str(path), "--results", str(path))
    assert (done.status, b"are read from the file that the results go to" in done.stderr, path.read_bytes()) == (2, True, RESULT)


def test_kill_9_and_the_same_command_again(start, batch, endpoint, tmp_path):
    path = tmp_path / "results.jsonl"
    args = ["--results", str(path), "--concurrency", "4"]
    source = tmp_path / "requests.txt"
    source.write_text(numbered(60))
    child = start("batch", "-e", "kill", "--base-url", endpoint.url, str(source), *args)
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 20)
    child.signal(signal.SIGKILL)
    assert child.finish().status == 137
    known = {result["custom_id"] for result in results_of(path.read_bytes()[:path.read_bytes().rfind(b"\n") + 1])}
    before = len(endpoint.log())
    assert batch("kill", source.read_bytes(), *args).status == 0
    again = {entry["message"] for entry in endpoint.log()[before:]}
    assert not again & {f"line {name}" for name in known}
    results = results_of(path.read_bytes())
    assert sorted(result["custom_id"] for result in results) == sorted(str(number) for number in range(1, 61))


# -- While it runs ---------------------------------------------------


def test_a_slow_writer(start, endpoint):
    child = start("batch", "-e", "good", "--base-url", endpoint.url)
    for number in range(3):
        child.send(f"line {number}\nhalf of ".encode())
        child.expect(f"echo: {'half of ' if number else ''}line {number}")
    child.end_input()
    done = child.finish()
    assert (done.status, done.stdout.count(b"\n")) == (0, 4)


def test_the_input_is_read_as_it_is_needed(start, endpoint):
    before = len(endpoint.log())
    child = start("batch", "-e", "hanging", "--base-url", endpoint.url, "--concurrency", "1")
    pipe = child.process.stdin
    os.set_blocking(pipe.fileno(), False)
    taken = 0
    while select.select([], [pipe], [], 1)[1] and taken < 1 << 20:
        taken += pipe.write(b"a line\n" * 100) or 0
    wait_until(lambda: len(endpoint.log()) > before)
    assert select.select([], [pipe], [], 0.2)[1] == []
    assert taken < 1 << 20


def test_ctrl_c_waits_for_those_in_flight(start, endpoint):
    child = start("batch", "-e", "slow", "--base-url", endpoint.url, "--concurrency", "2")
    child.send(numbered(50).encode())
    child.expect("echo: line 1")
    child.signal(signal.SIGINT)
    done = child.finish()
    results = results_of(done.stdout)
    assert (done.status, 2 <= len(results) <= 6) == (130, True)
    assert all(result["error"] is None for result in results)
    assert b"Ctrl+C" in done.stderr


@pytest.mark.parametrize("number, status, words", [
    (signal.SIGINT, 130, "waiting up to 5 s for 5 requests in flight; another Ctrl+C drops them"),
    (signal.SIGTERM, 143, "SIGTERM: waiting up to 5 s for 5 requests in flight; Ctrl+C drops them"),
])
def test_a_second_signal_drops_them(start, endpoint, number, status, words):
    before = len(endpoint.log())
    child = start("batch", "-e", "hanging", "--base-url", endpoint.url, stderr=subprocess.STDOUT)
    child.send(numbered(5).encode())
    wait_until(lambda: len(endpoint.log()) >= before + 5)
    started = time.monotonic()
    child.signal(number)
    child.expect(words)
    child.signal(number)
    done = child.finish()
    assert (done.status, time.monotonic() - started < 3) == (status, True)
    assert b"{" not in done.stdout


def test_ctrl_c_does_not_wait_for_those_that_failures_left(start, endpoint):
    child = start("batch", "-e", "hanging", "--base-url", endpoint.url, "--max-failures", "1", stderr=subprocess.STDOUT)
    child.send(b"one\n{\n")
    child.expect("1 failure: waiting up to 5 s for 1 request in flight; Ctrl+C drops them")
    started = time.monotonic()
    child.signal(signal.SIGINT)
    assert (child.finish().status, time.monotonic() - started < 3) == (130, True)


def test_a_reader_that_goes_away(start, endpoint):
    child = start("batch", "-e", "slow", "--base-url", endpoint.url, "--concurrency", "1")
    child.send(numbered(20).encode())
    child.expect("echo: line 1")
    child.process.stdout.close()
    assert child.process.wait(10) in (141, -signal.SIGPIPE)


def test_input_that_breaks_off_loses_no_result(start, endpoint):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        child = start("batch", "-e", "waiting", "--base-url", endpoint.url, "--ordered", "--concurrency", "2",
                      stdin=theirs)
        before = len(endpoint.log())
        ours.sendall(b"fails first\ntwo\nthree\n")
        wait_until(lambda: len(endpoint.log()) == before + 3)  # the first one waits, and the second one is answered
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets the connection
        ours.close()
        done = child.finish()
    assert (done.status, b"cannot read the requests" in done.stderr) == (2, True)
    assert answer(results_of(done.stdout)[0]) == "echo: two"


def test_a_defect_while_connecting_is_not_waited_for(xeroctl, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(xeroctl, "open_stream", fail)
    monkeypatch.setattr(threading, "excepthook", print, raising=False)
    exchange = xeroctl.Exchange(None, xeroctl.find_route("http://127.0.0.1:1/"), None)
    others = set(threading.enumerate())
    with contextlib.closing(xeroctl.RequestLoop(xeroctl.Waiter())) as loop:
        loop.start(exchange)
        with pytest.raises(ZeroDivisionError):
            for _ in range(50):
                loop.turn(time.monotonic() + 0.1)
        for thread in set(threading.enumerate()) - others:
            thread.join(5)


def test_progress_on_a_terminal(terminal, endpoint, tmp_path):
    source = tmp_path / "requests.txt"
    source.write_text(numbered(30))
    child = terminal("batch", "-e", "slow", "--base-url", endpoint.url, "--concurrency", "2", str(source), "--results",
                     str(tmp_path / "results"))
    child.expect("2 in flight")
    child.expect("left")
    child.expect("30 answered, 0 failed")
    assert child.finish() == 0


# -- Without a process -----------------------------------------------


@pytest.mark.parametrize("events, limits", [
    ("a", [8]), ("r", [4]), ("rr", [4, 4]), ("rRR", [4, 2, 1]), ("RRRRR", [4, 2, 1, 1, 1]), ("raaaaa", [4, 4, 4, 4, 4, 5]),
])
def test_throttle(xeroctl, events, limits):
    throttle = xeroctl.Throttle(8)
    seen, now = [], 10
    for event in events:
        now += 1
        if event == "a":
            throttle.note_answer()
        else:
            throttle.note_refusal(now if event == "R" else 5, 0, now)
        seen.append(int(throttle.limit))
    assert seen == limits


def test_throttle_makes_all_wait(xeroctl):
    throttle = xeroctl.Throttle(8)
    throttle.note_refusal(0, 10, 100)
    throttle.note_refusal(0, 1, 100)
    assert [throttle.has_room(0, now) for now in (100, 109.9, 110)] == [False, False, True]
    assert [throttle.has_room(count, 110) for count in (3, 4)] == [True, False]


@pytest.mark.parametrize("pieces", [[b"a\nb\n"], [b"a", b"\n", b"b"], [b"a\n", b"b\n"], [b"a\nb"]])
def test_line_reader(xeroctl, pieces):
    reading, writing = os.pipe()
    reader = xeroctl.LineReader(reading)
    lines = []
    for piece in pieces:
        os.write(writing, piece)
        line = reader.next_line()
        while line:
            lines.append(line)
            line = reader.next_line()
    os.close(writing)
    line = reader.next_line()
    lines += [line] if line else []
    os.close(reading)
    assert (lines, reader.is_exhausted()) == ([(1, b"a"), (2, b"b")], True)
