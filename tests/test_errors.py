"""Whatever goes wrong is one line, or one JSON object, and one exit status; stdout stays empty."""

import json
from collections import namedtuple

import pytest

from loopback import BEFORE_REQUEST, DONE, chunk, completion, head, json_response, response, stream

KEY = "xero_acme_0123456789"
HTML = b"<!DOCTYPE html>\n<html><body><h1>Bad Gateway</h1></body></html>\n"
REQUEST_ID = {"X-Request-ID": "req-1"}
REDIRECT = "redirects are not followed: if you trust https://elsewhere.example/v1, make it the base URL"
FASTAPI = {"detail": [
    {"loc": ["body", "temperature"], "msg": "Input should be less than 2", "type": "less_than"},
    {"loc": ["body", "messages", 0, "role"], "msg": "Field required", "type": "missing"},
]}


def error(message="no", **fields):
    return {"error": {"message": message, **fields}}


class Case(namedtuple("Case", "reply exit kind message fields")):
    """A response; the exit status, the kind and the message it becomes; the other fields that are not null."""


def case(reply, exit, kind, message, **fields):
    return Case(reply, exit, kind, message, fields)


def refused(status, body, message, **fields):
    """Return the case of a 400 to 499 that is simply refused."""
    reply = body if isinstance(body, bytes) else json_response(body, status)
    return case(reply, 4, "refused", message, status=int(status[:3]), **fields)


def nonsense(body, message, **headers):
    """Return the case of a 200 that is no answer."""
    return case(response(body, headers=headers), 5, "server", message)


