"""The selector loop of batch and bench, turn by turn, on socket pairs: what arrives before the parser has time for it."""

import gc
import json
import os
import signal
import socket
import time
import weakref

import pytest

URL = "http://127.0.0.1:1/v1/chat/completions"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"""HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"choices": [{"message": {"content": "x"}}]}"""
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def event(document):
    return b"data: %b\n\n" % (document if isinstance(document, bytes) else json.dumps(document).encode())


def chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = event({"choices": [{"index": 0, "delta": {"content": "x"}}]})
STOP = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
USAGE = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
END = chunk(STOP) + chunk(USAGE) + chunk(event(b"[DONE]")) + b"0\r\n\r\n"


class Loop:
    """A RequestLoop whose connections are socket pairs; `servers` are their other ends."""

    def __init__(self, xeroctl, monkeypatch, waiter):
        self.xeroctl = xeroctl
        self.monkeypatch = monkeypatch
        self.servers = []
        self.loop = xeroctl.RequestLoop(waiter)
        self.route = xeroctl.find_route(URL)
        self.request = xeroctl.Request("POST", URL, {}, b"{}", True)
        self.settings = xeroctl.Settings(
            endpoint="e", base_url=URL, api_key=None, headers=(), output="text", stream=True, timeout=300, connect_timeout=10,
            retries=0, cacert=None, dry_run=False, notes=[], sources={})
        monkeypatch.setattr(xeroctl, "open_stream", self.open_stream)

    def open_stream(self, route, settings, waiter, log):
        ours, server = socket.socketpair()
        ours.setblocking(False)
        self.servers.append(server)
        return self.xeroctl.Stream(ours, waiter, route, settings.timeout, log)

    def exchange(self):
        return self.xeroctl.Exchange(self.request, self.route, self.settings)

    def turn(self, seconds=0.02):
        return self.loop.turn(time.monotonic() + seconds)

    def until(self, condition):
        ended = []
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            ended += self.turn()
        return ended

    def ask(self):
        """Send a request on a new connection; return its Exchange and the server's end."""
        exchange = self.exchange()
        self.loop.start(exchange)
        self.until(lambda: exchange.sent_at is not None)
        self.servers[-1].recv(65536)
        return exchange, self.servers[-1]

    def parse(self, does):
        """Let the parser work, or have no time."""
        self.monkeypatch.setattr(self.xeroctl, "WORK_SECONDS", 10 if does else 0)


@pytest.fixture
def loop(xeroctl, monkeypatch):
    loop = Loop(xeroctl, monkeypatch, xeroctl.Waiter())
    yield loop
    loop.loop.close()
    for server in loop.servers:
        server.close()


def test_bytes_that_wait_for_the_parser_are_no_silence(loop, xeroctl, monkeypatch):
    exchange, server = loop.ask()
    server.sendall(HEAD + chunk(TOKEN) + chunk(STOP))
    loop.until(lambda: exchange.reply.finish_reason)
    monkeypatch.setattr(xeroctl, "AFTER_FINISH_SECONDS", 0)
    monkeypatch.setattr(xeroctl, "TIMEOUT_CHECK_SECONDS", 0)
    loop.loop._next_timeout_check = 0
    loop.parse(False)
    server.sendall(END)
    loop.turn()
    loop.turn()
    loop.parse(True)
    assert loop.turn() == [exchange]
    assert (exchange.error, exchange.reply.usage.completion) == (None, 2)


def test_what_nobody_asked_for_is_no_answer_to_the_next_request(loop):
    first, server = loop.ask()
    server.sendall(HEAD + chunk(TOKEN) + END)
    assert loop.until(lambda: first.reply.finish_reason) == [first]
    loop.parse(False)
    server.sendall(TIMED_OUT)
    server.shutdown(socket.SHUT_WR)
    loop.turn()
    second = loop.exchange()
    loop.loop.start(second)
    loop.parse(True)
    loop.until(lambda: second.sent_at is not None)
    assert len(loop.servers) == 2
    loop.servers[1].sendall(HEAD + chunk(TOKEN) + END)
    loop.until(lambda: second.reply.finish_reason)
    assert (second.error, second.head.status) == (None, 200)


def test_a_new_connection_does_not_wait_for_the_parser(loop, xeroctl, monkeypatch):
    busy, server = loop.ask()
    loop.parse(False)
    server.sendall(HEAD + chunk(TOKEN))
    waiting = loop.exchange()
    loop.loop.start(waiting)
    loop.until(lambda: loop.loop._opened and loop.loop._unparsed)
    sent_before = []
    feed = xeroctl.AnswerDecoder.feed
    monkeypatch.setattr(
        xeroctl.AnswerDecoder, "feed", lambda *args: sent_before.append(waiting.sent_at) or feed(*args))
    loop.parse(True)
    loop.until(lambda: busy.reply.deltas)
    assert sent_before[0] is not None
    assert waiting.due <= waiting.sent_at


def test_a_request_is_due_when_its_connection_is_open(loop):
    exchange, _ = loop.ask()
    assert exchange.due < exchange.sent_at
    late = loop.exchange()
    late.due -= 100
    late.is_scheduled = True
    due = late.due
    loop.loop.start(late)
    loop.until(lambda: late.sent_at is not None)
    assert late.due == due


def test_what_ends_in_the_turn_of_an_interrupt_is_returned_by_the_next(xeroctl, monkeypatch):
    waiter = xeroctl.Waiter()
    with waiter.watch_signals():
        loop = Loop(xeroctl, monkeypatch, waiter)
        exchange, server = loop.ask()
        server.sendall(HEAD + chunk(TOKEN) + END)
        os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored in the background of a shell
        with pytest.raises(xeroctl.Terminated):
            loop.turn()
        assert loop.loop._finished == []
        assert loop.turn() == [exchange]
        loop.loop.close()


