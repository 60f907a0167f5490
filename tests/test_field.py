"""Replies from the field, byte for byte, each with its siblings: text, status and words, whole and cut anywhere.

`REPLIES` is what servers of MiniMax, llama.cpp, Cloudflare, OpenRouter, nginx and others sent to one question.
"""

import json
from collections import namedtuple

import pytest

from loopback import Hold, chunk, completion, json_response, stream

Field = namedtuple("Field", "reply options text status words")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def sized(status, kind, body):
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, kind, len(body), body)


JSON = b"application/json"
REPLIES = {
    "whole-message-after-deltas": Field(STREAM_HEAD + b"""\
data: {"choices": [{"index": 0, "delta": {"content": "Hel"}, "finish_reason": null}]}

data: {"choices": [{"index": 0, "delta": {"content": "lo"}, "finish_reason": null}]}

data: {"object": "chat.completion", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello"}}]}

data: [DONE]
""" + b"\n", ["--stream", "-q"], "Hello\n", 0, []),
    "error-line-in-stream": Field(STREAM_HEAD + b"""\
error: {"code":400,"message":"the request exceeds the available context size","type":"invalid_request_error"}

data: [DONE]

""", ["--stream"], "", 4, ["the request exceeds the available context size"]),
    "bare-error-in-stream": Field(STREAM_HEAD + (
        b'{"error":{"message":"request (19185 tokens) exceeds the available context size (16384 tokens)","code":400}}'),
        ["--stream"], "", 4, ["request (19185 tokens) exceeds the available context size (16384 tokens)"]),
    "json-labelled-event-stream": Field(STREAM_HEAD + b"""\
{"object": "chat.completion", "choices": [{"index": 0, "message": {"content": "OK"}, "finish_reason": "stop"}]}

data: [DONE]

""", [], "OK\n", 0, []),
    "cloudflare-errors": Field(sized(
        b"400 Bad Request", JSON, b'{"result": null, "success": false, "errors": [{"code": 5006, "message": "AiError: Bad input"}]}'),
        [], "", 4, ["AiError: Bad input"]),
    "openrouter-raw": Field(sized(
        b"400 Bad Request", JSON, b'{"error": {"message": "Provider returned error", "code": 400, "metadata": {"raw": '
        b'"{\\"error\\": {\\"message\\": \\"Model supports at most 1 image\\"}}", "provider_name": "X"}}}'),
        [], "", 4, ["Provider returned error", "Model supports at most 1 image", "provider X"]),
    "status-200-base-resp": Field(sized(
        b"200 OK", JSON, b'{"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}, "choices": null}'),
        [], "", 5, ["insufficient balance"]),
    "html-title": Field(sized(
        b"400 Bad Request", b"text/html",
        b"<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head><body>nginx</body></html>"),
        [], "", 4, ["400 The plain HTTP request was sent to HTTPS port", "https://"]),
    "finish-model-length": Field(STREAM_HEAD + b"""\
data: {"choices": [{"index": 0, "delta": {"content": "Partial ans"}, "finish_reason": null}]}

data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "model_length"}]}

data: [DONE]

""", ["--stream", "-q"], "Partial ans\n", 0, ["warning", "model_length"]),
    "reasoning-only": Field(sized(
        b"200 OK", JSON, b'{"choices": [{"index": 0, "message": {"content": null, "reasoning_content": "9.9 is larger"}, "finish_reason": "stop"}]}'),
        [], "", 5, ["empty", "reasoning came"]),
    "nan-in-logprobs": Field(sized(
        b"200 OK", JSON, b'{"choices":[{"index":0,"message":{"content":"fine"},"logprobs":{"content":[{"logprob":-Infinity},{"logprob":NaN}]},'
        b'"finish_reason":"stop"}]}'), [], "fine\n", 0, []),
    "tool-call-without-finish": Field(STREAM_HEAD + b"""\
data: {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "get_weather", \
"arguments": "{}"}}]}, "finish_reason": null}]}

data: [DONE]

""", ["--stream"], "\n", 0, ["note", "tool call"]),
    "float-usage": Field(STREAM_HEAD + b"""\
data: {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": null}]}

data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}

data: {"choices": [], "usage": {"prompt_tokens": 12.0, "completion_tokens": 1.0, "total_tokens": 13.0}}

data: [DONE]

""", ["--stream", "--show-usage"], "Hi\n", 0, ["12", "1", "13"]),
    "quota-used-up": Field(sized(
        b"429 Too Many Requests", JSON, b'{"error": {"message": "You exceeded your current quota, please check your plan.", '
        b'"type": "insufficient_quota", "code": "insufficient_quota"}}'), [], "", 7, ["You exceeded your current quota", "does not help"]),
}


