"""The tool as a process: signals, streams that are closed or full, interpreters with parts missing, many at once."""

import ctypes
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
from threading import Event

import pytest

from conftest import XEROCTL
from loopback import (BEFORE_REQUEST, DONE, Call, Gate, Hold, chunk, completion, json_response, sse, stream,
                      stream_head)
from terminal import Process, Terminal, checked

SOON_SECONDS = 1
F_SETPIPE_SZ = 1031  # of Linux; fcntl has it since Python 3.10
HELLO = json_response(completion())
HEL = stream_head() + sse(chunk("Hel"))
LO = sse(chunk("lo", finish="stop"), DONE)
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def ask(server, *options, scheme="http"):
    return ("chat", "--endpoint", "my-endpoint", "--base-url", f"{scheme}://127.0.0.1:{server.port}/v1",
            *(options if "-m" in options else ("-m", "Hi", *options)))


def shell(line, interpreter, *args):
    """Return the words that run *line* in bash, where "$@" is the tool with *args*."""
    return ["bash", "-c", line, "bash", interpreter, str(XEROCTL), *args]


@pytest.fixture
def started(request, interpreter, env):
    """Start any program with the tool's environment; options as for Process."""

    def start(argv, **options):
        child = Process(argv, env, **options)
        request.addfinalizer(child.kill)
        return child

    return start


@pytest.fixture
def bash(started, interpreter):
    """Run a line of bash in which "$@" is the tool with the given arguments."""
    return lambda line, *args, **options: started(shell(line, interpreter, *args), **options)


# -- Signals ---------------------------------------------------------


def connecting(start, server):
    begun = Event()
    server.script([BEFORE_REQUEST, Call(lambda sock: sock.recv(1) and begun.set()), Hold()])
    child = start(*ask(server, scheme="https"))
    assert begun.wait(10)
    return child


def waiting_for_headers(start, server):
    server.script([Hold()])
    child = start(*ask(server, "--stream"))
    server.wait_requests()
    return child


def streaming(start, server):
    server.script([HEL, Hold()])
    child = start(*ask(server, "--stream"))
    child.expect("Hel")
    return child


