"""Bytes into bodies, bodies into events, events into a Reply, errors out of anything: tables of cases, and random input."""

import gzip
import json
import random
import time

import pytest

from loopback import DONE, USAGE, chunk, completion, sse

FUZZ_STREAMS = 10000
KEY = "xero_acme_secret"
MANY_SECONDS = 8  # a decoder that reads a line anew for each chunk takes minutes for what takes a second


def decoded(xeroctl, *chunks):
    """Return the (name, data) pairs that *chunks* hold, without those of stray lines."""
    decoder = xeroctl.EventDecoder()
    return [tuple(event) for data in chunks for event in decoder.feed(data) if event.name]


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
    ("a name that is shorter", b"dat: x\nerror: x\n{\ndata: a\n\n", messages("a")),
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


@pytest.mark.smoke
@cases
def test_a_cut_anywhere_changes_nothing(xeroctl, data, events):
    for at in range(len(data) + 1):
        assert decoded(xeroctl, data[:at], data[at:]) == events, at
        assert decoded(xeroctl, data[:at], b"", data[at:at + 1], b"", data[at + 1:]) == events, at


@pytest.mark.smoke
@cases
def test_one_byte_at_a_time_is_enough(xeroctl, data, events):
    assert decoded(xeroctl, *(data[at:at + 1] for at in range(len(data)))) == events


def test_an_event_comes_with_the_byte_that_ends_it(xeroctl):
    decoder = xeroctl.EventDecoder()
    fed = [len(decoder.feed(bytes([byte]))) for byte in b"data: a\n\ndata: b\r\r"]
    assert fed == [0] * 8 + [1] + [0] * 8 + [1]


@pytest.mark.smoke
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


@pytest.mark.parametrize("data, blocks", [
    (b'{"a": 1}', ['{"a": 1}']),
    (b'{"a":\n 1}\n\ndata: x\n\n{"b"}\n', ['{"a":\n 1}', '{"b"}']),
    (b"error: x\r\n\r\n", ["error: x"]),
    (b"foo\rdata: a\rbar: \xff\r\r", ["foo\nbar: \ufffd"]),
    (BOM + b"{}\n", ["{}"]),
    (b"data: a\n\nevent: x\nid: 1\nretry: 1\n: x\n:\n", []),
    (b"data: not ended", []),
    (b"", []),
], ids=str)
def test_what_is_no_field_is_an_event_without_a_name(xeroctl, data, blocks):
    for at in range(len(data) + 1):
        decoder = xeroctl.EventDecoder()
        events = decoder.feed(data[:at]) + decoder.feed(data[at:]) + decoder.finish()
        assert [text for name, text in events if not name] == blocks, at


# -- Bodies ----------------------------------------------------------

TE, GZIP = b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n"
FIVE = b"5\r\nHello\r\n"
BODIES = [  # headers, what follows the blank line, the body, whether it is complete at its end, what is left
    ("length", b"Content-Length: 5\r\n", b"HelloHTTP", b"Hello", True, b"HTTP"),
    ("length of zero", b"Content-Length: 0\r\n", b"HTTP", b"", True, b"HTTP"),
    ("until the close", b"", b"Hello", b"Hello", False, b""),
    ("chunks", TE, b"3\r\nHel\r\n2\r\nlo\r\n0\r\n\r\nHTTP", b"Hello", True, b"HTTP"),
    ("chunks that hold line ends", TE, b"7\r\n\r\n5\r\n\r\n\r\n2\r\n\r\n\r\n0\r\n\r\n", b"\r\n5\r\n\r\n\r\n", True, b""),
    ("an extension", TE, b"5;a=b\r\nHello\r\n0;c\r\n\r\n", b"Hello", True, b""),
    ("blanks and zeros", TE, b"0005  \r\nHello\r\n000\r\n\r\n", b"Hello", True, b""),
    ("capitals", TE, b"A\r\nHelloHello\r\n0\r\n\r\n", b"HelloHello", True, b""),
    ("trailers", TE, FIVE + b"0\r\nA: b\r\nC: d\r\n\r\nHTTP", b"Hello", True, b"HTTP"),
    ("chunks beside a length", TE + b"Content-Length: 2\r\n", FIVE + b"0\r\n\r\n", b"Hello", True, b""),
    ("gzip", GZIP, gzip.compress(b"Hello"), b"Hello", False, b""),
    ("gzip of two members", GZIP, gzip.compress(b"Hel") + gzip.compress(b"lo") + b"\0\0", b"Hello", False, b""),
    ("gzip in chunks", GZIP + TE, b"%x\r\n%b\r\n0\r\n\r\n" % (len(gzip.compress(b"Hello")), gzip.compress(b"Hello")), b"Hello", True, b""),
]


