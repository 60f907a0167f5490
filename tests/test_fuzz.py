"""Mutated streams and mutated responses: no traceback, no hang, no answer that is not one, no success that is none.

Everything follows from a seed.  The counts come from the environment: FUZZ_STREAMS, FUZZ_RESPONSES (in one process) and
FUZZ_PROCESSES (a process each); FUZZ_SEED is the first seed.  By hand: FUZZ_STREAMS=100000 FUZZ_PROCESSES=1000.
"""

import gzip
import os
import random
import re
import subprocess
import zlib

import pytest

import fuzz
import test_field
from conftest import XEROCTL
from driver import Driver
from loopback import completion, head, http_chunk, json_response, response, stream_head

FIRST_SEED = int(os.environ.get("FUZZ_SEED", 0))
STREAMS = int(os.environ.get("FUZZ_STREAMS", 5000))
RESPONSES = int(os.environ.get("FUZZ_RESPONSES", 250))
PROCESSES = int(os.environ.get("FUZZ_PROCESSES", 5))
STATUSES = {0, 3, 4, 5, 6, 7, 8}
BLANK_LINE = re.compile(rb"\r?\n\r?\n")
FOOTER = re.compile(r"-- ~?\d+ tokens? in [\d.]+s \(~?[\d.]+ tok/s\)")


# -- Streams, in a child of the interpreter --------------------------


def test_no_mutated_stream_is_read_otherwise_than_by_the_letter(interpreter):
    done = subprocess.run(
        [interpreter, fuzz.__file__, str(XEROCTL), str(FIRST_SEED), str(STREAMS)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"PYTHONIOENCODING": "ascii:backslashreplace", "PYTHONDONTWRITEBYTECODE": "1"}, timeout=60 + STREAMS / 100)
    *failures, last = done.stdout.decode("ascii").rstrip("\n").split("\n")
    assert done.returncode == 0 and not failures, done.stdout.decode("ascii")[:5000]
    assert 0.1 * STREAMS < int(last.split()[0]) < 0.9 * STREAMS or STREAMS < 100


def test_the_simple_reading_knows_whole_from_cut():
    assert [fuzz.reading(data) for data in fuzz.STREAMS] == [
        ("Hello é€😀", True), ("ab", True), ("CRLF", True), ("CR ends", True), ("lines", True), ("yes", True), ("x", False),
        ("y", False),         ("0z", True), ("😀", True), ("CRLF lines", True), ("named", False), ("o", False)]
    assert fuzz.reading(fuzz.STREAMS[0][:fuzz.STREAMS[0].index(b"lo")]) == ("Hel", False)


# -- Replies from the field, cut at each byte ------------------------


def outcome(xeroctl, pieces, streamed):
    """Return the text, the exit status and the words of a response that comes in these pieces, then the close."""
    decoder, answers, reply, failure, text = xeroctl.ResponseDecoder("POST"), None, xeroctl.Reply(), b"", ""
    url = "http://127.0.0.1:1/e/v1/chat/completions"
    try:
        for data in [*pieces, None]:
            body = decoder.feed(data) if data is not None else decoder.finish()
            if not decoder.head:
                continue
            context = xeroctl.ErrorContext(decoder.head.status, decoder.head.headers, [], url, "", "POST", None)
            if decoder.head.status != 200:
                failure += body or b""
                continue
            answers = answers or xeroctl.AnswerDecoder(streamed, decoder.head, context)
            part = answers.finish(1.0) if data is None else answers.feed(body, 1.0)
            if part:
                reply.add(part)
                text += part.text
            if answers.error:
                raise answers.error
        if failure:
            raise xeroctl.parse_error(failure, context)
        reply.check_answer()
    except xeroctl.WireError as error:
        return text, None, str(error)
    except xeroctl.XeroctlError as error:
        return text, error.exit_status, str(error)
    return text, 0, f"{xeroctl.finish_warning(reply)}, {xeroctl.finish_note(reply)}, {reply.usage}, {reply.tool_calls}"


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("name", test_field.REPLIES)
def test_a_field_reply_is_the_same_cut_at_each_byte(xeroctl, name, streamed):
    data = test_field.REPLIES[name].reply
    whole = outcome(xeroctl, [data], streamed)
    assert whole[1] == test_field.REPLIES[name].status
    assert outcome(xeroctl, [data[at:at + 1] for at in range(len(data))], streamed) == whole
    for at in range(len(data) + 1):
        assert outcome(xeroctl, [data[:at], data[at:]], streamed) == whole, at


@pytest.mark.parametrize("name", test_field.REPLIES)
def test_a_field_reply_that_ends_at_any_byte_is_no_other_success(xeroctl, name):
    data = test_field.REPLIES[name].reply
    text, status, words = outcome(xeroctl, [data], True)
    ends = [outcome(xeroctl, [data[:at]], True) for at in range(len(data))]
    assert all(text.startswith(part[0]) for part in ends)
    if status:
        assert all(part[1] in (None, 5, 8, status) for part in ends)
    assert {part[0] for part in ends if part[1] == 0} <= {text}


# -- Responses, through the whole program ----------------------------