def waiting_to_retry(start, server):
    server.script(json_response({}, "503 Busy", {"Retry-After": "30"}))
    child = start(*ask(server), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    child.expect("trying again in 30.0 s\n")
    return child


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("phase, output", [
    (connecting, b""), (waiting_for_headers, b""), (streaming, b"Hel\n"),
    (waiting_to_retry, b"xeroctl: note: HTTP 503, trying again in 30.0 s\n"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_signal_ends_it_at_once_and_keeps_the_text(start, server, phase, output, number):
    child = phase(start, server)
    child.signal(number)
    result = child.finish(timeout=SOON_SECONDS)
    assert result == (128 + number, output, b"")
    assert child.process.returncode == -number  # it dies of the signal, as a shell's loop around it must know
    assert phase == waiting_to_retry or server.gone[0].wait(SOON_SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("options", [
    ["--from-file", "fifo"], ["--schema", "fifo"], ["--param", "x=@fifo"], ["-a", "fifo"], ["-i", "-a", "fifo"],
    ["-q"],
], ids=" ".join)
def test_a_signal_ends_it_while_it_waits_for_a_pipe_in_place_of_a_file(start, server, tmp_path, options, number):
    path = tmp_path / "fifo"
    config = None
    if options == ["-q"]:  # the config file is the pipe
        config = {"XDG_CONFIG_HOME": str(tmp_path)}
        (tmp_path / "xeroctl").mkdir()
        path = tmp_path / "xeroctl" / "config.toml"
    os.mkfifo(str(path))
    message = [] if "-i" in options else ["-m", "Hi"]
    child = start("chat", "--endpoint", "e", "--base-url", server.url, *message, *options, env=config, cwd=str(tmp_path))
    writer = os.open(str(path), os.O_WRONLY)  # once it has opened the pipe
    child.signal(number)
    result = child.finish(timeout=5)
    os.close(writer)
    assert result == (128 + number, b"", b"")


def test_a_pipe_in_place_of_a_file_is_read_to_its_end(bash, server):
    server.script(HELLO)
    line = '"$@" --from-file <(echo short) --param x=@<(echo 5) -a <(echo log)'
    assert bash(line, *ask(server)).finish() == (0, b"Hello!\n", b"")
    body = server.requests[0].json
    assert (body["messages"][0]["content"], body["x"]) == ("short", 5)
    assert "\nlog\n" in body["messages"][1]["content"]


@pytest.mark.smoke
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_it_while_it_reports_an_error(start, server, number):
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 4096)
    child = start(*ask(server, "--from-file", "x" * 8000), stderr=writer)
    os.close(writer)
    assert select.select([reader], [], [], 10)[0]  # the name is more than the pipe holds: it waits for a reader
    child.signal(number)
    child.finish(timeout=SOON_SECONDS)
    os.close(reader)
    assert child.process.returncode == -number


def wait_until_full(reader):
    """Wait until the pipe of *reader* takes nothing more: what it holds, a page or less a write, grows no longer."""
    counts = [0]
    while counts[-1] == 0 or counts[-10:].count(counts[-1]) < 10:
        assert len(counts) < 1000
        select.select([], [], [], 0.02)
        counts.append(struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, b"    "))[0])


@pytest.mark.smoke
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_it_while_nobody_reads(start, server, number):
    server.script([stream_head()] + [sse(chunk("lolo")) * 17000, Hold()])
    reader, writer = os.pipe()
    child = start(*ask(server, "--stream"), stdout=writer)
    os.close(writer)
    wait_until_full(reader)
    child.signal(number)
    assert child.finish(timeout=5) == (128 + number, b"", b"")
    os.close(reader)


@pytest.mark.smoke
def test_ctrl_c_with_json_keeps_whole_lines(start, server):
    server.script([HEL, Hold()])
    child = start(*ask(server, "--stream", "-o", "json"))
    child.expect("\n")
    child.signal(signal.SIGINT)
    result = child.finish(timeout=SOON_SECONDS)
    assert (result.status, result.stdout.count(b"\n"), result.stdout[-2:]) == (130, 1, b"}\n")


@pytest.mark.smoke
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ignored_from_the_start_stays_ignored(bash, server, number):
    gate = Event()
    server.script([HEL, Gate(gate), LO])
    child = bash('trap "" HUP INT TERM; exec "$@"', *ask(server, "--stream", "--quiet"))
    child.expect("Hel")
    child.signal(number)
    gate.set()
    assert child.finish() == (0, b"Hello\n", b"")


@pytest.mark.smoke
def test_ctrl_c_ends_the_loop_around_it(interpreter, env, server):
    server.script([HEL, Hold()])
    line = 'for i in 1 2 3; do "$@"; done; echo the loop went on'
    with Terminal(shell(line, interpreter, *ask(server, "--stream")), env) as child:
        child.expect("Hel")
        child.send("\x03")
        assert child.finish() == 130
    assert b"went on" not in child.output
    assert len(server.gone) == 1


@pytest.mark.smoke
def test_a_ctrl_c_that_another_thread_is_given_is_seen(interpreter, env, server):
    # It leaves the main thread in its wait, as does one that comes after Python's last look before the wait.
    tell = getattr(ctypes.CDLL(None), "tgkill", None)
    if not tell:
        pytest.skip("the C library has no tgkill")
    server.script([Hold()])
    with Terminal([interpreter, str(XEROCTL), *ask(server)], dict(env, TERM="xterm")) as child:
        server.wait_requests()
        child.expect("waiting")
        number = child.process.pid
        spinner = min({int(name) for name in os.listdir(f"/proc/{number}/task")} - {number})  # the resolver came later
        assert tell(number, spinner, signal.SIGINT) == 0
        assert child.finish(timeout=SOON_SECONDS) == 130
    assert server.gone[0].wait(SOON_SECONDS)


def test_an_alarm_of_the_parent_goes_off(started, interpreter, server):
    server.script([Hold()])
    child = started([sys.executable, "-c", "import os, signal, sys; signal.alarm(1); os.execv(sys.argv[1], sys.argv[1:])",
                     interpreter, str(XEROCTL), *ask(server)])
    assert child.finish().status == 128 + signal.SIGALRM


# -- Standard output -------------------------------------------------


@pytest.mark.smoke
def test_a_reader_that_goes_ends_the_stream_quietly(start, server):
    gate = Event()
    server.script([HEL, Gate(gate), sse(chunk("lo")), Hold()])
    reader, writer = os.pipe()
    child = start(*ask(server, "--stream"), stdout=writer)
    os.close(writer)
    assert os.read(reader, 3) == b"Hel"
    os.close(reader)
    gate.set()
    assert child.finish(timeout=5) == (141, b"", b"")
    assert server.gone[0].wait(SOON_SECONDS)


@pytest.mark.smoke
@pytest.mark.parametrize("options", [(), ("-m", "-"), ("-i",)], ids=" ".join)
def test_a_stdin_that_cannot_be_read_is_one_line(start, server, options):
    with open(os.devnull, "wb") as only_written:
        result = start(*ask(server)[:5], *options, stdin=only_written).finish()
    assert (result.status, result.stdout) == (2, b"")
    assert result.stderr == b"xeroctl: error: cannot read standard input: Bad file descriptor\n"


def test_a_stdin_that_does_not_wait_is_waited_for(start, server):
    server.always(HELLO)
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    child = start(*ask(server, "-i", "-q"), stdin=reader)
    os.close(reader)
    os.write(writer, b"one\n")
    server.wait_requests(1)
    child.expect("Hello!\n" * 2)  # to -m and to the first line
    os.write(writer, b"tw")
    select.select([], [], [], 0.1)
    os.write(writer, b"o\n")
    child.expect("Hello!\n")
    os.close(writer)
    assert child.finish() == (0, b"Hello!\n" * 3, b"")
    assert [request.json["messages"][-1]["content"] for request in server.requests] == ["Hi", "one", "two"]


def test_a_pipe_to_head_ends_quietly(bash, server):
    server.script([HEL] + [sse(chunk("lo" * 50000))] * 40 + [Hold()])
    child = bash('"$@" | head -c 3; echo " ${PIPESTATUS[0]}"', *ask(server, "--stream"))
    assert child.finish() == (0, b"Hel 141\n", b"")


def outputs(server):
    return {
        "whole": ask(server), "streamed": ask(server, "--stream"), "json": ask(server, "-o", "json"),
        "help": ("--help",), "version": ("--version",), "dry run": ask(server, "--dry-run"),
    }


@pytest.mark.parametrize("what", ["whole", "streamed", "json", "help", "version", "dry run"])
def test_a_reader_gone_from_the_start_is_status_141(start, server, what):
    server.always(HELLO)
    reader, writer = os.pipe()
    os.close(reader)
    child = start(*outputs(server)[what], stdout=writer)
    os.close(writer)
    assert child.finish() == (141, b"", b"")


@pytest.mark.parametrize("what", ["whole", "streamed", "json", "help", "version", "dry run"])
def test_a_full_disk_is_one_line(start, server, what):
    server.always(HELLO)
    with open("/dev/full", "wb") as full:
        result = start(*outputs(server)[what], stdout=full).finish()
    reason = b"cannot write to stdout: No space left on device"
    if what == "json":
        assert (json.loads(result.stderr.decode())["kind"], result.stderr.count(b"\n")) == ("output", 1)
        assert (result.status, reason in result.stderr) == (1, True)
    else:
        assert result == (1, b"", b"xeroctl: error: " + reason + b"\n")


def test_a_full_disk_ends_the_stream(start, server):
    server.script([HEL, Hold()])
    with open("/dev/full", "wb") as full:
        assert start(*ask(server, "--stream"), stdout=full).finish(timeout=5).status == 1
    assert server.gone[0].wait(SOON_SECONDS)


def test_a_non_blocking_pipe_gets_all_of_the_answer(start, server):
    text = "".join(f"{number} " for number in range(200000))
    server.script(stream(chunk(text), chunk(finish="stop"), DONE))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    child = start(*ask(server, "--stream", "--quiet"), stdout=writer)
    os.close(writer)
    with open(reader, "rb") as file:
        assert file.read(1) + file.read() == text.encode() + b"\n"
    assert child.finish() == (0, b"", b"")


# -- Streams that are not there --------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("closing, options, expected", [
    (">&-", (), (1, b"", b"xeroctl: error: cannot write to stdout: Bad file descriptor\n")),
    ("2>&-", ("--show-usage",), (0, b"Hello!\n", b"")),
    ("<&-", (), (0, b"Hello!\n", b"")),
    ("<&- 2>&-", (), (0, b"Hello!\n", b"")),
    ("<&- >&- 2>&-", (), (1, b"", b"")),
])
def test_a_closed_stream_is_no_disaster(bash, server, closing, options, expected):
    server.script(HELLO)
    assert bash('exec "$@" ' + closing, *ask(server, *options)).finish() == expected