def body_of(xeroctl, *pieces, method="POST"):
    decoder = xeroctl.ResponseDecoder(method)
    return decoder, b"".join([decoder.feed(piece) for piece in pieces])


@pytest.mark.parametrize("headers, sent, body, complete, unread", [case[1:] for case in BODIES], ids=[case[0] for case in BODIES])
def test_a_body_is_the_same_however_it_is_cut(xeroctl, headers, sent, body, complete, unread):
    data = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n" + headers + b"\r\n" + sent
    ways = [[data[:at], data[at:]] for at in range(len(data) + 1)] + [[data[at:at + 1] for at in range(len(data))]]
    for way in ways:
        decoder, seen = body_of(xeroctl, *way)
        assert (seen, decoder.complete, decoder.unread) == (body, complete, unread), way
        decoder.finish()
        assert decoder.complete and decoder.head.status == 200


@pytest.mark.parametrize("headers, sent, body", [
    (b"Content-Length: 9\r\n", b"Hello", b"Hello"),
    (TE, FIVE, b"Hello"),
    (TE, b"9\r\nHello", b"Hello"),
    (TE, FIVE + b"zz\r\n", b"Hello"),
    (TE, FIVE + b"-5\r\nHello", b"Hello"),
    (TE, FIVE + b"\r\n\r\n", b"Hello"),
    (TE, FIVE + b"f" * 70000, b"Hello"),
    (TE, b"4\r\nHello\r\n0\r\n\r\n", b"Hell"),
    (TE, b"0x5\r\nHello\r\n", b""),
    (TE, b"+5\r\nHello\r\n", b""),
    (TE, b"5\r\nHellof\r\nHello", b"Hello"),
    (TE, b"5\r\nHello\r\r\n5\r\nHello", b"Hello"),
    (TE, b"", b""),
    (GZIP, gzip.compress(b"Hello")[:-1], b"Hello"),
    (GZIP + b"Content-Length: 20\r\n", gzip.compress(b"Hello"), b"Hello"),
], ids=str)
def test_a_body_that_is_broken_gives_what_stands_before(xeroctl, headers, sent, body):
    decoder, seen = body_of(xeroctl, b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n" + sent)
    assert seen == body and not decoder.complete
    with pytest.raises(xeroctl.IncompleteError):
        decoder.finish()


def test_a_coding_that_is_broken_gives_what_stands_before(xeroctl):
    data = gzip.compress(b"Hello")
    decoder, seen = body_of(xeroctl, b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n" + GZIP + b"\r\n" + data[:-8], b"\xff" * 9)
    assert seen == b"Hello"
    for call in (lambda: decoder.feed(b""), decoder.finish):
        with pytest.raises(xeroctl.ServerError):
            call()


@pytest.mark.parametrize("members", [1, 2])
def test_one_read_of_a_body_cannot_fill_the_memory(xeroctl, members):
    data = gzip.compress(b" " * (xeroctl.MAX_REPLY_BYTES // members + 1)) * members
    decoder, seen = body_of(xeroctl, b"HTTP/1.1 200 OK\r\n" + GZIP + b"\r\n" + data)
    assert seen == b""
    with pytest.raises(xeroctl.ServerError, match="^the reply is over 64 MiB$"):
        decoder.feed(b"")


@pytest.mark.parametrize("data", [b"SSH-2.0-OpenSSH\r\n", b"\r\nHTTP/1.1 200 OK\r\n\r\n", b"HTTP/2 200\r\n\r\n", b"\x15\x03\x03", b"HTTP/1.1 2000 OK\r\n\r\n", b"<"],
                         ids=str)
def test_what_is_no_http_is_said_at_once(xeroctl, data):
    with pytest.raises(xeroctl.WireError):
        body_of(xeroctl, *(data[at:at + 1] for at in range(len(data))))


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\nA: b\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=str)
def test_a_head_that_does_not_end_is_none(xeroctl, data):
    decoder, body = body_of(xeroctl, data)
    with pytest.raises(xeroctl.IncompleteError):
        decoder.finish()
    assert (decoder.head, body) == (None, b"")


@pytest.mark.parametrize("data, method, keeps", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "POST", True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close\r\n\r\n", "POST", False),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", "POST", False),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n", "POST", True),
    (b"HTTP/1.1 204 No Content\r\n\r\n", "POST", True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", "HEAD", True),
    (b"HTTP/1.1 200 OK\r\n\r\n", "CONNECT", True),
    (b"HTTP/1.1 200 OK\r\n" + TE + b"\r\n0\r\n\r\n", "GET", True),
], ids=str)
def test_whether_another_response_can_follow(xeroctl, data, method, keeps):
    decoder, body = body_of(xeroctl, data, method=method)
    assert (body, decoder.complete, decoder.keeps_open) == (b"", True, keeps)


def test_a_head_is_kept_as_it_came(xeroctl):
    data = b"HTTP/1.1 200 Fine\r\nA: b\r\na:  c \r\nnonsense\r\n: x\r\nContent-Type: text/\r\n plain\r\n\r\n"
    head = body_of(xeroctl, data)[0].head
    assert head[:3] == ("1.1", 200, "Fine")
    assert (head.headers["a"], head.headers["content-type"]) == ("b, c", "text/ plain")
    assert head.lines == ["HTTP/1.1 200 Fine", "A: b", "a:  c ", "nonsense", ": x", "Content-Type: text/ plain"]


# -- Replies ---------------------------------------------------------

ODD = [None, True, False, 0, -1, 1.5, "", "text", [], [None], [[]], {}, {"x": None}]


def context(xeroctl, status=200, headers=None, secrets=(KEY,), url="http://h/e/v1/chat/completions", method="POST"):
    return xeroctl.ErrorContext(status, headers or {}, list(secrets), url, "", method, "http://h/v1/chat/completions")


def decoder_of(xeroctl, headers=None):
    head = xeroctl.ResponseHead("1.1", 200, "OK", {"content-type": "text/event-stream", **(headers or {})}, [])
    return xeroctl.AnswerDecoder(True, head, context(xeroctl, headers=head.headers))


def answered(xeroctl, documents, more=b""):
    """Return the Reply that a stream of *documents* is, and the error in it."""
    decoder, reply = decoder_of(xeroctl), xeroctl.Reply()
    data = sse(*(json.dumps(document).encode().join((b"data: ", b"\n\n")) for document in documents))
    for part in (decoder.feed(data + more, 1.0), decoder.finish(2.0)):
        if part:
            reply.add(part)
    return reply, decoder.error


def choices(value):
    return {"choices": value}


@pytest.mark.smoke
@pytest.mark.parametrize("document", [
    *ODD,
    *map(choices, ODD),
    *(choices([value]) for value in ODD),
    *(choices([{"delta": value}]) for value in ODD),
    *(choices([{"message": value}]) for value in ODD),
    *(choices([{"delta": {"content": value}}]) for value in ODD if value != "text"),
    *(choices([{"delta": {"content": [{"text": value}]}}]) for value in ODD if value != "text"),
    *(choices([{"delta": {"refusal": value}}]) for value in ODD if value != "text"),
    *(choices([{"delta": {"reasoning": value, "reasoning_content": value}}]) for value in ODD if value != "text"),
    *(choices([{"delta": {"tool_calls": value, "function_call": value and []}}]) for value in ODD),
    *(choices([{"finish_reason": value}]) for value in ODD if value != "text"),
    *({"usage": value} for value in ODD),
    *({"id": value, "model": value} for value in ODD if value != "text"),
], ids=repr)
def test_a_document_of_a_wrong_shape_adds_nothing(xeroctl, document):
    reply, _ = answered(xeroctl, [document])
    assert (reply.text, reply.first_at, reply.finish_reason, reply.has_reasoning) == ("", None, None, False)
    assert (reply.id, reply.model, reply.deltas, reply.tool_calls) == (None, None, 0, [])
    assert set(reply.usage) == {None}


@pytest.mark.parametrize("index", [1, -1, "0", [], {}, 0.5, 7], ids=repr)
def test_the_only_choice_is_the_answer_whatever_its_index(xeroctl, index):
    document = choices([{"index": index, "delta": {"content": "x"}}])
    for count in (1, 4, 5, 50):
        assert answered(xeroctl, [document] * count)[0].text == "x" * count
    assert answered(xeroctl, [document, chunk("a"), document, chunk("b")])[0].text in ("ab", "xaxb")


@pytest.mark.parametrize("value", [value for value in ODD if value not in (0, -1) or isinstance(value, bool)], ids=repr)
def test_usage_of_a_wrong_shape_is_no_number(xeroctl, value):
    usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), value)
    usage.update(prompt_tokens_details={"cached_tokens": value}, completion_tokens_details=value)
    assert set(xeroctl.parse_usage(usage)) == {None}


