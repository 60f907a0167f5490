"""Bytes into events, events into a Reply, bodies into errors: tables of cases, and what random input does."""

import json
import random
import time

import pytest

from loopback import DONE, USAGE, chunk, completion, sse

FUZZ_STREAMS = 10000
KEY = "xero_acme_secret"
MANY_SECONDS = 8  # a decoder that reads a line anew for each chunk takes minutes for what takes a second


def decoded(xeroctl, *chunks):
    """Return the (name, data) pairs that *chunks* hold."""
    decoder = xeroctl.EventDecoder()
    return [tuple(event) for data in chunks for event in decoder.feed(data)]


def messages(*data):
    return [("message", text) for text in data]


# -- Events ----------------------------------------------------------

BOM = b"\xef\xbb\xbf"
STREAMS = [
    ("LF", b"data: a\n\ndata: b\n\n", messages("a", "b")),
    ("CRLF", b"data: a\r\n\r\ndata: b\r\n\r\n", messages("a", "b")),
    ("CR", b"data: a\r\rdata: b\r\r", messages("a", "b")),
    ("CRLF then LF", b"data: a\r\n\ndata: b\r\n\n", messages("a", "b")),
    ("LF then CRLF", b"data: a\n\r\ndata: b\n\r\n", messages("a", "b")),
    ("CR then LF is one end", b"data: a\r\ndata: b\r\n\r\n", messages("a\nb")),
    ("CR then CRLF", b"data: a\r\r\ndata: b\r\r\n", messages("a", "b")),
    ("LF then CR", b"data: a\n\rdata: b\n\r", messages("a", "b")),
    ("blank lines", b"\n\r\n\r\n\ndata: a\n\n\n\n\r\r", messages("a")),
    ("several data lines", b"data: a\ndata: b\ndata:\ndata: c\n\n", messages("a\nb\n\nc")),
    ("no space", b"data:a\n\n", messages("a")),
    ("one space goes", b"data:   a \n\n", messages("  a ")),
    ("a tab stays", b"data:\ta\n\n", messages("\ta")),
    ("a colon in the value", b"data: a: b\n\n", messages("a: b")),
    ("a value that is a colon", b"data::\n\n", messages(":")),
    ("data without a colon", b"data\n\n", messages("")),
    ("data without a value", b"data:\n\n", messages("")),
    ("two data without a colon", b"data\ndata\n\n", messages("\n")),
    ("no data, no event", b"event: x\nid: 1\n\ndata: a\n\n", messages("a")),
    ("the name is forgotten", b"event: x\ndata: a\n\ndata: b\n\n", [("x", "a"), ("message", "b")]),
    ("the name of an empty event is forgotten", b"event: x\n\ndata: a\n\n", messages("a")),
    ("the last name counts", b"event: x\nevent: y\ndata: a\n\n", [("y", "a")]),
    ("a name after the data", b"data: a\nevent: x\n\n", [("x", "a")]),
    ("an empty name", b"event: x\nevent:\ndata: a\n\n", messages("a")),
    ("comments", b": ping\n:\ndata: a\n: data: x\n\n:\n\n", messages("a")),
    ("other fields", b"id: 1\nretry: 10\nfoo: bar\nid\nx\ndata: a\n\n", messages("a")),
    ("names are exact", b"DATA: x\ndata : x\n data: x\ndatas: x\ndat: x\ndata: a\n\n", messages("a")),
    ("a mark at the start", BOM + b"data: a\n\n", messages("a")),
    ("only one mark", BOM + BOM + b"data: x\n\ndata: a\n\n", messages("a")),
    ("a mark further on", b"data: a\n\n" + BOM + b"data: x\n\ndata: b\n\n", messages("a", "b")),
    ("a mark in a value", b"data: " + BOM + b"a\n\n", messages("\ufeffa")),
    ("a mark before a blank line", BOM + b"\ndata: a\n\n", messages("a")),
    ("part of a mark", BOM[:2] + b"data: x\n\ndata: a\n\n", messages("a")),
    ("NUL", b"data: a\0b\n\n\0data: x\n\n", messages("a\0b")),
    ("other line ends are text", "data: a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n\n".encode(),
     messages("a\u2028b\u2029c\x85d\x0be\x0cf\x1cg")),
    ("characters", "event: é\ndata: é€😀\n\n".encode(), [("é", "é€😀")]),
    ("not UTF-8", b"data: a\xff\xc3\nevent: \xff\ndata: \xa9\n\n", [("\ufffd", "a\ufffd\ufffd\n\ufffd")]),
    ("not ended", b"data: a\n\ndata: b\n", messages("a")),
    ("not ended, without a line end", b"data: a\n\ndata: b", messages("a")),
    ("not ended, after CR", b"data: a\r\rdata: b\r", messages("a")),
    ("nothing", b"", []),
    ("only a mark", BOM, []),
]
cases = pytest.mark.parametrize("data, events", [case[1:] for case in STREAMS], ids=[case[0] for case in STREAMS])