def test_an_error_without_stderr_keeps_its_status(bash, server):
    server.script(json_response({}, "404 Not Found"))
    assert bash('exec "$@" 2>&-', *ask(server)).finish() == (4, b"", b"")


def test_no_message_and_no_stdin_is_a_usage_error(bash):
    line = b"xeroctl: error: no message: give -m TEXT, or pipe one in\n"
    child = bash('exec "$@" <&-', "chat", "--endpoint", "e", "--base-url", "http://127.0.0.1:1/v1")
    assert child.finish() == (2, b"", line)


def test_a_stderr_that_nobody_reads_does_not_stop_the_answer(start, server):
    server.script(json_response({}, "503 Busy", {"Retry-After": "0"}), stream(chunk("Hello", finish="stop"), DONE))
    reader, writer = os.pipe()
    os.close(reader)
    child = start(*ask(server, "--stream", "--show-usage", "--verbose"), stderr=writer)
    os.close(writer)
    assert child.finish() == (0, b"Hello\n", b"")


# -- Interpreters ----------------------------------------------------


def test_it_runs_from_standard_input(started, interpreter, server):
    server.script(HELLO)
    with open(XEROCTL, "rb") as source:
        child = started([interpreter, "-", *ask(server)], stdin=source)
    assert child.finish() == (0, b"Hello!\n", b"")


