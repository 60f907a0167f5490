"""Hostile wires: a table of what servers, proxies and networks send, and what the tool makes of it.

A new quirk is one more row: its name, the bytes on the wire, and the text, the status and the one line on stderr, with
--stream, without it, or for `both`.  Written from the WHATWG HTML standard (9.2.6), RFC 9110, RFC 9112 and what vLLM,
llama.cpp, Ollama, LiteLLM, Azure, OpenRouter and the proxies before them are known to send.
"""

import gzip
import json
import re
import select
import zlib
from collections import namedtuple

import pytest

from conftest import XEROCTL
from driver import Driver
from loopback import (BEFORE_REQUEST, DONE, Call, ClientGone, Drip, Hold, Reset, as_json, chunk, completion, head, http_chunk,
                      json_response, response, sse, stream, stream_head)

Wire = namedtuple("Wire", "name connections expected")
Expected = namedtuple("Expected", "options text status line")

# -- Words of the table ----------------------------------------------


def wire(name, reply, *expected):
    """Return a row: *reply* is what one connection sends, bytes or steps; a tuple of these is one connection each."""
    connections = reply if isinstance(reply, tuple) else (reply,)
    return Wire(name, connections, [one for some in expected for one in some])


def streamed(text="Hello", status=0, line="", options=()):
    """Expect this with --stream: text before its newline, the line after `xeroctl: `, SERVER being the address in it."""
    return [Expected(("--stream", *options), text, status, line)]


def single(text="Hello", status=0, line="", options=()):
    """Expect this of a single shot."""
    return [Expected(tuple(options), text, status, line)]


def both(*args, **options):
    return streamed(*args, **options) + single(*args, **options)


def partly(text, status, line, options=()):
    """Expect the part of an answer that came before it failed; a single shot shows it too."""
    return streamed(text, status, line, options) + single(text, status, line, options)


def matching(pattern):
    return re.compile(pattern, re.DOTALL)


def data(text):
    """Return an event of the bytes or the text *text*."""
    return b"data: %b\n\n" % (text if isinstance(text, bytes) else text.encode())


def cut(*pieces, headers=()):
    """Return a chunked stream that is read in exactly these pieces."""
    return stream_head(headers, chunked=True) + b"".join(map(http_chunk, pieces)) + b"0\r\n\r\n"


def cut_at_each(text):
    return cut(*(text[at:at + 1] for at in range(len(text))))


def error(message="no", **fields):
    return {"error": {"message": message, **fields}}


def choice(**fields):
    return {"choices": [{"index": 0, **fields}]}


def html(status, title):
    """Return the page that a proxy sends for *status*."""
    page = f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n<center><h1>{title}</h1></center>\r\n</body>\r\n</html>\r\n"
    return response(page.encode(), status, {"Content-Type": "text/html", "Server": "nginx"})


def coded(coding, body, kind="application/json"):
    return head("200 OK", {"Content-Type": kind, "Content-Encoding": coding}) + body


def headed(*lines, body=b"", first=b"HTTP/1.1 200 OK", kind=b"Content-Type: text/event-stream"):
    """Return a response with these header lines as they stand."""
    return b"\r\n".join([first, *filter(None, [kind]), *lines, b"", b""]) + body


def pause(sock):
    select.select([sock], [], [], 0.03)


def flood(sock):
    """Send 50 MB, of which no client should read more than its buffers hold."""
    for sent in range(50):
        if sent > 20:
            raise AssertionError(f"the client read {sent} MB")
        try:
            sock.sendall(b"x" * 1000000)
        except OSError:
            raise ClientGone from None


HEL, LO, STOP = chunk("Hel"), chunk("lo"), chunk(finish="stop")
HELLO = [HEL, LO, STOP, DONE]
EVENTS = sse(*HELLO)
BODY = as_json(completion("Hello"))
PRETTY = json.dumps(completion("Hello"), indent=2).encode()
ANSWER = json_response(completion("Hello"))
JSON = {"Content-Type": "application/json"}
NOT_ENDED = "the reply was cut short: the stream ended before its end"
CLOSED = "the reply was cut short: SERVER closed the connection"
NO_SIZE = "the reply was cut short: SERVER sent an invalid chunk size"
NOT_INFLATED = "the reply was cut short: SERVER sent an incomplete compressed body"
NO_WORD = "SERVER closed the connection without an answer"
SILENT = "SERVER sent nothing for 0.2 s: see --timeout"
SHORT_TIMEOUT = ["--timeout", "0.2"]
NO_REASON = "note: the server gave no reason for the end: the answer may be incomplete"
NO_ANSWER = "the reply holds no answer"
NO_TEXT = "the answer is empty"
EMPTY = "the reply is empty: check the base URL"
NOT_JSON = "the reply is not JSON: check the base URL"
PAGE = "the reply is an HTML page: check the base URL"
EVENT_NOT_JSON = "the stream holds something that is not JSON"
NOT_CODED = "the reply is not in the encoding that it claims"
CUT = "warning: the answer was cut at the token limit (finish reason %s)"
WITHHELD = "warning: the answer was cut or withheld by a content filter (finish reason %s)"
TOOL = "note: the model asked for a tool call: -o json shows it"
SLOW = "wait, or raise --retries"
USED_UP = "waiting does not help: check the plan and the credit"
PROXY = "a proxy or firewall on the way may have answered"
REDIRECT = "redirects are not followed: if you trust https://elsewhere.example/v1, make it the base URL"
NOT_HTTP = matching(r"SERVER does not speak HTTP: (its answer begins with|the first line of its answer is) .+")
BIG_HEAD = "SERVER does not speak HTTP: the head of its answer is over 1 MiB"
NO_SLUGS = "check --endpoint and the base URL: without slugs it is http://SERVER/v1/chat/completions"
BOM = b"\xef\xbb\xbf"

# -- Event streams: line ends, fields, characters (WHATWG HTML, 9.2.6) -----


def ends(*line_ends):
    """Return the events of HELLO, their line ends replaced by *line_ends* in turn."""
    lines = EVENTS.split(b"\n")
    return b"".join(line + line_ends[at % len(line_ends)] for at, line in enumerate(lines[:-1]))


def lines_of(document, end=b"\n"):
    """Return an event whose JSON stands on several data lines."""
    return b"".join(b"data: %b%b" % (line, end) for line in json.dumps(document, indent=1).encode().split(b"\n")) + end


LINES = [
    wire("LF", stream(*HELLO), both()),
    wire("CRLF", stream(ends(b"\r\n")), both()),
    wire("CR", stream(ends(b"\r")), both()),
    wire("LF and CRLF in turn", stream(ends(b"\n", b"\r\n")), both()),
    wire("CRLF and LF in turn", stream(ends(b"\r\n", b"\n")), both()),
    wire("CR and CRLF in turn", stream(ends(b"\r", b"\r\n")), both()),
    wire("CRLF and CR in turn", stream(ends(b"\r\n", b"\r")), both()),
    wire("LF and CR in turn", stream(ends(b"\n", b"\r")), both()),
    wire("every end in turn", stream(ends(b"\n", b"\r", b"\r\n", b"\r", b"\r", b"\r\n", b"\r\n", b"\n")), both()),
    wire("LF, cut at each byte", cut_at_each(EVENTS), both()),
    wire("CRLF, cut at each byte", cut_at_each(ends(b"\r\n")), both()),
    wire("CR, cut at each byte", cut_at_each(ends(b"\r")), both()),
    wire("CR ends the stream", stream_head() + ends(b"\r", b"\r\n")[:-1], both()),
    wire("a CRLF cut in two by a pause", [stream_head(), sse(HEL)[:-2] + b"\r", Call(pause), b"\n\r", Call(pause), b"\n" + sse(LO, STOP, DONE)],
         both()),
    wire("blank lines everywhere", stream(b"\n\r\n\r\r", HEL, b"\n\n\n", LO, b"\r\n\r\n", STOP, DONE), both()),
    wire("byte-order mark", stream(BOM + sse(HEL), LO, STOP, DONE), both()),
    wire("byte-order mark, cut in it", cut(BOM[:1], BOM[1:2], BOM[2:] + EVENTS[:3], EVENTS[3:]), both()),
    wire("a second byte-order mark hides a line", stream(BOM + BOM + sse(HEL), LO, STOP, DONE), both("lo")),
    wire("a byte-order mark further on hides a line", stream(HEL, BOM + sse(LO), STOP, DONE), both("Hel")),
    wire("comments", stream(b": ping\n\n:\n\n:\r\n:x\n", HEL, b": data: x\n", LO, STOP, DONE), both()),
    wire("a comment between the lines of an event", stream(b"data: {\n: ping\ndata: " + as_json(HEL)[1:] + b"\n\n", LO, STOP, DONE), both()),
    wire("OpenRouter's comments", stream(b": OPENROUTER PROCESSING\n\n" * 50, *HELLO), both()),
    wire("sse-starlette's pings", stream(b": ping - 2026-01-01 00:00:00.000000+00:00\r\n\r\n" * 3, ends(b"\r\n")), both()),
    wire("a comment of 5 MB", stream(b":" + b"x" * 5000000 + b"\n\n", *HELLO), both()),
    wire("a comment that is no UTF-8", stream(b":\xff\xfe\x00\n\n", *HELLO), both()),
    wire("a comment as the last thing", stream(*HELLO[:-1], b": bye"), both()),
    wire("unknown fields", stream(b"id: 7\nretry: 10\nfoo: bar\nnonsense\nx_y: {}\n", *HELLO), both()),
    wire("retry is no number", stream(b"retry: soon\n\n", *HELLO), both()),
    wire("an id with NUL", stream(b"id: a\0b\n", *HELLO), both()),
    wire("names of fields are exact", stream(b"DATA: no\ndata : no\n data: no\nDat: no\ndatas: no\n\n", *HELLO), both()),
    wire("data without a colon", stream(b"data\n\n", *HELLO), both()),
    wire("data without a value", stream(b"data:\n\ndata: \n\n", *HELLO), both()),
    wire("data without a space", stream(EVENTS.replace(b"data: ", b"data:")), both()),
    wire("data with two spaces", stream(EVENTS.replace(b"data: ", b"data:  ")), both()),
    wire("data with a tab", stream(EVENTS.replace(b"data: ", b"data:\t")), both()),
    wire("several data lines", stream(lines_of(HEL), lines_of(LO, b"\r\n"), lines_of(STOP, b"\r"), DONE), both()),
    wire("a data line without a colon among several", stream(lines_of(HEL).replace(b"data: {\n", b"data\ndata: {\ndata\n"), LO, STOP, DONE),
         both()),
    wire("several data lines cut a string", stream(data(b'{"choices": [{"delta": {"content": "a\ndata: b"}}]}')),
         both("", 5, EVENT_NOT_JSON)),
    wire("NUL in a comment and an unknown field", stream(b":\0\n\0: \0\n", *HELLO), both()),
    wire("NUL escaped in the text", stream(chunk("a\0b"), STOP, DONE), both("a\0b")),
    wire("NUL bare in the JSON", stream(data(b'{"choices": [{"delta": {"content": "a\0b"}}]}')), both("", 5, EVENT_NOT_JSON)),
    wire("controls escaped in the text go to a pipe unchanged", stream(chunk("\x1b[31m\x07\r\x9b"), STOP, DONE),
         both("\x1b[31m\x07\r\x9b")),
    wire("a line of 5 MB", stream(chunk("x" * 5000000), STOP, DONE), both("x" * 5000000)),
    wire("a line of 5 MB of spaces", stream(b"data:" + b" " * 5000000 + as_json(HEL) + b"\n\n", LO, STOP, DONE), both()),
    wire("a name of 1 MB", stream(b"event: " + b"x" * 1000000 + b"\ndata: no\n\n", *HELLO), both()),
    wire("20,000 empty events", stream(b"\n" * 20000 + b"data\n\n" * 20000, *HELLO), both()),
    wire("2,000 chunks of one letter", stream(sse(chunk("x")) * 2000, STOP, DONE), both("x" * 2000)),
    wire("invalid UTF-8 in the text", stream(data(b'{"choices": [{"delta": {"content": "a\xff\xc3(\xe2\x82b"}}]}'), STOP, DONE),
         both("a\ufffd\ufffd(\ufffdb")),
    wire("Latin-1 in the text", stream(data(as_json(chunk("é")).decode().encode("latin-1")), STOP, DONE), both("\ufffd")),
    wire("a surrogate in UTF-8", stream(data(b'{"choices": [{"delta": {"content": "a\xed\xa0\xbdb"}}]}'), STOP, DONE),
         both("a\ufffd\ufffd\ufffdb")),
    wire("invalid UTF-8 in a name is no message", stream(b"event: \xff\ndata: no\n\n", *HELLO), both()),
    wire("characters cut at each byte", cut_at_each(sse(chunk("é€😀"), STOP, DONE)), both("é€😀")),
    wire("a character cut by a pause", [stream_head(), sse(chunk("é"))[:-45], Call(pause), sse(chunk("é"))[-45:], sse(STOP, DONE)], both("é")),
    wire("other line ends are text", stream(chunk("a\u2028b\u2029c\x85d\x0be\x0cf"), STOP, DONE),
         both("a\u2028b\u2029c\x85d\x0be\x0cf")),
    wire("escaped characters", stream(data(json.dumps(chunk("é😀\u2028"))), STOP, DONE), both("é😀\u2028")),
    wire("a surrogate pair in two chunks", stream(data(json.dumps(chunk("\ud83d"))), data(json.dumps(chunk("\ude00"))), STOP, DONE),
         both("😀")),
    wire("half a surrogate pair", stream(data(json.dumps(chunk("a\ud83d"))), data(json.dumps(chunk("b"))), STOP, DONE),
         both(matching("a(\\?|\ufffd)b"))),
    wire("half a surrogate pair at the end", stream(data(json.dumps(chunk("a\ud83d"))), STOP, DONE),
         both(matching("a(\\?|\ufffd)?"))),
    wire("a newline at the end is enough", stream(chunk("Hello\n"), STOP, DONE), both("Hello")),
    wire("two newlines stay", stream(chunk("Hello\n\n"), STOP, DONE), both("Hello\n")),
    wire("spaces and newlines alone", stream(chunk(" \n "), STOP, DONE), both((" \n ", ""), 5, NO_TEXT)),
    wire("names that are not ours", stream(b"event: x_metrics\ndata: not JSON\n\n", HEL, b'event: x_error\ndata: {"error": "no"}\n\n', LO, STOP, DONE),
         both()),
    wire("names that are ours", stream(b"event: message\n" + sse(HEL), b"event:\n" + sse(LO), b"event\n" + sse(STOP), DONE),
         both()),
    wire("a name without data", stream(b"event: error\n\n", *HELLO), both()),
    wire("the last name counts", stream(b"event: error\nevent: message\n" + sse(HEL), LO, STOP, DONE), both()),
    wire("Anthropic's pings", stream(b'event: ping\ndata: {"type": "ping"}\n\n', *HELLO), both()),
]

