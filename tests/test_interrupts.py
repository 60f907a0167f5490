"""Ctrl+C at random microseconds after Enter: the chat comes back with a prompt each time, and leaves nothing behind.

A few seconds in the tests; for longer, and on any Python:

    .venv/bin/python tests/test_interrupts.py --seconds 600 --interpreter python3.8
"""

import argparse
import collections
import faulthandler
import fcntl
import json
import os
import random
import re
import select
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest

import conftest
import loopback
from loopback import DONE, Call, Hold, chunk, http_chunk, json_response, sse, stream, stream_head
from terminal import Terminal

CHATS = 3  # at the same time
ROUNDS_A_CHAT = 150
MAX_DELAY_SECONDS = 0.012
HANG_SECONDS = 10  # no machine is that busy
PROMPT_SECONDS = 1
PROMPT = re.compile(rb"[\r\n](?:\^C)*(?:\x1b\[\?2004h)?(?:\x1b\[[\d;]*m)*> (?:\x1b\[0m)?")
COMPLAINTS = re.compile(rb"Traceback|Exception ignored|Warning|Fatal|cannot (write|keep|save|lock)|in use by another")
SHORT = stream(chunk("short"), chunk(finish="stop"), DONE)
PONG = stream(chunk("pong"), chunk(finish="stop"), DONE)


# -- The server ------------------------------------------------------


def stream_slowly(sock, pauses):
    """Send a word every few milliseconds until the client goes away."""
    sock.sendall(stream_head(chunked=True))
    while True:
        sock.sendall(http_chunk(sse(chunk("word "))))
        if select.select([sock], [], [], pauses.random() * 0.006)[0] and not sock.recv(1024):
            return


def stream_fast(sock, pauses):
    """Send words as fast as the client reads them, for as long as it does."""
    sock.sendall(stream_head(chunked=True))
    data = http_chunk(sse(chunk("fast words\n")) * 200)
    for _ in range(1000):
        sock.sendall(data)


def answer_at_once(sock, pauses):
    sock.sendall(SHORT)


def answer_soon(sock, pauses):
    select.select([sock], [], [], pauses.random() * 0.012)
    sock.sendall(SHORT)


def refuse_for_now(sock, pauses):
    sock.sendall(json_response({"error": {"message": "busy"}}, "503 Busy"))


def say_nothing(sock, pauses):
    Hold().run(sock)


def say_half_a_head(sock, pauses):
    sock.sendall(stream_head()[:30])
    Hold().run(sock)


REPLIES = [stream_slowly, stream_slowly, stream_fast, answer_at_once, answer_soon, refuse_for_now, say_nothing,
           say_half_a_head]


class Answers:
    """Answers each request in one of the ways of REPLIES, or with PONG where the question is `ping`."""

    def __init__(self, server, choices, counts):
        self.server, self.choices, self.counts = server, choices, counts

    def play(self, sock):
        question = self.server.requests[-1].json["messages"][-1]["content"]
        if question == "ping":
            sock.sendall(PONG)
            return
        reply = self.choices.choice(REPLIES)
        self.counts[reply.__name__] += 1
        reply(sock, self.choices)


# -- The keys --------------------------------------------------------


