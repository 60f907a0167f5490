"""Processes under test, on pipes or on a pseudo-terminal, and what a terminal shows of their output."""

import fcntl
import os
import re
import select
import selectors
import struct
import subprocess
import termios
import threading
import time
import unicodedata
from collections import namedtuple

SHOWN_BYTES = 5000  # of a child's output, where a test fails
REPEATED = re.compile(rb"([^\x1b]{3,40}?)\1{3,}")  # shown once
Result = namedtuple("Result", "status stdout stderr")


def exit_status(returncode):
    """Return a status as a shell reports it: 128 + N for a death by signal N."""
    return 128 - returncode if returncode < 0 else returncode


def checked(result):
    """Return *result*, which must not hold what Python writes of an exception that nobody caught."""
    uncaught = re.search(b"Traceback|Exception ignored", result.stderr)
    if uncaught:
        shown = result.stderr[-SHOWN_BYTES:].decode(errors="replace")
        raise AssertionError(f"{uncaught.group().decode()}, status {result.status}:\n{shown}")
    return result


def wait_until(condition, timeout=10):
    """Return the first true value of *condition*, a function that is called every few milliseconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"this did not come true within {timeout} s: {condition}")
        select.select([], [], [], 0.005)


def compiled(pattern):
    """Return a regular expression on bytes for a text, bytes, or a regular expression on either."""
    if isinstance(pattern, str):
        pattern = pattern.encode()
    if isinstance(pattern, bytes):
        return re.compile(re.escape(pattern))
    if isinstance(pattern.pattern, str):
        return re.compile(pattern.pattern.encode(), pattern.flags & ~re.UNICODE)
    return pattern


class Child:
    """A running process whose output is kept, and read while something is awaited; killed at the end of `with`."""

    def __init__(self, awaited, argv, popen=subprocess.Popen, **options):
        self.process = popen(argv, bufsize=0, start_new_session=True, **options)
        self.seen = {"stdout": bytearray(), "stderr": bytearray(), "terminal": bytearray()}
        self._awaited = self.seen[awaited]
        self._consumed = 0
        self._selector = selectors.DefaultSelector()
        for name in ("stdout", "stderr"):
            pipe = getattr(self.process, name)
            if pipe:
                self._selector.register(pipe.fileno(), selectors.EVENT_READ, name)

    @property
    def stdout(self):
        return bytes(self.seen["stdout"])

    @property
    def stderr(self):
        return bytes(self.seen["stderr"])

    @property
    def unread(self):
        """What came, and no call of `expect` consumed."""
        return bytes(self._awaited[self._consumed:])

    def expect(self, pattern, timeout=10):
        """Return the match of *pattern* in the output that no earlier call consumed, and consume through it."""
        deadline = time.monotonic() + timeout
        while True:
            match = compiled(pattern).search(self.unread)
            if match:
                self._consumed += match.end()
                return match
            if not self._read(deadline):
                limit = f"within {timeout} s" if self._selector.get_map() else "before the output ended"
                raise AssertionError(f"{pattern!r} did not come {limit}{self._so_far()}")

    def skip(self):
        """Consume all that came until now."""
        self._read(time.monotonic())
        self._consumed = len(self._awaited)

    def wait_until_handled(self, number):
        """Return once the process has a handler for signal *number* (Linux tells in /proc)."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with open(f"/proc/{self.process.pid}/status") as file:
                caught = re.search(r"SigCgt:\s*(\w+)", file.read())
            if int(caught.group(1), 16) >> (number - 1) & 1:
                return
            select.select([], [], [], 0.01)
        raise AssertionError(f"no handler for signal {number}")

    def signal(self, number):
        """Send signal *number* to the process alone."""
        self.process.send_signal(number)

    def kill(self):
        """End the process, if it still runs, and close everything."""
        self.process.kill()
        self.process.wait()
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.kill()

    def _read(self, deadline):
        """Keep what comes next; return False when nothing more can come or the deadline is over."""
        if not self._selector.get_map():
            return False
        for key, _ in self._selector.select(max(0, deadline - time.monotonic())):
            try:
                data = os.read(key.fd, 65536)
            except OSError:  # EIO: nobody holds the other side of the pty
                data = b""
            self.seen[key.data] += data
            if not data:
                self._selector.unregister(key.fd)
        return time.monotonic() < deadline

    def _end(self, timeout):
        """Return the exit status once the output and the process have ended."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        try:
            return exit_status(self.process.wait(max(0, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the process did not end within {timeout} s{self._so_far()}") from None

    def _so_far(self):
        shown = {name: REPEATED.sub(rb"\1...", bytes(data[-SHOWN_BYTES:])) for name, data in self.seen.items() if data}
        return "; seen so far:" + "".join(f"\n{name}: {data!r}" for name, data in shown.items())


class Process(Child):
    """A child on pipes; `expect` looks at its stdout."""

    def __init__(self, argv, env, cwd=None, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                 popen=subprocess.Popen):
        super().__init__("stdout", argv, popen, env=env, cwd=cwd, stdin=stdin, stdout=stdout, stderr=stderr)

    def send(self, data):
        """Write *data* to the child's stdin, which stays open."""
        self.process.stdin.write(data)

    def end_input(self):
        """Close the child's stdin."""
        self.process.stdin.close()

    def feed(self, data):
        """Write all of *data* to the child's stdin, as far as the child reads it, and close it."""
        try:
            with self.process.stdin as pipe:
                while data:
                    data = data[pipe.write(data):]
        except BrokenPipeError:
            pass  # the child needs no more

    def run_to_end(self, data, timeout=20):
        """Return the Result of the child, given *data* on its stdin."""
        if len(data) <= select.PIPE_BUF:
            self.feed(data)
        else:
            threading.Thread(target=self.feed, args=(data,), daemon=True).start()
        return self.finish(timeout)

    def finish(self, timeout=20):
        """Wait for the end and return the Result, free of tracebacks."""
        return checked(Result(self._end(timeout), self.stdout, self.stderr))