# -- The end of a stream ---------------------------------------------

END = [
    wire("DONE", stream(*HELLO), both()),
    wire("DONE with spaces", stream(HEL, LO, STOP, b"data:   [DONE]  \n\n"), both()),
    wire("DONE with tabs and CR", stream(HEL, LO, STOP, b"data:\t[DONE]\t\r\n\r\n"), both()),
    wire("DONE without a space", stream(HEL, LO, STOP, b"data:[DONE]\n\n"), both()),
    wire("DONE on several data lines", stream(HEL, LO, STOP, b"data\ndata: [DONE]\ndata\n\n"), both()),
    wire("DONE with a name of its own is none", stream(HEL, b"event: x_end\n" + DONE), partly("Hel", 8, NOT_ENDED)),
    wire("DONE, kept open", [stream_head(), EVENTS, Hold()], both()),
    wire("DONE, chunked and kept open", [stream_head(chunked=True), http_chunk(EVENTS), Hold()], both()),
    wire("DONE, more and kept open", [stream_head(), EVENTS, sse(chunk("no"), error()), b"data: {", Hold()], both()),
    wire("DONE, then nonsense", stream(*HELLO, b"\xff\0<html>"), both()),
    wire("DONE, then a reset", [stream_head(), EVENTS, Call(pause), Reset()], both()),
    wire("DONE twice", stream(*HELLO, DONE), both()),
    wire("DONE without a reason", stream(HEL, LO, DONE), both(line=NO_REASON)),
    wire("DONE in lower case", [stream_head(), sse(HEL, LO, STOP), b"data: [done]\n\n", Hold()], both()),
    wire("DONE in quotes", [stream_head(), sse(HEL, LO, STOP), b'data: "[DONE]"\n\n', Hold()], both()),
    wire("DONE not ended, with a reason", stream_head() + EVENTS[:-2], both()),
    wire("DONE not ended, without a reason", stream_head() + sse(HEL) + DONE[:-1], partly("Hel", 8, NOT_ENDED)),
    wire("only DONE", stream(DONE), both("", 5, NO_ANSWER)),
    wire("a reason and no DONE, as of transformers", stream(HEL, LO, STOP), both()),
    wire("a reason on the last text", stream(HEL, chunk("lo", finish="stop"), DONE), both()),
    wire("a reason on the first text, and more", stream(chunk("Hel", finish="stop"), LO, DONE), both()),
    wire("a reason that is cut off", stream_head() + sse(HEL, STOP)[:-2], partly("Hel", 8, NOT_ENDED)),
    wire("a reason alone", stream(STOP, DONE), both("", 5, NO_TEXT)),
    *[wire(f"a reason of {reason}", stream(HEL, chunk("lo", finish=reason), DONE), both(line=CUT % reason, options=["-q"]))
      for reason in ("length", "model_length", "max_tokens", "MAX_TOKENS")],
    wire("length, with a limit of ours", stream(HEL, chunk("lo", finish="length"), DONE),
         both(line=CUT % "length" + ": see --max-tokens", options=["--max-tokens", "3"])),
    *[wire(f"a reason of {reason}", stream(HEL, chunk("lo", finish=reason), DONE), both(line=WITHHELD % reason, options=["-q"]))
      for reason in ("content_filter", "content_filter: hate", "SAFETY", "RECITATION", "refusal")],
    *[wire(f"a reason of {reason}", stream(HEL, chunk("lo", finish=reason), DONE), both())
      for reason in ("eos", "end_turn", "stop_sequence", "STOP")],
    *[wire(f"a reason of {reason}", stream(HEL, chunk("lo", finish=reason), DONE),
           partly("Hello", 8, f"the reply was cut short: the server failed (finish reason {reason})"))
      for reason in ("network_error", "abort", "insufficient_system_resource")],
    wire("a reason that nobody knows", stream(HEL, chunk("lo", finish="x\x1b[2J"), DONE),
         both(line="warning: the answer may not be whole (finish reason x\u241b[2J)", options=["-q"])),
    wire("a reason of 10,000 letters", stream(HEL, chunk("lo", finish="x" * 10000), DONE),
         both(line=matching("warning: the answer may not be whole .finish reason x{100}."))),
    wire("an unknown reason", stream(HEL, chunk("lo", finish="eos_token"), DONE), both()),
    wire("a reason that is a number", stream(HEL, LO, choice(delta={}, finish_reason=1), DONE), both(line=NO_REASON)),
    wire("a reason that is a list, no DONE", stream(HEL, choice(delta={}, finish_reason=["stop"])), partly("Hel", 8, NOT_ENDED)),
    wire("a reason that is an empty text, as of some vLLM", stream(choice(delta={"content": "Hello"}, finish_reason=""), STOP, DONE), both()),
    wire("a reason of another choice is not ours", stream(HEL, {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}),
         partly("Hel", 8, NOT_ENDED)),
    wire("no reason and no DONE", stream(HEL, LO), partly("Hello", 8, NOT_ENDED)),
    wire("only the head", stream_head(), both("", 8, NOT_ENDED)),
    wire("only comments", stream(b": ping\n\n" * 3), both("", 8, NOT_ENDED)),
    wire("only a role, then the close", stream(chunk(delta={"role": "assistant", "content": ""})), both("", 8, NOT_ENDED)),
]

# -- Shapes ----------------------------------------------------------


def odd(name, document):
    """Return a row in which *document* comes between the chunks of an answer and adds nothing to it."""
    return wire(name, stream(HEL, document, LO, STOP, DONE), both())


