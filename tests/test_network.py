"""Connections that fail, fall silent, break or lie; retries, redirects, proxies and TLS."""

import base64
import contextlib
import gzip
import json
import re
import select
import signal
import socket
import ssl
import subprocess
import time
import zlib
from threading import Event

import pytest

import loopback
from loopback import (BEFORE_REQUEST, DONE, Call, ClientGone, Drip, Gate, Hold, Reset, as_json, chunk, completion, head, http_chunk,
                      json_response, response, sse, stream, stream_head)

HELLO = json_response(completion())
HEL = sse(chunk("Hel"))
LO = sse(chunk("lo", finish="stop"), DONE)
NOW = {"Retry-After": "0"}


def moment(sock):
    """Say nothing for a fifth of a second, less if the client goes."""
    select.select([sock], [], [], 0.2)


def ask(url, *options):
    return ("chat", "--endpoint", "my-endpoint", "--base-url", url, "-m", "Hi", *options)


@contextlib.contextmanager
def full_listener():
    """Yield a port that neither accepts nor refuses: its queue of connections is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


# -- Connecting ------------------------------------------------------


@pytest.fixture
def unheard():
    """A socket with an address, on which nobody listens yet."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


@pytest.fixture
def refusing(unheard):
    """The host and port of an address that refuses connections."""
    return "127.0.0.1:%d" % unheard.getsockname()[1]


REFUSED = "xeroctl: error: %s refused the connection: is the server running?\n"


@pytest.mark.smoke
def test_a_refused_connection_is_retried_visibly(run, refusing):
    result = run(*ask(f"http://{refusing}/v1", "--retries", "1"))
    again = f"xeroctl: note: {refusing} refused the connection, trying again in 0.D s\n"
    assert (result.status, result.stdout) == (6, b"")
    final = REFUSED % refusing
    assert re.sub(r"0\.[345] s", "0.D s", result.stderr.decode()) == again + final


def test_without_retries_a_refused_connection_is_one_line(run, refusing):
    line = REFUSED % refusing
    assert run(*ask(f"http://{refusing}/v1", "--retries", "0")) == (6, b"", line.encode())


def test_a_server_that_starts_late_is_reached_by_a_retry(start, unheard, refusing):
    child = start(*ask(f"http://{refusing}/v1"), stderr=subprocess.STDOUT)
    child.expect("trying again")
    unheard.listen()
    unheard.settimeout(10)
    with unheard.accept()[0] as sock:
        loopback.read_request(sock)
        sock.sendall(HELLO)
    assert child.finish().stdout.endswith(b" s\nHello!\n")


def test_an_unknown_host_is_named(run):
    result = run(*ask("http://nowhere.invalid/v1"))
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (6, b"", 1)
    assert result.stderr.startswith(b"xeroctl: error: unknown host: nowhere.invalid: ")


@pytest.mark.smoke
def test_a_connection_that_is_never_accepted_has_a_limit(run):
    with full_listener() as port:
        line = f"xeroctl: error: no connection to 127.0.0.1:{port} within 0.3 s: see --connect-timeout\n"
        assert run(*ask(f"http://127.0.0.1:{port}/v1", "--connect-timeout", "0.3")) == (6, b"", line.encode())


@pytest.mark.needs("tls")
def test_a_tls_handshake_that_never_comes_has_the_same_limit(run, server):
    server.script([BEFORE_REQUEST, Hold()])
    line = (f"xeroctl: error: no TLS at 127.0.0.1:{server.port} within 0.3 s: is it an http:// address? "
            "else see --connect-timeout\n")
    url = f"https://127.0.0.1:{server.port}/v1"
    assert run(*ask(url, "--connect-timeout", "0.3")) == (6, b"", line.encode())


def test_the_limit_for_connecting_is_none_for_the_answer(chat, server):
    server.script([Call(moment), Call(moment), HELLO])
    assert chat("-m", "Hi", "--connect-timeout", "0.3") == (0, b"Hello!\n", b"")


NAMED = """
import os, signal, socket, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import xeroctl

def addresses(*ports):
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]

def silence():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as a resolver, which sees no Ctrl+C
    os.write(1, b"asked\\n")
    threading.Event().wait()

answers = [lambda: %s]  # a second question finds none, which is a traceback
socket.getaddrinfo = lambda *question: answers.pop()()
sys.exit(xeroctl.main())
"""


def named(answer):
    """Return the interpreter's options for a tool to which a host's name has *answer*, an expression, once."""
    return "-c", NAMED % answer


@pytest.fixture
def resolved(monkeypatch):
    """Have each name stand for some ports of this machine."""
    def resolved(*ports):
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *question: found)
    return resolved


def connected(xeroctl, seconds):
    """Return a socket to one of the addresses of a name."""
    deadline = time.monotonic() + seconds
    waiter = xeroctl.Waiter()
    return xeroctl.connect_socket(xeroctl.resolve("api.invalid", 80, waiter, seconds), waiter, deadline)[0]


@pytest.mark.smoke
def test_a_name_is_looked_up_once_and_each_address_tried(run, server, unheard):
    server.script(HELLO)
    options = named(f"addresses({unheard.getsockname()[1]}, {server.port})")
    assert run(*ask("http://api.invalid/v1"), interpreter_options=options) == (0, b"Hello!\n", b"")


def test_an_address_of_a_family_that_the_machine_has_not_is_passed_over(xeroctl, monkeypatch, server):
    server.script([BEFORE_REQUEST])
    found = [(family, socket.SOCK_STREAM, 6, "", ("127.0.0.1", server.port)) for family in (9999, socket.AF_INET)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *question: found)
    with connected(xeroctl, 5) as sock:
        assert sock.getpeername()[1] == server.port


def test_an_address_that_never_answers_leaves_time_for_the_next(xeroctl, resolved, server):
    server.script([BEFORE_REQUEST, Hold()])
    with full_listener() as port:
        resolved(port, server.port)
        begin = time.monotonic()
        with connected(xeroctl, 0.6) as sock:
            assert (sock.getpeername()[1], time.monotonic() - begin < 0.5) == (server.port, True)


def test_all_addresses_share_one_limit(xeroctl, resolved):
    with full_listener() as port:
        resolved(*[port] * 4)
        begin = time.monotonic()
        with pytest.raises(socket.timeout):
            connected(xeroctl, 0.4)
        assert 0.3 < time.monotonic() - begin < 1.2