def arguments(server, *options):
    return ("chat", "-e", "e", "--base-url", server.url + "/v1", "-m", "x", *options)


@pytest.mark.smoke
@pytest.mark.parametrize("name", REPLIES)
def test_a_field_reply_gives_its_text_status_and_words(run, server, name):
    field = REPLIES[name]
    server.script(field.reply)
    status, out, err = run(*arguments(server, *field.options))
    assert (status, out.decode()) == (field.status, field.text)
    assert [word for word in field.words if word not in err.decode()] == []
    assert len(server.requests) == 1
    if status:
        assert err.startswith(b"xeroctl: error: ") and err.count(b"\n") == 1


@pytest.mark.parametrize("name", REPLIES)
def test_a_field_reply_is_the_same_streamed_or_not(run, server, name):
    field = REPLIES[name]
    server.always(field.reply)
    for options in ([], ["--stream"]):
        status, out, _ = run(*arguments(server, *options, "-q"))
        assert (status, out.decode()) == (field.status, field.text)


# -- As JSON ---------------------------------------------------------


def strictly(text):
    def refuse(constant):
        raise ValueError(constant)
    return json.loads(text, parse_constant=refuse)


def test_a_number_that_json_lacks_is_null_in_json(run, server):
    server.always(REPLIES["nan-in-logprobs"].reply)
    status, out, _ = run(*arguments(server, "-o", "json"))
    assert status == 0
    assert strictly(out)["choices"][0]["logprobs"]["content"] == [{"logprob": None}, {"logprob": None}]


@pytest.mark.parametrize("name", ["reasoning-only", "tool-call-without-finish", "whole-message-after-deltas", "finish-model-length"])
def test_each_document_is_printed_as_it_came(run, server, name):
    field = REPLIES[name]
    server.script(field.reply)
    status, out, err = run(*arguments(server, *field.options, "-o", "json"))
    _, _, body = field.reply.partition(b"\r\n\r\n")
    sent = [strictly(line.replace(b"data: ", b"").decode()) for line in body.split(b"\n") if b"{" in line]
    decoder, printed, rest = json.JSONDecoder(), [], out.decode()
    while rest:
        document, end = decoder.raw_decode(rest)
        printed.append(document)
        rest = rest[end:].lstrip()
    assert (status, printed) == (field.status, sent)
    assert all(strictly(line) for line in err.decode().split("\n")[:-1])


@pytest.mark.parametrize("name", [name for name, field in REPLIES.items() if field.status])
def test_an_error_says_its_status_and_code_in_json(run, server, name):
    field = REPLIES[name]
    server.script(field.reply)
    status, _, err = run(*arguments(server, "-o", "json"))
    said = strictly(err.decode())
    assert status == field.status
    assert said["kind"] == {4: "refused", 5: "server", 7: "rate_limit"}[status]
    assert said["retryable"] is False


# -- Siblings --------------------------------------------------------

BUSY = {"Retry-After": "61"}


@pytest.mark.parametrize("document, headers", [
    ({"error": {"message": "no", "code": "insufficient_quota"}}, {"Retry-After": "1"}),
    ({"error": {"message": "no", "type": "exceeded_current_quota_error"}}, {}),
    ({"error": {"message": "no", "code": "billing_hard_limit_reached"}}, {}),
    ({"error": {"message": "slow down"}}, BUSY),
    ({"error": {"message": "slow down", "retry_after": 3600}}, {}),
], ids=str)
def test_what_does_not_pass_soon_is_asked_once(run, server, document, headers):
    server.script(json_response(document, "429 Too Many Requests", headers))
    status, out, err = run(*arguments(server))
    assert (status, out, len(server.requests)) == (7, b"", 1)
    assert b"raise --retries" not in err
    asked = headers.get("Retry-After") or str(document["error"].get("retry_after", ""))
    if "slow" in str(document):
        assert f"asks to wait {asked} s".encode() in err