class Race:
    """Talks with one chat after the other, counts what came, and raises AssertionError where a chat fails."""

    def __init__(self, interpreter, xeroctl, env, home, seed):
        self.words = [interpreter, str(xeroctl), "chat", "-i", "--endpoint", "e"]
        self.env = dict(env, HOME=home, TMPDIR=home)
        self.choices = random.Random(seed)
        self.counts = collections.Counter()
        self.slowest = 0

    def run(self, seconds):
        """Race for *seconds* and return the counts."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with loopback.Server() as server:
                server.always(Call(Answers(server, self.choices, self.counts).play))
                self._hold_a_chat(server, deadline)
            self._look_at_what_is_left()
        return self.counts

    def _hold_a_chat(self, server, deadline):
        words = [*self.words, "--base-url", server.url + "/v1"]
        with Terminal(words, self.env) as child:
            self.counts["chats"] += 1
            child.expect(PROMPT, HANG_SECONDS)
            for _ in range(ROUNDS_A_CHAT):
                self._interrupt(child)
                if time.monotonic() > deadline or child.process.poll() is not None:
                    break
            if child.process.poll() is None:
                self._ask(child)
                self._leave(child, server)
            complaint = COMPLAINTS.search(child.output)
            if complaint:
                shown = child.output[max(0, complaint.start() - 500):complaint.end() + 2000]
                raise AssertionError(f"{complaint.group().decode()}: {shown.decode(errors='replace')}")

    def _pause(self, seconds):
        select.select([], [], [], seconds)

    def _interrupt(self, child):
        """Ask, press Ctrl+C once or twice within MAX_DELAY_SECONDS, and wait for a prompt.

        Where the answer is complete before Ctrl+C, there are two prompts.  If the second comes late, the next round
        takes it for its own; a chat that hangs is still found, a round later.
        """
        self.counts["rounds"] += 1
        child.skip()
        child.send("hello\r")
        self._pause(self.choices.random() * MAX_DELAY_SECONDS)
        start = time.monotonic()
        child.send("\x03")
        if self.choices.random() < 0.2:
            self._pause(self.choices.random() * MAX_DELAY_SECONDS / 4)
            child.send("\x03")
        try:
            child.expect(PROMPT, PROMPT_SECONDS)
        except AssertionError:
            self._press_a_key(child)
        else:
            self.slowest = max(self.slowest, time.monotonic() - start)

    def _press_a_key(self, child):
        """Wait for a prompt that is late.

        Python has a gap between its last look for signals and its wait for keys.  A Ctrl+C in the gap is seen with the
        next key: then nothing is late, since the last prompt is still the last thing on the screen.
        """
        if child.process.poll() == -signal.SIGINT:
            self.counts["ended by three Ctrl+C's in a row"] += 1
            return
        unseen = child.unread.strip() in (b"", b"hello")
        self.counts["seen with the next key" if unseen else "late"] += 1
        child.send("\x15\r")
        child.expect(PROMPT, HANG_SECONDS)

    def _ask(self, child):
        """Ask a question that is answered; a Ctrl+C that Python saw late may take it back, so ask until it is."""
        for _ in range(5):
            child.send("\x15ping\r")
            try:
                child.expect(re.compile(b"pong[^>]*" + PROMPT.pattern), PROMPT_SECONDS)
            except AssertionError:
                self.counts["asked again"] += 1
                continue
            self.counts["answers at the end"] += 1
            return
        raise AssertionError(f"no question is answered any more: {child.output[-2000:]!r}")

    def _leave(self, child, server):
        """End the chat in one of the ways to end one; the status must be the way's."""
        way = self.choices.choice(["quit", "end of input", "SIGTERM", "SIGHUP"])
        self.counts[way] += 1
        if way == "quit":
            child.send("/quit\r")
            assert child.finish(HANG_SECONDS) == 0
        elif way == "end of input":
            child.send("\x04")
            assert child.finish(HANG_SECONDS) == 0
        else:
            number = getattr(signal, way)
            child.send("hello\r")
            self._pause(self.choices.random() * MAX_DELAY_SECONDS)
            child.signal(number)
            assert child.finish(HANG_SECONDS) == 128 + number

    def _look_at_what_is_left(self):
        """No temporary file is left, no lock is held, and what was kept can be read."""
        for folder, _, names in os.walk(self.env["HOME"]):
            self._take_the_lock(folder)
            for name in names:
                path = os.path.join(folder, name)
                self._take_the_lock(path)
                assert not name.startswith(".xeroctl-"), path
                with open(path, "rb") as file:
                    content = file.read().decode()
                if name == "history":
                    entries = {json.loads(line) for line in content.splitlines()}
                    assert entries <= {"hello", "ping", "/quit"}, entries
                elif name.endswith(".json"):
                    json.loads(content)
                    self.counts["conversations read"] += 1

    def _take_the_lock(self, path):
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AssertionError(f"the lock of {path} is still held") from None
        finally:
            os.close(fd)


class Races:
    """A Race on each of CHATS threads, each with a home of its own."""

    def __init__(self, interpreter, xeroctl, env, folder, seed):
        homes = [os.path.join(folder, str(number)) for number in range(CHATS)]
        for home in homes:
            os.mkdir(home)
        self.races = [Race(interpreter, xeroctl, env, home, seed + number) for number, home in enumerate(homes)]

    @property
    def counts(self):
        return sum((race.counts for race in self.races), collections.Counter())

    def run(self, seconds):
        """Race for *seconds*, or until a chat fails; raise what the first one that failed raised."""
        with ThreadPoolExecutor(CHATS) as threads:
            for done in as_completed([threads.submit(race.run, seconds) for race in self.races]):
                done.result()

    def report(self):
        """Return the counts as lines."""
        lines = [f"{name}: {count}" for name, count in sorted(self.counts.items())]
        return "\n".join(lines + [f"slowest prompt: {max(race.slowest for race in self.races):.3f} s"])


# -- Both ways to run it ---------------------------------------------


@pytest.mark.smoke
@pytest.mark.needs("readline")
def test_every_ctrl_c_after_enter_ends_in_a_prompt(request, interpreter, env, tmp_path):
    races = Races(interpreter, conftest.XEROCTL, env, str(tmp_path), random.randrange(1000000))
    races.run(request.config.getoption("--race-seconds"))
    print(races.report())
    assert races.counts["rounds"] > 0


def main():
    """Race on one Python for as long as the options say; print the counts, also where a chat fails."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--interpreter", default=sys.executable)
    parser.add_argument("--file", default=str(conftest.XEROCTL), help="the xeroctl.py to race (default: ours)")
    parser.add_argument("--seed", type=int, default=random.randrange(1000000))
    options = parser.parse_args()
    print("seed:", options.seed, flush=True)
    faulthandler.dump_traceback_later(options.seconds + 60, exit=True)
    with tempfile.TemporaryDirectory() as folder:
        env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "TERM": "xterm"}
        races = Races(options.interpreter, options.file, env, folder, options.seed)
        try:
            races.run(options.seconds)
        finally:
            print(races.report(), flush=True)
    return 1 if races.counts["late"] else 0


if __name__ == "__main__":
    sys.exit(main())
