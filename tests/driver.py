"""Many runs of the tool in one process: a child that calls `main` for each line it is sent, and who speaks with it."""

import faulthandler
import gc
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback

DEADLINE_SECONDS = 10


# -- The child, on any Python from 3.6 -------------------------------


def run_main(main, argv):
    """Return the status of `main(argv)`, and what it wrote to file descriptors 1 and 2."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull) as nothing:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdin = nothing
        sys.stdout, sys.stderr = (io.TextIOWrapper(open(fd, "wb", closefd=False), encoding="utf-8") for fd in (1, 2))
        try:
            status = main(argv)
        except BaseException:  # what the interpreter itself does at the top
            traceback.print_exc()
            status = 1
        gc.collect(0)  # an unclosed socket is told to stderr, as an error
        sys.stdout.flush()
        sys.stderr.flush()
        for file in (out, err):
            file.seek(0)
        return status, out.read(), err.read()


def serve(path):
    """Answer each line of stdin, the arguments of a run as JSON, with its result as JSON."""
    spec = importlib.util.spec_from_file_location("xeroctl", path)
    xeroctl = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(xeroctl)
    asked, answers, log = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w"), os.dup(2)
    for line in asked:
        faulthandler.dump_traceback_later(DEADLINE_SECONDS, exit=True, file=log)
        status, out, err = run_main(xeroctl.main, json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps([status, out.decode("latin-1"), err.decode("latin-1")]) + "\n")
        answers.flush()


# -- The parent ------------------------------------------------------


class Driver:
    """A child of *interpreter* that runs the tool; inside `with`.  One that hung is replaced by the next."""

    def __init__(self, interpreter, path, home):
        self._argv = [interpreter, os.path.abspath(__file__), str(path)]
        self.env = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "PYTHONWARNINGS": "error",
                    "PYTHONDONTWRITEBYTECODE": "1"}
        self._child = None

    def run(self, *argv):
        """Return the (status, stdout, stderr) of the tool; raise AssertionError where it has no end or a traceback."""
        if not self._child:
            self._log = tempfile.TemporaryFile()
            self._child = subprocess.Popen(
                self._argv, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True)
        self._child.stdin.write(json.dumps(argv).encode() + b"\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise AssertionError(f"no end within {DEADLINE_SECONDS} s, or a crash:\n{self._end()}")
        status, out, err = json.loads(line.decode())
        if "Traceback" in err or "Exception ignored" in err:
            raise AssertionError(f"traceback, status {status}:\n{err}")
        return status, out.encode("latin-1"), err.encode("latin-1")

    def _end(self):
        """End the child and return what it wrote to stderr."""
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait(DEADLINE_SECONDS)
        self._child = None
        with self._log:
            self._log.seek(0)
            return self._log.read().decode(errors="replace")

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        if self._child:
            self._end()


if __name__ == "__main__":
    serve(sys.argv[1])