@pytest.mark.parametrize("reply, words", [
    (completion(None), "the answer is empty"),
    (completion(""), "the answer is empty"),
    (completion(" \n"), "the answer is empty"),
    (completion(None, message={"reasoning": "Hm."}), "reasoning came"),
    (completion("<think>Hm.</think>\n"), "reasoning came"),
    ({"choices": [{"index": 0, "finish_reason": "stop"}]}, "the answer is empty"),
    ({"choices": [{"index": 0, "message": None, "finish_reason": "stop"}]}, "the answer is empty"),
    ({"choices": []}, "holds no answer"),
], ids=str)
def test_no_text_is_no_answer(run, server, reply, words):
    server.always(json_response(reply))
    status, _, err = run(*arguments(server))
    assert status == 5 and words in err.decode() and err.count(b"\n") == 1
    status, out, err = run(*arguments(server, "-o", "json"))
    assert (status, strictly(out.decode())) == (5, reply)
    assert words in strictly(err.decode())["message"]


def test_a_tool_call_is_an_answer_that_is_not_streamed_too(run, server):
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    for finish in ("tool_calls", "stop", None):
        server.script(json_response(completion(None, finish=finish, message={"tool_calls": [call]})))
        status, _, err = run(*arguments(server))
        assert (status, err) == (0, b"xeroctl: note: the model asked for a tool call: -o json shows it\n")


def test_204_is_no_answer_streamed_too(run, server):
    server.always(b"HTTP/1.1 204 No Content\r\n\r\n")
    for options in ([], ["--stream"]):
        status, out, err = run(*arguments(server, *options))
        assert (status, out) == (5, b"") and b"empty" in err


@pytest.mark.parametrize("status, words", [("400 Bad Request", "unknown field stream_options"), ("422 No", "Extra inputs are not permitted")])
def test_stream_options_that_are_refused_are_left_out(run, server, status, words):
    refusal = json_response({"detail": [{"loc": ["body", "stream_options"], "msg": words}]}, status)
    server.script(refusal, stream(chunk("Hello"), chunk(finish="stop"), b"data: [DONE]\n\n"))
    result = run(*arguments(server, "--stream", "--retries", "0"))
    assert (result.status, result.stdout) == (0, b"Hello\n")
    first, second = [request.json for request in server.requests]
    assert first.pop("stream_options") == {"include_usage": True}
    assert first == second


def test_stream_options_that_are_refused_twice_are_an_error(run, server):
    server.always(json_response({"error": "stream_options is unknown"}, "400 Bad Request"))
    status, _, err = run(*arguments(server, "--stream"))
    assert (status, len(server.requests)) == (4, 2)
    assert err == b"xeroctl: error: HTTP 400: stream_options is unknown\n"


def test_what_follows_the_end_is_not_waited_for(run, server):
    for end in (b"data: [DONE]\n\n", b"data: [done]\n\n"):
        server.script([STREAM_HEAD, b'{"choices": [{"message": {"content": "OK"}, "finish_reason": "stop"}]}\n', end, Hold()])
        assert run(*arguments(server, "--stream", "-q"))[:2] == (0, b"OK\n")


@pytest.mark.parametrize("params, expected", [
    (["temperature=null"], {}),
    (["x=null"], {"x": None}),
    (["stream_options=null"], {}),
    (["max_tokens=null", "max_completion_tokens=7"], {"max_completion_tokens": 7}),
], ids=str)
def test_a_null_takes_out_what_we_would_send(run, server, params, expected):
    server.script(stream(chunk("Hello"), chunk(finish="stop"), b"data: [DONE]\n\n"))
    options = [word for param in params for word in ("--param", param)]
    given = ["--temperature", "1", "--max-tokens", "5"] if params[0] in ("temperature=null", "max_tokens=null") else []
    assert run(*arguments(server, "--stream", "-q", *given, *options)).status == 0
    body = server.requests[0].json
    assert {name: body[name] for name in body if name not in ("model", "messages", "stream")} == {
        **({"stream_options": {"include_usage": True}} if params != ["stream_options=null"] else {}),
        **({"max_tokens": 5} if params == ["temperature=null"] else {}),
        **({"temperature": 1} if "max_tokens=null" in params else {}), **expected}