def test_a_reset_after_the_end_does_not_spoil_the_answer(loop, monkeypatch):
    loop.request = loop.request._replace(streamed=False)
    exchange, server = loop.ask()
    loop.parse(False)
    server.sendall(UNTIL_CLOSE)
    server.shutdown(socket.SHUT_WR)
    loop.turn()
    loop.turn()

    def reset(stream):
        raise ConnectionResetError

    monkeypatch.setattr(loop.xeroctl.Stream, "receive_now", reset)
    loop.turn()
    loop.parse(True)
    assert loop.turn() == [exchange]
    assert exchange.error is None


def test_a_connection_that_goes_on_after_the_answer_is_closed(loop, xeroctl, monkeypatch):
    exchange, server = loop.ask()
    server.sendall(HEAD + chunk(TOKEN) + chunk(STOP) + chunk(event(b"[DONE]")))
    assert loop.until(lambda: exchange.reply.finish_reason) == [exchange]
    monkeypatch.setattr(xeroctl, "AFTER_FINISH_SECONDS", 0)
    monkeypatch.setattr(xeroctl, "TIMEOUT_CHECK_SECONDS", 0)
    server.sendall(chunk(b": ping\n\n"))
    loop.until(lambda: not loop.loop._connections)
    assert server.recv(10) == b""


def test_a_request_that_is_lost_late_is_not_sent_again(loop, xeroctl, monkeypatch):
    first, server = loop.ask()
    server.sendall(HEAD + chunk(TOKEN) + END)
    loop.until(lambda: first.reply.finish_reason)
    monkeypatch.setattr(xeroctl, "CROSSING_SECONDS", 0)
    second = loop.exchange()
    loop.loop.start(second)
    server.recv(65536)
    server.shutdown(socket.SHUT_WR)
    ended = loop.until(lambda: second.error)
    assert (ended, second.error.kind, len(loop.servers)) == ([second], "network", 1)


def test_a_request_that_crosses_the_end_of_its_connection_is_sent_again_and_its_time_counts(loop):
    first, server = loop.ask()
    server.sendall(HEAD + chunk(TOKEN) + END)
    loop.until(lambda: first.reply.finish_reason)
    second = loop.exchange()
    due = second.due
    loop.loop.start(second)
    server.shutdown(socket.SHUT_WR)
    loop.until(lambda: len(loop.servers) == 2)
    loop.servers[1].sendall(HEAD + chunk(TOKEN) + END)
    assert loop.until(lambda: second.reply.finish_reason) == [second]
    assert (second.error, second.due) == (None, due)


def test_connections_that_are_held_after_the_answer_are_few(loop, xeroctl):
    for _ in range(2 * xeroctl.MAX_SKIPPING):
        exchange, server = loop.ask()
        server.sendall(HEAD + chunk(TOKEN) + chunk(STOP) + chunk(event(b"[DONE]")))
        loop.until(lambda: exchange.reply.finish_reason)  # noqa: B023
    assert len(loop.loop._connections) <= xeroctl.MAX_SKIPPING + 2


def test_an_error_without_an_end_ends(loop, xeroctl):
    exchange, server = loop.ask()
    server.sendall(HEAD.replace(b"200 OK", b"500 No") + chunk(b"x" * xeroctl.MAX_ERROR_BYTES))
    assert loop.until(lambda: exchange.error) == [exchange]
    assert exchange.error.status == 500


def test_no_request_leaves_a_cycle(loop):
    gc.collect()
    gc.disable()
    try:
        exchange, server = loop.ask()
        decoder = weakref.ref(next(iter(loop.loop._connections)).decoder)
        server.sendall(HEAD + chunk(TOKEN) + END)
        loop.until(lambda: exchange.reply.finish_reason)
        assert decoder() is None
    finally:
        gc.enable()


def test_no_more_is_received_than_the_parser_may_hold_back(loop, xeroctl, monkeypatch):
    exchange, server = loop.ask()
    monkeypatch.setattr(xeroctl, "MAX_UNPARSED_BYTES", 1000)
    loop.parse(False)
    server.sendall(HEAD + chunk(TOKEN) * 30)
    loop.turn()
    held = loop.loop._unparsed_bytes
    server.sendall(chunk(TOKEN) * 30)
    loop.turn()
    assert held == loop.loop._unparsed_bytes > 1000
    loop.parse(True)
    loop.until(lambda: exchange.reply.deltas == 60)
    assert loop.loop._unparsed_bytes == 0


@pytest.mark.parametrize("beat, timer, arrived, late", [
    (0.010, 0, None, [0.004]), (0.0095, 0.010, None, [0.004]), (0.0, 0.0004, None, [0.0136, 0.004]), (0.0145, 0, None, []),
    (0.014, 0, 0.013, [0]), (0.010, 0, 0.013, [0.004]), (0.010, 0, -0.026, [0.030]), (0.0, 0, -0.026, [0.030, 0.030]),
], ids=str)
def test_lag(loop, xeroctl, monkeypatch, beat, timer, arrived, late):
    """Seen at 14 ms: how late the loop is for each beat before that."""
    now = 1000.014
    monkeypatch.setattr(xeroctl.time, "monotonic", lambda: now)
    if arrived is not None:
        loop.loop._unparsed.append((None, b"", 1000 + arrived))
    loop.loop._next_lag_sample = 1000 + beat
    loop.loop._sample_lag(1000 + timer if timer else 0)
    monkeypatch.undo()
    loop.loop._unparsed.clear()
    assert loop.loop.lags == [pytest.approx(one, abs=1e-6) for one in late]