CASES = {
    # Not authorised
    "401": case(json_response(error("Bad key.", code="invalid_api_key"), "401 Unauthorized", REQUEST_ID), 3, "auth",
                "HTTP 401 (invalid_api_key, request req-1): Bad key: check the API key",
                status=401, code="invalid_api_key", request_id="req-1"),
    "401 empty": case(response(status="401 Unauthorized"), 3, "auth", "HTTP 401: check the API key", status=401),
    "403": case(json_response(error("Not yours.", code="scope_insufficient"), "403 Forbidden"), 3, "auth",
                "HTTP 403 (scope_insufficient): Not yours: this key may not do that: check its scopes",
                status=403, code="scope_insufficient"),
    # Refused
    "404": refused("404 Not Found", error("No such project.", code="project_not_found", type="not_found"),
                   "HTTP 404 (project_not_found) at URL/e/v1/chat/completions: No such project: check --endpoint and the base URL: without slugs it is URL/v1/chat/completions",
                   code="project_not_found"),
    "422 FastAPI": refused("422 Unprocessable Entity", FASTAPI, "HTTP 422: body.temperature: Input should be less than 2; "
                           "body.messages.0.role: Field required"),
    "type for code": refused("400 Bad Request", error(type="invalid_request_error"), "HTTP 400 (invalid_request_error): no",
                             code="invalid_request_error"),
    "null code": refused("400 Bad Request", error(code=None, param=None), "HTTP 400: no"),
    "number code": refused("400 Bad Request", error(code=1234), "HTTP 400 (1234): no", code="1234"),
    "detail": refused("400 Bad Request", {"detail": "no"}, "HTTP 400: no"),
    "message": refused("400 Bad Request", {"message": "no", "code": 400}, "HTTP 400: no"),
    "error text": refused("400 Bad Request", {"error": "no"}, "HTTP 400: no"),
    "error true": refused("400 Bad Request", {"error": True, "message": "no"}, "HTTP 400: no"),
    "list": refused("400 Bad Request", [error("one"), "two", 3], "HTTP 400: one; two"),
    "string": refused("400 Bad Request", "no", "HTTP 400: no"),
    "number": refused("400 Bad Request", 42, "HTTP 400"),
    "null": refused("400 Bad Request", None, "HTTP 400"),
    "empty": refused("400 Bad Request", response(status="400 Bad Request"), "HTTP 400"),
    "text": refused("400 Bad Request", response(b"no\r\nway\n", "400 Bad Request"), "HTTP 400: no way"),
    "wrong type": refused("418 Teapot", response(b'{"error": "no"}', "418 Teapot", {"Content-Type": "text/html"}),
                          "HTTP 418: no"),
    "HTML as JSON": refused("418 Teapot", response(HTML, "418 Teapot", {"Content-Type": "application/json"}),
                            "HTTP 418: the answer is an HTML page"),
    "not UTF-8": refused("400 Bad Request", response(b"caf\xe9 \xff", "400 Bad Request"), "HTTP 400: caf\ufffd \ufffd"),
    "half JSON": refused("400 Bad Request", response(b'{"error": "no', "400 Bad Request"), 'HTTP 400: {"error": "no'),
    "body cut short": refused("400 Bad Request", head("400 Bad Request", {"Content-Length": 99}) + b"no", "HTTP 400: no"),
    "long": refused("400 Bad Request", error("no " * 9999), "HTTP 400: " + ("no " * 167)[:500]),
    "deep": refused("400 Bad Request", response(b'{"error":' * 5000 + b"1" + b"}" * 5000, "400 Bad Request"), None),
    "brackets": refused("400 Bad Request", response(b"[" * 100000, "400 Bad Request"), "HTTP 400: " + "[" * 500),
    "409": refused("409 Conflict", error(), "HTTP 409: no", retryable=True),
    # Rate limited
    "429": case(json_response(error("Slow.", code="rate_limited"), "429 Too Many Requests", {"Retry-After": "7"}), 7,
                "rate_limit", "HTTP 429 (rate_limited): Slow: wait, or raise --retries",
                status=429, code="rate_limited", retryable=True, retry_after=7),
    "429 body": case(json_response(error("Slow.", retry_after=1.5), "429 Too Many Requests"), 7, "rate_limit",
                     "HTTP 429: Slow: wait, or raise --retries", status=429, retryable=True, retry_after=1.5),
    "429 date": case(response(status="429 Too Many Requests", headers={
        "Date": "Wed, 21 Oct 2026 07:28:00 GMT", "Retry-After": "Wed, 21 Oct 2026 07:30:00 GMT"}), 7, "rate_limit",
        "HTTP 429: the server asks to wait 120 s", status=429, retryable=True, retry_after=120),
    "429 quota": case(json_response(error("Used up.", type="insufficient_quota"), "429 Too Many Requests"), 7, "rate_limit",
                      "HTTP 429 (insufficient_quota): Used up: waiting does not help: check the plan and the credit",
                      status=429, code="insufficient_quota"),
    # Server failures
    "500 HTML": case(response(HTML, "500 Oops", {"Content-Type": "text/html"}), 5, "server",
                     "HTTP 500: the answer is an HTML page", status=500, retryable=True),
    "503": case(json_response(error("Loading model", type="unavailable_error", code=503), "503 Unavailable"), 5, "server",
                "HTTP 503 (unavailable_error): Loading model", status=503, code="unavailable_error", retryable=True),
    "302": case(response(status="302 Found", headers={"Location": "https://elsewhere.example/v1"}), 5, "server",
                "HTTP 302: " + REDIRECT, status=302),
    "308": case(response(HTML, "308 Moved", {"Location": "https://elsewhere.example/v1", **REQUEST_ID}), 5, "server",
                "HTTP 308 (request req-1): " + REDIRECT, status=308, request_id="req-1"),
    # No answers
    "200 HTML": nonsense(HTML, "the reply is an HTML page: check the base URL"),
    "200 HTML as JSON": nonsense(HTML, "the reply is an HTML page: check the base URL", **{"Content-Type": "application/json"}),
    "200 text": nonsense(b"Hello!", "the reply is not JSON: check the base URL"),
    "200 empty": nonsense(b"", "the reply is empty: check the base URL"),
    "204": case(head("204 No Content"), 5, "server", "the reply is empty: check the base URL"),
    "200 not UTF-8": nonsense(b'{"choices": "\xff"}', "the reply is not JSON: check the base URL"),
    "200 NaN": nonsense(b'{"choices": NaN}', "the reply holds no answer"),
    "200 brackets": nonsense(b"[" * 100000, "the reply is not JSON: check the base URL"),
    "200 {}": nonsense(b"{}", "the reply holds no answer"),
    "200 no choices": nonsense(b'{"id": "x", "choices": []}', "the reply holds no answer"),
    "200 null choices": nonsense(b'{"choices": null}', "the reply holds no answer"),
    "200 odd choices": nonsense(b'{"choices": [null, 1, "x", []]}', "the reply holds no answer"),
    "200 odd message": nonsense(b'{"choices": [{"index": 0, "message": 5}]}', "the reply holds no answer"),
    "200 []": nonsense(b"[]", "error in the reply: not a completion: []"),
    "200 null": nonsense(b"null", "error in the reply: not a completion: null"),
    "200 text in JSON": nonsense(b'"x"', "error in the reply: x"),
    "200 error": case(json_response(error("Overloaded.", code="overloaded"), headers=REQUEST_ID), 5, "server",
                      "error in the reply (overloaded, request req-1): Overloaded.", code="overloaded", request_id="req-1", retryable=True),
    "200 error, unknown": case(json_response(error("No.", code="x_1")), 5, "server", "error in the reply (x_1): No.", code="x_1"),
    "200 rate limit": case(json_response(error("No.", type="rate_limit_error")), 7, "rate_limit",
                           "error in the reply (rate_limit_error): No: wait, or raise --retries", code="rate_limit_error", retryable=True),
    "200 error text": nonsense(b'{"error": "no"}', "error in the reply: no"),
    "200 error with a number": case(json_response(error(code=404)), 4, "refused",
                                    "error in the reply: no: check --endpoint and the base URL: without slugs it is URL/v1/chat/completions"),
    "200 detail": nonsense(b'{"detail": "no"}', "error in the reply: no"),
    "HTTP/1.0": case(b'HTTP/1.0 400 Bad Request\r\n\r\n{"error": "no"}', 4, "refused", "HTTP 400: no", status=400),
}
NOTHING = {"status": None, "code": None, "request_id": None, "retryable": False, "retry_after": None}


