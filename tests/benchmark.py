#!/usr/bin/env python3
"""Time xeroctl beside the least script that does the same, bare Python, curl and other clients.

    tests/benchmark.py [--runs N] [--rows WORD] [--interpreter PATH] [--peer 'NAME=COMMAND {base} {message}']

All sides of a row run in turn, round by round, against a server in a process of its own whose answers are built before
the clock runs. The table gives the median and the range of each figure, and the ratio of the median to the row's first
side: "copied" is the bare file, "installed" the module that pip puts beside a start script, compiled once.
"""

import argparse
import json
import os
import pty
import select
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
XEROCTL = os.environ.get("XEROCTL_FILE") or os.path.join(TOP, "xeroctl.py")
STREAMS = (1000, 100000)
TEXTS, AT_ONCE, TEXT_SECONDS = 200, 8, 0.02
TOKENS, TOKEN_SECONDS = 200, 0.005
CHAT = "/v1/chat/completions"

FLOOR = """\
import argparse, json, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("message")
parser.add_argument("--stream", action="store_true")
options = parser.parse_args()
body = {"model": "m", "stream": options.stream, "messages": [{"role": "user", "content": options.message}]}
request = urllib.request.Request(options.base + "/chat/completions", json.dumps(body).encode(),
                                 {"Content-Type": "application/json"})
with urllib.request.urlopen(request) as response:
    if not options.stream:
        print(json.load(response)["choices"][0]["message"]["content"])
    rest = b""
    while options.stream:
        data = response.read1(65536)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\\n")
        texts = [choice["delta"].get("content") or "" for line in lines
                 if line.startswith(b"data: ") and line != b"data: [DONE]"
                 for choice in json.loads(line[6:])["choices"]]
        print("".join(texts), end="", flush=True)
"""
INSTALLED = """\
import sys
sys.path.insert(0, {folder!r})
from xeroctl import main
sys.exit(main())
"""


# -- Server ----------------------------------------------------------


def chunk(text, finish=None):
    """Return the HTTP chunk with the event that carries *text*, as big as real servers make it."""
    data = json.dumps({
        "id": "chatcmpl-0123456789abcdef0123456789abcdef", "object": "chat.completion.chunk", "created": 1767225600,
        "model": "benchmark", "system_fingerprint": "fp_0123456789",
        "choices": [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}],
    }, separators=(",", ":")).encode()
    return http_chunk(b"data: " + data + b"\n\n")


def http_chunk(data):
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM_HEAD = (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
               b"Connection: close\r\n\r\n")
STREAM_END = chunk("", "stop") + http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def answers():
    """Return the whole responses by the first part of the path."""
    whole = json.dumps({
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1767225600, "model": "benchmark",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello! " * 30}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 60, "total_tokens": 69},
    }).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    built = {"single": head % len(whole) + whole,
             "texts": (head % len(whole) + whole).replace(b"Connection: close\r\n", b""),
             "single, streamed": STREAM_HEAD + chunk("Hello! " * 30) + STREAM_END}  # for peers that only stream
    for count in STREAMS:
        body = b"".join(chunk("word%d " % (number % 1000)) for number in range(count))
        built["stream%d" % count] = STREAM_HEAD + body + STREAM_END
    return built


def send_clock(connection):
    """Send a token every few milliseconds, each with the time of its sending."""
    connection.sendall(STREAM_HEAD)
    due = time.monotonic()
    for _ in range(TOKENS):
        due += TOKEN_SECONDS
        time.sleep(max(0, due - time.monotonic()))
        connection.sendall(chunk("%.6f " % time.monotonic()))
    connection.sendall(STREAM_END)


def read_request(connection):
    """Return the head and the body of a request, or raise OSError at the end of the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = connection.recv(65536)
        if not data:
            raise ConnectionResetError
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < int(length[0]):
        body += connection.recv(65536)
    return head, body


def serve_one(connection, built):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        head, body = read_request(connection)
        name = head.split(b"/")[1].decode()
        while name == "texts":  # as a model's server: some time for each, on a connection that stays open
            time.sleep(TEXT_SECONDS)
            connection.sendall(built[name])
            read_request(connection)
        if name == "clock":
            send_clock(connection)
        else:
            streamed = name == "single" and b'"stream":true' in body.replace(b" ", b"")
            connection.sendall(built[name + ", streamed" * streamed])
    except OSError:
        pass  # the reader ended
    connection.close()


def serve():
    """Print the port, then answer until killed."""
    built = answers()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        print(listener.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=serve_one, args=(listener.accept()[0], built), daemon=True).start()


# -- Measures --------------------------------------------------------


def measure_start(argv, env):
    """Return the seconds of a run of *argv*."""
    return {"s": measure_process(argv, env)["s"]}


def measure_process(argv, env):
    """Return the seconds, the CPU seconds and the peak memory in MiB of a run of *argv*."""
    begin = time.perf_counter()
    child = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE)
    errors = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    child.stderr.close()
    child.returncode = status
    if status:
        raise SystemExit("%s failed: %s" % (" ".join(argv), errors.decode()))
    return {"s": seconds, "CPU s": used.ru_utime + used.ru_stime, "MiB": used.ru_maxrss / 1024}


def measure_delay(argv, env):
    """Return the milliseconds from a token's sending to its arrival here: the median and the 99th percentile."""
    delays, rest = [], b""
    with subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as child:
        while True:
            data = os.read(child.stdout.fileno(), 65536)
            now = time.monotonic()
            if not data:
                break
            *tokens, rest = (rest + data).split(b" ")
            for token in tokens:
                token = token.rpartition(b'content":"')[2].strip(b"\n")  # curl shows the events themselves
                if token[:1].isdigit():
                    delays.append(1000 * (now - float(token)))
    if len(delays) < TOKENS:
        raise SystemExit("%s: %d of %d tokens came" % (" ".join(argv), len(delays), TOKENS))
    delays.sort()
    return {"ms median": statistics.median(delays), "ms p99": delays[int(len(delays) * 0.99) - 1]}


