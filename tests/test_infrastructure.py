"""The tests' own tools do what the tests believe of them."""

import http.client
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from contextlib import ExitStack

import pytest

import loopback
from conftest import TOP
from driver import Driver
from loopback import BEFORE_REQUEST, DONE, Call, Drip, Gate, Hold, Reset
from terminal import Terminal, compiled, screen, wait_until

GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=5)


def answer(server, request):
    """Return all that *server* sends for *request*."""
    with connect(server) as client:
        client.sendall(request)
        return client.makefile("rb").read()


# -- Loopback --------------------------------------------------------


def test_each_connection_takes_the_next_script(server):
    server.script([b"one"], b"two")
    server.always(b"more")
    assert [answer(server, GET) for _ in range(4)] == [b"one", b"two", b"more", b"more"]


def test_a_connection_without_a_script_is_a_surprise():
    with loopback.Server() as server:
        assert answer(server, GET).startswith(b"HTTP/1.1 599 Not Scripted\r\n")
        assert server.surprises == 1


def test_requests_are_recorded_whole(server):
    server.script([])
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-LENGTH: 11\r\nX-A: 1\r\nx-a: 2\r\n\r\n"
    with connect(server) as client:
        client.sendall(head + b'{"a": ')
        client.sendall(b'"\xc3\xa9"}')
        request = server.wait_requests()
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    assert request.headers == {"host": "x", "content-length": "11", "x-a": "1, 2"}
    assert (request.raw_head, request.json) == (head, {"a": "é"})


@pytest.mark.parametrize("target", ["http://api.example:80/v1?a=b", "api.example:443"])
def test_a_proxy_request_keeps_its_target(server, target):
    server.script([])
    answer(server, b"CONNECT %b HTTP/1.1\r\n\r\n" % target.encode())
    assert (server.requests[0].method, server.requests[0].target) == ("CONNECT", target)


def test_wait_requests_has_a_deadline(server):
    with pytest.raises(AssertionError, match="0 of 1 requests within 0.01 s"):
        server.wait_requests(timeout=0.01)


def test_reset_resets(server):
    server.script([Reset()], [BEFORE_REQUEST, Reset()])
    for request in (GET, b""):
        with pytest.raises(ConnectionResetError):
            answer(server, request)


def test_an_empty_script_closes_cleanly(server):
    server.script([], [BEFORE_REQUEST])
    assert (answer(server, GET), answer(server, b"")) == (b"", b"")


def test_hold_sees_the_client_go(server):
    server.script([b"wait", Hold()])
    with connect(server) as client:
        client.sendall(GET)
        assert client.recv(10) == b"wait"
        assert not server.gone[0].is_set()
    assert server.gone[0].wait(5)


def test_a_gate_waits_for_the_test(server):
    event = threading.Event()
    server.script([b"before", Gate(event), b"after"])
    with connect(server) as client:
        client.sendall(GET)
        assert client.recv(10) == b"before"
        event.set()
        assert client.recv(10) == b"after"


def test_the_server_stops_though_steps_are_waiting():
    start = time.monotonic()
    with loopback.Server() as server:
        server.script([b"x", Gate(threading.Event())], [b"x", Hold()])
        clients = [connect(server), connect(server)]
        for client in clients:
            client.sendall(GET)
            client.recv(1)
    for client in clients:
        client.close()
    assert time.monotonic() - start < loopback.LIMIT_SECONDS / 2


def test_drip_sends_one_byte_at_a_time():
    class Recorder:
        sent = []
        sendall = sent.append

    Drip(b"abc").run(Recorder)
    assert Recorder.sent == [b"a", b"b", b"c"]