@pytest.mark.needs("tls")
def test_what_is_left_of_the_limit_is_left_for_the_handshake(run, server):
    seconds = []

    def wait(sock):
        begin = time.monotonic()
        with contextlib.suppress(ClientGone):
            Hold().run(sock)
        seconds.append(time.monotonic() - begin)

    server.script([BEFORE_REQUEST, Call(wait)])
    options = named(f"addresses(*[{server.port}] * 4)")
    result = run(*ask("https://api.invalid/v1", "--connect-timeout", "0.6"), interpreter_options=options)
    assert (result.status, server.gone[0].wait(5)) == (6, True)
    assert seconds[0] > 0.4


def test_a_name_that_is_never_resolved_has_the_same_limit(run):
    line = b"xeroctl: error: no connection to api.invalid within 0.3 s: see --connect-timeout\n"
    result = run(*ask("http://api.invalid/v1", "--connect-timeout", "0.3"), interpreter_options=named("silence()"))
    assert result == (6, b"asked\n", line)


def test_ctrl_c_ends_a_lookup_at_once(start):
    child = start(*ask("http://api.invalid/v1"), interpreter_options=named("silence()"))
    child.expect("asked")
    child.signal(signal.SIGINT)
    assert child.finish(timeout=2) == (130, b"asked\n", b"")


# -- Silence ---------------------------------------------------------


@pytest.mark.parametrize("steps, text", [
    ([Hold()], b""),
    ([b"HTTP/1.1 200 OK\r\nContent-", Hold()], b""),
    ([stream_head(), Hold()], b""),
    ([stream_head(), HEL, Hold()], b"Hel\n"),
    ([stream_head(), HEL, sse(chunk("lo"))[:-9], Hold()], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL), Hold()], b"Hel\n"),
    ([HELLO[:-9], Hold()], b""),
], ids=["no answer", "in the headers", "before the text", "after text", "in an event", "between chunks", "in a body"])
def test_silence_has_a_limit_and_keeps_the_text(chat, server, steps, text):
    server.script(steps)
    line = f"xeroctl: error: 127.0.0.1:{server.port} sent nothing for 0.3 s: see --timeout\n"
    assert chat("-m", "Hi", "--stream", "--timeout", "0.3") == (6, text, line.encode())


def test_pings_are_not_silence(chat, server):
    server.script([stream_head()] + [Call(moment), b": keep-alive\n\n", Call(moment), b":\n"] * 2 + [HEL, LO])
    result = chat("-m", "Hi", "--stream", "--timeout", "0.4")
    assert (result.status, result.stdout) == (0, b"Hello\n")


# -- Connections that break ------------------------------------------


@pytest.mark.parametrize("first", [
    [Reset()],
    [BEFORE_REQUEST, Reset()],
    [],
    [stream_head(), Reset()],
    [stream_head(), b": ping\n\n", sse(chunk(delta={"role": "assistant", "content": None})), Reset()],
], ids=["before headers", "before the request", "closed without a word", "after headers", "after an empty delta"])
def test_a_connection_lost_before_the_first_token_is_retried(chat, server, first):
    server.script(first, [stream(chunk("Hello", finish="stop"), DONE)])
    result = chat("-m", "Hi", "--stream", "--retries", "1")
    assert (result.status, result.stdout, len(server.gone)) == (0, b"Hello\n", 2)
    assert result.stderr.count(b"trying again in 0.") == 1


def test_a_connection_lost_after_text_is_not_retried(start, server):
    gate = Event()
    server.script([stream_head(), HEL, Gate(gate), Reset()])
    child = start(*ask(server.url, "--stream"))
    child.expect("Hel")
    gate.set()
    line = f"xeroctl: error: the reply was cut short: 127.0.0.1:{server.port} closed the connection\n"
    assert child.finish() == (8, b"Hel\n", line.encode())


CUT = [
    ([HELLO[:-9]], b""),
    ([head("200 OK", {"Content-Length": 999}), HELLO], b""),
    ([stream_head({"Content-Length": 9999}), HEL], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL)], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL), http_chunk(HEL)[:-9]], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL), b"zz\r\nx\r\n"], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL), b"-5\r\nx\r\n"], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL), b"\r\nx\r\n"], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL), b"f" * 20 + b"\r\nx\r\n"], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL), b"0\r\n\r\n"], b"Hel\n"),
    ([stream_head(chunked=True), http_chunk(HEL), b"f" * 70000 + b"\r\n"], b"Hel\n"),
    ([stream_head(), HEL], b"Hel\n"),
]


@pytest.mark.smoke
@pytest.mark.parametrize("steps, text", CUT, ids=[
    "body", "length too large", "stream with a length", "between chunks", "in a chunk", "size not a number",
    "negative size", "no size", "huge size", "chunked end without DONE", "endless size", "close without DONE"])
def test_a_reply_that_ends_early_is_cut_short(chat, server, steps, text):
    server.script(steps)
    result = chat("-m", "Hi", "--stream")
    assert (result.status, result.stdout) == (8, text)
    assert re.fullmatch(rb"xeroctl: error: the reply was cut short: [^\n]+\n", result.stderr)


# -- Shapes of a body ------------------------------------------------

JSON = {"Content-Type": "application/json"}
BODY = as_json(completion())


@pytest.mark.parametrize("steps", [
    [head("200 OK", JSON).replace(b"HTTP/1.1", b"HTTP/1.0") + BODY],
    [head("200 OK", JSON) + BODY],
    [head("200 OK", JSON) + BODY[:20], Call(moment), BODY[20:]],
    [HELLO, Hold()],
    [head("200 OK", JSON, {"Transfer-Encoding": "chunked"}), http_chunk(BODY), http_chunk(b""), Hold()],
    [head("200 OK", JSON, {"Transfer-Encoding": "chunked"}),
     b"%x;a=b\r\n%b\r\n0\r\nX-A: 1\r\n\r\n" % (len(BODY), BODY)],
    [head("200 OK", {"Content-Length": len(BODY)}), BODY, Hold()],
    [b"HTTP/1.1 100 Continue\r\n\r\n", HELLO],
    [Drip(HELLO)],
    [response(gzip.compress(BODY), headers={"Content-Encoding": "gzip"})],
    [response(zlib.compress(BODY), headers={"Content-Encoding": "deflate"})],
    [response(BODY, headers={"Content-Encoding": "identity"})],
    [HELLO + b"and more, which is not ours", Hold()],
], ids=["HTTP/1.0", "until the close", "in two parts", "kept open", "chunked, kept open", "chunk extension and trailer",
        "no type, kept open", "100 first", "byte by byte", "gzip", "deflate", "identity", "more than the length"])