def test_zero_tokens_are_a_number(xeroctl):
    usage = {"prompt_tokens": 0, "prompt_tokens_details": {"cached_tokens": 0}}
    assert xeroctl.parse_usage(usage) == (0, None, None, 0, None)


@pytest.mark.parametrize("count, parsed", [(12.0, 12), (12.5, None), (1e300, None), (10 ** 40, None), (float("inf"), None), (float("nan"), None)])
def test_a_count_that_is_a_whole_float_is_a_number(xeroctl, count, parsed):
    seen = xeroctl.parse_usage({"total_tokens": count}).total
    assert (seen, type(seen)) == (parsed, type(parsed))


@pytest.mark.smoke
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
    ([chunk("a"), chunk("\ud83d")], "a\ufffd", None),
    ([chunk("a"), completion("ab")], "ab", "stop"),
    ([chunk("a"), completion("b")], "a", "stop"),
    ([chunk("a\ud83d"), completion("a😀b")], "a\ufffd", "stop"),
], ids=str)
def test_documents_add_up_to_a_reply(xeroctl, documents, text, reason):
    reply, _ = answered(xeroctl, documents)
    assert (reply.text, reply.finish_reason, reply.first_at) == (text, reason, 1.0)


def test_a_character_of_the_reasoning_is_joined_however_it_is_cut(xeroctl):
    documents = [chunk(delta={"reasoning": "a\ud83d"}), chunk(delta={"reasoning": "\ude00b"}), chunk("c", finish="stop")]
    stream = b"".join(b"data: %b\n\n" % json.dumps(document).encode() for document in documents)
    for at in range(len(stream) + 1):
        decoder = decoder_of(xeroctl)
        chunks = [decoder.feed(stream[:at], 1.0), decoder.feed(stream[at:], 2.0), decoder.finish(3.0)]
        assert "".join(one.reasoning for one in chunks if one) == "a😀b", at


