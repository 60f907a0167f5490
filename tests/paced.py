"""A chat completion server that keeps a schedule: one loop in a process of its own, steered by the endpoint's slug.

`python paced.py JSON` serves the endpoints that JSON describes, {slug: {option: value}}, on a port that it prints. The
options are in DEFAULTS. GET /log returns what it did: a list of {slug, message, status, at, first, gaps}, in seconds.
"""

import contextlib
import gc
import heapq
import itertools
import json
import random
import select
import selectors
import socket
import subprocess
import sys
import time
import urllib.request

DEFAULTS = {
    "ttft_ms": [0, 0],      # from the request to the first text, uniform
    "tpot_ms": 0,           # from each token to the next
    "tokens": 10,           # of a streamed answer; at most max_tokens of the request
    "per_chunk": 1,         # tokens in a chunk
    "usage": True,          # whether token counts are told
    "role_ms": None,        # time of a first chunk with a role alone
    "reasoning": 0,         # tokens of reasoning at the beginning
    "hold": False,          # keep the connection silent after [DONE]
    "close": False,         # close after each answer without announcing it
    "share": {},            # {what: share of requests}: a status such as "429", "reset", "cut" or "garbage"
    "first": {},            # {text: what}, done to the first request with each message that holds the text
    "retry_after": None,    # header of the failures
    "stall_s": None,        # [begin, end] since its first request: nothing is sent meanwhile
    "delay_ms": 0,          # of an answer that is not streamed
    "per_second": None,     # limit: more requests get a 429
}


class Connection:
    """What was received and is to be sent on one connection."""

    def __init__(self, sock):
        self.sock = sock
        self.received = b""