@pytest.mark.parametrize("name", CASES)
def test_a_failed_exchange_is_one_line_or_one_json_object(start, server, name):
    reply, exit, kind, message, fields = CASES[name]
    server.script(reply, reply)
    command = ["chat", "--endpoint", "e", "--base-url", server.url, "-m", "hi", "--retries", "0", "--api-key", KEY]
    children = start(*command), start(*command, "-o", "json")
    text, as_json = [child.finish() for child in children]
    assert (text.status, text.stdout, text.stderr.count(b"\n")) == (exit, b"", 1)
    message = text.stderr.decode()[16:-1] if message is None else message.replace("URL/", server.url + "/")
    assert text.stderr.decode() == f"xeroctl: error: {message}\n"
    said = json.loads(as_json.stderr.decode())
    assert said == {"kind": kind, "message": message, **NOTHING, **fields}
    assert (as_json.status, as_json.stderr.count(b"\n")) == (exit, 1)
    printed = as_json.stdout and json.dumps(json.loads(as_json.stdout.decode()))
    assert printed == (json.dumps(json.loads(reply.partition(b"\r\n\r\n")[2].decode().replace("NaN", "null"))) if "no answer" in message else b"")


@pytest.mark.smoke
def test_a_401_without_a_key_says_where_to_put_one(chat, server):
    server.script(json_response(error("Who are you?"), "401 Unauthorized"))
    line = b"xeroctl: error: HTTP 401: Who are you?: set XEROTIER_API_KEY or give --api-key\n"
    assert chat("-m", "hi") == (3, b"", line)
    assert "authorization" not in server.requests[0].headers


@pytest.mark.smoke
def test_a_server_that_speaks_something_else_is_said_to(chat, server):
    server.script([BEFORE_REQUEST, b"SSH-2.0-OpenSSH_9.6\r\n"])
    line = f"xeroctl: error: 127.0.0.1:{server.port} does not speak HTTP: its answer begins with 'SSH-2.0-OpenSSH_9.6\\r'\n"
    assert chat("-m", "hi", "--retries", "0") == (5, b"", line.encode())


DELAYS = [
    "soon", "-5", "1e9", "nan", "Wed, 01 Jan 99999 00:00:00 GMT", "Wed, 99 Jan 2026 99:99:99 GMT", "Mon, 1 Jan 0000 0:0:0 +9999",
    "1 1 1 1 1 1", ",", "Wed, 21 Oct 2026 07:28:00 GMT" + "9" * 30, "\u0663", "99999999999999999999",
]


