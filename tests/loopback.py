"""A server on 127.0.0.1 that does to each connection what a script says, byte for byte, and records what it saw.

A script is a list of steps: bytes to send, or one of the step classes below. The request is read before the first
step, unless that is BEFORE_REQUEST. After the last step the connection is closed cleanly. No wait is longer than
LIMIT_SECONDS.
"""

import collections
import contextlib
import json
import socket
import struct
import threading
from typing import Any, Callable, NamedTuple

LIMIT_SECONDS = 20
BEFORE_REQUEST = object()
DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}


class Request(NamedTuple):
    """A request as it was received; header names are in lower case, repeated headers joined by a comma."""

    method: str
    target: str
    headers: dict
    raw_head: bytes
    body: bytes

    @property
    def json(self):
        return json.loads(self.body.decode())


class ClientGone(Exception):
    """The client closed the connection."""


# -- Steps -----------------------------------------------------------


class Hold(NamedTuple):
    """Say nothing until the client goes away."""

    def run(self, sock):
        while sock.recv(65536):
            pass
        raise ClientGone


class Reset(NamedTuple):
    """Close the connection with a TCP reset; nothing can follow."""

    def run(self, sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


class Gate(NamedTuple):
    """Wait until the test sets *event*."""

    event: threading.Event

    def run(self, sock):
        if not self.event.wait(LIMIT_SECONDS):
            raise AssertionError("the test never opened the gate")


class Drip(NamedTuple):
    """Send *data* one byte at a time."""

    data: bytes

    def run(self, sock):
        for byte in self.data:
            sock.sendall(bytes([byte]))


class Call(NamedTuple):
    """Do anything else with the socket."""

    function: Callable[[socket.socket], Any]

    def run(self, sock):
        self.function(sock)


# -- Server ----------------------------------------------------------


def read_request(sock):
    """Return the next Request from *sock*, its body as long as Content-Length says."""

    def more():
        data = sock.recv(65536)
        if not data:
            raise ClientGone
        return data

    received = b""
    while b"\r\n\r\n" not in received:
        received += more()
    head, _, body = received.partition(b"\r\n\r\n")
    request_line, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = request_line.split(" ")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    while len(body) < int(headers.get("content-length", 0)):
        body += more()
    return Request(method, target, headers, head + b"\r\n\r\n", body)


class Server:
    """A running server inside its `with` block.

    `requests` holds each Request in the order of their ends; `gone` one event a connection, set when the client has
    closed it; `surprises` the number of connections that had no script, each answered with status 599; `failures` what
    steps raised.
    """

    def __init__(self, tls_context=None):
        self.requests = []
        self.gone = []
        self.surprises = 0
        self.failures = []
        self._scripts = collections.deque()
        self._always = None
        self._gates = []
        self._sockets = []
        self._threads = []
        self._closing = False
        self._arrived = threading.Condition()
        self._tls_context = tls_context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls_context else 'http'}://127.0.0.1:{self.port}"

    def script(self, *connections):
        """Add the scripts of the next connections; a step alone is a script of one step."""
        for script in connections:
            self._scripts.append(self._steps(script if isinstance(script, list) else [script]))

    def always(self, *steps):
        """Set the script of every connection that comes after the last scripted one."""
        self._always = self._steps(steps)

    def wait_requests(self, count=1, timeout=10):
        """Return request number *count*, counted from 1, once it is here."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.requests) >= count, timeout):
                raise AssertionError(f"{len(self.requests)} of {count} requests within {timeout} s")
            return self.requests[count - 1]

    def __enter__(self):
        self._start(self._accept)
        return self

    def __exit__(self, *unused):
        self._closing = True
        socket.create_connection(("127.0.0.1", self.port)).close()  # wakes accept
        self._threads[0].join()
        self._listener.close()
        for gate in self._gates:
            gate.event.set()
        for sock in self._sockets:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # beneath TLS, which another thread may be using
        for thread in self._threads[1:]:
            thread.join(LIMIT_SECONDS)

    def _steps(self, steps):
        self._gates += [step for step in steps if isinstance(step, Gate)]
        return list(steps)

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self):
        while True:
            sock = self._listener.accept()[0]
            if self._closing:
                return sock.close()
            steps = self._scripts.popleft() if self._scripts else self._always
            if steps is None:
                self.surprises += 1
                steps = [response(b"loopback: no script for this connection\n", "599 Not Scripted")]
            self.gone.append(threading.Event())
            self._start(self._serve, sock, steps, self.gone[-1])

    def _serve(self, sock, steps, gone):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(LIMIT_SECONDS)
        try:
            if self._tls_context:
                sock = self._tls_context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            self._sockets.append(sock)
            self._play(sock, steps)
        except socket.timeout as error:
            self.failures.append(error)
        except (ClientGone, OSError):
            gone.set()
        except Exception as error:
            self.failures.append(error)
        finally:
            sock.close()

    def _play(self, sock, steps):
        if self._tls_context:
            sock.do_handshake()
        if steps[:1] == [BEFORE_REQUEST]:
            steps = steps[1:]
        else:
            request = read_request(sock)
            with self._arrived:
                self.requests.append(request)
                self._arrived.notify_all()
        for step in steps:
            if isinstance(step, bytes):
                sock.sendall(step)
            else:
                step.run(sock)
        if sock.fileno() >= 0:
            if self._tls_context:
                sock = sock.unwrap()
            sock.shutdown(socket.SHUT_WR)
            Hold().run(sock)


# -- Builders --------------------------------------------------------


def head(status, *groups):
    """Return a response's head; each of *groups* is a dict of headers, or pairs."""
    pairs = [pair for group in groups for pair in (group.items() if isinstance(group, dict) else group)]
    lines = [f"HTTP/1.1 {status}"] + [f"{name}: {value}" for name, value in pairs]
    return "\r\n".join(lines + ["", ""]).encode("latin-1")