def test_every_way_to_send_a_body_is_read(chat, server, steps):
    server.script(steps)
    assert chat("-m", "Hi") == (0, b"Hello!\n", b"")


EVENTS = HEL + LO


@pytest.mark.parametrize("steps", [
    [stream_head(), EVENTS, Hold()],
    [stream_head({"Content-Length": len(EVENTS)}), EVENTS, Hold()],
    [stream_head(chunked=True), http_chunk(EVENTS), Hold()],
    [stream_head().replace(b"HTTP/1.1", b"HTTP/1.0") + EVENTS],
    [stream_head({"Content-Encoding": "gzip"}) + gzip.compress(EVENTS)],
    [stream_head(chunked=True), Drip(b"".join(http_chunk(bytes([byte])) for byte in EVENTS))],
    [stream_head(), HEL, LO[:LO.index(b"data: [DONE]")]],
], ids=["kept open", "length, kept open", "chunked, kept open", "HTTP/1.0", "gzip", "drops", "no DONE"])
def test_every_way_to_send_a_stream_is_read(chat, server, steps):
    server.script(steps)
    result = chat("-m", "Hi", "--stream")
    assert (result.status, result.stdout) == (0, b"Hello\n")


NOT_HTTP = "does not speak HTTP"


@pytest.mark.parametrize("answer, reason", [
    (b"SSH-2.0-OpenSSH_9.6\r\n", NOT_HTTP),
    (b"\x15\x03\x01\x00\x02\x02\x16", NOT_HTTP),
    (b"<html>hello</html>\n", NOT_HTTP),
    (b"HTTP/1.1 two hundred\r\n\r\n", NOT_HTTP),
    (b"HTTP/9.9 200 OK\r\n\r\n", NOT_HTTP),
    (b"HTTP/1.1 200 OK\r\nX: %b\r\n\r\n" % (b"x" * 2000000), NOT_HTTP),
    (b"HTTP/1.1 200 OK\r\n%b\r\n" % (b"X: y\r\n" * 300000), NOT_HTTP),
    (b"HTTP/1.1 204 No Content\r\n\r\n", "the reply is empty"),
    (response(b""), "the reply is empty"),
    (response(b"<!DOCTYPE html><p>Hi", headers={"Content-Type": "text/html"}), "an HTML page"),
    (response(b"Hi"), "not JSON"),
    (response(BODY, headers={"Content-Encoding": "gzip"}), "not in the encoding that it claims"),
    (response(b"\x1b\x2f\x01\xf8", headers={"Content-Encoding": "br"}), "not JSON"),
], ids=["ssh", "TLS alert", "bare HTML", "status in words", "HTTP/9.9", "endless header", "endless headers", "204", "empty",
        "HTML", "text", "not gzip", "brotli"])
def test_an_answer_that_makes_no_sense_is_status_5(chat, server, answer, reason):
    server.script(answer)
    result = chat("-m", "Hi")
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (5, b"", 1)
    assert reason in result.stderr.decode()


# -- Retries ---------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 501, 502, 503, 504])
def test_a_passing_failure_is_retried(chat, server, status):
    server.script(json_response({"error": {"message": "busy"}}, f"{status} Busy", NOW), HELLO)
    assert chat("-m", "Hi") == (0, b"Hello!\n", b"xeroctl: note: HTTP %d, trying again in 0.1 s\n" % status)
    assert len(server.requests) == 2
    assert server.requests[0].body == server.requests[1].body


@pytest.mark.parametrize("status, expected", [(400, 4), (401, 3), (403, 3), (404, 4), (405, 4), (413, 4), (422, 4)])
def test_a_refusal_is_not_retried(chat, server, status, expected):
    server.script(json_response({"error": {"message": "no"}}, f"{status} No", NOW))
    result = chat("-m", "Hi")
    assert (result.status, result.stdout, len(server.requests)) == (expected, b"", 1)
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("options, requests", [((), 3), (("--retries", "0"), 1), (("--retries", "1"), 2)], ids=repr)
@pytest.mark.parametrize("status, expected", [("429 Slow", 7), ("503 Busy", 5)])
def test_retries_come_to_an_end(chat, server, options, requests, status, expected):
    server.always(json_response({"error": "busy"}, status, NOW))
    result = chat("-m", "Hi", *options)
    assert (result.status, result.stdout, len(server.requests)) == (expected, b"", requests)
    assert result.stderr.count(b"trying again") == requests - 1
    assert result.stderr.count(b"\n") == requests


@pytest.mark.smoke
def test_quiet_retries_are_silent(chat, server):
    server.script(json_response({}, "503 Busy", NOW), HELLO)
    assert chat("-m", "Hi", "--quiet") == (0, b"Hello!\n", b"")


def test_an_error_in_a_stream_before_the_first_token_is_retried(chat, server):
    busy = {"error": {"message": "busy", "code": 503, "retry_after": 0}}
    server.script(stream(busy), stream(chunk("Hi", finish="stop"), DONE))
    result = chat("-m", "Hi", "--stream")
    assert (result.status, result.stdout, len(server.requests)) == (0, b"Hi\n", 2)

FAILED_TRY = stream(chunk(finish="stop"), {"error": {"message": "busy", "code": 500, "retry_after": 0}})


def test_a_retry_forgets_how_the_failed_try_ended(start, server):
    gate = Event()
    server.script(FAILED_TRY, [stream_head(), HEL, Gate(gate), Reset()])
    child = start(*ask(server.url, "--stream", "--quiet"))
    child.expect("Hel")
    gate.set()
    line = f"xeroctl: error: the reply was cut short: 127.0.0.1:{server.port} closed the connection\n"
    assert child.finish() == (8, b"Hel\n", line.encode())