def test_what_a_whole_message_holds_is_given_once(xeroctl):
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    whole = {"reasoning_content": "Hm.", "content": "Hello", "tool_calls": [call]}
    documents = [chunk(delta={"reasoning_content": "Hm."}), chunk("Hello"), chunk(delta={"tool_calls": [call]})]
    for sent in ([completion(message=whole)], [*documents, completion(message=whole)], [*documents, chunk(finish="stop")]):
        decoder, reply = decoder_of(xeroctl), xeroctl.Reply()
        seen = decoder.feed(sse(*sent), 1.0)
        reply.add(seen)
        assert (seen.reasoning, seen.text, reply.tool_calls) == ("Hm.", "Hello", ["f"])


@pytest.mark.parametrize("text, answer, reasoning", [
    ("Hello", "Hello", False),
    ("<think>Hm.</think>\n\nHello", "Hello", True),
    (" \n<think>\n</think>Hello", "Hello", True),
    ("<think>Hm.", "", True),
    ("<think>Hm.</thin", "", True),
    ("<thin", "<thin", False),
    ("a <think>b</think>", "a <think>b</think>", False),
    ("<think>a</think>b<think>c</think>", "b<think>c</think>", True),
    ("</think>b", "</think>b", False),
], ids=str)
def test_thoughts_are_told_from_the_answer_however_they_are_cut(xeroctl, text, answer, reasoning):
    for at in range(len(text) + 1):
        reply, _ = answered(xeroctl, [chunk(text[:at]), chunk(text[at:])])
        assert (reply.text, reply.has_reasoning) == (answer, reasoning), at
        splitter = xeroctl.ThoughtSplitter()
        parts = [splitter.feed(text[:at]), splitter.feed(text[at:]), splitter.finish()]
        assert "".join(thought + rest for thought, rest in parts) == text
        assert "".join(rest for _, rest in parts).strip() == answer