def measure_prompt(argv, env):
    """Return the seconds until a chat shows its prompt on a terminal."""
    begin = time.perf_counter()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(argv[0], argv, env)
    seen = b""
    while b"> " not in seen and select.select([terminal], [], [], 20)[0]:
        seen += os.read(terminal, 65536)
    seconds = time.perf_counter() - begin
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(terminal)
    return {"s": seconds}


# -- Rows ------------------------------------------------------------


def sides(options, folder, base):
    """Yield (row, measure, {side: argv}) for each row of the table."""
    python = options.interpreter
    floor, script = os.path.join(folder, "floor.py"), os.path.join(folder, "installed.py")
    with open(floor, "w") as file:
        file.write(FLOOR)
    with open(script, "w") as file:
        file.write(INSTALLED.format(folder=folder))
    shutil.copy(XEROCTL, folder)
    subprocess.check_call([python, "-m", "py_compile", os.path.join(folder, "xeroctl.py")])
    copied, installed = [python, XEROCTL], [python, script]

    def ours(*arguments):
        return {"copied": copied + list(arguments), "installed": installed + list(arguments)}

    def chat(name, *arguments):
        return ours("chat", "--endpoint", "m", "--base-url", base % name + "/chat/completions", "-m", "hi", *arguments)

    def peers(name):
        if shutil.which("curl"):
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]})
            yield "curl", ["curl", "-sSN", base % name + "/chat/completions", "-d", body]
        for peer in options.peer:
            title, _, command = peer.partition("=")
            yield title, [word.format(base=base % name, message="hi") for word in shlex.split(command)]

    bare = {"import argparse": [python, "-c", "import argparse"], "pass": [python, "-c", "pass"]}
    for option in ("--version", "--help"):
        yield option, measure_start, dict(bare, **ours(option))
    yield "one answer", measure_process, dict(
        {"floor": [python, floor, base % "single", "hi"]}, **chat("single"), **dict(peers("single")))
    for count in STREAMS:
        name = "stream%d" % count
        texts = {"json, " + side: argv for side, argv in chat(name, "--stream", "-o", "json").items()}
        yield "%d chunks" % count, measure_process, dict(
            {"floor": [python, floor, base % name, "hi", "--stream"]}, **chat(name, "--stream"), **texts)
    texts = os.path.join(folder, "texts")
    with open(texts, "w") as file:
        file.writelines("text number %d\n" % number for number in range(TEXTS))
    at_once = ["xargs", "-a", texts, "-d", "\\n", "-P", str(AT_ONCE), "-I", "{}"]
    each = {"xargs, " + side: at_once + ["{}" if word == "hi" else word for word in argv]
            for side, argv in dict(chat("texts"), **dict(peers("texts"))).items() if side != "copied"}
    together = ours("batch", "-q", "--endpoint", "m", "--base-url", base % "texts" + "/chat/completions",
                    "--concurrency", str(AT_ONCE), texts)
    yield "%d texts" % TEXTS, measure_process, dict(together, **each)
    yield "a token every 5 ms", measure_delay, dict(
        {"floor": [python, floor, base % "clock", "hi", "--stream"]}, **chat("clock", "--stream"),
        **{side: argv for side, argv in peers("clock") if side == "curl"})
    yield "prompt of a chat", measure_prompt, dict(
        {"import argparse": [python, "-c", "import argparse; input('> ')"]}, **{
            side: [word for word in argv if word not in ("-m", "hi")] for side, argv in chat("single", "-i").items()})


def table(row, measure, argvs, runs, env):
    """Print the lines of one row."""
    figures = {side: [] for side in argvs}
    for number in range(runs + 1):
        for side, argv in argvs.items():
            figure = measure(argv, env)
            if number:  # the first round warms up
                figures[side].append(figure)
    first = {}
    for side, found in figures.items():
        for name in found[0]:
            values = sorted(figure[name] for figure in found)
            median = statistics.median(values)
            first.setdefault(name, median)
            print("| %-18s | %-17s | %-9s | %8.4g | %8.4g to %-8.4g | %5.2f |" % (
                row, side, name, median, values[0], values[-1], median / first[name]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--interpreter", default=sys.executable, metavar="PATH", help="Python to measure with")
    parser.add_argument("--runs", type=int, default=15, metavar="N", help="rounds of each row (default: 15)")
    parser.add_argument("--rows", default="", metavar="WORD", help="only rows with this in their name")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND",
                        help="another client, asked once; {base} is the base URL, {message} the message")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE)
    with tempfile.TemporaryDirectory() as folder:
        try:
            base = "http://127.0.0.1:%d/%%s/v1" % int(server.stdout.readline())
            env = dict(os.environ, HOME=folder, TERM="xterm", PYTHONDONTWRITEBYTECODE="1")
            print("| row | side | figure | median | range | ratio |\n| --- | --- | --- | --- | --- | --- |")
            for row, measure, argvs in sides(options, folder, base):
                if options.rows in row:
                    rounds = min(options.runs, 3) if "texts" in row else options.runs  # 8 s each by xargs
                    table(row, measure, argvs, rounds, env)
        finally:
            server.kill()
            server.wait()
            server.stdout.close()


if __name__ == "__main__":
    main()