SHAPES = [
    odd("choices are null", {"choices": None}),
    odd("choices are empty, as Azure begins", {"choices": [], "prompt_filter_results": [{"prompt_index": 0}]}),
    odd("choices are an object", {"choices": {"0": {"delta": {"content": "no"}}}}),
    odd("choices are a number", {"choices": 7}),
    odd("choices are a text", {"choices": "no"}),
    odd("choices are lists", {"choices": [["no"], []]}),
    odd("choices are null in a list", {"choices": [None]}),
    odd("choices are numbers and texts", {"choices": [1, "no", True, 1.5]}),
    odd("no choices", {"object": "chat.completion.chunk"}),
    odd("an empty object", {}),
    odd("a delta that is null", choice(delta=None)),
    odd("a delta that is a list", choice(delta=[{"content": "no"}])),
    odd("a delta that is a text", choice(delta="no")),
    odd("a delta that is a number", choice(delta=7)),
    odd("no delta", choice()),
    odd("a message that is a text", choice(message="no")),
    odd("content that is null", choice(delta={"content": None})),
    odd("content that is a number", choice(delta={"content": 7})),
    odd("content that is true", choice(delta={"content": True})),
    odd("content that is an object", choice(delta={"content": {"text": "no"}})),
    odd("content parts of no shape", choice(delta={"content": [None, 1, "no", {"text": 7}, {"type": "image_url"}, []]})),
    odd("a refusal that is a number", choice(delta={"refusal": 7})),
    odd("reasoning that is an object", choice(delta={"reasoning": {"text": "no"}, "reasoning_content": 7})),
    odd("tool calls of no shape", choice(delta={"tool_calls": [None, 7, {"function": "no"}]})),
    odd("usage that is a text", {"choices": [], "usage": "no"}),
    odd("usage that is a list", {"choices": [], "usage": [1, 2, 3]}),
    odd("usage of texts", {"choices": [], "usage": {"prompt_tokens": "9", "completion_tokens": "3"}}),
    odd("usage details that are null", {"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": None}}),
    odd("usage that is negative, huge and true", {"choices": [], "usage": {"prompt_tokens": -1, "total_tokens": 10 ** 30, "completion_tokens": 7}}),
    odd("an id and a model that are numbers", {"choices": [], "id": 7, "model": 7, "created": "now"}),
    odd("an index that is a text", {"choices": [{"index": "1", "delta": {"content": "no"}}]}),
    odd("an index that is 1", {"choices": [{"index": 1, "delta": {"content": "no"}}]}),
    odd("an index that is negative", {"choices": [{"index": -1, "delta": {"content": "no"}}]}),
    odd("an error that is null", {"error": None, "choices": []}),
    odd("an error that is empty", {"error": {}, "choices": []}),
    odd("a detail beside choices", {"detail": None, "choices": []}),
    odd("a vendor's object", {"object": "x_metrics", "x_queue_ms": 5}),
    odd("1,000 unknown fields", {"choices": [], **{f"x_{number}": number for number in range(1000)}}),
    odd("a number of 300 digits", {"choices": [], "created": 10 ** 300}),
    wire("an index that is null", stream(choice(index=None, delta={"content": "Hel"}), LO, STOP, DONE), both()),
    wire("no index", stream({"choices": [{"delta": {"content": "Hel"}}]}, LO, STOP, DONE), both()),
    wire("an index that is 0.0", stream({"choices": [{"index": 0.0, "delta": {"content": "Hel"}}]}, LO, STOP, DONE), both()),
    wire("index 1 before index 0", stream({"choices": [
        {"index": 1, "delta": {"content": "no"}, "finish_reason": "length"},
        {"index": 0, "delta": {"content": "Hello"}, "finish_reason": "stop"}]}, DONE), both()),
    wire("index 1 in chunks of its own", stream(
        {"choices": [{"index": 1, "delta": {"content": "no"}}]}, HEL, {"choices": [{"index": 1, "delta": {"content": "no"}}]}, LO, STOP, DONE),
        both()),
    wire("content in parts", stream(choice(delta={"content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}), STOP, DONE),
         both()),
    wire("a refusal", stream(choice(delta={"refusal": "Hel"}), choice(delta={"refusal": "lo", "content": None}), STOP, DONE),
         both()),
    wire("reasoning_content, as of DeepSeek and vLLM", stream(choice(delta={"reasoning_content": "Hm.", "content": None}), HEL, LO, STOP, DONE),
         both()),
    wire("reasoning, as of OpenRouter and Ollama", stream(choice(delta={"reasoning": "Hm.", "content": ""}), HEL, LO, STOP, DONE), both()),
    wire("reasoning and nothing else", stream(choice(delta={"reasoning": "Hm."}), STOP, DONE), both("", 5, NO_TEXT + ": only reasoning came")),
    wire("reasoning, cut", stream(choice(delta={"reasoning": "Hm."}), chunk(finish="length"), DONE),
         both("", 5, NO_TEXT + ": only reasoning came (finish reason length)")),
    wire("thoughts in the text", stream(chunk("<think>Hm."), chunk("</th"), chunk("ink>\n\nHello"), STOP, DONE), both("<think>Hm.</think>\n\nHello")),
    wire("thoughts and nothing else", stream(chunk("<think>Hm."), chunk("</think>\n"), STOP, DONE),
         both("<think>Hm.</think>", 5, NO_TEXT + ": only reasoning came")),
    wire("tool calls", stream(
        choice(delta={"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}]}),
        choice(delta={"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}), chunk(finish="tool_calls"), DONE), both("", line=TOOL)),
    wire("a tool call without a reason", stream(
        choice(delta={"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}), DONE), both("", line=TOOL)),
    wire("a function call, the older form", stream(choice(delta={"function_call": {"name": "f", "arguments": "{}"}}), chunk(finish="function_call"), DONE),
         both("", line=TOOL)),
    wire("a whole message in a stream", stream(completion("Hello"), DONE), both()),
    wire("a whole message after its deltas, as of MiniMax", stream(HEL, LO, completion("Hello"), DONE), both()),
    wire("a whole message after a part of its deltas", stream(HEL, completion("Hello"), DONE), both()),
    wire("another whole message after deltas", stream(HEL, LO, completion("Hi"), DONE), both()),
    wire("a message that grows beside its deltas, as of Perplexity", stream(
        choice(delta={"content": "Hel"}, message={"content": "Hel"}), choice(delta={"content": "lo"}, message={"content": "Hello"}),
        choice(delta={"content": ""}, message={"content": "Hello"}, finish_reason="stop"), DONE), both()),
    wire("a message that grows", stream(*(choice(message={"content": "Hello"[:end]}) for end in (1, 3, 5)), STOP, DONE), both()),
    wire("the only choice has index 1", stream(*({"choices": [{**part["choices"][0], "index": 1}]} for part in (HEL, LO, STOP)), DONE), both()),
    wire("the only choice has index 1, in many chunks", stream(
        *({"choices": [{**part["choices"][0], "index": 1}]} for part in [chunk("x")] * 20 + [STOP]), DONE), both("x" * 20)),
    wire("a chunk under a name of its own", stream(b"event: completion.delta\n" + sse(HEL), b"event: x_y\n" + sse(LO), b"event: end\n" + sse(STOP), DONE),
         both()),
    wire("text in place of delta, as of old completions", stream({"choices": [{"index": 0, "text": "no", "finish_reason": None}]}, DONE),
         both("", 5, NO_ANSWER)),
    wire("usage in every chunk", stream(*({**part, "usage": {"completion_tokens": 1}} for part in (HEL, LO, STOP)), DONE),
         both()),
    wire("a new id in each chunk", stream(*({**part, "id": str(at)} for at, part in enumerate((HEL, LO, STOP))), DONE), both()),
    wire("names twice, the last counts", stream(data('{"choices": [{"delta": {"content": "no", "content": "Hello"}}]}'), STOP, DONE), both()),
    wire("JSON of a number", stream(HEL, data("7")), partly("Hel", 5, "error in the reply: not a completion: 7")),
    *[wire(f"JSON of {text}", stream(HEL, data(text), LO, STOP, DONE), both()) for text in ("null", '""')],
    wire("JSON of a list", stream(HEL, data('[{"message": "no"}]')), partly("Hel", 5, "error in the reply: no")),
    wire("JSON with NaN", stream(HEL, data('{"choices": [], "x": NaN}'), LO, STOP, DONE), both()),
    wire("JSON with 1e999", stream(HEL, data('{"choices": [], "x": 1e999}'), LO, STOP, DONE), both()),
    *[wire(f"JSON with {number}, as JSON", stream(data('{"choices":[{"delta":{"content":"x"},"y":[%s]}]}' % number), DONE),
           streamed('{"choices":[{"delta":{"content":"x"},"y":[null]}]}', options=["-o", "json", "-q"]))
      for number in ("NaN", "-Infinity")],
    wire("JSON with a comma at the end", stream(HEL, data('{"choices": [],}')), partly("Hel", 5, EVENT_NOT_JSON)),
    wire("JSON cut in the event", stream(HEL, data(as_json(LO)[:-3])), partly("Hel", 5, EVENT_NOT_JSON)),
    wire("two documents in an event", stream(HEL, data(as_json(LO) + as_json(LO))), partly("Hel", 5, EVENT_NOT_JSON)),
    wire("JSON 100,000 deep", stream(HEL, data(b'{"choices":' + b"[" * 100000)), partly("Hel", 5, EVENT_NOT_JSON)),
    wire("a number of 5,000 digits", stream(HEL, data(b'{"choices": [], "x": ' + b"9" * 5000 + b"}"), LO, STOP, DONE),
         partly(matching("Hel(lo)?"), (0, 5), matching(f"({EVENT_NOT_JSON})?"))),
]

# -- Whole replies ---------------------------------------------------

WHOLE = [
    wire("JSON", ANSWER, both()),
    wire("JSON as text/plain", response(BODY, headers={"Content-Type": "text/plain"}), both()),
    wire("JSON without a type", response(BODY), both()),
    wire("JSON in capitals", response(BODY, headers={"Content-Type": "Application/JSON; Charset=UTF-8"}), both()),
    wire("JSON as application/problem+json", response(BODY, headers={"Content-Type": "application/problem+json"}), both()),
    wire("JSON with a byte-order mark", response(BOM + BODY, headers=JSON), both()),
    wire("JSON with spaces and newlines around it", response(b"\r\n \t" + BODY + b"\n\n"), both()),
    wire("JSON after 70 kB of spaces, as keep-alive", response(b" \n" * 35000 + BODY, headers=JSON), both()),
    wire("JSON in UTF-16", response(json.dumps(completion("Hello")).encode("utf-16"), headers=JSON), both("", 5, NOT_JSON)),
    wire("JSON with invalid UTF-8", response(BODY.replace(b"Hello", b"H\xffllo"), headers=JSON), both("", 5, NOT_JSON)),
    wire("JSON after spaces alone, without a type", [stream_head().replace(b"Content-Type: text/event-stream\r\n", b""), b" \n", Call(pause), b"\n", Call(pause), BODY], both()),
    *[wire(f"JSON as an event stream, {name}", [stream_head(), form, *more], both()) for name, form, more in [
        ("closed", BODY, []), ("ended", BODY + b"\n\n", []), ("after blank lines", b"\n\n" + BODY, []),
        ("with DONE", BODY + b"\n\n" + DONE, [Hold()]), ("with DONE on the next line", BODY + b"\n" + DONE, [Hold()]),
        ("with DONE glued to it", BODY + DONE, [Hold()]), ("pretty-printed", PRETTY, []), ("pretty-printed, with DONE", PRETTY + b"\n" + DONE, []),
        ("after a comment", b": ping\n\n" + BODY, [])]],
    wire("JSON as an event stream, without a reason", [stream_head(), as_json(completion("Hello", finish=None))], both(line=NO_REASON)),
    wire("chunks without data:, a line each", [stream_head(), b"\n".join(map(as_json, [HEL, LO, STOP])) + b"\n"], both()),
    wire("nonsense in an event stream", stream(b"OK\n\nnothing: here\n{broken\n\n", *HELLO), both()),
    wire("an event stream as JSON", response(EVENTS, headers=JSON), both("", 5, NOT_JSON)),
    wire("an event stream as text/plain", response(EVENTS, headers={"Content-Type": "text/plain"}), streamed(),
         single("", 5, NOT_JSON)),
    wire("an event stream without a type", response(EVENTS), streamed(), single("", 5, NOT_JSON)),
    wire("an event stream in capitals", response(EVENTS, headers={"Content-Type": "TEXT/Event-Stream;charset=UTF-8"}), both()),
    wire("an event stream nobody asked for", stream(*HELLO), both()),
    wire("JSON lines, as of Ollama's own API", response(b'{"message": {"content": "no"}, "done": false}\n' * 2, headers={
        "Content-Type": "application/x-ndjson"}), both("", 5, NOT_JSON)),
    wire("two documents", response(BODY + BODY, headers=JSON), both("", 5, NOT_JSON)),
    wire("JSON that is cut", response(BODY[:-5], headers=JSON), both("", 5, NOT_JSON)),
    wire("an empty body", response(b"", headers=JSON), both("", 5, EMPTY)),
    wire("a body of spaces", response(b" \n ", headers=JSON), both("", 5, NOT_JSON)),
    wire("an empty body without a type", response(b""), streamed("", 8, NOT_ENDED), single("", 5, EMPTY)),
    wire("an empty stream, as of llama-cpp-python", stream(), both("", 8, NOT_ENDED)),
    wire("HTML with 200", html("200 OK", "Welcome to nginx!"), both("", 5, PAGE)),
    wire("HTML with 200 as JSON", response(b"<!DOCTYPE html>", headers=JSON), both("", 5, PAGE)),
    wire("HTML with 200 without a type", response(b"\n <html>"), both("", 5, PAGE)),
    wire("text with 200", response(b"OK", headers={"Content-Type": "text/plain"}), streamed("", 8, NOT_ENDED),
         single("", 5, NOT_JSON)),
    wire("binary with 200", response(bytes(range(256)), headers={"Content-Type": "application/octet-stream"}),
         streamed("", 8, NOT_ENDED), single("", 5, NOT_JSON)),
    wire("201", json_response(completion("Hello"), "201 Created"), both()),
    wire("202", json_response({"status": "queued"}, "202 Accepted"), both("", 5, NO_ANSWER)),
    wire("203", json_response(completion("Hello"), "203 Non-Authoritative Information"), both()),
    wire("204", head("204 No Content"), both("", 5, EMPTY)),
    wire("204 with a type", head("204 No Content", JSON), both("", 5, EMPTY)),
    wire("205", response(b"", "205 Reset Content", JSON), both("", 5, EMPTY)),
    wire("206 of the whole", json_response(completion("Hello"), "206 Partial Content"), both()),
    wire("206 of a part", response(BODY[:40], "206 Partial Content", {**JSON, "Content-Range": "bytes 0-39/400"}),
         both("", 5, NOT_JSON)),
    wire("299", json_response(completion("Hello"), "299 Whatever"), both()),
    wire("no choices", json_response({"id": "x", "choices": []}), both("", 5, NO_ANSWER)),
    wire("choices that are null", json_response({"choices": None}), both("", 5, NO_ANSWER)),
    wire("a choice that is a list", json_response({"choices": [["no"]]}), both("", 5, NO_ANSWER)),
    wire("only choice 1", json_response({"choices": [{"index": 1, "message": {"content": "Hello"}, "finish_reason": "stop"}]}), both()),
    wire("a message that is missing", json_response(choice(finish_reason="stop")), both("", 5, NO_TEXT)),
    wire("a message that is null", json_response(choice(message=None, finish_reason="stop")), both("", 5, NO_TEXT)),
    wire("reasoning alone", json_response(completion(None, message={"reasoning_content": "Hm."})), both("", 5, NO_TEXT + ": only reasoning came")),
    wire("NaN in logprobs", response(BODY[:-1] + b', "logprobs": [NaN, -Infinity, 1e999]}', headers=JSON), both()),
    wire("a message that is a list", json_response(choice(message=["no"])), both("", 5, NO_ANSWER)),
    wire("content that is a list of texts", json_response(choice(message={"content": ["no"]})), both("", 5, NO_ANSWER)),
    wire("content that is null", json_response(completion(None)), both("", 5, NO_TEXT)),
    wire("content that is empty", json_response(completion("")), both("", 5, NO_TEXT)),
    wire("content that is blank", json_response(completion(" \n")), both((" ", ""), 5, NO_TEXT)),
    wire("content in parts", json_response(completion([{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}])),
         both()),
    wire("a refusal", json_response(completion(None, message={"refusal": "Hello"})), both()),
    wire("reasoning and an answer", json_response(completion("Hello", message={"reasoning_content": "Hm.", "reasoning": "Hm."})),
         both()),
    wire("a tool call", json_response(completion(None, finish="tool_calls", message={"tool_calls": [{"id": "c"}]})),
         both("", line=TOOL)),
    wire("no reason", json_response(completion("Hello", finish=None)), both(line=NO_REASON)),
    wire("usage that is null", json_response(completion("Hello", usage=None)), both()),
    wire("usage that is a list", json_response(completion("Hello", usage=[1])), both()),
    wire("usage of a wrong shape, shown", json_response(completion("Hello", usage={"prompt_tokens": "9", "prompt_tokens_details": [1]})),
         single(line=matching(r"seconds: +[\d.]+\nid: +chatcmpl-1"), options=["--show-usage"])),
    wire("a lone surrogate", response(json.dumps(completion("a\ud83db")).encode(), headers=JSON),
         both(matching("a(\\?|\ufffd)b"))),
    wire("an answer of Anthropic's own API", json_response({"type": "message", "content": [{"type": "text", "text": "no"}]}),
         both("", 5, NO_ANSWER)),
    wire("a stream of Anthropic's own API", stream(
        b'event: message_start\ndata: {"type": "message_start"}\n\n',
        b'event: content_block_delta\ndata: {"delta": {"text": "no"}}\n\n', b'event: message_stop\ndata: {"type": "message_stop"}\n\n'),
        both("", 8, NOT_ENDED)),
]

# -- Errors inside a reply of 200 ------------------------------------


def inside(name, event, status, line):
    """Return the rows of an error *event* before, between and after the text of a stream."""
    line = line if hasattr(line, "pattern") else f"error in the reply{line}"
    return [
        wire(name + ", first", stream(event), both("", status, line)),
        wire(name + ", after text", stream(HEL, event, LO, STOP, DONE), partly("Hel", status, line)),
    ]


ERRORS_INSIDE = [
    *inside("an error object", error(), 5, ": no"),
    *inside("an error text", {"error": "no"}, 5, ": no"),
    *inside("an error list", {"error": ["no", {"message": "way"}]}, 5, matching("error in the reply(: .*)?")),
    *inside("an error that is true", {"error": True, "message": "no"}, 5, ": no"),
    *inside("an error number", {"error": 7}, 5, ""),
    *inside("an error of 400, as of vLLM", error("too long", type="BadRequestError", param=None, code=400), 4, " (BadRequestError): too long"),
    *inside("an error of 401", error(code=401), 3, ": no: set XEROTIER_API_KEY or give --api-key"),
    *inside("an error of 403", error(code=403), 3, ": no: this key may not do that: check its scopes"),
    *inside("an error of 404", error(code=404), 4, ": no: " + NO_SLUGS),
    *inside("an error of 429", error(code=429), 7, ": no: " + SLOW),
    *inside("an error of 500, as of llama.cpp", error(code=500, type="server_error"), 5, " (server_error): no"),
    *inside("an error of code 7", error(code=7), 5, " (7): no"),
    *inside("an error of code -1", error(code=-1), 5, " (-1): no"),
    *inside("an error of code true", error(code=True), 5, ": no"),
    *inside("an error of a text for a code, as of LiteLLM", error(type="None", param="None", code="500"), 5, ": no"),
    *inside("an error beside choices, as of OpenRouter", {
        "id": "gen-1", "object": "chat.completion.chunk", "provider": "x", "error": {"code": "server_error", "message": "no"},
        "choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "error"}]}, 5, " (server_error): no"),
    *inside("an error in a choice, as of OpenRouter", choice(
        delta={"content": ""}, finish_reason="error", error={"code": 502, "message": "no"}), 5, ": no"),
    *inside("an error of generation, as of TGI", {"error": "Request failed during generation", "error_type": "generation"}, 5,
            ": Request failed during generation"),
    *inside("an error of object error, as of old vLLM", {"object": "error", "message": "no", "type": "BadRequestError", "code": 400}, 4,
            " (BadRequestError): no"),
    *inside("an error of type error, as of Anthropic", {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}, 5,
            " (overloaded_error): no"),
    *inside("a bare detail", {"detail": "no"}, 5, ": no"),
    *inside("a bare message", {"message": "no"}, 5, ": no"),
    *inside("a bare string", data('"no"'), 5, ": no"),
    *inside("a list of texts", data('["no", "way"]'), 5, ": no; way"),
    *inside("event: error with JSON", b"event: error\n" + sse(error(code=503)), 5, ": no"),
    *inside("event: error with text", b"event: error\ndata: no\n\n", 5, ": no"),
    *inside("event: error with two lines of text", b"event: error\ndata: no\ndata: way\n\n", 5, ": no way"),
    *inside("event: error with empty data", b"event: error\ndata:\n\n", 5, ": no reason given"),
    *inside("event: error with null", b"event: error\ndata: null\n\n", 5, ": no reason given"),
    *inside("event: error with {}", b"event: error\ndata: {}\n\n", 5, ": no reason given"),
    *inside("event: error with a message", b'event: error\ndata: {"message": "no"}\n\n', 5, ": no"),
    *inside("event: error with a list", b'event: error\ndata: [{"message": "no"}]\n\n', 5, ": no"),
    *inside("event: error with DONE", b"event: error\ndata: [DONE]\n\n", 5, ": [DONE]"),
    *inside("event: error with a chunk", b"event: error\n" + sse(HEL), 5, matching("error in the reply(: .*)?")),
    *inside("event: error with HTML", b"event: error\ndata: <html>\n\n", 5, ": <html>"),
    *inside("an error with controls", error("a\x1b[31mb\r\nc\x07\x9b"), 5, ": a\u241b[31mb c\u2407\ufffd"),
    *inside("an error of 2,000 letters", error("x" * 2000), 5, ": " + "x" * 500),
    *inside("text for JSON", data("Internal Server Error"), 5, matching(EVENT_NOT_JSON)),
    wire("an error after the reason", stream(HEL, STOP, error()), partly("Hel", 5, "error in the reply: no")),
    wire("an error after DONE is not read", stream(*HELLO, error()), both()),
    wire("an error without its blank line", stream_head() + sse(HEL, error())[:-2], partly("Hel", 8, NOT_ENDED)),
    wire("a reason of error, as of OpenRouter", stream(HEL, chunk(finish="error"), DONE),
         partly("Hel", 8, "the reply was cut short: the server failed (finish reason error)")),
    wire("a whole reply with a reason of error", json_response(completion("Hel", finish="error")),
         both("Hel", 8, "the reply was cut short: the server failed (finish reason error)")),
    wire("a whole reply with an error in its choice", json_response(choice(message={"content": ""}, finish_reason="error", error={
        "code": 502, "message": "no"})), both("", 5, "error in the reply: no")),
    *(row for name, form in [
        ("on a line of its own, as of Ollama", b'{"error": {"message": "no", "type": "api_error", "code": 400}}\n'),
        ("alone, not ended", b'{"error": {"message": "no", "type": "api_error", "code": 400}}'),
        ("pretty-printed", json.dumps(error(type="api_error", code=400), indent=2).encode()),
        ("pretty-printed with CRLF", json.dumps(error(type="api_error", code=400), indent=2).encode().replace(b"\n", b"\r\n") + b"\r\n\r\n"),
        ("with DONE", as_json(error(type="api_error", code=400)) + b"\n\n" + DONE),
        ("in a list, as of Gemini", as_json([error(type="api_error", code=400)])),
        ("as a field, as of llama.cpp", b'error: {"code": 400, "message": "no", "type": "api_error"}\n\n'),
        ("as a field, with DONE", b'error: {"code": 400, "message": "no", "type": "api_error"}\n\n' + DONE),
        ("as a field, not ended", b'error:{"error": {"code": 400, "message": "no", "type": "api_error"}}'),
    ] for row in [wire(f"an error {name}, first", stream(form), both("", 4, "error in the reply (api_error): no")),
                  wire(f"an error {name}, after text", stream(HEL, form), partly("Hel", 4, "error in the reply (api_error): no"))]),
    wire("an error as a field, of text", stream(HEL, b"error: no way\n\n"), partly("Hel", 5, "error in the reply: no way")),
    *[wire(f"200 of {name}", json_response(document), both("", status, line)) for name, document, status, line in [
        ("MiniMax", {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}, "choices": None}, 5,
         "error in the reply (1008): insufficient balance"),
        ("Cloudflare", {"success": False, "errors": [{"code": 5006, "message": "no"}], "result": None}, 5, "error in the reply (5006): no"),
        ("no success", {"success": False, "result": 7}, 5, 'error in the reply: {"success":false,"result":7}'),
        ("a code and msg", {"code": 401, "msg": "who"}, 3, "error in the reply: who: set XEROTIER_API_KEY or give --api-key"),
        ("an invalid key", error(code="invalid_api_key"), 3, "error in the reply (invalid_api_key): no: set XEROTIER_API_KEY or give --api-key"),
        ("a rate limit", error(type="rate_limit_error"), 7, "error in the reply (rate_limit_error): no: " + SLOW),
        ("a quota", error(code="insufficient_quota"), 7, "error in the reply (insufficient_quota): no: " + USED_UP),
        ("a bad request", error(type="invalid_request_error"), 4, "error in the reply (invalid_request_error): no"),
        ("AWS", {"Message": "no"}, 5, "error in the reply: no"),
    ]],
    wire("a good reply of MiniMax", json_response(completion("Hello", base_resp={"status_code": 0, "status_msg": ""})), both()),
    wire("a request id", stream(HEL, error(code="x"), headers={"X-Request-ID": "r-1"}),
         partly("Hel", 5, "error in the reply (x, request r-1): no")),
    wire("200 JSON error", json_response(error(code="overloaded")), both("", 5, "error in the reply (overloaded): no")),
    wire("200 JSON error text", json_response({"error": "no"}), both("", 5, "error in the reply: no")),
    wire("200 JSON detail", json_response({"detail": "no"}), both("", 5, "error in the reply: no")),
    wire("200 JSON string", json_response("no"), both("", 5, "error in the reply: no")),
    wire("200 JSON null", json_response(None), both("", 5, "error in the reply: not a completion: null")),
    wire("200 JSON list", json_response([completion("no")]), both("", 5, "error in the reply")),
]

# -- Statuses and pages of errors ------------------------------------

BUSY = {"Retry-After": "0"}
UPSTREAM = b"upstream connect error or disconnect/reset before headers. reset reason: connection termination"


def refused(status, body, code, line, headers=()):
    """Return a row for an answer of *status*, with one connection to answer it."""
    reply = response(body, status, headers) if isinstance(body, bytes) else json_response(body, status, headers)
    return wire(f"{status}{line[:40]}", reply, both("", code, f"HTTP {status[:3]}{line}"))


STATUSES = [
    refused("400 Bad Request", error("no", type="invalid_request_error", param="x", code=None), 4, " (invalid_request_error): no"),
    refused("400 Bad Request", error("filtered", code="content_filter", status=400, innererror={"code": "x"}), 4, " (content_filter): filtered"),
    refused("400 Bad Request", {"detail": [{"loc": ["body", "n"], "msg": "bad", "type": "t"}]}, 4, ": body.n: bad"),
    refused("400 Bad Request", {"object": "error", "message": "no", "type": "BadRequestError", "code": 400}, 4, " (BadRequestError): no"),
    refused("400 Bad Request", {"error": "model is required"}, 4, ": model is required"),
    refused("400 Errors", {"errors": [{"message": "no"}, "way"]}, 4, ": no; way"),
    refused("400 Cloudflare", {"result": None, "success": False, "errors": [{"code": 5006, "message": "AiError: Bad input"}]}, 4, " (5006): AiError: Bad input"),
    refused("400 AWS", {"Message": "no"}, 4, ": no"),
    refused("400 Apigee", {"fault": {"faultstring": "no", "detail": {"errorcode": "x"}}}, 4, ": no"),
    refused("400 OAuth", {"error": "invalid_client", "error_description": "no"}, 4, ": invalid_client: no"),
    refused("400 Baidu", {"error_code": 17, "error_msg": "no"}, 4, " (17): no"),
    refused("400 Other", {"error_message": "no"}, 4, ": no"),
    refused("400 Reason", {"status": "failed", "reason": "no"}, 4, " (failed): no"),
    refused("400 Both", {"error": "SyntaxError", "message": "no"}, 4, ": SyntaxError: no"),
    refused("400 The same twice", {"error": "no", "message": "no"}, 4, ": no"),
    refused("400 OpenRouter", error("Provider returned error", code=400, metadata={
        "raw": '{"error": {"message": "Model supports at most 1 image"}}', "provider_name": "X"}), 4,
        ": Provider returned error: Model supports at most 1 image (provider X)"),
    refused("400 OpenRouter, raw text", error("Provider returned error.", metadata={"raw": "no", "provider_name": "X"}), 4,
            ": Provider returned error: no (provider X)"),
    refused("400 JSON in a message", error('{"error": {"message": "no"}}'), 4, ": no"),
    refused("400 Events", b'data: {"error": {"message": "no"}}\n\n', 4, ": no"),
    refused("400 Unknown", {"oops": [1, 2], "x": None}, 4, ': {"oops":[1,2],"x":null}'),
    refused("400 Unknown inside", {"error": {"oops": 1}}, 4, ': {"error":{"oops":1}}'),
    refused("400 The same words twice", error("no", metadata={"raw": "no"}), 4, ": no"),
    refused("400 Unknown and long", {"oops": "x" * 9999}, 4, ': {"oops":"' + "x" * 491),
    refused("400 TLS", b"Client sent an HTTP request to an HTTPS server.\n", 4, ": Client sent an HTTP request to an HTTPS server: begin the base URL with https://"),
    refused("400 A point", error("No such thing."), 4, ": No such thing."),
    refused("401 A point", error("No such key."), 3, ": No such key: set XEROTIER_API_KEY or give --api-key"),
    refused("400 Bad Request", {}, 4, ""),
    refused("400 Nothing", {"error": None}, 4, ""),
    refused("400 Bad Request", {"error": {"error": {"error": {"message": "deep"}}}}, 4, ": deep"),
    refused("400 Bad Request", EVENTS, 4, ": " + " ".join(EVENTS.decode().split())[:500], {"Content-Type": "text/event-stream"}),
    refused("400 Bad Request", b"\x00\x1b[2J\xff", 4, ": \u2400\u241b[2J\ufffd"),
    refused("401 Unauthorized", {"statusCode": 401, "message": "no"}, 3, ": no: set XEROTIER_API_KEY or give --api-key"),
    refused("402 Payment Required", error("no credits", code=402), 4, ": no credits"),
    refused("403 Empty", b"", 3, ": this key may not do that: check its scopes"),
    refused("403 Forbidden", {}, 3, ": this key may not do that: check its scopes"),
    refused("403 Forbidden", b"<html>", 3, ": the answer is an HTML page: " + PROXY),
    refused("403 Forbidden", b"error code: 1020", 3, ": error code: 1020: " + PROXY),
    refused("404 Not Found", error("no", code="DeploymentNotFound"), 4, " (DeploymentNotFound) at http://SERVER/e/v1/chat/completions: no: " + NO_SLUGS),
    refused("404 Not Found", b"404 page not found\n", 4, " at http://SERVER/e/v1/chat/completions: 404 page not found: " + NO_SLUGS),
    refused("405 Method Not Allowed", {"detail": "Method Not Allowed"}, 4, ": Method Not Allowed"),
    refused("407 Proxy Authentication Required", b"", 4, ": the proxy wants a user and password: put them into its URL"),
    refused("408 Request Timeout", b"", 4, ""),
    refused("413 Request Entity Too Large", b"<html>", 4, ": the answer is an HTML page"),
    refused("418 I'm a teapot", b"short and stout", 4, ": short and stout"),
    refused("422 Unprocessable Entity", {"error": "no", "error_type": "validation"}, 4, ": no"),
    refused("424 Failed Dependency", {"error": "Request failed", "error_type": "generation"}, 4, ": Request failed"),
    refused("429 Too Many Requests", {"error": "Model is overloaded", "error_type": "overloaded"}, 7, ": Model is overloaded: " + SLOW),
    refused("429 Too Many Requests", error("no", code="429"), 7, ": no: " + SLOW),
    refused("429 Long", error("no"), 7, ": no: the server asks to wait 3600 s", {"Retry-After": "3600"}),
    refused("429 Quota", error("no", type="insufficient_quota"), 7, " (insufficient_quota): no: " + USED_UP),
    refused("451 Unavailable For Legal Reasons", b"", 4, ""),
    refused("460 ", b"", 4, ""),
    refused("499 Client Closed Request", b"", 4, ""),
    refused("500 Internal Server Error", b"Internal Server Error", 5, ": Internal Server Error"),
    refused("500 Internal Server Error", {"error": {"message": "litellm.InternalServerError: no", "type": None, "param": None, "code": "500"}}, 5,
            ": litellm.InternalServerError: no"),
    refused("501 Not Implemented", {"message": "no"}, 5, ": no"),
    refused("503 Service Unavailable", error("Loading model", type="unavailable_error", code=503), 5, " (unavailable_error): Loading model"),
    refused("503 Service Unavailable", UPSTREAM, 5, ": " + UPSTREAM.decode()),
    refused("520 ", b"error code: 520", 5, ": error code: 520"),
    refused("529 ", {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, 5, " (overloaded_error): Overloaded"),
    refused("530 ", b"error code: 1033", 5, ": error code: 1033"),
    refused("561 Unauthorized", b"<html>", 5, ": the answer is an HTML page"),
    refused("599 Network Connect Timeout", b"", 5, ""),
    refused("600 What", b"", 5, ""),
    refused("777 What", error("no"), 5, ": no"),
    refused("999 Request denied", b"<html>", 5, ": the answer is an HTML page"),
    refused("300 Multiple Choices", b"", 5, ": " + REDIRECT, {"Location": "https://elsewhere.example/v1"}),
    refused("301 Moved Permanently", b"<html>", 5, ": " + REDIRECT, {"Location": "https://elsewhere.example/v1"}),
    refused("307 Temporary Redirect", b"", 5, " (request r-1): " + REDIRECT, {"Location": "https://elsewhere.example/v1", "X-Request-ID": "r-1"}),
    wire("302 to controls", headed(b"Location: https://x/\x1b[2J\x9b", b"Content-Length: 0", first=b"HTTP/1.1 302 Found"),
         both("", 5, matching(r"HTTP 302: redirects are not followed: [^\x00-\x1f\x7f-\x9f]+"))),
    wire("304", head("304 Not Modified"), both("", 5, matching("HTTP 304.*"))),
    wire("nginx 502", html("502 Bad Gateway", "502 Bad Gateway"), both("", 5, "HTTP 502: the answer is an HTML page: 502 Bad Gateway")),
    wire("nginx 504", html("504 Gateway Time-out", "504 Gateway Time-out"), both("", 5, "HTTP 504: the answer is an HTML page: 504 Gateway Time-out")),
    wire("AWS ALB 503", response(b"<html>\r\n<head><title>503 Service Temporarily Unavailable</title></head>", "503 Service Temporarily Unavailable",
                                 {"Server": "awselb/2.0", "Content-Type": "text/html"}), both("", 5, "HTTP 503: the answer is an HTML page: 503 Service Temporarily Unavailable")),
    wire("nginx, plain HTTP to its TLS port", html("400 Bad Request", "400 The plain HTTP request was sent to HTTPS port"),
         both("", 4, "HTTP 400: the answer is an HTML page: 400 The plain HTTP request was sent to HTTPS port: begin the base URL with https://")),
    wire("a title with marks", response(b"<TITLE lang=en>\n a &amp; b\n</TITLE>", "500 Oops"), both("", 5, "HTTP 500: the answer is an HTML page: a & b")),
    wire("HAProxy 503", b"HTTP/1.0 503 Service Unavailable\r\nCache-Control: no-cache\r\nConnection: close\r\nContent-Type: text/html\r\n\r\n"
         b"<html><body><h1>503 Service Unavailable</h1>\nNo server is available to handle this request.\n</body></html>\n\n",
         both("", 5, "HTTP 503: the answer is an HTML page")),
    wire("HAProxy 408", b"HTTP/1.0 408 Request Time-out\r\nConnection: close\r\n\r\n<html><body><h1>408</h1></body></html>\n",
         both("", 4, "HTTP 408: the answer is an HTML page")),
    wire("Cloudflare 524 with its ray", response(b"<!DOCTYPE html>", "524 ", {"CF-RAY": "8a1b-FRA"}),
         both("", 5, "HTTP 524: the answer is an HTML page")),
    wire("an error in gzip", response(gzip.compress(as_json(error())), "400 Bad Request", {"Content-Encoding": "gzip"}),
         both("", 4, "HTTP 400: no")),
    wire("an error that is no gzip", response(as_json(error()), "400 Bad Request", {"Content-Encoding": "gzip"}),
         both("", 4, "HTTP 400")),
    wire("an error, chunked", head("400 Bad Request", {"Transfer-Encoding": "chunked"}) + http_chunk(b'{"error": ') + http_chunk(b'"no"}') + http_chunk(b""),
         both("", 4, "HTTP 400: no")),
    wire("an error, chunked and cut", head("400 Bad Request", {"Transfer-Encoding": "chunked"}) + b"14\r\nnot ",
         both("", 4, "HTTP 400: not")),
    wire("an error, then a reset", [head("400 Bad Request", {"Content-Length": 99}) + b"not ", Call(pause), Reset()],
         both("", 4, "HTTP 400: not")),
    wire("an error, then silence", [head("400 Bad Request", {"Content-Length": 99}) + b"not ", Hold()],
         both("", 4, "HTTP 400: not", SHORT_TIMEOUT)),
    wire("an error as a dripping body", [head("400 Bad Request"), Drip(as_json(error()))], both("", 4, "HTTP 400: no")),
    wire("an error with a body of 50 MB", [head("500 Oops"), Call(flood)], both("", 5, "HTTP 500: " + "x" * 500)),
    wire("an error with a chunked body of 50 MB", [
        head("500 Oops", {"Transfer-Encoding": "chunked"}), b"2faf080\r\n", Call(flood)], both("", 5, "HTTP 500: " + "x" * 500)),
    wire("an error of 10 MB in 10 kB of gzip", response(gzip.compress(b"x" * 10000000), "500 Oops", {"Content-Encoding": "gzip"}),
         both("", 5, "HTTP 500: " + "x" * 500)),
    wire("an error with a request id of controls", headed(
        b"X-Request-ID: r\x1b[31m\x07", b"Content-Length: 0", first=b"HTTP/1.1 500 Oops"), both("", 5, "HTTP 500 (request r\u241b[31m\u2407)")),
]

# -- Heads -----------------------------------------------------------


def numbered(count):
    return [b"X-%d: y" % number for number in range(count)]


HEADS = [
    wire("a status line without a reason", headed(body=EVENTS, first=b"HTTP/1.1 200"), both()),
    wire("a status line with a space for a reason", headed(body=EVENTS, first=b"HTTP/1.1 200 "), both()),
    wire("a status line with a long reason", headed(body=EVENTS, first=b"HTTP/1.1 200 " + b"x" * 60000), both()),
    wire("a status line in Latin-1", headed(body=EVENTS, first=b"HTTP/1.1 200 \xe9\xff"), both()),
    wire("a status line with spaces", headed(body=EVENTS, first=b"HTTP/1.1   200   OK"), both()),
    wire("a status line of HTTP/1.0", headed(body=EVENTS, first=b"HTTP/1.0 200 OK"), both()),
    wire("a status line of HTTP/1.2", headed(body=EVENTS, first=b"HTTP/1.2 200 OK"), both()),
    wire("a status line of HTTP/2", headed(body=EVENTS, first=b"HTTP/2 200"), both("", 5, NOT_HTTP)),
    wire("a status line of HTTP/0.9 has none", b"Hello", both("", 5, NOT_HTTP)),
    wire("a status line in lower case", headed(body=EVENTS, first=b"http/1.1 200 OK"), both("", 5, NOT_HTTP)),
    wire("a status line of ICY", headed(body=EVENTS, first=b"ICY 200 OK"), both("", 5, NOT_HTTP)),
    wire("a status of two digits", headed(body=EVENTS, first=b"HTTP/1.1 20 OK"), both("", 5, NOT_HTTP)),
    wire("a status of four digits", headed(body=EVENTS, first=b"HTTP/1.1 2000 OK"), both("", 5, NOT_HTTP)),
    wire("a status that is negative", headed(body=EVENTS, first=b"HTTP/1.1 -200 OK"), both("", 5, NOT_HTTP)),
    wire("a status in words", headed(body=EVENTS, first=b"HTTP/1.1 OK"), both("", 5, NOT_HTTP)),
    wire("an empty status line", b"\r\n" + stream(*HELLO), both("", 5, NOT_HTTP)),
    wire("a status line of 70 kB", headed(body=EVENTS, first=b"HTTP/1.1 200 " + b"x" * 70000), both()),
    wire("a status line of 2 MB", headed(body=EVENTS, first=b"HTTP/1.1 200 " + b"x" * 2000000), both("", 5, BIG_HEAD)),
    wire("TLS", b"\x15\x03\x01\x00\x02\x02\x16", both("", 5, matching(r"SERVER does not speak HTTP: .*https://.*"))),
    wire("HTTP/2 in the clear", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\0" * 18, both("", 5, NOT_HTTP)),
    wire("ssh", [BEFORE_REQUEST, b"SSH-2.0-OpenSSH_9.6\r\n"], both("", 5, NOT_HTTP)),
    wire("a head of LF alone", stream(*HELLO).replace(b"\r\n", b"\n"), both()),
    wire("a header without a colon", headed(b"nonsense", body=EVENTS), both()),
    wire("a header without a colon, before the type", headed(b"nonsense", b"Content-Type: text/event-stream", body=EVENTS, kind=b""), streamed(),
         single(matching("(Hello)?"), (0, 5), matching(f"({NOT_JSON})?"))),
    wire("a header without a name", headed(b": x", body=EVENTS), both()),
    wire("a header with a space before its colon", headed(b"X-A : y", body=EVENTS), both()),
    wire("a header of NUL", headed(b"X-A: a\0b", body=EVENTS), both()),
    wire("a header of bare CR", headed(b"X-A: a\rb", body=EVENTS), both()),
    wire("a header of Latin-1 and UTF-8", headed(b"X-A: \xe9\xff", "X-\xe9: é😀".encode(), body=EVENTS), both()),
    wire("a type over two lines (obs-fold)", headed(b"Content-Type:\r\n text/event-stream", body=EVENTS, kind=b""), both()),
    wire("a header over two lines (obs-fold)", headed(b"X-A: a\r\n\tb\r\n c", body=EVENTS), both()),
    wire("90 headers", headed(*numbered(90), body=EVENTS), both()),
    wire("200 headers", headed(*numbered(200), body=EVENTS), both()),
    wire("5,000 headers", headed(*numbered(5000), body=EVENTS), both()),
    wire("headers without end", headed(*numbered(200000), body=EVENTS), both("", 5, BIG_HEAD)),
    wire("a header of 60 kB", headed(b"X-A: " + b"x" * 60000, body=EVENTS), both()),
    wire("a header of 70 kB", headed(b"X-A: " + b"x" * 70000, body=EVENTS), both()),
    wire("a header of 1,000 kB", headed(b"X-A: " + b"x" * 1000000, body=EVENTS), both()),
    wire("two types", headed(b"Content-Type: text/html", body=EVENTS), both()),
    wire("a type without a value", headed(b"Content-Type:", body=EVENTS, kind=b""), streamed(), single("", 5, NOT_JSON)),
    wire("100 Continue first", b"HTTP/1.1 100 Continue\r\n\r\n" + stream(*HELLO), both()),
    wire("100 Continue twice, with headers", b"HTTP/1.1 100 Continue\r\nX-A: b\r\n\r\n" * 2 + stream(*HELLO), both()),
    wire("103 Early Hints first", b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n" + stream(*HELLO),
         both()),
    wire("103 Early Hints without end", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 50000 + stream(*HELLO), both("", 5, BIG_HEAD)),
    wire("103 Early Hints 2,000 times", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 2000 + stream(*HELLO), both()),
    wire("102 Processing first", b"HTTP/1.1 102 Processing\r\n\r\n" + stream(*HELLO), both()),
    wire("101 is no answer", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n", both("", 5, matching(".*"))),
    wire("only 100 Continue", b"HTTP/1.1 100 Continue\r\n\r\n", both("", 6, NO_WORD)),
]

# -- Lengths, chunks and encodings -----------------------------------


def sized(value, body=EVENTS):
    return headed(b"Content-Length: " + value, body=body)


def whole_sized(value, body=BODY):
    return headed(b"Content-Length: " + value, body=body, kind=b"Content-Type: application/json")


def coded_chunks(*raw, headers=()):
    """Return a stream of raw bytes in the chunked coding."""
    return stream_head(headers, chunked=True) + b"".join(raw)


def size(form, body=EVENTS):
    return form % len(body) + b"\r\n" + body + b"\r\n"


LAST = b"0\r\n\r\n"
FIRST = http_chunk(sse(HEL))
ZIPPED, ZIPPED_EVENTS = gzip.compress(BODY), gzip.compress(EVENTS)
RAW_DEFLATE = zlib.compressobj(wbits=-15)
FLUSHED = zlib.compressobj(wbits=31)
FLUSHED_PARTS = [FLUSHED.compress(sse(part)) + FLUSHED.flush(zlib.Z_SYNC_FLUSH) for part in HELLO]

BODIES = [
    wire("a length", [sized(b"%d" % len(EVENTS)), Hold()], both()),
    wire("a length, whole, kept open", [whole_sized(b"%d" % len(BODY)), Hold()], both()),
    wire("a length of zero", [sized(b"0", b""), Hold()], both("", 8, NOT_ENDED)),
    wire("a length of zero, whole", [whole_sized(b"0", b""), Hold()], both("", 5, EMPTY)),
    wire("a length too small", sized(b"%d" % len(sse(HEL))), partly("Hel", 8, NOT_ENDED)),
    wire("a length too small by the end of DONE", sized(b"%d" % (len(EVENTS) - 1)), both()),
    wire("a length too small, whole", whole_sized(b"%d" % (len(BODY) - 1)), both("", 5, NOT_JSON)),
    wire("a length too large", sized(b"%d" % (len(EVENTS) + 50)), both()),
    wire("a length too large, no DONE", sized(b"9999", sse(HEL)), partly("Hel", 8, CLOSED)),
    wire("a length too large, whole", whole_sized(b"9999"), both("", 8, CLOSED)),
    wire("a length of 30 digits, whole", whole_sized(b"9" * 30), both("", 8, CLOSED)),
    wire("a length that is negative", sized(b"-5"), both()),
    wire("a length that is negative, whole", whole_sized(b"-5"), both()),
    wire("a length that is no number", sized(b"many"), both()),
    wire("a length that is no number, whole", whole_sized(b"0x10"), both()),
    wire("a length that is empty, whole", whole_sized(b""), both()),
    wire("a length of 5,000 digits, whole", whole_sized(b"9" * 5000),
         both(matching("(Hello)?"), (0, 8), matching(f"({CLOSED})?"))),
    wire("two equal lengths", headed(*[b"Content-Length: %d" % len(BODY)] * 2, body=BODY, kind=b"Content-Type: application/json"), both()),
    wire("two lengths, the first is too small", headed(b"Content-Length: 5", b"Content-Length: %d" % len(BODY), body=BODY, kind=None), both("", 5, NOT_JSON)),
    wire("a list of lengths", whole_sized(b"%d, %d" % (len(BODY), len(BODY))), both()),
    wire("more than the length", whole_sized(b"%d" % len(BODY), BODY + b"HTTP/1.1 500 no\r\n\r\n"), both()),
    wire("a length beside chunks", coded_chunks(size(b"%x"), LAST, headers={"Content-Length": 5}), both()),
    wire("no length, to the close", headed(body=BODY, kind=b"Content-Type: application/json"), both()),
    wire("HTTP/1.0, to the close", headed(body=BODY, kind=b"Content-Type: application/json", first=b"HTTP/1.0 200 OK"), both()),
    wire("HTTP/1.0, cut by the close", headed(body=BODY[:-9], kind=b"Content-Type: application/json", first=b"HTTP/1.0 200 OK"),
         both("", 5, NOT_JSON)),
    wire("a chunk", coded_chunks(size(b"%x"), LAST), both()),
    wire("a chunk a byte", cut_at_each(EVENTS), both()),
    wire("a chunk size in upper case", coded_chunks(size(b"%X"), LAST), both()),
    wire("a chunk size with zeros", coded_chunks(size(b"%010x"), b"0000\r\n\r\n"), both()),
    wire("a chunk size with spaces", coded_chunks(size(b"%x  "), LAST), both()),
    wire("a chunk size with an extension", coded_chunks(size(b"%x;a=b;c=\"d;e\""), b"0;last\r\n\r\n"), both()),
    wire("a chunk size with an extension of 4 kB", coded_chunks(size(b"%x;") .replace(b";\r", b";" + b"x" * 4000 + b"\r"), LAST),
         both()),
    wire("a chunk size with LF alone", coded_chunks(size(b"%x").replace(b"\r\n", b"\n"), b"0\n\n"),
         both(matching("(Hello)?"), (0, 8), matching(".*"))),
    wire("trailers", coded_chunks(size(b"%x"), b"0\r\nX-A: b\r\nX-C: d\r\n\r\n"), both()),
    wire("trailers, whole", headed(b"Transfer-Encoding: chunked", body=size(b"%x", BODY) + b"0\r\nX-A: b\r\n\r\n", kind=b""),
         both()),
    wire("trailers without an end", coded_chunks(size(b"%x"), b"0\r\nX-A: b\r\n"), both()),
    wire("Transfer-Encoding in capitals", headed(b"TRANSFER-ENCODING: Chunked", body=size(b"%x") + LAST), both()),
    wire("Transfer-Encoding of identity", headed(b"Transfer-Encoding: identity", body=EVENTS), both()),
    wire("no last chunk, with DONE", coded_chunks(size(b"%x")), both()),
    wire("no last chunk, with a reason", coded_chunks(http_chunk(sse(HEL, LO, STOP))), both()),
    wire("no last chunk, whole", headed(b"Transfer-Encoding: chunked", body=size(b"%x", BODY), kind=b""), both("", 8, CLOSED)),
    wire("no last chunk", coded_chunks(FIRST), partly("Hel", 8, CLOSED)),
    wire("only the last chunk", coded_chunks(LAST), both("", 8, NOT_ENDED)),
    wire("the last chunk too early", coded_chunks(FIRST, LAST, http_chunk(sse(LO))), partly("Hel", 8, NOT_ENDED)),
    wire("a chunk size too large", coded_chunks(FIRST, b"ffff\r\n", sse(LO)), partly("Hello", 8, CLOSED)),
    wire("a chunk size too small", coded_chunks(FIRST, b"5\r\n", sse(LO)), partly("Hel", 8, NO_SIZE)),
    wire("a chunk size that is huge", coded_chunks(FIRST, b"f" * 30 + b"\r\n", sse(LO)), partly("Hel", 8, NO_SIZE)),
    wire("a chunk size of 70 kB", coded_chunks(FIRST, b"f" * 70000 + b"\r\n"), partly("Hel", 8, NO_SIZE)),
    wire("a chunk size that is negative", coded_chunks(FIRST, b"-5\r\n", sse(LO)), partly(matching("Hel(lo)?"), 8, NO_SIZE)),
    wire("a chunk size that is no number", coded_chunks(FIRST, b"zz\r\n", sse(LO)), partly("Hel", 8, NO_SIZE)),
    wire("a chunk size that is empty", coded_chunks(FIRST, b"\r\n", sse(LO)), partly("Hel", 8, NO_SIZE)),
    wire("a first chunk size that is no number", coded_chunks(EVENTS), both("", 8, NO_SIZE)),
    *[wire(f"a chunk size of {size}", [coded_chunks(FIRST, size.encode() + b"\r\n", sse(LO)), Hold()], partly("Hel", 8, NO_SIZE))
      for size in ("0x5", "1_0", "+5", "-0", "5 5", "5,", "\u0665")],
    wire("a chunk that goes on after its size", [coded_chunks(FIRST[:-2] + b"ff\r\n", sse(LO)), Hold()], partly("Hel", 8, NO_SIZE)),
    wire("a chunk with one byte too many, kept open", [coded_chunks(FIRST[:-2] + b"1\r\n5\r\n", sse(LO)), Hold()], partly("Hel", 8, NO_SIZE)),
    wire("a trailer section of 2 MB", [headed(b"Transfer-Encoding: chunked", body=size(b"%x", BODY) + b"0\r\n" + b"X-A: b\r\n" * 250000, kind=b""), Hold()],
         both("", 8, "the reply was cut short: SERVER sent a trailer section over 1 MiB")),
    wire("a chunk size that is no number, after DONE", coded_chunks(size(b"%x"), b"zz\r\n"), both()),
    wire("gzip", coded("gzip", ZIPPED), both()),
    wire("gzip in capitals", coded("GZIP", ZIPPED), both()),
    wire("x-gzip", coded("x-gzip", ZIPPED), both()),
    wire("gzip of a stream", coded("gzip", ZIPPED_EVENTS, "text/event-stream"), both()),
    wire("gzip of a stream, flushed event by event, kept open", [coded("gzip", b"", "text/event-stream"), *FLUSHED_PARTS, Hold()], both()),
    wire("gzip of a stream, cut at each byte", cut(*(ZIPPED_EVENTS[at:at + 1] for at in range(len(ZIPPED_EVENTS))), headers={"Content-Encoding": "gzip"}),
         both()),
    wire("gzip with a name and a comment in it", coded("gzip", b"\x1f\x8b\x08\x18" + b"\0" * 5 + b"\xff" b"a\0b\0" + ZIPPED[10:]), both()),
    wire("gzip that is cut", coded("gzip", ZIPPED[:-40]), both("", 8, NOT_INFLATED)),
    wire("gzip that is cut in its last bytes", coded("gzip", ZIPPED[:-4]), both("", 8, NOT_INFLATED)),
    wire("gzip that is cut by its length", response(ZIPPED[:-4], headers={**JSON, "Content-Encoding": "gzip"}), both("", 8, NOT_INFLATED)),
    wire("gzip that is cut, in chunks", headed(b"Transfer-Encoding: chunked", b"Content-Encoding: gzip", body=size(b"%x", ZIPPED[:-9]) + LAST),
         both("", 8, NOT_INFLATED)),
    wire("deflate that is cut", coded("deflate", zlib.compress(BODY)[:-2]), both("", 8, NOT_INFLATED)),
    wire("gzip of two members", coded("gzip", gzip.compress(BODY[:30]) + gzip.compress(BODY[30:])), both()),
    wire("gzip of two members, a stream", coded("gzip", gzip.compress(sse(HEL)) + gzip.compress(sse(LO, STOP, DONE)), "text/event-stream"), both()),
    wire("gzip of two members, the second is cut", coded("gzip", gzip.compress(BODY) + ZIPPED[:-4]), both("", 8, NOT_INFLATED)),
    wire("gzip with zeros after it", coded("gzip", ZIPPED + b"\0" * 600), both()),
    wire("gzip of a stream that is cut", coded("gzip", b"".join(FLUSHED_PARTS[:1]), "text/event-stream"),
         partly("Hel", 8, NOT_INFLATED)),
    wire("gzip with a wrong checksum", coded("gzip", ZIPPED[:-8] + b"\0" * 8), both("", 5, NOT_CODED)),
    wire("gzip with a broken middle", coded("gzip", ZIPPED[:40] + b"\xff" * 9 + ZIPPED[49:]),
         both("", 5, matching("the reply is not .*"))),
    wire("gzip that is none", coded("gzip", BODY), both("", 5, NOT_CODED)),
    wire("gzip that is empty", coded("gzip", b""), both("", 5, EMPTY)),
    wire("deflate", coded("deflate", zlib.compress(BODY)), both()),
    wire("deflate that is raw", coded("deflate", RAW_DEFLATE.compress(BODY) + RAW_DEFLATE.flush()), both("", 5, NOT_CODED)),
    wire("identity", coded("identity", BODY), both()),
    wire("an encoding that is empty", coded("", BODY), both()),
    wire("an encoding that is a charset", coded("utf-8", BODY), both()),
    wire("brotli", coded("br", b"\x1b\x2f\x01\xf8\x8d\x94\x6e\xdc"), both("", 5, matching("the reply is not .*"))),
    wire("gzip without a header that says so", response(ZIPPED, headers=JSON), both("", 5, NOT_JSON)),
]

# -- Breaks, silence and drips at each stage -------------------------


def broken(name, steps, close, reset, silence, text=""):
    """Return the rows of a connection that after *steps* is closed, reset, or falls silent (once: that takes its time)."""
    steps = steps if isinstance(steps, list) else [steps]
    return [
        wire(f"{name}: close", steps, partly(text, *close)),
        wire(f"{name}: reset", [*steps, Call(pause), Reset()], partly(text, *reset)),
        wire(f"{name}: silence", [*steps, Hold()], streamed(text, *silence, options=SHORT_TIMEOUT)),
    ]


UNANSWERED, UNENDED, BROKEN, LATE = (6, NO_WORD), (8, NOT_ENDED), (8, CLOSED), (6, SILENT)
ACCENT = sse(HEL) + sse(chunk("é"))[:sse(chunk("é")).index(b"\xc3") + 1]

BREAKS = [
    *broken("before the headers", [], UNANSWERED, UNANSWERED, LATE),
    *broken("in the status line", b"HTTP/1.1 2", UNANSWERED, UNANSWERED, LATE),
    *broken("after the status line", b"HTTP/1.1 200 OK\r\n", UNANSWERED, UNANSWERED, LATE),
    *broken("in the headers", stream_head()[:-9], UNANSWERED, UNANSWERED, LATE),
    *broken("before the blank line", stream_head()[:-2], UNANSWERED, UNANSWERED, LATE),
    *broken("after the headers", stream_head(), UNENDED, UNANSWERED, LATE),
    *broken("after the headers of chunks", stream_head(chunked=True), BROKEN, UNANSWERED, LATE),
    *broken("after the headers of a body", head("200 OK", JSON, {"Content-Length": 99}), BROKEN, UNANSWERED, LATE),
    *broken("after a comment", stream_head() + b": ping\n\n", UNENDED, BROKEN, LATE),
    *broken("between chunks", [stream_head(chunked=True), FIRST], BROKEN, BROKEN, LATE, "Hel"),
    *broken("in a chunk size", [stream_head(chunked=True), FIRST, b"f"], BROKEN, BROKEN, LATE, "Hel"),
    *broken("in a chunk", [stream_head(chunked=True), FIRST, b"ff\r\ndata"], BROKEN, BROKEN, LATE, "Hel"),
    *broken("in an event", [stream_head(), sse(HEL, LO)[:-9]], UNENDED, BROKEN, LATE, "Hel"),
    *broken("before an event's blank line", [stream_head(), sse(HEL, LO)[:-1]], UNENDED, BROKEN, LATE, "Hel"),
    *broken("in a character", [stream_head(), ACCENT], UNENDED, BROKEN, LATE, "Hel"),
    *broken("in a character and a chunk", [stream_head(chunked=True), b"fff\r\n" + ACCENT], BROKEN, BROKEN, LATE, "Hel"),
    *broken("in a body", head("200 OK", JSON, {"Content-Length": len(BODY)}) + BODY[:-9], BROKEN, BROKEN, LATE),
    *broken("in a chunked body", head("200 OK", JSON, {"Transfer-Encoding": "chunked"}) + http_chunk(BODY)[:-9], BROKEN, BROKEN, LATE),
    *broken("after the reason", [stream_head(), sse(HEL, LO, STOP)], (0, ""), (0, ""), (0, ""), "Hello"),
    *broken("after DONE", [stream_head(), EVENTS], (0, ""), (0, ""), (0, ""), "Hello"),
    wire("whole, before the headers: silence", [Hold()], single("", *LATE, options=SHORT_TIMEOUT)),
    wire("whole, in a body: silence", [ANSWER[:-9], Hold()], single("", *LATE, options=SHORT_TIMEOUT)),
    wire("whole, in a stream: silence", [stream_head(), sse(HEL), Hold()], single("Hel", *LATE, options=SHORT_TIMEOUT)),
    wire("a stream as a drip", [stream_head(), Drip(EVENTS)], both()),
    wire("a head and a stream as a drip", [Drip(stream(*HELLO, chunked=True))], both()),
    wire("a body as a drip", [Drip(ANSWER)], both()),
    wire("gzip as a drip", [Drip(coded("gzip", ZIPPED_EVENTS, "text/event-stream"))], both()),
    wire("comments are no silence", [stream_head(), *[Call(lambda sock: select.select([sock], [], [], 0.1)), b": ping\n\n"] * 3, EVENTS],
         both(options=SHORT_TIMEOUT)),
]

# -- Retries and Retry-After -----------------------------------------


def again(line, seconds="0.1"):
    return f"note: {line.partition(': ')[0]}, trying again in {seconds} s"


def asked(name, headers=(), fields=(), status="429 Slow", seconds=None):
    """Return the row of an answer that asks for a wait of *seconds*, as -o json tells it."""
    code, http = (7, 429) if status.startswith("429") else (5, int(status[:3]))
    said = "null" if seconds is None else seconds
    line = matching(r'\{.*"status": %d, .*"retryable": true, "retry_after": %s\}' % (http, said))
    return wire("Retry-After: " + name, json_response(error(**dict(fields)), status, headers), both("", code, line, options=["-o", "json"]))


DATE, SOON = "Thu, 01 Jan 2026 00:00:00 GMT", "Thu, 01 Jan 2026 00:00:09 GMT"
RETRY = ["--retries", "1"]
ONCE = json_response(error("busy"), "503 Busy", BUSY)

RETRIES = [
    asked("seconds", {"Retry-After": "7"}, seconds="7.0"),
    asked("seconds with spaces", {"Retry-After": "  7  "}, seconds="7.0"),
    asked("a fraction", {"Retry-After": "1.5"}, seconds="1.5"),
    asked("zero", {"Retry-After": "0"}, seconds=r"0(\.0)?"),
    asked("a date", {"Retry-After": SOON, "Date": DATE}, seconds=9),
    asked("a date that is over", {"Retry-After": DATE, "Date": SOON}, seconds=0),
    asked("a date of RFC 850", {"Retry-After": "Thursday, 01-Jan-26 00:00:09 GMT", "Date": DATE}, seconds=9),
    asked("a date of asctime", {"Retry-After": "Thu Jan  1 00:00:09 2026", "Date": DATE}, seconds=9),
    asked("nonsense", {"Retry-After": "soon"}),
    asked("empty", {"Retry-After": ""}),
    asked("negative", {"Retry-After": "-5"}),
    asked("huge", {"Retry-After": "9" * 30}, seconds=r"9\d{18}"),
    asked("hexadecimal", {"Retry-After": "0x7"}),
    asked("infinite", {"Retry-After": "inf"}),
    asked("milliseconds", {"retry-after-ms": "250", "retry-after": "1"}, seconds="0.25"),
    asked("in the body", fields={"retry_after": 3}, seconds=3),
    asked("in the body as text", fields={"retry_after": "3"}),
    asked("in the body, negative", fields={"retry_after": -3}, seconds=0),
    asked("in the body, huge", fields={"retry_after": 10 ** 40}, seconds=r"9\d{18}"),
    asked("in the body and the head", {"Retry-After": "7"}, {"retry_after": 3}, seconds="7.0"),
    asked("two of them", [("Retry-After", "7"), ("Retry-After", "9")], seconds="7.0"),
    asked("on a 503", {"Retry-After": "7"}, status="503 Busy", seconds="7.0"),
    asked("nothing on a 503", status="503 Busy"),
    wire("a 503, then the answer", (ONCE, ANSWER), both(line=again("HTTP 503: busy"), options=RETRY)),
    wire("two of 503, then the answer", (ONCE, ONCE, stream(*HELLO)),
         both(line="\n".join("xeroctl: " + again("HTTP 503: busy") for _ in range(2))[9:], options=["--retries", "2"])),
    wire("a 429, then the answer", (json_response(error("busy"), "429 Slow", BUSY), ANSWER),
         both(line=again("HTTP 429: busy: " + SLOW), options=RETRY)),
    wire("an HTML 502, then the answer", (response(b"<html>", "502 Bad", BUSY), ANSWER),
         both(line=again("HTTP 502: the answer is an HTML page"), options=RETRY)),
    wire("a 400 is not retried", json_response(error("no"), "400 Bad", BUSY), both("", 4, "HTTP 400: no", options=RETRY)),
    wire("a 600 is not retried", json_response(error("no"), "600 Bad", BUSY), both("", 5, "HTTP 600: no", options=RETRY)),
    wire("an error before the text, then the answer", (stream(error("busy", code=503, retry_after=0)), stream(*HELLO)),
         both(line=again("error in the reply: busy"), options=RETRY)),
    wire("an error after the text is not retried", stream(HEL, error("busy", code=503, retry_after=0)),
         partly("Hel", 5, "error in the reply: busy", options=RETRY)),
    wire("a reset before the headers, then the answer", ([Reset()], ANSWER),
         both(line=matching(re.escape(again(NO_WORD, "0.")[:-2]) + r"\d s"), options=RETRY)),
    wire("a close after reasoning is not retried", stream(choice(delta={"reasoning": "Hm."})),
         both("", 8, NOT_ENDED, options=RETRY)),
    wire("a reset after reasoning is not retried", [stream_head(), sse(choice(delta={"reasoning": "Hm."})), Call(pause), Reset()],
         both("", 8, CLOSED, options=RETRY)),
]

# -- The tests -------------------------------------------------------

TABLES = {"lines": LINES, "end": END, "shapes": SHAPES, "whole": WHOLE, "errors": ERRORS_INSIDE, "statuses": STATUSES, "heads": HEADS,
          "bodies": BODIES, "breaks": BREAKS, "retries": RETRIES}
ROWS = {f"{table}: {row.name}{' (stream)' * ('--stream' in expected.options)}": (row.connections, expected)
        for table, rows in TABLES.items() for row in rows for expected in row.expected}
FOOTER = re.compile(rb"-- ~?\d+ tokens? in [\d.]+s \(~?[\d.]+ tok/s\)\n\Z")
IN_A_PROCESS = [
    "lines: every end in turn (stream)", "lines: characters cut at each byte", "end: DONE, more and kept open (stream)",
    "whole: HTML with 200", "errors: event: error with text, after text (stream)", "statuses: AWS ALB 503",
    "statuses: an error with a body of 50 MB", "bodies: gzip", "breaks: in a character and a chunk: reset (stream)",
    "breaks: whole, in a body: silence", "retries: a 503, then the answer (stream)",
]


@pytest.fixture(scope="module")
def driver(interpreter, tmp_path_factory):
    with Driver(interpreter, XEROCTL, tmp_path_factory.mktemp("home")) as driver:
        yield driver


def is_as_expected(seen, expected):
    """Tell whether a text or number is the expected one, one of a tuple, or matches a regular expression."""
    if hasattr(expected, "fullmatch"):
        return bool(expected.fullmatch(str(seen)))
    return seen in expected if isinstance(expected, tuple) else seen == expected


def check(result, expected, place):
    """Check the (status, stdout, stderr) of a run against a row."""
    status, out, err = result
    text, line = out.decode(), FOOTER.sub(b"", err).decode().replace(place, "SERVER")
    if text:
        assert text.endswith("\n")
        text = text[:-1]
    if line:
        assert line.endswith("\n")
        line = line[:-1]
    line = re.sub("\\Axeroctl: (error: )?", "", line)
    ok = [is_as_expected(seen, wanted) for seen, wanted in zip((text, status, line), expected[1:])]
    assert all(ok), f"seen {text[:300]!r}, {status}, {line[:900]!r}; expected {str(expected[1:])[:1200]}"


def arguments(server, expected):
    return ("chat", "--endpoint", "e", "--base-url", server.url + "/v1", "-m", "hi", "--retries", "0", *expected.options)


@pytest.mark.parametrize("name", ROWS)
def test_a_wire_gives_its_text_status_and_line(driver, server, name):
    connections, expected = ROWS[name]
    server.script(*connections)
    check(driver.run(*arguments(server, expected)), expected, f"127.0.0.1:{server.port}")
    assert len(server.gone) == len(connections)


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_a_process_of_its_own_gives_the_same(run, server, name):
    connections, expected = ROWS[name]
    server.script(*connections)
    check(run(*arguments(server, expected)), expected, f"127.0.0.1:{server.port}")
    assert len(server.gone) == len(connections)


def test_the_table_is_long_and_no_name_stands_twice():
    rows = [(table, row.name) for table, rows in TABLES.items() for row in rows]
    assert len(set(rows)) == len(rows) >= 150