@pytest.mark.smoke
def test_a_retry_forgets_what_json_the_failed_try_sent(chat, server):
    server.script(FAILED_TRY, HELLO)
    result = chat("-m", "Hi", "-o", "json", "--quiet")
    assert result == (0, json.dumps(completion(), indent=2).encode() + b"\n", b"")


def test_a_429_in_a_stream_may_be_a_text(chat, server):
    server.always(stream({"error": {"message": "slow", "code": "429", "retry_after": 0}}))
    line = b"xeroctl: error: error in the reply: slow: wait, or raise --retries\n"
    assert chat("-m", "Hi", "--stream", "--quiet") == (7, b"", line)
    assert len(server.requests) == 3


DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@pytest.mark.parametrize("headers, details, seconds", [
    ({}, {}, None),
    ({"Retry-After": "0"}, {}, 0),
    ({"Retry-After": "7"}, {}, 7),
    ({"Retry-After": " 7 "}, {}, 7),
    ({"retry-after": "7"}, {}, 7),
    ({"Retry-After": "1.5"}, {}, 1.5),
    ({"Retry-After": "86400"}, {}, 86400),
    ({"Retry-After": "-5"}, {}, None),
    ({"Retry-After": "soon"}, {}, None),
    ({"Retry-After": ""}, {}, None),
    ({"Retry-After": "nan"}, {}, None),
    ({"Retry-After": "1e3"}, {}, None),
    ({"Retry-After": "\xb2"}, {}, None),
    ({"Retry-After": "Thu, 01 Jan 2026 00:00:09 GMT", "Date": DATE}, {}, 9),
    ({"Retry-After": "Thu, 01 Jan 2026 01:00:09 +0100", "Date": DATE}, {}, 9),
    ({"Retry-After": "Wed, 31 Dec 2025 00:00:00 GMT", "Date": DATE}, {}, 0),
    ({"Retry-After": "Thu, 99 Foo 2026 00:00:00 GMT", "Date": DATE}, {}, None),
    ({"Retry-After": "Thu, 01 Jan 99999 00:00:00 GMT", "Date": DATE}, {}, None),
    ({"Retry-After": "Thu, 01 Jan 2026 1.2.3.4 GMT", "Date": DATE}, {}, None),
    ({"Retry-After": "2026 Jan , 01 1.2.3.4 99 +0100", "Date": DATE}, {}, None),
    ({"Retry-After": "Thu, 01 Jan 2026 00:00:09 GMT", "Date": ",+0100\"" + "9" * 30}, {}, None),
    ({"Retry-After": "9" * 30 + " Jan " + "9" * 30 + " 00:00:00", "Date": DATE}, {}, None),
    ({"Retry-After": DATE, "Date": "Thu, 01 Jan 99999 00:00:00 GMT"}, {}, None),
    ({"Retry-After-Ms": "250"}, {}, 0.25),
    ({"Retry-After-Ms": "250", "Retry-After": "1"}, {}, 0.25),
    ({"Retry-After-Ms": "soon", "Retry-After": "1"}, {}, 1),
    ({}, {"retry_after": 3}, 3),
    ({}, {"retry_after": 0.5}, 0.5),
    ({}, {"retry_after": -1}, 0),
    ({}, {"retry_after": True}, None),
    ({}, {"retry_after": "3"}, None),
    ({}, [], None),
    ({}, "text", None),
    ({"Retry-After": "7"}, {"retry_after": 3}, 7),
], ids=repr)
def test_the_wait_that_a_server_asks_for(xeroctl, headers, details, seconds):
    assert xeroctl.retry_after_seconds({name.lower(): value for name, value in headers.items()}, details) == seconds


@pytest.mark.parametrize("attempt, asked, jitter, seconds", [
    (1, 0, 0, 0), (1, 7, 1, 7), (1, 60, 0, 60), (1, 61, 0, 60), (3, 86400, 0, 60), (1, 10 ** 400, 0, 60),
    (1, None, 0, 0.5), (2, None, 0, 1), (3, None, 0, 2), (1, None, 1, 0.375), (2, None, 1, 0.75),
    (30, None, 0, 60),
], ids=repr)
def test_the_wait_before_a_retry(xeroctl, attempt, asked, jitter, seconds):
    assert xeroctl.retry_delay(attempt, asked, jitter) == seconds


def test_no_number_of_retries_overflows_the_wait(xeroctl):
    assert xeroctl.retry_delay(5000, None, 0.5) == 60


@pytest.mark.parametrize("value", ["9" * 9, "9" * 10, "9" * 30])
def test_a_huge_wait_is_capped(xeroctl, value):
    assert xeroctl.retry_delay(1, xeroctl.retry_after_seconds({"retry-after": value}, {}), 0) == 60


@pytest.mark.parametrize("headers, error", [
    ({"Retry-After": "Thu, 01 Jan 2015 00:00:00 GMT"}, {}),
    ({"Retry-After": DATE, "Date": DATE}, {}),
    ({"retry-after-ms": "1", "retry-after": "9"}, {}),
    ({}, {"retry_after": 0}),
], ids=repr)
def test_the_wait_that_the_server_asked_for_is_kept(chat, server, headers, error):
    server.script(json_response({"error": error}, "429 Slow", headers), HELLO)
    result = chat("-m", "Hi")
    assert (result.status, result.stdout) == (0, b"Hello!\n")
    assert result.stderr.endswith(b", trying again in 0.1 s\n")


@pytest.mark.smoke
@pytest.mark.parametrize("value", ["Thu, 01 Jan 99999 00:00:00 GMT", "-1", "\xff\xfe", "0 0 0 0 0 0"])
def test_a_wait_that_makes_no_sense_is_ignored(chat, server, value):
    server.script(json_response({}, "503 Busy", {"Retry-After": value, "Date": DATE}), HELLO)
    result = chat("-m", "Hi", "--retries", "0")
    assert (result.status, result.stdout, result.stderr) == (5, b"", b"xeroctl: error: HTTP 503\n")


# -- Redirects -------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_the_key_stays(chat, server, status):
    with loopback.Server() as other:
        server.script(response(b"", f"{status} Moved", {"Location": other.url + "/v1"}))
        result = chat("-m", "Hi", "--api-key", "xero_acme_secret")
        assert (result.status, result.stdout, len(server.requests)) == (5, b"", 1)
        assert other.url in result.stderr.decode() and b"redirect" in result.stderr
        assert (other.requests, other.gone) == ([], [])