@cases
def test_a_stream_has_these_events(xeroctl, data, events):
    assert decoded(xeroctl, data) == events


@cases
def test_a_cut_anywhere_changes_nothing(xeroctl, data, events):
    for at in range(len(data) + 1):
        assert decoded(xeroctl, data[:at], data[at:]) == events, at
        assert decoded(xeroctl, data[:at], b"", data[at:at + 1], b"", data[at + 1:]) == events, at


@cases
def test_one_byte_at_a_time_is_enough(xeroctl, data, events):
    assert decoded(xeroctl, *(data[at:at + 1] for at in range(len(data)))) == events


def test_an_event_comes_with_the_byte_that_ends_it(xeroctl):
    decoder = xeroctl.EventDecoder()
    fed = [len(list(decoder.feed(bytes([byte])))) for byte in b"data: a\n\ndata: b\r\r"]
    assert fed == [0] * 8 + [1] + [0] * 8 + [1]


@pytest.mark.parametrize("size", [64, 65536])
def test_a_line_of_5_megabytes_takes_no_longer_than_many_short_ones(xeroctl, size):
    data = b"data: " + b"x" * 5000000 + b"\n\n"
    begin = time.process_time()
    events = decoded(xeroctl, *(data[at:at + size] for at in range(0, len(data), size)))
    assert events == messages("x" * 5000000)
    assert time.process_time() - begin < MANY_SECONDS


def test_an_event_without_end_is_refused(xeroctl, monkeypatch):
    monkeypatch.setattr(xeroctl, "MAX_EVENT_BYTES", 1000)
    assert len(decoded(xeroctl, *[b"data: %b\n\n" % (b"x" * 900)] * 10)) == 10
    for piece in (b"x" * 100, b"data: x\n", b": ping\n"):
        with pytest.raises(xeroctl.ServerError):
            decoded(xeroctl, *[piece] * 300)


# -- Replies ---------------------------------------------------------

ODD = [None, True, False, 0, -1, 1.5, "", "text", [], [None], [[]], {}, {"x": None}]


def choices(value):
    return {"choices": value}


@pytest.mark.parametrize("document", [
    *ODD,
    *map(choices, ODD),
    *(choices([value]) for value in ODD),
    *(choices([{"index": value, "delta": {"content": "x"}}]) for value in (1, -1, "0", [], {}, 0.5)),
    *(choices([{"delta": value}]) for value in ODD),
    *(choices([{"delta": {"content": value}}]) for value in ODD if value != "text"),
    *(choices([{"delta": {"content": [{"text": value}]}}]) for value in ODD if value != "text"),
    *(choices([{"delta": {"refusal": value}}]) for value in ODD if value != "text"),
    *(choices([{"delta": {"reasoning": value, "reasoning_content": value}}]) for value in ODD if value != "text"),
    *(choices([{"delta": {"tool_calls": value}}]) for value in ODD),
    *(choices([{"finish_reason": value}]) for value in ODD if value != "text"),
    *({"usage": value} for value in ODD),
    *({"id": value, "model": value} for value in ODD if value != "text"),
], ids=repr)
def test_a_document_of_a_wrong_shape_adds_nothing(xeroctl, document):
    reply = xeroctl.Reply()
    assert (reply.add(document), reply.text, reply.begun, reply.finish_reason) == ("", "", False, None)
    assert (reply.id, reply.model, reply.chunks) == (None, None, 0)
    assert reply.usage is None or set(reply.usage) == {None}


@pytest.mark.parametrize("value", [value for value in ODD if value not in (0, -1) or isinstance(value, bool)], ids=repr)
def test_usage_of_a_wrong_shape_is_no_number(xeroctl, value):
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), value)
    usage.update(prompt_tokens_details={"cached_tokens": value}, completion_tokens_details=value)
    assert set(xeroctl.parse_usage(usage)) == {None}