def framed(rng, events):
    """Return *events* as a response, in one of the ways that there are."""
    kind, at = rng.randrange(5), rng.randrange(len(events))
    if kind == 0:
        return response(events, headers={"Content-Type": "text/event-stream"})
    if kind == 1:
        return stream_head() + events
    if kind == 2:
        return stream_head(chunked=True) + b"".join(map(http_chunk, (events[:at] or b"\n", events[at:], b"")))
    if kind == 3:
        return stream_head({"Content-Encoding": "gzip"}) + gzip.compress(events)
    return b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + events


WHOLE = [json_response(completion("Hello")), json_response({"error": {"message": "no", "code": "x"}}, "429 Slow", {"Retry-After": "9"}),
         response(b"<html><h1>Bad Gateway</h1></html>", "502 Bad Gateway"), response(b"", "204 No Content"),
         head("302 Found", {"Location": "https://elsewhere.example/"})]


def random_response(rng):
    """Return a mutated response, whole or a stream."""
    data = rng.choice(WHOLE) if rng.random() < 0.2 else framed(rng, rng.choice(fuzz.STREAMS))
    return fuzz.mutated(rng, data, WHOLE + [framed(rng, rng.choice(fuzz.STREAMS))])


def unchunked(body):
    """Return what the chunks of *body* hold, as far as they go."""
    data = b""
    while True:
        match = re.match(rb"\s*[+-]?(?:0[xX])?_?([0-9a-fA-F_]+)[^\n]*\n", body)
        size = int(match.group(1).replace(b"_", b"") or b"0", 16) if match else 0
        if not size:
            return data
        data += body[match.end():match.end() + size]
        body = body[match.end() + size + 2:]


def ungzipped(body):
    inflater, data = zlib.decompressobj(zlib.MAX_WBITS | 32), b""
    for at in range(len(body)):
        try:
            data += inflater.decompress(body[at:at + 1])
        except zlib.error:
            break
    return data


def bodies(data):
    """Return each body that a reader, however lenient, may find in the response *data*."""
    found = [data[match.end():] for match in BLANK_LINE.finditer(data)] + [b""]
    found += [body[:int(size)] for body in found for size in re.findall(rb"(?i)length:[^\d\r\n]*(\d{1,9})", data)]
    found += [unchunked(body) for body in found]
    return found + [ungzipped(body) for body in found if body[:1] == b"\x1f" or body[:1] == b"x"]


def readings(data):
    """Return each (text, whole) that a reader may make of the response *data*."""
    found = set()
    for body in bodies(data):
        found.add(fuzz.reading(body))
        try:
            document = fuzz.json.loads(body.decode("utf-8-sig"))
            answer = fuzz.Answer()
            answer.add(document)
            answer.end()
            found.add((fuzz.joined(answer.text), not fuzz.is_failure(document)))
        except (ValueError, LookupError, TypeError, RecursionError, AttributeError):
            pass
    return found


def printed(text):
    return text if text.endswith("\n") or not text else text + "\n"


def check(result, data):
    """Check what the tool made of the response *data* against every way to read it."""
    status, out, err = result
    text, lines = out.decode(), err.decode().split("\n")
    assert status in STATUSES and lines.pop() == ""
    assert all(line.startswith("xeroctl: ") or FOOTER.fullmatch(line) for line in lines)
    assert status == 0 or lines
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", err.decode())
    ways = readings(data)
    if status == 0:
        assert text.rstrip("\ufffd\n") in {printed(way).rstrip("\ufffd\n") for way, whole in ways if whole}
    elif text:
        assert text.rstrip("\ufffd\n") in {printed(way).rstrip("\ufffd\n") for way, _ in ways}


def fuzz_responses(run, server, count):
    """Send *count* mutated responses to `run`, and check each result; return how many were a success."""
    successes = 0
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        rng = random.Random(seed)
        data, at = random_response(rng), rng.randrange(1, 50)
        server.script([data[:at], data[at:]])
        options = rng.choice([[], ["--stream"]])
        try:
            result = run("chat", "--endpoint", "e", "--base-url", server.url + "/v1", "-m", "hi", "--retries", "0",
                         "--timeout", "5", *options)
            check(result, data)
        except BaseException:
            print(f"seed {seed}, {options}: {data[:3000]!r}")
            raise
        successes += result[0] == 0
    return successes


def test_no_mutated_response_makes_a_traceback_a_hang_or_a_wrong_success(interpreter, server, tmp_path):
    with Driver(interpreter, XEROCTL, tmp_path) as driver:
        successes = fuzz_responses(driver.run, server, RESPONSES)
    assert 0.1 * RESPONSES < successes < 0.9 * RESPONSES or RESPONSES < 100


def test_no_mutated_response_harms_a_process_of_its_own(run, server):
    fuzz_responses(run, server, PROCESSES)


@pytest.mark.parametrize("status, out, data", [
    (0, b"Hel\n", stream_head() + fuzz.chunk(content="Hel")),
    (0, b"Hello\n", stream_head() + fuzz.STREAMS[0]),
    (8, b"no\n", stream_head() + fuzz.chunk(content="Hel")),
    (1, b"", stream_head()),
    (8, b"", stream_head()),
], ids=["cut", "too little", "other text", "unexpected status", "no line"])
def test_a_wrong_result_would_be_noticed(status, out, data):
    with pytest.raises(AssertionError):
        check((status, out, b""), data)