def test_call_does_anything_and_its_failure_is_kept():
    with loopback.Server() as server:
        server.script([Call(lambda sock: sock.sendall(b"called"))], [Call(lambda sock: 1 // 0)])
        assert (answer(server, GET), answer(server, GET)) == (b"called", b"")
    assert [type(failure) for failure in server.failures] == [ZeroDivisionError]


def test_tls_is_spoken_and_closed_cleanly(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    trust = ssl.create_default_context(cafile=certificate)
    with loopback.Server(tls_context=context) as server:
        server.script([b"hello"])
        with trust.wrap_socket(connect(server), server_hostname="127.0.0.1", suppress_ragged_eofs=False) as client:
            client.sendall(GET)
            assert (client.recv(10), client.recv(10)) == (b"hello", b"")
    assert server.failures == []


@pytest.mark.parametrize("chunked", [False, True])
def test_a_built_stream_is_valid_http(server, chunked):
    events = [b": ping\n\n", loopback.chunk("é", delta={"role": "assistant"}), loopback.chunk(finish="stop"), DONE]
    server.script(loopback.stream(*events, headers={"X-Request-ID": "r1"}, chunked=chunked))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", "/")
    with connection.getresponse() as reply:
        assert (reply.getheader("Content-Type"), reply.getheader("X-Request-ID")) == ("text/event-stream", "r1")
        assert reply.read() == loopback.sse(*events)
    connection.close()


def test_a_built_response_is_valid_http(server):
    server.script(loopback.json_response(loopback.completion("é"), headers=[("X-A", "1"), ("X-A", "2")]))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url, timeout=5) as reply:
        assert reply.headers.get_all("X-A") == ["1", "2"]
        assert '"content": "é"' in reply.read().decode()


# -- Rules -----------------------------------------------------------


def test_no_test_sleeps():
    files = sorted(TOP.glob("tests/test_*.py"))
    assert [file.name for file in files if "time.sleep" + "(" in file.read_text(encoding="utf-8")] == []
    assert len(files) > 20


def test_wait_until_waits_for_a_condition():
    calls = []
    assert wait_until(lambda: calls.append(1) or len(calls) == 3) and len(calls) == 3
    with pytest.raises(AssertionError, match="did not come true within 0.01 s"):
        wait_until(lambda: False, timeout=0.01)


# -- The warm interpreter --------------------------------------------


def show(*lines):
    """Return a script that stands in for the tool in a Driver."""
    return "import os, sys\n\n\ndef main():\n" + "".join(f"    {line}\n" for line in lines)


@pytest.fixture
def scripted(interpreter, tmp_path):
    """Return a Driver whose tool is the function main of these lines."""
    with ExitStack() as stack:
        def scripted(*lines):
            (tmp_path / "tool.py").write_text(show(*lines))
            return stack.enter_context(Driver(interpreter, tmp_path / "tool.py", tmp_path))
        yield scripted


def test_a_run_has_its_own_arguments_input_environment_and_folder(scripted, tmp_path):
    driver = scripted("print(sys.argv[1:], sys.stdin.read(), os.environ.get('A'), os.getcwd())", "os.environ['A'] = '3'", "return 4")
    env = {**driver.env, "A": "1"}
    shown = f"['x', 'é'] hi 1 {tmp_path}\n".encode()
    assert [driver.run("x", "é", stdin=b"hi", env=env, cwd=str(tmp_path)) for _ in range(2)] == [(4, shown, b"")] * 2
    assert driver.run(cwd="/") == (4, b"[]  None /\n", b"")


def test_a_long_input_and_a_long_output_pass_each_other(scripted):
    text = b"x" * 1000000
    assert scripted("sys.stdout.write(sys.stdin.read())").run(stdin=text) == (0, text, b"")


def test_a_run_that_died_of_a_signal_is_told_and_the_next_one_runs(scripted):
    driver = scripted("if sys.argv[1:]: os.kill(os.getpid(), 15)")
    assert [driver.run("x").status, driver.run().status] == [143, 0]


@pytest.mark.parametrize("line", ["1 // 0", "import socket; socket.socket().fileno()"])
def test_a_traceback_and_a_leak_are_refused(scripted, line):
    with pytest.raises(AssertionError, match="Traceback|Exception ignored"):
        scripted(line, "return 0").run()


def test_a_driver_runs_what_its_interpreter_does_not_look_at_when_it_starts(scripted):
    driver = scripted("return 0")
    assert driver.can_run({**driver.env, "HOME": "/x", "XEROTIER_CONTEXT": "a"})
    assert not any(driver.can_run({**driver.env, name: "1"}) for name in ("LC_ALL", "LANG", "PYTHONPATH", "PYTHONUTF8"))


# -- Spawning --------------------------------------------------------


def code(*lines):
    """Return the options that run *lines* in place of the tool."""
    return ("-c", "\n".join(lines))


@pytest.mark.smoke
def test_run_returns_whole_streams(run):
    copy = code("import sys", "sys.stdout.write(sys.stdin.read())", "sys.stderr.write(sys.argv[2])", "sys.exit(3)")
    assert run("argument", stdin=b"input", interpreter_options=copy) == (3, b"input", b"argument")


@pytest.mark.smoke
@pytest.mark.needs("bare-environment")
def test_run_builds_the_environment(run, env):
    env["CHANGED"] = "1"
    show = code("import os", "print(*os.environ)")
    result = run(env={"ADDED": "1", "HOME": None}, interpreter_options=show)
    names = {"PATH", "LANG", "PYTHONWARNINGS", "PYTHONDONTWRITEBYTECODE", "TERM", "CHANGED", "ADDED"}
    assert set(result.stdout.decode().split()) == names


def test_run_reports_a_signal_as_a_shell_does(run):
    assert run(interpreter_options=code("import os", "os.kill(os.getpid(), 15)")).status == 143


@pytest.mark.smoke
def test_run_refuses_a_traceback(run):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run(interpreter_options=code("1 // 0"))


def test_run_has_a_deadline(run):
    with pytest.raises(AssertionError, match="did not end within 0.3 s"):
        run(stdin=subprocess.PIPE, timeout=0.3, interpreter_options=code("import signal", "signal.pause()"))


@pytest.mark.smoke
def test_start_talks_to_a_running_process(start):
    shout = code("for _ in range(2): print(input().upper(), flush=True)", "import signal", "signal.pause()")
    process = start(interpreter_options=("-u",) + shout, stderr=subprocess.DEVNULL)
    process.send(b"one\n")
    process.expect(b"ONE\n")
    process.send(b"two\n")
    process.expect(b"TWO\n")
    process.signal(signal.SIGTERM)
    assert process.finish() == (143, b"ONE\nTWO\n", b"")


def test_ctrl_c_reaches_a_child_as_keyboard_interrupt(start):
    wait = ["import sys", "try: print('ready', flush=True); input()", "except KeyboardInterrupt: sys.exit(130)"]
    process = start(interpreter_options=code(*wait))
    process.expect("ready")
    process.signal(signal.SIGINT)
    assert process.finish().status == 130


# -- Terminal --------------------------------------------------------


def test_the_terminal_is_the_controlling_one_of_that_size(terminal):
    ask = ["import os, sys", "tty = os.open('/dev/tty', os.O_RDWR)", "print(os.tcgetpgrp(tty) == os.getpid())"]
    ask += ["print(*(os.isatty(n) for n in range(3)))", "print(*os.get_terminal_size())"]
    child = terminal(columns=33, rows=7, interpreter_options=code(*ask))
    assert child.finish() == 0
    assert child.output == b"True\r\nTrue True True\r\n33 7\r\n"


def test_expect_consumes_through_the_match(terminal):
    child = terminal(interpreter_options=code("print('id=1 id=22.')"))
    assert [child.expect(re.compile(r"id=(\d+)[ .]")).group(1) for _ in range(2)] == [b"1", b"22"]
    with pytest.raises(AssertionError, match="'id' did not come before the output ended; seen so far:\nterminal: b'id"):
        child.expect("id")


def test_expect_has_a_deadline_and_shows_what_it_saw(terminal):
    child = terminal(interpreter_options=code("print(input('name? '))"))
    child.expect("name? ")
    with pytest.raises(AssertionError, match="'Ann' did not come within 0.01 s; seen so far:\nterminal: b'name"):
        child.expect("Ann", timeout=0.01)
    child.send("Bob\n")
    child.expect("Bob\r\nBob\r\n")
    assert child.finish() == 0


def test_keys_resizing_and_signals_reach_the_child(terminal):
    child = terminal(interpreter_options=code(
        "import os, signal",
        "signal.signal(signal.SIGWINCH, lambda *_: os.write(1, b'%d' % os.get_terminal_size().columns))",
        "signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'usr1'))",
        "signal.signal(signal.SIGINT, signal.SIG_DFL)",
        "os.write(1, b'ready')",
        "while True: signal.pause()",
    ))
    child.expect("ready")
    child.resize(columns=44, rows=10)
    child.expect("44")
    child.signal(signal.SIGUSR1)
    child.expect("usr1")
    child.send("\x03")
    assert child.finish() == 130


def test_hangup_ends_the_child(terminal):
    child = terminal(interpreter_options=code("input('ready')"))
    child.expect("ready")
    child.hangup()
    assert child.finish() == 128 + signal.SIGHUP


def test_a_stream_may_be_a_pipe_instead(terminal):
    ask = ["import os, sys", "print(*(os.isatty(n) for n in range(3)))", "sys.stderr.write('note')"]
    child = terminal(stdout=subprocess.PIPE, interpreter_options=code(*ask))
    assert (child.finish(), child.stdout, child.output) == (0, b"True False True\n", b"note")


@pytest.mark.smoke
def test_a_long_paste_arrives(terminal):
    child = terminal(interpreter_options=code(
        "import sys, tty", "tty.setraw(0)", "print('ready', flush=True)", "print(len(sys.stdin.buffer.read(30000)))",
    ))
    child.expect("ready")
    child.send("x" * 30000)
    child.expect("30000")


def test_a_child_is_killed_with_its_block(interpreter, env):
    with Terminal([interpreter, "-c", "input('ready')"], env) as child:
        child.expect("ready")
    assert child.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("pattern", ["a.é", "a.é".encode(), re.compile("A[.]é", re.I), re.compile("a[.]é".encode())])
def test_a_pattern_may_be_text_or_bytes(pattern):
    assert compiled(pattern).search("-a.é-".encode()).group() == "a.é".encode()


@pytest.mark.parametrize(
    "output, lines",
    [
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"one\ntwo", ["one", "   two"]),
        (b"waiting\r\x1b[Kdone", ["done"]),
        (b"waiting\rdone", ["doneing"]),
        (b"abc\x1b[2K\rx", ["x"]),
        (b"abc\b\b\x1b[K", ["a"]),
        (b"abc\x1b[2D\x1b[1@x", ["axbc"]),
        (b"abc\x1b[2D\x1b[1P", ["ac"]),
        (b"0123456789AB", ["0123456789", "AB"]),
        (b"0123456789\r\nx", ["0123456789", "x"]),
        (b"0123456789AB\x1b[A\r\x1b[J", []),
        (b"a\r\nb\r\nc\r\nd", ["b", "c", "d"]),
        (b"a\r\nb\x1b[H\x1b[1Cx", ["ax", "b"]),
        (b"a\x1b[3;5Hb\x1b[2J\x1b[Hc", ["c"]),
        (b"\x1b[?2004h\x1b[?25l\x1b[1;31mred\x1b[0m\x1b[?25h", ["red"]),
        ("⠋ e\u0301 日本".encode(), ["⠋ e\u0301 日本"]),
        ("12345678日本".encode(), ["12345678日", "本"]),
        (b"0123456789\x1b[0mx", ["0123456789", "x"]),
        (b"0123456789\x1b[Dx", ["01234567x9"]),
        ("👩\u200d🚀\ufe0f|".encode(), ["👩\u200d🚀\ufe0f|"]),
    ],
    ids=ascii,
)
def test_screen_shows_what_a_terminal_would(output, lines):
    assert screen(output, columns=10, rows=3) == lines


@pytest.mark.parametrize("output", [b"\x1b]0;title\a", b"\x00", b"\x1b[5;6r", b"\x1b[>c"], ids=ascii)
def test_screen_refuses_what_it_does_not_know(output):
    with pytest.raises(AssertionError):
        screen(output)