def test_zero_tokens_are_a_number(xeroctl):
    usage = {"prompt_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
    assert xeroctl.parse_usage(usage) == (0, None, None, 0, None)


@pytest.mark.parametrize("documents, text, reason", [
    ([chunk("a"), chunk("b"), chunk(finish="stop")], "ab", "stop"),
    ([chunk("a", finish="stop"), chunk(choices=[]), chunk(usage=USAGE, choices=[])], "a", "stop"),
    ([completion("whole")], "whole", "stop"),
    ([completion(None, message={"refusal": "no"})], "no", "stop"),
    ([completion([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], "ab", "stop"),
    ([chunk(delta={"content": None, "role": "assistant"}), chunk("a", finish="length")], "a", "length"),
    ([choices([{"index": 1, "delta": {"content": "x"}}, {"index": 0, "delta": {"content": "a"}}])], "a", None),
    ([choices([{"delta": {"content": "a"}}])], "a", None),
    ([chunk("\ud83d"), chunk("\ude00"), chunk("\ud83d!")], "😀\ufffd!", None),
], ids=str)
def test_documents_add_up_to_a_reply(xeroctl, documents, text, reason):
    reply = xeroctl.Reply()
    for document in documents:
        reply.add(document)
    assert (reply.text, reply.finish_reason, reply.begun) == (text, reason, True)


# -- Random input ----------------------------------------------------

TOKENS = [None, True, 0, -1, 10 ** 18, 1e300, "", "x", "\ud800", "\x1b[31m", KEY]
TOKENS += [[], {}, [[[[]]]], {"text": 5}, "0", 429, 503]
TEXTS = [b"1e999", b"NaN", b"-Infinity", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b'"\\ud83d"', b"null", b'"']
VALID = [
    [chunk(delta={"role": "assistant", "content": None}), chunk("Hel"), chunk("lo", finish="stop"),
     chunk(usage=dict(USAGE, prompt_tokens_details={"cached_tokens": 1}), choices=[])],
    [chunk(delta={"reasoning_content": "Hm"}), chunk("x"), {"error": {"message": "m", "code": 503, "retry_after": 1}}],
    [completion("whole"), {"detail": [{"loc": ["body", "n"], "msg": "bad"}]}, {"object": "error", "message": "m"}],
    [{"error": "text"}, {"message": "text", "type": "t", "status": 500}, ["list", {"msg": "x"}]],
]


def mutated_document(rng, value):
    """Return *value* with one part, found by a random walk, replaced by something odd."""
    if rng.random() < 0.25 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(TOKENS)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    copy = value.copy()
    copy[key] = mutated_document(rng, value[key])
    return copy


def mutated_bytes(rng, data):
    """Return *data* with a few bytes changed, removed, doubled or inserted."""
    for _ in range(rng.randrange(4)):
        at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        end = min(end, at + 40)
        data = rng.choice([
            data[:at] + bytes([rng.randrange(256)]) + data[at + 1:], data[:at] + data[end:], data[:end] + data[at:],
            data[:at] + rng.choice(TEXTS + [b"\n", b"\r", b"\n\n", b"data:", b"event: error\n"]) + data[at:],
        ])
    return data


def random_stream(rng):
    """Return the bytes of a stream that is random, mutated, or both."""
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(rng.choice(b'data: event\r\n\n{}[]"\\,:0') for _ in range(rng.randrange(300)))
    if kind == 1:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(300)))
    documents = [mutated_document(rng, document) for document in rng.choice(VALID)]
    data = sse(*(json.dumps(document).encode().join((b"data: ", b"\n\n")) for document in documents), DONE)
    return mutated_bytes(rng, data) if kind > 4 else data


def pieces(rng, data):
    """Yield *data* in pieces of random lengths."""
    while data:
        at = rng.randrange(1, 200)
        yield data[:at]
        data = data[at:]


def headers(rng):
    dates = ["Thu, 01 Jan 2026 00:00:00 GMT", "Thu, 01 Jan 99999 00:00:00 GMT"]
    values = ["", "0", "5", "-1", "nan", *dates, "\xff", "1 2 3 4 5"]
    names = ["Retry-After", "Retry-After-Ms", "Date", "X-Request-ID", "Location"]
    return {name: rng.choice(values) for name in names if rng.random() < 0.3}


def check_error(xeroctl, error):
    """Check that *error* can be shown, as a line and as JSON."""
    assert isinstance(error, xeroctl.XeroctlError) and str(error)
    assert 1 <= error.exit_status <= 8
    json.dumps([str(error), error.status, error.code, error.request_id, error.retryable, error.retry_after])
    xeroctl.printable(str(error)).encode("utf-8", "replace")
    assert error.retry_after is None or 0 <= xeroctl.retry_delay(1, error.retry_after, 0) <= 60


def check_stream(xeroctl, data, headers):
    """Take the pieces *data* the way that the tool does, to the end or to an error of ours."""
    decoder, reply = xeroctl.EventDecoder(), xeroctl.Reply()
    try:
        for piece in data:
            for event in decoder.feed(piece):
                if event.data.strip() == "[DONE]":
                    continue
                document = xeroctl.event_document(event)
                if xeroctl.is_error(document):
                    raise xeroctl.build_error(document, 200, headers, KEY)
                reply.add(document)
    except xeroctl.XeroctlError as error:
        check_error(xeroctl, error)
    reply.seconds, reply.first_token_seconds = 1.0, 0.5
    reply.text.encode()
    lines = [xeroctl.footer_line(reply), xeroctl.finish_notice(reply) or "", str(xeroctl.usage_fields(reply, True))]
    xeroctl.printable("".join(lines)).encode("utf-8", "replace")


def test_no_stream_raises_anything_but_our_own_errors(xeroctl):
    for seed in range(FUZZ_STREAMS):
        rng = random.Random(seed)
        data = random_stream(rng)
        try:
            check_stream(xeroctl, pieces(rng, data), headers(rng))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {data[:2000]!r}") from error


def test_no_error_body_raises_anything(xeroctl):
    for seed in range(FUZZ_STREAMS // 4):
        rng = random.Random(seed)
        document = mutated_document(rng, rng.choice(rng.choice(VALID)))
        body = rng.choice([mutated_bytes(rng, json.dumps(document).encode()), random_stream(rng)])
        status = rng.choice([301, 400, 401, 403, 404, 407, 422, 429, 500, 503])
        try:
            check_error(xeroctl, xeroctl.parse_error(body, status, headers(rng), rng.choice([KEY, None])))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {status} {body[:2000]!r}") from error


@pytest.mark.parametrize("document", [
    '{"error": %s}', '{"error": {"message": %s}}', '{"detail": [{"loc": %s, "msg": "x"}]}', '{"error": {"code": %s}}',
    '{"choices": %s}', '{"choices": [{"delta": {"content": %s}}]}', "%s",
])
def test_no_depth_of_nesting_raises_anything_else(xeroctl, document):
    for depth in [*range(1, 100, 7), *range(100, 1400), *range(1400, 100000, 9973)]:
        for opening, closing in ("[]", ('{"error":', "}")):
            text = document % (opening * depth + "0" + closing * depth)
            event = b"data: %b\n\n" % text.encode()
            check_stream(xeroctl, [event], {})
            check_error(xeroctl, xeroctl.parse_error(text.encode(), 422, {}, KEY))


# -- Printable -------------------------------------------------------


@pytest.mark.parametrize("text, shown", [
    ("plain, é 😀\u2028\u202e\ufeff", "plain, é 😀\u2028\u202e\ufeff"),
    ("a\tb\nc", "a\tb\nc"),
    ("a\rb\r\nc", "ab\nc"),
    ("\x1b[31m\x1b]0;t\x07", "\u241b[31m\u241b]0;t\u2407"),
    ("\x00\x08\x0b\x0c\x7f", "\u2400\u2408\u240b\u240c\u2421"),
    ("\x80\x85\x9b2J\x9d\x9f", "\ufffd\ufffd\ufffd2J\ufffd\ufffd"),
    ("\xa0\xad", "\xa0\xad"),
    ("", ""),
], ids=ascii)
def test_printable_leaves_nothing_that_drives_a_terminal(xeroctl, text, shown):
    assert xeroctl.printable(text) == shown


def test_printable_leaves_no_control_character_but_newline_and_tab(xeroctl):
    shown = xeroctl.printable("".join(map(chr, range(0x250))))
    assert [character for character in shown if ord(character) < 32 or 127 <= ord(character) < 160] == ["\t", "\n"]