def test_a_redirect_without_a_target_is_an_error_too(chat, server):
    server.script(response(b"", "302 Found"))
    result = chat("-m", "Hi")
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (5, b"", 1)


# -- Proxies ---------------------------------------------------------

FAR = "http://api.invalid/acme/v1"
FAR_PATH = "/acme/my-endpoint/v1/chat/completions"


def basic(pair):
    return "Basic " + base64.b64encode(pair.encode()).decode()


@pytest.mark.smoke
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_http_goes_through_the_proxy(run, server, variable):
    server.script(HELLO)
    assert run(*ask(FAR), env={variable: server.url}) == (0, b"Hello!\n", b"")
    request = server.requests[0]
    assert (request.method, request.target, request.headers["host"]) == (
        "POST", "http://api.invalid" + FAR_PATH, "api.invalid")
    assert "proxy-authorization" not in request.headers


def test_a_proxy_gets_its_password_and_nobody_sees_it(run, server):
    server.script(HELLO)
    proxy = server.url.replace("://", "://us%20er:p%40ss-word@")
    result = run(*ask(FAR, "--verbose"), env={"http_proxy": proxy})
    assert (result.status, result.stdout) == (0, b"Hello!\n")
    assert server.requests[0].headers["proxy-authorization"] == basic("us er:p@ss-word")
    assert b"ss-word" not in result.stderr and basic("us er:p@ss-word").encode()[6:] not in result.stderr


@pytest.mark.needs("tls")
@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY"])
def test_https_asks_the_proxy_for_a_tunnel(run, server, variable):
    server.script(*[response(b"", "502 Bad Gateway")] * 2)
    proxy = server.url.replace("://", "://user:word@")
    result = run(*ask("https://api.invalid/v1", "--api-key", "xero_acme_secret", "--retries", "1"), env={variable: proxy})
    request = server.requests[1]
    place = f"the proxy 127.0.0.1:{server.port}"
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (6, b"", 2)
    assert result.stderr.endswith(f"xeroctl: error: {place} does not connect us: HTTP 502 Bad Gateway\n".encode())
    assert (request.method, request.target) == ("CONNECT", "api.invalid:443")
    assert request.headers["proxy-authorization"] == basic("user:word")
    assert b"xero_acme_secret" not in request.raw_head


@pytest.mark.needs("tls")
def test_a_proxy_that_wants_a_user_for_a_tunnel_says_so(run, server):
    server.script(response(b"", "407 Proxy Authentication Required"))
    result = run(*ask("https://api.invalid/v1"), env={"https_proxy": server.url})
    assert result == (4, b"", f"xeroctl: error: the proxy 127.0.0.1:{server.port} does not connect us: HTTP 407 Proxy "
                      "Authentication Required: the proxy wants a user and password: put them into its URL\n".encode())


@pytest.mark.needs("tls")
def test_a_proxy_that_is_silent_about_a_tunnel_is_not_taken_for_one_without_tls(run, server):
    server.script(Hold())
    result = run(*ask("https://api.invalid/v1", "--connect-timeout", "0.3"), env={"https_proxy": server.url})
    assert result == (6, b"", f"xeroctl: error: no connection to the proxy 127.0.0.1:{server.port} within 0.3 s: "
                      "see --connect-timeout\n".encode())


def test_a_server_that_is_silent_in_a_tunnel_is_named(run, server, far_certificate):
    def tunnel(sock):
        sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context_for(far_certificate).wrap_socket(sock, server_side=True) as tls:
            while tls.recv(65536):
                pass

    server.script([Call(tunnel)])
    result = run(*ask("https://api.invalid/acme/v1", "--cacert", str(far_certificate), "--timeout", "0.3"),
                 env={"https_proxy": server.url})
    assert result == (6, b"", b"xeroctl: error: api.invalid sent nothing for 0.3 s: see --timeout\n")


@pytest.mark.smoke
def test_tls_goes_through_the_tunnel(run, server, far_certificate):
    seen = []

    def tunnel(sock):
        sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with context_for(far_certificate).wrap_socket(sock, server_side=True) as tls:
            seen.append(loopback.read_request(tls))
            tls.sendall(HELLO)

    server.script([Call(tunnel)])
    result = run(*ask("https://api.invalid/acme/v1", "--api-key", "xero_acme_secret", "--cacert", str(far_certificate)),
                 env={"https_proxy": server.url.replace("://", "://user:word@")})
    assert result == (0, b"Hello!\n", b"")
    assert (seen[0].target, seen[0].headers["authorization"]) == (FAR_PATH, "Bearer xero_acme_secret")
    assert seen[0].headers["host"] == "api.invalid"
    assert "proxy-authorization" not in seen[0].headers


def test_behind_a_proxy_the_server_is_named_for_its_certificate(run, server, far_certificate):
    def tunnel(sock):
        sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        with contextlib.suppress(OSError):  # who does not trust us hangs up
            context_for(far_certificate).wrap_socket(sock, server_side=True).close()

    server.script([Call(tunnel)])
    result = run(*ask("https://api.invalid/acme/v1"), env={"https_proxy": server.url})
    assert (result.status, result.stdout) == (6, b"")
    assert result.stderr.startswith(b"xeroctl: error: TLS with api.invalid failed: ")


def test_verbose_tells_until_when_a_certificate_is_good(run, certificate):
    with loopback.Server(tls_context=context_for(certificate)) as server:
        server.script(HELLO)
        result = run(*ask(server.url + "/v1"), "-v", "--cacert", str(certificate))
    line = rb"^\* TLSv1\.[23], the certificate is good until [A-Z][a-z]{2} +\d+ \d\d:\d\d:\d\d 20\d\d GMT$"
    assert (result.status, len(re.findall(line, result.stderr, re.MULTILINE))) == (0, 1)


