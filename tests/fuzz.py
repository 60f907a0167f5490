"""Mutated streams, and a slow, simple reading of them to compare with; run by test_fuzz.py, on any Python from 3.6.

As a script it takes the path of the tool, a first seed and a count, and prints each failure.
"""

import importlib.util
import json
import random
import re
import sys
import traceback


def event(document):
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def chunk(finish=None, **delta):
    return event({"id": "c-1", "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


DONE = b"data: [DONE]\n\n"
STREAMS = [
    chunk(role="assistant", content=None) + chunk(content="Hel") + chunk(content="lo é€😀") + chunk("stop") + DONE,
    b": ping\n\n" + chunk(content="a") + b":\n\nevent: x_metrics\ndata: {}\n\n" + chunk("length", content="b") + DONE,
    (b"\xef\xbb\xbf" + chunk(content="CRLF") + b"id: 1\nretry: 5\n" + chunk("stop") + DONE).replace(b"\n", b"\r\n"),
    (chunk(content="CR ") + chunk(content="ends") + DONE).replace(b"\n", b"\r"),
    b'data: {"choices":\ndata:[{"delta":\ndata\ndata: {"content": "lines"}}]}\n\n' + chunk("stop"),
    chunk(reasoning_content="Hm") + chunk(content="yes") + chunk("stop") + event({"choices": [], "usage": {"completion_tokens": 3}}),
    chunk(content="x") + event({"error": {"message": "busy", "code": 503}}) + DONE,
    chunk(content="y") + b"event: error\ndata: gone\n\n",
    event({"choices": [{"index": 1, "delta": {"content": "no"}}, {"index": 0, "delta": {"content": "0"}}]}) + chunk(content="z") + DONE,
    b'data: {"choices": [{"delta": {"content": "\\ud83d"}}]}\n\ndata: {"choices": [{"delta": {"content": "\\ude00"}}]}\n\n' + DONE,
    b'data: {"choices":\r\ndata:[{"delta":\r\ndata\r\ndata: {"content": "CRLF lines"}}]}\r\n\r\ndata: [DONE]\r\n\r\n',
    chunk(content="named") + b"event: x_end\n" + DONE,
    chunk(content="o") + event({"choices": [{"finish_reason": "error", "error": {"code": 502, "message": "no"}}]}) + DONE,
]
TOKENS = [
    b"data:", b"data: ", b"data: [DONE]\n\n", b"[DONE]", b"event: error\n", b"event:", b"\r", b"\n", b"\r\n", b"\n\n", b":", b" ", b"\0",
    b"\xef\xbb\xbf", b"\xff", b"\xc3", b"\xf0\x9f\x98", b"\\ud83d", b"\\u0000", b'{"error"', b'data: {"error": "no"}\n\n', b"event: x\n",
    b'"finish_reason": "stop"', b'"finish_reason": "error"', b"null",
    b"[" * 3000, b'{"a":' * 3000, b"1e999", b"NaN", b"-", b"9" * 400, b'"', b"{", b"}", b"]", b",", b"true", b'"delta": []', b'"index": 1',
]
SEPARATOR = re.compile("\r\n|\n|\r")


# -- Mutations -------------------------------------------------------


def mutated(rng, data, others):
    """Return *data* with up to four mutations; *others* are what it may be spliced with."""
    for _ in range(rng.randrange(5)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randrange(1, 60))
        kind = rng.randrange(8)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1:]
        elif kind == 1:
            data = data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at:at + 1]) + data[at + 1:]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:end] + data[at:]
        elif kind == 4:
            data = data[:at]
        elif kind == 5:
            other = rng.choice(others)
            data = data[:at] + other[rng.randrange(len(other)):]
        else:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
    return data


def pieces(rng, data):
    """Return *data* cut somewhere."""
    longest, cut = rng.choice([1, 3, 40, 1000, 100000]), []
    while data:
        at = rng.randrange(longest) + 1
        cut.append(data[:at])
        data = data[at:]
    return cut


# -- The slow, simple reading ----------------------------------------


def strict(text):
    """Return the number *text*, unless JSON has no such number."""
    if float(text) not in (float("inf"), float("-inf")) and float(text) == float(text):
        return float(text)
    raise ValueError(text)


