"""Runs the script named first on the command line in a Python that has what Python has on Windows, and no more.

Modules, signals and functions that Python documents as missing there are gone, a console has the code page 1252, and
getpass has its msvcrt.
"""

import io
import os
import runpy
import shutil  # noqa: F401 - like subprocess it would look for a module of Windows
import signal
import subprocess  # noqa: F401
import sys
import types

MODULES = ["curses", "fcntl", "grp", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"]
SIGNALS = ["SIGABRT", "SIGBREAK", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"]
STDIN = sys.stdin  # whose end would close what lies beneath it
FUNCTIONS = [
    "alarm", "chown", "ctermid", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups",
    "getpgid", "getpgrp", "getsid", "getuid", "killpg", "lchown", "lockf", "mkfifo", "mknod", "nice", "openpty",
    "pause", "pipe2", "pread", "pwrite", "setgid", "setitimer", "setpgid", "setsid", "setuid", "siginterrupt",
    "sigwait", "statvfs", "sysconf", "tcgetpgrp", "tcsetpgrp", "ttyname", "uname",
]


def expanduser(path):
    """Return *path* with the user's folder for ~; no list of users is asked."""
    return os.environ["HOME"] + path[1:] if path[:1] == "~" and path[1:2] in ("", "/", "\\") else path


def become_windows():
    """Take from this process what Windows has not."""
    for name in MODULES:
        sys.modules[name] = None
    for name in dir(signal):
        if name.startswith("SIG") and not name.startswith("SIG_") and name not in SIGNALS or name in FUNCTIONS:
            delattr(signal, name)
    for name in FUNCTIONS:
        if hasattr(os, name):
            delattr(os, name)
    msvcrt = types.ModuleType("msvcrt")
    msvcrt.getwch = lambda: os.read(0, 1).decode("cp1252")
    msvcrt.putwch = lambda character: os.write(1, character.encode("cp1252"))
    sys.modules["msvcrt"] = msvcrt
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(STDIN.buffer, "cp1252")
    sys.stdout, sys.stderr = (io.TextIOWrapper(stream.buffer, "cp1252", line_buffering=True)
                              for stream in (sys.stdout, sys.stderr))
    os.name, os.path.expanduser = "nt", expanduser


if __name__ == "__main__":
    become_windows()
    sys.argv.pop(0)
    runpy.run_path(sys.argv[0], run_name="__main__")