def test_a_strange_retry_after_is_no_catastrophe(start, server):
    for value in DELAYS:
        headers = {"Retry-After": value.encode().decode("latin-1"), "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}
        server.script(response(status="429 Too Many Requests", headers=headers))
    command = ["chat", "--endpoint", "e", "--base-url", server.url, "-m", "hi", "--retries", "0"]
    children = [start(*command) for _ in DELAYS]
    ends = {child.finish() for child in children}
    assert {end[:2] for end in ends} == {(7, b"")}
    assert {end.stderr.replace(str(2 ** 63 - 1).encode(), b"N").replace(b"1000000000", b"N") for end in ends} == {
        b"xeroctl: error: HTTP 429: wait, or raise --retries\n", b"xeroctl: error: HTTP 429: the server asks to wait N s\n"}


@pytest.mark.smoke
def test_a_redirect_is_not_followed(chat, server):
    server.script(response(status="307 Temporary Redirect", headers={"Location": server.url + "/other"}))
    result = chat("-m", "hi", "--api-key", KEY)
    assert (result.status, result.stdout, len(server.requests)) == (5, b"", 1)
    assert f"if you trust {server.url}/other, " in result.stderr.decode()


@pytest.mark.smoke
def test_http_1_0_is_an_answer(chat, server):
    server.script(b"HTTP/1.0 200 OK\r\n\r\n" + json.dumps(completion()).encode())
    assert chat("-m", "hi") == (0, b"Hello!\n", b"")


@pytest.mark.parametrize("depth", [100, 600, 5000])
def test_a_deep_reply_is_printed_whole_or_refused(start, server, depth):
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    document = json.dumps(completion(deep=0)).encode().replace(b'"deep": 0', b'"deep": ' + deep)
    server.always(response(document))
    command = ["chat", "--endpoint", "e", "--base-url", server.url, "-m", "hi"]
    children = [start(*command, *options) for options in (["-o", "json"], ["-o", "json", "--stream"], [])]
    for child, braces in zip(children, [depth, depth, 0]):
        result = child.finish()
        if result.status:
            assert (result.status, result.stdout, result.stderr.count(b"\n")) == (5, b"", 1)
            assert depth > 100
        else:
            assert b"".join(result.stdout.split()).count(b'{"a":') == braces
            assert braces or result.stdout == b"Hello!\n"


# -- What must not be shown ------------------------------------------

EVIL = "a\x1b[31mb\x07c\rd\ne\x7ff\x9b2Jg\x00h"


@pytest.mark.smoke
@pytest.mark.parametrize("place", ["whole", "inside a stream"])
def test_nothing_a_server_says_drives_the_terminal(chat, server, place):
    document = error(EVIL, code=EVIL)
    headers = {"X-Request-ID": "r\x1b[31m\x07\x9b1"}
    server.always(json_response(document, "400 Bad", headers) if place == "whole" else stream(document, headers=headers))
    result = chat("-m", "hi", "--stream")
    assert (result.stdout, result.stderr.count(b"\n")) == (b"", 1)
    assert all(character >= " " and not "\x7f" <= character < "\xa0" for character in result.stderr.decode()[:-1])
    assert "a␛[31mb␇c" in result.stderr.decode()
    result = chat("-m", "hi", "--stream", "-o", "json")
    assert (result.stdout, result.stderr.count(b"\n")) == (b"", 1)
    assert all(" " <= character < "\x7f" for character in result.stderr.decode()[:-1])
    assert set(json.loads(result.stderr.decode())) == {"kind", "message", *NOTHING}


@pytest.mark.parametrize("reply", [
    json_response(error(f"Bad key {KEY}!", code=KEY), "401 Unauthorized", {"X-Request-ID": KEY}),
    response(f"you sent {KEY}".encode(), "500 " + KEY),
    response(status="302 Found", headers={"Location": "https://elsewhere.example/?key=" + KEY}),
    json_response(error("x" * 490 + " " + KEY), "400 Bad Request"),
    stream(chunk("Hel"), error(KEY)),
], ids=["401", "text", "redirect", "cut off", "stream"])
def test_a_key_that_a_server_echoes_is_not_shown(start, server, reply):
    server.always(reply)
    command = ["chat", "--endpoint", "e", "--base-url", server.url, "-m", "hi", "--retries", "0", "--stream"]
    children = [start(*command, *options, env={"XEROTIER_API_KEY": KEY}) for options in ([], ["-o", "json"], ["--verbose"])]
    for child in children:
        result = child.finish()
        assert result.status in (3, 4, 5)
        assert KEY[:9] not in result.stderr.decode()


@pytest.mark.smoke
@pytest.mark.parametrize("options", [[], ["-o", "json"]], ids=str)
@pytest.mark.parametrize("key", ['xero_"quoted"_0123', "xero_back\\slash_0123"])
def test_a_key_of_odd_characters_is_not_shown_either(chat, server, key, options):
    server.script(json_response(error(f"Bad key {key}!", code=key), "401 Unauthorized", {"X-Request-ID": key}))
    result = chat("-m", "hi", *options, env={"XEROTIER_API_KEY": key})
    assert (result.status, result.stdout) == (3, b"")
    assert b"HTTP 401 (***, request ***): Bad key ***!" in result.stderr and b"0123" not in result.stderr


# -- Usage errors ----------------------------------------------------

USAGE_ERRORS = [
    (["chat", "-m", "hi", "--base-url", "http://127.0.0.1:1"], "no endpoint: give --endpoint SLUG, or "),
    (["chat", "--endpoint"], "--endpoint needs a value"),
    (["--nonsense", "chat"], "xeroctl chat has no option --nonsense: see xeroctl "),
    (["chat", "--endpoint", "e", "--nonsense"], "xeroctl chat has no option --nonsense: see xeroctl chat --help"),
    (["chat", "--endpoint", "e", "extra"], "unexpected argument 'extra': a message goes behind -m"),
    (["chat", "--endpoint", "e", "--temp", "1"], "xeroctl chat has no option --temp: did you mean --temperature?"),
    (["nonsense"], "xeroctl has no such command"),
    (["modles"], "xeroctl has no command modles: did you mean models?"),
    (["--apikey", "sk-secret-1234567890", "models"], "xeroctl has no option --apikey: did you mean --api-key?"),
    (["chat", "--timeout", "x\x1b[31m"], "--timeout must be a number from 0.001 to 1000000, not 'x\u241b[31m'"),
]


@pytest.mark.parametrize("arguments, message", USAGE_ERRORS, ids=[message[:40] for _, message in USAGE_ERRORS])
def test_a_usage_error_is_one_line_or_one_json_object(start, arguments, message):
    children = [start(*form, *arguments) for form in ([], ["-o", "json"], ["--output=json"], ["-qvojson"], ["-qo", "json"])]
    text, *as_json = [child.finish() for child in children]
    assert (text.status, text.stdout, text.stderr.count(b"\n")) == (2, b"", 1)
    assert text.stderr.decode().startswith("xeroctl: error: " + message)
    assert "1234567890" not in text.stderr.decode()
    for said in as_json:
        assert (said.status, said.stdout, said.stderr.count(b"\n")) == (2, b"", 1)
        assert json.loads(said.stderr.decode()) == {"kind": "usage", "message": text.stderr.decode()[16:-1], **NOTHING}


@pytest.mark.smoke
def test_an_unknown_output_form_is_refused(run):
    result = run("chat", "-o", "xml")
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)
    assert result.stderr == b"xeroctl: error: --output must be text, json or table, not 'xml'\n"


