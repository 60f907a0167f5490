"""A warm interpreter that holds the tool and forks a process for each run of it: 10 ms a run instead of 120.

The process has streams, arguments, environment, folder, session and signals of its own, as one that was started.
What it does not show is how the interpreter starts and ends: that is for tests that start it.
"""

import array
import ast
import gc
import importlib
import importlib.util
import json
import os
import select
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import ExitStack, suppress

STREAMS = ("stdin", "stdout", "stderr")
WITHOUT_EFFECT_ONCE_STARTED = ("PYTHON", "LANG", "LC_", "LD_", "OPENSSL_", "MALLOC_")  # variables that begin so


# -- The warm interpreter, Python 3.6 or later ------------------------


def load(path):
    """Return the module in the file *path*, with the modules loaded that its functions import."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    spec = importlib.util.spec_from_file_location("xeroctl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    for name in sorted(names - {"readline"}):  # readline speaks to the terminal when it is loaded
        with suppress(ImportError):  # it is not on every system
            importlib.import_module(name)
    return module


def receive_request(channel, lines):
    """Return the next request and its file descriptors; None where there is no next."""
    fds = array.array("i")
    message, ancillary, _, _ = channel.recvmsg(1, socket.CMSG_LEN(4 * fds.itemsize))
    if not message:
        return None, []
    for _, _, data in ancillary:
        fds.frombytes(data)
    return json.loads(lines.readline()), list(fds)


def become(request, fds, given):
    """Make of this process the one that *request* describes; variables that are not *given* stay."""
    for number, fd in enumerate(fds[:3]):
        os.dup2(fd, number)
        os.close(fd)
    os.set_inheritable(fds[3], False)  # it is closed when this process ends, not when its children do
    os.setsid()
    os.chdir(request["cwd"])
    environment = {name: value.encode("latin-1") for name, value in request["env"].items()}
    for name in set(given) - set(environment):
        os.environ.pop(name, None)
    for name, value in environment.items():
        os.environb[os.fsencode(name)] = value
    sys.argv[1:] = [os.fsdecode(word.encode("latin-1")) for word in request["argv"]]


def end(main):
    """Call *main* and end this process as `sys.exit(main())` does, without taking the interpreter down."""
    try:
        status = main()
        gc.collect()  # an unclosed socket is told to stderr, as an error
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status or 0)


def serve(path, channel, given):
    """Fork a process for each request to start one, and answer with its number; tell how one ended that is asked for."""
    sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]
    sys.argv[:] = [path]
    tool = load(path)
    channel.set_inheritable(False)
    lines, answers = channel.makefile("r"), channel.makefile("w")
    gc.collect()
    getattr(gc, "freeze", gc.collect)()  # since Python 3.7: what is loaded need not be looked at again
    while True:
        request, fds = receive_request(channel, lines)
        if request is None:
            return
        if "wait" in request:
            answer = os.waitpid(request["wait"], 0)[1]
        else:
            answer = os.fork()
            if answer == 0:
                lines.close()
                answers.close()
                channel.close()
                become(request, fds, given)
                end(tool.main)
        for fd in fds:
            os.close(fd)
        print(answer, file=answers, flush=True)


# -- The tests' side --------------------------------------------------


def as_latin_1(text):
    """Return *text*, or bytes, as a text of which each character is a byte that a process is given."""
    return os.fsencode(text).decode("latin-1")


class Forked:
    """A process that a warm interpreter forked, with what tests use of a subprocess.Popen."""

    def __init__(self, ask, argv, env, cwd, streams):
        self._ask = ask
        self.args = argv
        self.returncode = None
        with ExitStack() as theirs:
            given = []
            for name in STREAMS:
                ours, fd = self._open(name, streams[name], given, theirs)
                setattr(self, name, ours)
                given.append(fd)
            self._alive, life = os.pipe()
            theirs.callback(os.close, life)
            request = {"argv": [as_latin_1(word) for word in argv], "cwd": os.path.abspath(cwd or "."),
                       "env": {as_latin_1(name): as_latin_1(value) for name, value in env.items()}}
            self.pid = ask(request, given + [life])

    def _open(self, name, stream, given, theirs):
        """Return our file, or None, and the process's descriptor for *stream* as Popen takes it."""
        if stream == subprocess.STDOUT:
            return None, given[1]
        if stream == subprocess.DEVNULL:
            stream = theirs.enter_context(open(os.devnull, "r+b", buffering=0))
        if stream != subprocess.PIPE:
            return None, stream if isinstance(stream, int) else stream.fileno()
        reader, writer = os.pipe()
        if name == "stdin":
            theirs.callback(os.close, reader)
            return open(writer, "wb", buffering=0), reader
        theirs.callback(os.close, writer)
        return open(reader, "rb", buffering=0), writer

    def wait(self, timeout=None):
        """Return the status as Popen does, once the process has ended."""
        if self.returncode is None:
            if not select.select([self._alive], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            os.close(self._alive)
            status = self._ask({"wait": self.pid}, [])
            self.returncode = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return self.returncode

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)  # it stays a zombie until it is waited for

    def kill(self):
        self.send_signal(9)


class Driver:
    """A warm *interpreter* that holds the tool in the file *path*; inside `with`."""

    def __init__(self, interpreter, path, home):
        self.env = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "PYTHONWARNINGS": "error",
                    "PYTHONDONTWRITEBYTECODE": "1"}
        self._words = [interpreter, os.path.abspath(__file__), str(path)]
        self._server = None
        self._lock = threading.Lock()

    def popen(self, argv, env, cwd=None, stdin=None, stdout=None, stderr=None, **unused):
        """Start the tool with the arguments *argv*, as subprocess.Popen starts a program, and return its Forked."""
        return Forked(self._ask, argv, env, cwd, {"stdin": stdin, "stdout": stdout, "stderr": stderr})

    def can_run(self, env):
        """Return whether *env* differs in nothing that an interpreter looks at when it starts."""
        different = set(env.items()) ^ set(self.env.items())
        return not any(name.startswith(WITHOUT_EFFECT_ONCE_STARTED) for name, _ in different)

    def run(self, *argv, stdin=b"", env=None, cwd=None):
        """Return the Result of the tool; raise AssertionError where it has no end or a traceback."""
        from terminal import Process  # which the warm interpreter need not load

        with Process(argv, self.env if env is None else env, cwd, popen=self.popen) as child:
            return child.run_to_end(stdin)

    def _start(self):
        """Start the interpreter, to be spoken with through a socket."""
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                self._words + [str(theirs.fileno())] + sorted(self.env), env=self.env, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True)
        self._answers = self._channel.makefile("r")

    def _ask(self, request, fds):
        """Return the number that the interpreter answers to *request*, which goes with *fds*."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with self._lock:
            if self._server is None:
                self._start()
            self._channel.sendmsg([b"!"], rights)
            self._channel.sendall(json.dumps(request).encode() + b"\n")
            return int(self._answers.readline())

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        if self._server:
            self._answers.close()
            self._channel.close()
            self._server.wait(10)


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=int(sys.argv[2])) as channel:
        serve(sys.argv[1], channel, sys.argv[3:])