class Terminal(Child):
    """A child that leads a session on a pty of its own; `expect` looks at what it writes there.

    A stream given as PIPE, DEVNULL or a file is not the terminal; what comes through a PIPE is in `stdout` or `stderr`.
    """

    def __init__(self, argv, env, columns=80, rows=24, cwd=None, stdin=None, stdout=None, stderr=None):
        self._master, slave = os.openpty()
        self.resize(columns, rows)
        try:
            super().__init__(
                "terminal", argv, env=env, cwd=cwd, preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
                **{name: slave if stream is None else stream
                   for name, stream in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr))},
            )
        finally:
            os.close(slave)
        self._selector.register(self._master, selectors.EVENT_READ, "terminal")

    @property
    def output(self):
        return bytes(self.seen["terminal"])

    def send(self, text):
        """Type *text*."""
        os.write(self._master, text if isinstance(text, bytes) else text.encode())

    def resize(self, columns, rows):
        """Change the window; the kernel tells the foreground process by SIGWINCH."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def hangup(self):
        """Close the terminal's side, as when its window is closed; the kernel sends SIGHUP."""
        if self._master in self._selector.get_map():
            self._selector.unregister(self._master)
        os.close(self._master)
        self._master = None

    def finish(self, timeout=20):
        """Wait for the end and return the exit status; a traceback on the terminal or stderr is refused."""
        status = self._end(timeout)
        checked(Result(status, b"", self.output + self.stderr))
        return status

    def kill(self):
        super().kill()
        if self._master is not None:
            os.close(self._master)
            self._master = None


# -- Screen ----------------------------------------------------------

TOKEN = re.compile(r"\x1b\[([?>]?)([\d;]*)([@-~])|\x1b[=>]|(.)", re.DOTALL)