class Paced:
    """The server: a heap of (time, action), and a selector."""

    def __init__(self, endpoints):
        self.endpoints = {slug: {**DEFAULTS, **options} for slug, options in endpoints.items()}
        self.random = random.Random(1)
        self.log = []
        self.seen = set()
        self.heap = []
        self.order = itertools.count()
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def at(self, when, action):
        heapq.heappush(self.heap, (when, next(self.order), action))

    def serve(self):
        while True:
            now = time.monotonic()
            while self.heap and self.heap[0][0] <= now:
                heapq.heappop(self.heap)[2]()
                now = time.monotonic()
            wait = max(0, int(1000 * (self.heap[0][0] - now)) - 0.5) / 1000 if self.heap else 1
            for key, _ in self.selector.select(wait):
                if key.data is None:
                    self.accept()
                else:
                    self.read(key.data)

    def accept(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = self.listener.accept()[0]
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.selector.register(sock, selectors.EVENT_READ, Connection(sock))

    def close(self, connection, reset=False):
        if connection.sock.fileno() >= 0:
            self.selector.unregister(connection.sock)
            if reset:
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sock.close()

    def read(self, connection):
        try:
            data = connection.sock.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            return self.close(connection)
        connection.received += data
        head, separator, body = connection.received.partition(b"\r\n\r\n")
        if not separator:
            return None
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        length = int(headers.get("content-length", 0))
        if len(body) < length:
            return None
        connection.received = body[length:]
        target = lines[0].split(" ")[1]
        if target == "/log":
            return self.send_json(connection, 200, self.log)
        return self.answer(connection, target.split("/")[1], json.loads(body[:length].decode()), headers)

    def send(self, connection, data):
        with contextlib.suppress(OSError):
            while data:
                try:
                    data = data[connection.sock.send(data):]
                except BlockingIOError:
                    select.select([], [connection.sock], [], 1)

    def send_json(self, connection, status, document, extra=""):
        body = json.dumps(document).encode()
        self.send(connection, f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nX-Request-ID: r-{len(self.log)}\r\n"
                  f"{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def fate(self, options, message):
        """Return what is to become of a request: None, a status, or a way to break off."""
        for text, what in options["first"].items():
            if text in message and message not in self.seen:
                self.seen.add(message)
                return what
        if options["per_second"]:
            second = int(time.monotonic())
            if options.setdefault("second", second) != second or "count" not in options:
                options.update(second=second, count=0)
            options["count"] += 1
            if options["count"] > options["per_second"]:
                return "429"
        draw = self.random.random()
        for what, share in options["share"].items():
            if draw < share:
                return what
            draw -= share
        return None

    def answer(self, connection, slug, body, headers):
        now = time.monotonic()
        options = self.endpoints[slug]
        options.setdefault("began", now)
        message = str(body["messages"][-1]["content"])
        what = self.fate(options, message)
        entry = {"slug": slug, "message": message, "status": 200, "at": now, "first": None, "gaps": [],
                 "headers": headers, "body": body}
        self.log.append(entry)
        if what is not None and what.isdigit():
            entry["status"] = int(what)
            extra = "" if options["retry_after"] is None else f"Retry-After: {options['retry_after']}\r\n"
            error = {"error": {"message": f"failed with {what}", "code": "scripted"}}
            return self.at(now + options["delay_ms"] / 1000, lambda: self.send_json(connection, int(what), error, extra))
        if what == "reset":
            entry["status"] = 0
            return self.close(connection, reset=True)
        if what == "garbage":
            entry["status"] = 0
            self.send(connection, b"SSH-2.0-OpenSSH\r\n")
            return self.close(connection)
        if not body.get("stream"):
            document = {"id": f"chatcmpl-{len(self.log)}", "object": "chat.completion", "model": "paced", "choices": [
                {"index": 0, "message": {"role": "assistant", "content": f"echo: {message}"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": len(message.split()), "completion_tokens": 2, "total_tokens": 9}}
            return self.at(now + options["delay_ms"] / 1000, lambda: self.finish_whole(connection, options, document, what))
        return self.stream(connection, options, body, entry, what)

    def finish_whole(self, connection, options, document, what):
        if what == "cut":
            self.send(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"id\": ")
            return self.close(connection)
        self.send_json(connection, 200, document)
        if options["close"]:
            self.close(connection)
        return None

    def stream(self, connection, options, body, entry, what):
        count = min(options["tokens"], body.get("max_tokens") or options["tokens"])
        low, high = options["ttft_ms"]
        first = entry["at"] + self.random.uniform(low, high) / 1000
        self.send(connection, b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if options["role_ms"] is not None:
            self.at(entry["at"] + options["role_ms"] / 1000,
                    lambda: self.send_event(connection, {"role": "assistant", "content": ""}))
        chunks = -(-count // options["per_chunk"])
        for number in range(chunks):
            name = "reasoning_content" if number * options["per_chunk"] < options["reasoning"] else "content"
            when = first + number * options["per_chunk"] * options["tpot_ms"] / 1000
            self.at(self.unstalled(options, when), lambda name=name: self.send_token(connection, name, entry))
        end = self.unstalled(options, first + (chunks - 1) * options["per_chunk"] * options["tpot_ms"] / 1000)
        usage = {"prompt_tokens": len(entry["message"].split()), "completion_tokens": count} if options["usage"] else None
        self.at(end, lambda: self.finish_stream(connection, options, usage, what))

    def unstalled(self, options, when):
        if options["stall_s"] is None:
            return when
        begin, end = (options["began"] + seconds for seconds in options["stall_s"])
        return end if begin <= when < end else when

    def send_event(self, connection, delta, finish=None, **more):
        document = {"id": "c", "object": "chat.completion.chunk", "model": "paced",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}
        self.send_chunk(connection, b"data: %b\n\n" % json.dumps(document).encode())

    def send_chunk(self, connection, data):
        self.send(connection, b"%x\r\n%b\r\n" % (len(data), data))

    def send_token(self, connection, name, entry):
        now = time.monotonic()
        if entry["first"] is None:
            entry["first"] = now
        else:
            entry["gaps"].append(now - entry["last"])
        entry["last"] = now
        self.send_event(connection, {name: "word "})

    def finish_stream(self, connection, options, usage, what):
        if what == "cut":
            return self.close(connection)
        self.send_event(connection, {}, "stop", **({"usage": usage} if usage else {}))
        self.send_chunk(connection, b"data: [DONE]\n\n")
        if not options["hold"]:
            self.send(connection, b"0\r\n\r\n")
        if options["close"]:
            self.close(connection)
        return None


class Server:
    """A Paced process inside its `with` block; `url` is its base URL, `log()` what it did."""

    def __init__(self, **endpoints):
        self._argv = [sys.executable, __file__, json.dumps(endpoints)]

    def __enter__(self):
        self._process = subprocess.Popen(self._argv, stdout=subprocess.PIPE)
        self.port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *unused):
        self._process.kill()
        self._process.communicate()

    def log(self):
        with urllib.request.urlopen(self.url + "/log", timeout=10) as answer:
            return json.loads(answer.read().decode())


if __name__ == "__main__":
    paced = Paced(json.loads(sys.argv[1]))
    gc.disable()  # a collection would hold up the schedule
    print(paced.listener.getsockname()[1], flush=True)
    paced.serve()