def test_no_date_is_worked_out_for_a_question(xeroctl, certificate, monkeypatch):
    def unasked(text):
        raise AssertionError("nobody asked how long the certificate is good")

    monkeypatch.setattr(ssl, "cert_time_to_seconds", unasked)
    with loopback.Server(tls_context=context_for(certificate)) as server:
        server.script(HELLO)
        arguments = [*ask(server.url + "/v1"), "--cacert", str(certificate), "-q"]
        options = xeroctl.parse_arguments(arguments)
        config = xeroctl.Config("", None, {}, [])
        settings = xeroctl.resolve_settings(options, {}, config, None)
        request = xeroctl.build_request("GET", server.url + "/v1/models", settings)
        log, steps = xeroctl.ConnectLog(), []
        monkeypatch.setattr(log, "add_step", lambda name, sentence, **facts: steps.append(name))
        document = xeroctl.receive_json(request, settings, xeroctl.Waiter(), log)
        assert (document["object"], steps) == ("chat.completion", ["name", "connection", "tls"])


@pytest.mark.parametrize("exceptions", ["api.invalid", ".invalid", "other.example,api.invalid", "*"])
def test_no_proxy_names_the_exceptions(run, server, exceptions):
    result = run(*ask(FAR), env={"http_proxy": server.url, "no_proxy": exceptions})
    assert (result.status, server.gone) == (6, [])
    assert result.stderr.startswith(b"xeroctl: error: unknown host: api.invalid")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_never_proxied(run, server, host):
    server.script(HELLO)
    environment = {"http_proxy": "http://127.0.0.1:1", "all_proxy": "socks5://127.0.0.1:1"}
    assert run(*ask(f"http://{host}:{server.port}/v1"), env=environment) == (0, b"Hello!\n", b"")


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "https://127.0.0.1:3128", "http://", "ftp://x", "http://127.0.0.1:"])
def test_a_proxy_that_is_not_http_is_refused(run, proxy):
    result = run(*ask(FAR), env={"http_proxy": proxy})
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)
    assert b"proxy" in result.stderr and b"http://" in result.stderr


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://[::1", "http://a b"])
def test_a_broken_proxy_address_is_a_usage_error(run, proxy):
    result = run(*ask(FAR), env={"http_proxy": proxy})
    assert (result.stdout, result.stderr.count(b"\n")) == (b"", 1)
    assert result.status == 2


@pytest.mark.needs("tls")
@pytest.mark.parametrize("url", [FAR, "https://api.invalid/acme/v1"])
def test_the_proxy_is_named_when_it_wants_a_password(run, server, url):
    server.script(response(b"", "407 Proxy Authentication Required"))
    result = run(*ask(url), env={"http_proxy": server.url, "https_proxy": server.url})
    assert result.status in (4, 6)
    assert b"proxy" in result.stderr and b"407" in result.stderr and b"--api-key" not in result.stderr
    assert (result.stdout, result.stderr.count(b"\n")) == (b"", 1)


def test_a_proxy_that_refuses_is_named(run, refusing):
    result = run(*ask(FAR, "--retries", "0"), env={"http_proxy": "http://user:word@" + refusing})
    line = f"xeroctl: error: the proxy {refusing} refused the connection: is the server running?\n"
    assert result == (6, b"", line.encode())


# -- TLS -------------------------------------------------------------


def context_for(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(certificate))
    return context


@pytest.fixture(scope="session")
def far_certificate(certificate, tmp_path_factory):
    """A key and a certificate for api.invalid."""
    path = tmp_path_factory.mktemp("far") / "far.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-new", "-key", str(certificate), "-days", "2", "-subj", "/CN=api.invalid",
         "-addext", "subjectAltName=DNS:api.invalid", "-addext", "keyUsage=digitalSignature,keyCertSign",
         "-out", str(path)], check=True, stderr=subprocess.DEVNULL)
    path.write_bytes(certificate.read_bytes().partition(b"-----BEGIN CERT")[0] + path.read_bytes())
    return path


@pytest.fixture
def secure(certificate):
    """A scripted server that speaks TLS."""
    with loopback.Server(tls_context=context_for(certificate)) as server:
        server.always(HELLO)
        yield server


def test_an_untrusted_certificate_is_refused_with_a_way_out(run, secure):
    result = run(*ask(secure.url + "/v1"))
    assert (result.status, result.stdout, secure.requests, len(secure.gone)) == (6, b"", [], 1)
    assert re.fullmatch(rb"xeroctl: error: TLS with 127.0.0.1:\d+ failed: [^\n]*certificate[^\n]*"
                        rb"--cacert FILE[^\n]*SSL_CERT_FILE\n", result.stderr)


def test_a_certificate_for_another_host_is_not_a_matter_of_authorities(run, far_certificate):
    with loopback.Server(tls_context=context_for(far_certificate)) as server:
        result = run(*ask(server.url + "/v1", "--cacert", str(far_certificate)))
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (6, b"", 1)
    assert b"127.0.0.1" in result.stderr and b"authority" not in result.stderr


@pytest.mark.smoke
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_cacert_is_trusted(run, secure, certificate, host):
    url = f"https://{host}:{secure.port}/v1"
    assert run(*ask(url, "--cacert", str(certificate))) == (0, b"Hello!\n", b"")


def test_ssl_cert_file_is_trusted(run, secure, certificate):
    assert run(*ask(secure.url + "/v1"), env={"SSL_CERT_FILE": str(certificate)}) == (0, b"Hello!\n", b"")


def test_a_stream_is_read_through_tls(run, secure, certificate):
    secure.script([stream_head(), HEL, LO, Hold()])
    result = run(*ask(secure.url + "/v1", "--stream", "--cacert", str(certificate)))
    assert (result.status, result.stdout) == (0, b"Hello\n")


def test_a_certificate_for_another_host_is_refused(run, far_certificate):
    with loopback.Server(tls_context=context_for(far_certificate)) as server:
        server.always(HELLO)
        result = run(*ask(server.url + "/v1", "--cacert", str(far_certificate)))
        assert (result.status, result.stdout, server.requests) == (6, b"", [])
    assert re.fullmatch(rb"xeroctl: error: TLS with 127.0.0.1:\d+ failed: [^\n]*127.0.0.1[^\n]*\n", result.stderr)