def events_of(data):
    """Return the (name, data) pairs of a stream, by the letter of the standard."""
    text = data.decode("utf-8", "replace")  # the whole, as the standard says: no line end is part of a character
    lines = SEPARATOR.split(text[1:] if text.startswith("\ufeff") else text)
    found, name, values = [], "", []
    for line in lines[:-1]:
        key, _, value = line.partition(":")
        value = value[1:] if value[:1] == " " else value
        if line == "" and values:
            found.append((name or "message", "\n".join(values)))
        if line == "":
            name, values = "", []
        elif key == "event":
            name = value
        elif key == "data":
            values.append(value)
    return found


def content_of(message):
    content = message.get("content") or message.get("refusal") if isinstance(message, dict) else None
    if isinstance(message, dict) and not isinstance(content, (str, list)):
        content = message.get("refusal")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def is_number_zero(value):
    return value is None or isinstance(value, (int, float)) and value == 0


def is_failure(document):
    """Tell whether a document in a 200 says that something failed."""
    if not isinstance(document, dict) or document.get("error"):
        return True
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and (choice.get("error") or choice.get("finish_reason") == "error"):
            return True
    if "choices" in document:
        return False
    return document.get("object") == "error" or bool(document.get("detail")) or isinstance(document.get("message"), str)


def reading(data):
    """Return the text of the stream *data* up to its end or failure, and whether it is whole.

    It is whole with [DONE] or a finish reason, and without a failure.
    """
    text, reason = "", None
    for name, value in events_of(data):
        if name == "message" and value.strip() == "[DONE]":
            return joined(text), True
        if name == "error":
            return joined(text), False
        if name == "message" and value.strip():
            try:
                document = json.loads(value, parse_float=strict, parse_constant=strict)
            except (ValueError, RecursionError):
                return joined(text), False
            if is_failure(document):
                return joined(text), False
            added, because = reading_of_choices(document.get("choices"))
            text, reason = text + added, because or reason
    return joined(text), bool(reason)


def reading_of_choices(choices):
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and is_number_zero(choice.get("index")):
            reason, delta = choice.get("finish_reason"), choice.get("delta")
            message = delta if isinstance(delta, dict) else choice.get("message")
            return content_of(message), reason if isinstance(reason, str) else None
    return "", None


def joined(text):
    """Return *text* with each pair of surrogates as its character; a lone one is U+FFFD."""
    pair = re.compile("([\ud800-\udbff])([\udc00-\udfff])")
    text = pair.sub(lambda match: chr(0x10000 + (ord(match.group(1)) - 0xD800) * 1024 + ord(match.group(2)) - 0xDC00), text)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# -- The tool's reading ----------------------------------------------


def take(xeroctl, chunks):
    """Return what `reading` returns, as the tool sees it: decoder, documents, errors, reply."""
    reply, whole = xeroctl.Reply(), True
    try:
        for document, _ in xeroctl.stream_documents(iter(chunks)):
            if xeroctl.is_error(document):
                raise xeroctl.build_error(document, 200, {}, "xero_acme_secret")
            reply.add(document)
    except xeroctl.CutShortError:
        whole = bool(reply.finish_reason)
    except xeroctl.XeroctlError as error:
        whole = False
        xeroctl.printable(str(error)).encode("utf-8", "replace")
    return reply.text, whole


def check(xeroctl, seed):
    """Return whether the stream of *seed* was whole; raise AssertionError where the readings differ."""
    rng = random.Random(seed)
    data = mutated(rng, rng.choice(STREAMS), STREAMS)
    seen, expected = take(xeroctl, pieces(rng, data)), reading(data)
    text, whole = expected
    shorter = text[:-1] if text.endswith("\ufffd") else text  # half a pair may be dropped at the end
    if seen not in (expected, (shorter, whole)):
        raise AssertionError(f"seen {seen!r}, expected {expected!r}")
    return whole


def main(path, first, count):
    """Print the seed and the stream of each failure, and last how many streams were whole."""
    spec = importlib.util.spec_from_file_location("xeroctl", path)
    xeroctl = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(xeroctl)
    whole = 0
    for seed in range(int(first), int(first) + int(count)):
        try:
            whole += check(xeroctl, seed)
        except Exception:
            rng = random.Random(seed)
            print(f"seed {seed}: {mutated(rng, rng.choice(STREAMS), STREAMS)[:3000]!r}\n{traceback.format_exc()}")
    print(f"{whole} whole")


if __name__ == "__main__":
    main(*sys.argv[1:])