def test_run_from_standard_input_it_has_no_other_message(started, interpreter, server):
    with open(XEROCTL, "rb") as source:
        child = started([interpreter, "-", "chat", "--endpoint", "e", "--base-url", server.url], stdin=source)
    result = child.finish()
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (9, b"", 1)


@pytest.mark.parametrize("options", [("-S", "-E", "-I"), ("-O",), ("-OO",), ("-B", "-s", "-u"), ("-bb",)], ids=repr)
def test_options_of_the_interpreter_change_nothing(chat, server, options):
    server.always(HELLO)
    assert chat("-m", "Hi", interpreter_options=options) == (0, b"Hello!\n", b"")


@pytest.mark.parametrize("module", ["readline", "zlib", "ssl", "termios", "fcntl", "curses"])
def test_a_module_that_may_be_missing_is_not_needed(chat, server, tmp_path, module):
    (tmp_path / (module + ".py")).write_text(f"raise ImportError('no {module}')\n")
    server.script(HELLO)
    assert chat("-m", "Hi", env={"PYTHONPATH": str(tmp_path)}) == (0, b"Hello!\n", b"")


LOCALES = [
    {"LC_ALL": "C"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LC_ALL": "POSIX", "LANG": None},
    {"LANG": None},
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"},
    {"PYTHONUTF8": "1"},
]


@pytest.mark.parametrize("locale", LOCALES, ids=repr)
@pytest.mark.parametrize("way", ["argument", "stdin"])
def test_pipes_are_utf_8_in_every_locale(chat, server, locale, way):
    text = "héllo 😀"
    server.script(json_response(completion(text)))
    options = ("-m", text) if way == "argument" else ("-m", "-")
    stdin = b"" if way == "argument" else text.encode() + b"\n"
    assert chat(*options, stdin=stdin, env=locale) == (0, text.encode() + b"\n", b"")
    assert server.requests[0].json["messages"] == [{"role": "user", "content": text}]


# -- Many at once ----------------------------------------------------


def test_thirty_at_once_each_get_one_whole_answer(start, server):
    texts = ["".join(f"{number}:{word} " for word in range(500)) for number in range(30)]
    for text in texts:
        parts = [chunk(text[at:at + 97]) for at in range(0, len(text), 97)]
        server.script(stream(*parts, chunk(finish="stop"), DONE, chunked=True))
    children = [start(*ask(server, "--stream", "--quiet")) for _ in texts]
    results = [child.finish(timeout=60) for child in children]
    assert {(result.status, result.stderr) for result in results} == {(0, b"")}
    assert sorted(result.stdout.decode() for result in results) == sorted(text + "\n" for text in texts)


def test_two_share_a_pipe_without_mixing_lines(bash, server):
    documents = [chunk(f"{number}" * 300) for number in range(200)]
    server.always(stream(*documents, chunk(finish="stop"), DONE))
    child = bash('"$@" & "$@"; wait', *ask(server, "--stream", "-o", "json"))
    result = checked(child.finish())
    assert (result.status, result.stderr) == (0, b"")
    lines = result.stdout.split(b"\n")
    assert len(lines) == 2 * 201 + 1
    assert all(line[:1] + line[-1:] == b"{}" for line in lines[:-1])