class Screen:
    """The cells and the cursor of a terminal that knows what readline and a spinner use, and refuses the rest."""

    def __init__(self, columns, rows):
        self.columns, self.rows = columns, rows
        self.row = self.column = 0  # column == columns: the next character wraps
        self.cells = [self.blank() for _ in range(rows)]

    def blank(self, length=None):
        return [" "] * (self.columns if length is None else length)

    def newline(self):
        self.row += 1
        if self.row == self.rows:
            self.cells = self.cells[1:] + [self.blank()]
            self.row -= 1

    def put(self, character):
        """Show one character at the cursor; a wide one takes two cells, a combining one joins the cell before."""
        if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
            self.cells[self.row][max(0, self.column - 1)] += character
            return
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if self.column + width > self.columns:
            self.column = 0
            self.newline()
        self.cells[self.row][self.column:self.column + width] = [character] + [""] * (width - 1)
        self.column += width

    def control(self, character):
        """Obey a control character."""
        if character == "\n":
            self.newline()
        elif character == "\r":
            self.column = 0
        elif character == "\b":
            self.column = max(0, min(self.column, self.columns - 1) - 1)
        elif character == "\t":
            self.column = min(self.columns - 1, self.column // 8 * 8 + 8)
        elif character != "\a":
            raise AssertionError(f"control character {character!r}")

    def command(self, parameters, final):
        """Obey ESC [ *parameters* *final*."""
        if final == "m":  # alone leaves the next character to wrap
            return
        numbers = [int(number or 0) for number in parameters.split(";")]
        count = max(1, numbers[0])
        self.column = min(self.column, self.columns - 1)
        line = self.cells[self.row]
        if final == "A":
            self.row = max(0, self.row - count)
        elif final == "B":
            self.row = min(self.rows - 1, self.row + count)
        elif final == "C":
            self.column = min(self.columns - 1, self.column + count)
        elif final == "D":
            self.column = max(0, self.column - count)
        elif final == "G":
            self.column = min(self.columns, count) - 1
        elif final == "H":
            self.row = min(self.rows, count) - 1
            self.column = min(self.columns, max(1, (numbers + [0])[1])) - 1
        elif final == "K":
            self.erase_in_line(numbers[0])
        elif final == "J":
            self.erase_in_screen(numbers[0])
        elif final == "@":
            line[:] = (line[:self.column] + self.blank(count) + line[self.column:])[:self.columns]
        elif final == "P":
            line[:] = (line[:self.column] + line[self.column + count:] + self.blank(count))[:self.columns]
        else:
            raise AssertionError(f"escape sequence ESC [ {parameters} {final}")

    def erase_in_line(self, mode):
        line = self.cells[self.row]
        start = self.column if mode == 0 else 0
        end = self.column + 1 if mode == 1 else self.columns
        line[start:end] = self.blank(end - start)

    def erase_in_screen(self, mode):
        if mode == 3:
            return  # only what has scrolled away
        if mode < 2:
            self.erase_in_line(mode)
        start = self.row + 1 if mode == 0 else 0
        end = self.row if mode == 1 else self.rows
        self.cells[start:end] = [self.blank() for _ in range(start, end)]


def screen(output, columns=80, rows=24):
    """Return the lines that a terminal shows after *output*, without blanks at their ends and at its end."""
    shown = Screen(columns, rows)
    for match in TOKEN.finditer(output.decode(errors="replace")):
        private, parameters, final, character = match.groups()
        if character and (character < " " or character == "\x7f"):
            shown.control(character)
        elif character:
            shown.put(character)
        elif final and not private:
            shown.command(parameters, final)
        elif private and not (private == "?" and final in "hl"):  # modes leave no mark
            raise AssertionError(f"escape sequence {match.group()!r}")
    lines = ["".join(line).rstrip() for line in shown.cells]
    while lines and not lines[-1]:
        lines.pop()
    return lines
