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


def events_of(data):
    """Return the (name, data) pairs of a stream, by the letter of the standard.

    Lines of a block that are no field make an event without a name; so do those at the end.
    """
    text = data.decode("utf-8", "replace")  # the whole, as the standard says: no line end is part of a character
    lines = SEPARATOR.split(text[1:] if text.startswith("\ufeff") else text)
    found, name, values, strays = [], "", [], []
    for line in [*lines[:-1], *([lines[-1], None] if lines[-1] else [None])]:
        key, _, value = (line or "").partition(":")
        value = value[1:] if value[:1] == " " else value
        if not line and strays:
            found.append(("", "\n".join(strays)))
        if line == "" and values:
            found.append((name or "message", "\n".join(values)))
        if not line:
            name, values, strays = "", [], []
        elif key == "event":
            name = value
        elif key == "data":
            values.append(value)
        elif key not in ("id", "retry", ""):
            strays.append(line)
    return found


def number(text):
    return float(text) if abs(float(text)) != float("inf") else None


def parsed(text):
    """Return the JSON document *text*; None where it is none, or nested too deeply."""
    try:
        return [json.loads(text, parse_float=number)]
    except (ValueError, RecursionError):
        return None


def bare_documents(text):
    """Return the JSON documents at the beginning of *text*, and what follows them."""
    found = []
    while text[:1] in ("{", "["):
        for end in [at + 1 for at in range(len(text)) if text[at] in "}]"]:
            one = parsed(text[:end])
            if one:
                found += one
                text = text[end:].strip()
                break
        else:
            break
    return found, text


def content_of(message):
    content = message.get("content") or message.get("refusal") if isinstance(message, dict) else None
    if isinstance(message, dict) and not isinstance(content, (str, list)):
        content = message.get("refusal")
    if isinstance(content, list):
        return "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


FAILED = re.compile("(?is)(error|abort|cancel|timeout|failed|insufficient_system_resource|.*_error)")
SAYS_ERROR = ("detail", "message", "msg", "errormessage", "errormsg", "errmsg", "errordescription", "statusmsg", "faultstring")


def is_failure(document):
    """Tell whether a document in a 200 says that something failed."""
    if not isinstance(document, dict) or document.get("error"):
        return True
    choices = document.get("choices")
    if choices:
        return isinstance(choices, list) and any(isinstance(choice, dict) and choice.get("error") for choice in choices)
    names = {re.sub("[^a-z]", "", name.lower()): value for name, value in document.items()}
    if document.get("object") == "error" or document.get("success") is False:
        return True
    if names.get("detail") or names.get("errors") or names.get("fault"):
        return True
    return any(isinstance(names.get(name), str) and names[name] for name in SAYS_ERROR)


class Answer:
    """What the documents of a stream add up to: the text of one choice, and its reason."""

    def __init__(self):
        self.text, self.reason, self.index, self.held, self.whole = "", None, None, [], False

    def add(self, document):
        choices = document.get("choices")
        choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
        wanted = 0 if self.index is None else self.index
        ours = [choice for choice in choices if (choice.get("index") or 0) == wanted]
        if ours:
            self.index, self.held = wanted, []
            self.take(ours[0])
        elif choices and self.index is None:
            self.held.append(choices[0])
            if len(self.held) > 4:
                self.end()

    def end(self):
        for choice in self.held:
            if self.index in (None, choice["index"]):
                self.index = choice["index"]
                self.take(choice)
        self.held = []

    def take(self, choice):
        delta, message, reason = choice.get("delta"), choice.get("message"), choice.get("finish_reason")
        text = content_of(delta)
        if not text and message:
            self.whole = self.whole or delta is None
            text = content_of(message)
            text = text[len(self.text):] if text.startswith(self.text) else ""
        self.text += text
        self.reason = reason if isinstance(reason, str) and reason else self.reason


def reading(data):
    """Return the text of the stream *data* up to its end or failure, and whether it is whole.

    It is whole with [DONE] or a finish reason, and without a failure.
    """
    answer = Answer()
    done = failed = False
    for name, value in events_of(data):
        documents, rest, value = [], "", value.strip()
        if name == "error" or name == "" and value.startswith("error:"):
            failed = True
            break
        if name == "":
            documents, rest = bare_documents(value)
            done = re.match(r"(?i)data: *\[done\]", rest) is not None
        elif name == "message" and value.strip('"').lower() == "[done]":
            done = True
        elif name == "message" and value:
            documents = parsed(value)
            failed = documents is None
        elif name != "message":
            documents = [one for one in parsed(value) or () if isinstance(one, dict) and one.get("choices") and isinstance(one["choices"], list)]
        for document in documents or ():
            if document not in (None, "", []):
                failed = failed or is_failure(document)
                if not failed:
                    answer.add(document)
        if failed or done:
            break
    answer.end()
    whole = not failed and bool(done or answer.reason or answer.whole) and not FAILED.match(answer.reason or "")
    return joined(answer.text), whole


def joined(text):
    """Return *text* with each pair of surrogates as its character; a lone one is U+FFFD."""
    pair = re.compile("([\ud800-\udbff])([\udc00-\udfff])")
    text = pair.sub(lambda match: chr(0x10000 + (ord(match.group(1)) - 0xD800) * 1024 + ord(match.group(2)) - 0xDC00), text)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


# -- The tool's reading ----------------------------------------------


def take(xeroctl, chunks):
    """Return what `reading` returns, as the tool sees it: decoder, documents, errors, reply."""
    context = xeroctl.ErrorContext(200, {}, ["xero_acme_secret"], "http://h/v1/chat/completions", "", "POST", None)
    head = xeroctl.ResponseHead("1.1", 200, "OK", {"content-type": "text/event-stream"}, [])
    decoder, reply, text = xeroctl.AnswerDecoder(True, head, context), xeroctl.Reply(), ""
    for data in [*chunks, None]:
        part = decoder.finish(2.0) if data is None else decoder.feed(data, 1.0)
        if part:
            reply.add(part)
            text += part.text
    if decoder.error:
        xeroctl.sanitize(str(decoder.error)).encode("utf-8", "replace")
        return text, False
    try:
        reply.check_answer()
    except xeroctl.CutShortError:
        return text, False
    except xeroctl.ServerError:  # no text
        pass
    return text, True


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