def test_a_chunk_holds_all_that_a_read_brought(xeroctl):
    documents = [chunk("a"), chunk("b"), chunk(delta={"reasoning": "Hm."}), chunk(delta={"role": "assistant"}), chunk(usage=USAGE, choices=[])]
    decoder = decoder_of(xeroctl)
    texts = [json.dumps(document) for document in documents]
    seen = decoder.feed(b"".join(b"data: %b\n\n" % text.encode() for text in texts), 5.0)
    assert (seen.text, seen.reasoning, seen.deltas, seen.at, seen.usage[:3]) == ("ab", "Hm.", 3, 5.0, (9, 3, 12))
    assert (seen.documents, seen.sources) == (documents, texts)
    assert decoder.feed(b": ping\n\n", 6.0) is None
    assert decoder.feed(b'data: {"x": NaN}\n\ndata: {"x":\ndata: 1}\n\n', 7.0).sources == [None, None]
    assert decoder.finish(8.0) is None and isinstance(decoder.error, xeroctl.CutShortError)


@pytest.mark.parametrize("text, code", [
    ("a\n```python\nx = 1\n\ny\n```\nb\n```\nz\n```", "x = 1\n\ny"),
    ("```\n```", ""),
    ("```\n\n```", ""),
    ("~~~\n```\n~~~", "```"),
    ("````\n```\nx\n```\n````", "```\nx\n```"),
    ("1. a\n   ```sh\n   x\n     y\n   ```", "x\n  y"),
    ("```\nnot closed\n", "not closed"),
    ("```x```", None),
    ("no `code`", None),
    ("", None),
], ids=repr)
def test_the_first_code_block_is_extracted(xeroctl, text, code):
    assert xeroctl.extract_code_block(text) == code
    assert xeroctl.find_code_blocks(text)[:1] == ([] if code is None else [code])


def test_all_code_blocks_are_found(xeroctl):
    assert xeroctl.find_code_blocks("```\na\n```\n\n  ```c\n  d\n  ```\n```\ne") == ["a", "d", "e"]


def test_a_fence_ends_where_the_lines_end_in_cr_lf(xeroctl):
    assert xeroctl.find_code_blocks("Here:\r\n```sh\r\nls\r\npwd\r\n```\r\nThat lists.\r\n") == ["ls\npwd"]


@pytest.mark.parametrize("text, printed", [
    ('{"a": [NaN, -Infinity, 1e999, -1e999, 1.5, 1e3]}', '{"a":[null,null,null,null,1.5,1000.0]}'),
    ('"\\ud83d\\ude00 \\ud83d é"', '"😀 \\ud83d é"'),
])
def test_what_is_printed_is_json(xeroctl, text, printed):
    assert xeroctl.json_text(xeroctl.parse_json(text)) == printed


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
    names = ["retry-after", "retry-after-ms", "date", "x-request-id", "location"]
    return {name: rng.choice(values) for name in names if rng.random() < 0.3}


def check_error(xeroctl, error):
    """Check that *error* can be shown, as a line and as JSON."""
    assert isinstance(error, xeroctl.XeroctlError) and str(error)
    assert 1 <= error.exit_status <= 8
    json.dumps([str(error), error.status, error.code, error.request_id, error.retryable, error.retry_after])
    xeroctl.sanitize(str(error)).encode("utf-8", "replace")
    assert error.retry_after is None or 0 <= xeroctl.retry_delay(1, error.retry_after, 0) <= 60


def check_stream(xeroctl, data, headers):
    """Take the pieces *data* the way that the tool does, to the end or to an error of ours."""
    decoder, reply = decoder_of(xeroctl, headers), xeroctl.Reply(5)
    for piece in [*data, None]:
        part = decoder.finish(2.0) if piece is None else decoder.feed(piece, 1.0)
        if part:
            reply.add(part)
            assert len(part.documents) == len(part.sources)
            xeroctl.json_text(part.documents)
    try:
        if decoder.error:
            raise decoder.error
        reply.check_answer()
    except xeroctl.XeroctlError as error:
        check_error(xeroctl, error)
    reply.text.encode()
    reply.first_seconds = 0.5
    lines = [xeroctl.footer_line(reply, 1.0), xeroctl.finish_warning(reply) or "", xeroctl.finish_note(reply) or "",
             str(xeroctl.usage_fields(reply, 1.0, True))]
    xeroctl.sanitize("".join(lines)).encode("utf-8", "replace")


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
            check_error(xeroctl, xeroctl.parse_error(body, context(
                xeroctl, status, headers(rng), rng.choice([[KEY], []]), method=rng.choice(["GET", "POST"]))))
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
            check_error(xeroctl, xeroctl.parse_error(text.encode(), context(xeroctl, 422)))