@pytest.mark.smoke
def test_an_error_after_some_text_leaves_the_text_alone(chat, server):
    server.script(stream(chunk("Hel"), error("Out of memory."), DONE))
    assert chat("-m", "hi", "--stream") == (5, b"Hel\n", b"xeroctl: error: error in the reply: Out of memory.\n")


@pytest.mark.smoke
@pytest.mark.parametrize("value", ["Apr 0 2002 12.34.56.78 GMT ,", "a, Apr . , . \x0b", "Mon, 99 Foo 2026 25:61:61 GMT"])
@pytest.mark.parametrize("name", ["Retry-After", "Date"])
def test_a_date_that_is_none_is_no_wait(chat, server, name, value):
    headers = [("Retry-After", "Mon, 23 Nov 2026 10:00:00 GMT")] if name == "Date" else []
    server.script(response(b"busy", "503 Busy", [*headers, (name, value)]))
    result = chat("-m", "hi", "--retries", "0")
    assert (result.status, result.stderr) == (5, b"xeroctl: error: HTTP 503: busy\n")


def test_an_empty_message_is_nothing_usable_to_ask(start):
    command = ["chat", "--endpoint", "e", "-m", "", "--base-url", "http://127.0.0.1:1"]
    text, as_json = [start(*command, *options).finish() for options in ([], ["-o", "json"])]
    assert (text.status, text.stdout, text.stderr) == (9, b"", b"xeroctl: error: the message is empty\n")
    assert json.loads(as_json.stderr.decode()) == {"kind": "input", "message": "the message is empty", **NOTHING}