def as_json(value):
    return json.dumps(value, ensure_ascii=False).encode()


def response(body=b"", status="200 OK", headers=(), length=True):
    """Return a whole response, with Content-Length unless *length* is false."""
    return head(status, headers, {"Content-Length": len(body)} if length else ()) + body


def json_response(value, status="200 OK", headers=()):
    """Return a whole response with *value* as JSON."""
    body = as_json(value)
    return head(status, {"Content-Type": "application/json", "Content-Length": len(body)}, headers) + body


def completion(text="Hello!", finish="stop", usage=USAGE, message=(), **more):
    """Return a chat.completion; *message* adds to the message, *more* to the whole."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **dict(message)}, "finish_reason": finish}
    return {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1767225600, "model": "test-model",
        "choices": [choice], "usage": usage, **more,
    }


def chunk(text=None, finish=None, delta=(), **more):
    """Return a chat.completion.chunk; *delta* adds to the delta, *more* to the whole."""
    content = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": {**content, **dict(delta)}, "finish_reason": finish}
    return {
        "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1767225600, "model": "test-model",
        "choices": [choice], **more,
    }


def sse(*events):
    """Return each event as a `data:` field of JSON; bytes go through unchanged."""
    return b"".join(event if isinstance(event, bytes) else b"data: %b\n\n" % as_json(event) for event in events)


def http_chunk(data):
    """Return *data* in the chunked transfer coding; b"" is the end."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream_head(headers=(), chunked=False):
    """Return the head of a 200 event stream."""
    coding = {"Transfer-Encoding": "chunked"} if chunked else ()
    return head("200 OK", {"Content-Type": "text/event-stream"}, coding, headers)


def stream(*events, headers=(), chunked=False):
    """Return a whole event stream, ended by the close, or with one HTTP chunk an event and the final empty one."""
    parts = [sse(event) for event in events]
    if chunked:
        parts = [http_chunk(part) for part in parts + [b""]]
    return stream_head(headers, chunked) + b"".join(parts)