@pytest.mark.needs("tls")
def test_https_to_a_plain_port_asks_for_the_scheme(run, server):
    server.script([BEFORE_REQUEST, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"])
    line = f"xeroctl: error: no TLS at 127.0.0.1:{server.port}: is it an http:// address?\n"
    assert run(*ask(server.url.replace("http", "https"))) == (6, b"", line.encode())


def test_plain_http_to_a_tls_port_is_an_error(run, secure):
    result = run(*ask(secure.url.replace("https", "http"), "--retries", "0"))
    assert (result.stdout, result.stderr.count(b"\n"), secure.requests) == (b"", 1, [])
    assert result.status in (5, 6)


@pytest.mark.needs("tls")
@pytest.mark.parametrize("content", [None, b"", b"no certificate\n", b"\x00\xff",
                                     b"-----BEGIN CERTIFICATE-----\n????\n-----END CERTIFICATE-----\n"], ids=repr)
def test_a_bad_cacert_is_a_usage_error(run, tmp_path, content):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    result = run(*ask("https://127.0.0.1:1/v1", "--cacert", str(path)))
    assert (result.status, result.stdout) == (2, b"")
    assert re.fullmatch(rb"xeroctl: error: cannot use %b as CA certificates: [^\n]+\n" % str(path).encode(), result.stderr)


@pytest.mark.needs("python-variables")
def test_a_python_without_ssl_says_so_and_still_speaks_http(chat, run, server, tmp_path):
    (tmp_path / "ssl.py").write_text("raise ImportError('no ssl here')\n")
    without = {"PYTHONPATH": str(tmp_path)}
    server.script(HELLO)
    assert chat("-m", "Hi", env=without) == (0, b"Hello!\n", b"")
    line = b"xeroctl: error: this Python has no ssl module, which https needs\n"
    assert run(*ask("https://127.0.0.1:1/v1"), env=without) == (6, b"", line)


# -- Heads and uploads -----------------------------------------------


@pytest.mark.parametrize("headers", [
    {f"X-Filler-{number}": "v" for number in range(1200)},
    {"X-Long": "v" * 70000},
    {"X-Long": "v" * 900000},
], ids=["1,200 lines", "a line of 70 KB", "a line of 900 KB"])
def test_a_large_head_is_read(chat, server, headers):
    server.script(json_response(completion(), headers=headers))
    assert chat("-m", "Hi") == (0, b"Hello!\n", b"")


def test_a_head_without_end_is_an_error(chat, server):
    def flood(sock):
        with contextlib.suppress(OSError):
            sock.sendall(b"HTTP/1.1 200 OK\r\nX-Long: " + b"v" * 3000000)

    server.script([Call(flood)])
    result = chat("-m", "Hi")
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (5, b"", 1)


def test_a_head_that_drips_is_bounded_as_a_whole(chat, server):
    def drip(sock):
        with contextlib.suppress(OSError):
            sock.sendall(b"HTTP/1.1 200 OK\r\n")
            while not select.select([sock], [], [], 0.1)[0]:
                sock.sendall(b"X-Drip: 1\r\n")

    server.script([Call(drip)])
    begin = time.monotonic()
    result = chat("-m", "Hi", "--timeout", "0.5", "--retries", "0")
    assert (result.status, result.stdout, time.monotonic() - begin < 5) == (6, b"", True)


def test_an_error_body_without_end_is_bounded_as_a_whole(chat, server):
    def drip(sock):
        with contextlib.suppress(OSError):
            sock.sendall(head("400 Bad Request", {"Content-Type": "text/plain"}) + b"no such field")
            while not select.select([sock], [], [], 0.1)[0]:
                sock.sendall(b" ")

    server.script([Call(drip)])
    begin = time.monotonic()
    result = chat("-m", "Hi", "--timeout", "0.5")
    assert (result.status, b"no such field" in result.stderr, time.monotonic() - begin < 5) == (4, True, True)


@pytest.mark.parametrize("end", ["close", "reset"])
def test_an_answer_before_the_upload_ends_is_read_once(run, server, tmp_path, end):
    """A gateway answers 413 after the first bytes and reads no more."""
    message = tmp_path / "message.txt"
    message.write_bytes(b"word " * 2000000)

    def refuse(sock):
        sock.recv(1000)
        body = as_json({"error": {"message": "body too large"}})
        sock.sendall(head("413 Content Too Large", {"Content-Type": "application/json", "Content-Length": len(body)}) + body)
        if end == "reset":
            select.select([], [], [], 0.1)
            sock.close()  # with unread bytes: a reset
        else:
            sock.shutdown(socket.SHUT_WR)
            select.select([], [], [], 0.5)

    server.script([BEFORE_REQUEST, Call(refuse)])
    with message.open("rb") as file:
        result = run(*ask(server.url + "/v1")[:-2], "--timeout", "5", stdin=file)
    assert (result.status, result.stdout) == (4, b"")
    assert result.stderr.startswith(b"xeroctl: error: HTTP 413: body too large")


# -- Ends that do not end --------------------------------------------


@pytest.mark.parametrize("rest", [b"", b": ping\n\n"], ids=["silence", "comments"])
def test_after_the_finish_reason_a_second_is_enough(chat, server, rest):
    def hold(sock):
        with contextlib.suppress(OSError):
            while not select.select([sock], [], [], 0.2)[0]:
                sock.sendall(rest)

    server.script([stream_head() + sse(chunk("Hi", finish="stop")), Call(hold)])
    begin = time.monotonic()
    result = chat("-m", "Hi", "--stream", "-q")
    assert (result.status, result.stdout) == (0, b"Hi\n")
    assert time.monotonic() - begin < 4


# -- Proxies that are passed by --------------------------------------


@pytest.mark.parametrize("host, no_proxy, expected", [
    ("api.example", "", False),
    ("api.example", "*", True),
    ("api.example", "example", True),
    ("api.example", ".example", True),
    ("api.example", "*.example", True),
    ("example", ".example", True),
    ("myexample", "example", False),
    ("api.example", "other , api.example", True),
    ("api.example", "other\tapi.example", True),
    ("API.Example.", "api.example", True),
    ("api.example", "api.example:443", True),
    ("api.example", "api.example:8443", False),
    ("10.1.2.3", "10.0.0.0/8", True),
    ("11.1.2.3", "10.0.0.0/8", False),
    ("10.1.2.3", "10.1.2.3", True),
    ("10.1.2.3", "10.1.2.3:443", True),
    ("10.1.2.3", "10.1.2.3:80", False),
    ("10.1.2.3", "2.3", False),
    ("fd00::1", "fd00::/8", True),
    ("fd00::1", "[fd00::1]", True),
    ("fd00::1", "[fd00::1]:443", True),
    ("fd00::1", "fd00:0:0::1", True),
    ("fe80::1", "fd00::/8", False),
    ("api.example", "10.0.0.0/8", False),
    ("api.example", ",, ,", False),
])
def test_no_proxy_is_read_as_curl_and_go_read_it(xeroctl, host, no_proxy, expected):
    assert xeroctl.bypasses_proxy(host, 443, no_proxy) is expected


@pytest.mark.parametrize("host", ["app.localhost", "0.0.0.0"])
def test_this_machine_is_never_proxied_whatever_it_is_called(xeroctl, monkeypatch, host):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    assert xeroctl.find_proxy(f"http://{host}:8000/v1") is None


@pytest.mark.needs("tls")
def test_an_ipv6_address_is_in_brackets_in_a_tunnel(run, server):
    server.script(response(b"", "502 Bad Gateway"))
    run(*ask("https://[fd00::1]:8443/v1", "--retries", "0"), env={"https_proxy": server.url})
    assert (server.requests[0].method, server.requests[0].target) == ("CONNECT", "[fd00::1]:8443")
    assert server.requests[0].headers["host"] == "[fd00::1]:8443"


# -- Without a thread ------------------------------------------------


NO_THREADS = """
import os, sys, threading
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import xeroctl

def start(thread):
    raise RuntimeError("can't start new thread")

threading.Thread.start = start
sys.exit(xeroctl.main())
"""


def test_no_thread_to_be_had_is_no_failure(run, server):
    server.script(HELLO)
    options = ("-c", NO_THREADS)
    assert run(*ask(f"http://localhost:{server.port}/v1"), interpreter_options=options) == (0, b"Hello!\n", b"")


def test_a_request_leaves_from_any_thread(xeroctl, server):
    import threading

    server.script(HELLO)
    settings = xeroctl.Settings(endpoint="e", base_url=server.url, api_key=None, headers=[], output="text", stream=False,
                                timeout=5, connect_timeout=5, retries=0, cacert=None, dry_run=False, notes=[], sources={})
    request = xeroctl.Request("POST", server.url + "/v1/chat/completions", [], b"{}", False)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(
        xeroctl.receive_json(request, settings, xeroctl.Waiter(), xeroctl.ConnectLog())))
    thread.start()
    thread.join(10)
    assert answers[0]["object"] == "chat.completion"


def test_a_request_is_not_redacted_for_nobody(xeroctl, server, monkeypatch):
    def show_lines(log, mark, lines):
        assert mark != ">", "nobody asked to see the request"

    monkeypatch.setattr(xeroctl.ConnectLog, "show_lines", show_lines)
    server.script(HELLO)
    arguments = [*ask(server.url + "/v1"), "-q"]
    settings = xeroctl.resolve_settings(xeroctl.parse_arguments(arguments), {}, xeroctl.Config("", None, {}, []), None)
    console = xeroctl.Console(None, None, None, {}, xeroctl.Waiter())
    request = xeroctl.build_chat_request(xeroctl.Sampling("m", {}, []), settings, [], False)
    reply = xeroctl.Reply()
    xeroctl.receive_answer(request, settings, console, reply)
    assert reply.text == "Hello!"


def test_verbose_shows_rate_limits_and_no_cookie_of_the_server(chat, server):
    server.script(json_response(completion(), headers={"Set-Cookie": "sess=abc123; Secure", "X-RateLimit-Remaining-Tokens": "99"}))
    result = chat("-m", "Hi", "-v")
    assert b"abc123" not in result.stderr and b"< Set-Cookie: ***\n" in result.stderr
    assert b"< X-RateLimit-Remaining-Tokens: 99\n" in result.stderr


def test_a_socket_that_cannot_be_wrapped_is_closed(xeroctl):
    class Context:
        def wrap_socket(self, sock, **options):
            raise ValueError("server_hostname cannot start with a leading dot")

    ours, theirs = socket.socketpair()
    with theirs, pytest.raises(ValueError):
        xeroctl.start_tls(ours, ".invalid", Context(), xeroctl.Waiter(), 0)
    assert ours.fileno() == -1


def test_the_note_of_a_retry_is_cut_before_the_advice_alone(chat, server):
    server.script(json_response({"error": {"message": "busy", "code": "a: b"}}, "503 Busy", {"Retry-After": "0"}), HELLO)
    assert chat("-m", "Hi").stderr == b"xeroctl: note: HTTP 503 (a: b), trying again in 0.1 s\n"


# -- Authorities of one's own ----------------------------------------


@pytest.fixture(scope="session")
def old_authority(certificate, tmp_path_factory):
    """The paths of an authority whose basic constraints are not critical, and of a certificate that it signed."""
    folder = tmp_path_factory.mktemp("authority")
    (folder / "ca.cnf").write_text("[req]\ndistinguished_name=dn\n[dn]\n[ca]\nbasicConstraints=CA:TRUE\n")
    (folder / "leaf.ext").write_text("subjectAltName=IP:127.0.0.1\n")
    for words in (
            "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=old -config ca.cnf -extensions ca -keyout ca.key -out ca.crt",
            "req -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 -config ca.cnf -keyout leaf.key -out leaf.csr",
            "x509 -req -in leaf.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile leaf.ext -out leaf.crt"):
        subprocess.run(["openssl", *words.split()], cwd=str(folder), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (folder / "leaf.pem").write_bytes((folder / "leaf.key").read_bytes() + (folder / "leaf.crt").read_bytes())
    return folder / "ca.crt", folder / "leaf.pem"


@pytest.mark.parametrize("how", ["--cacert", "SSL_CERT_FILE"])
def test_an_old_fashioned_authority_is_accepted_where_the_user_names_it(run, old_authority, how):
    authority, leaf = old_authority
    options = ("--cacert", str(authority)) if how == "--cacert" else ()
    with loopback.Server(tls_context=context_for(leaf)) as server:
        server.script(HELLO)
        assert run(*ask(server.url + "/v1", *options), env={"SSL_CERT_FILE": None if options else str(authority)}) == (0, b"Hello!\n", b"")
