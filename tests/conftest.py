"""What every test starts from: the chosen interpreters, a bare environment, the spawned tool, a scripted server."""

import argparse
import functools
import importlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zlib
from collections import namedtuple
from pathlib import Path

import pytest

import loopback
from driver import Driver
from terminal import Process, Terminal

TOP = Path(__file__).resolve().parent.parent
XEROCTL = Path(os.environ.get("XEROCTL_FILE") or TOP / "xeroctl.py").resolve()
sys.path.insert(0, str(XEROCTL.parent))


def interpreter_path(text):
    """Return the absolute path of the interpreter that a shell would start for *text*."""
    path = shutil.which(text)
    if path is None:
        raise argparse.ArgumentTypeError(f"no such program: {text!r}")
    return os.path.abspath(path)


@functools.lru_cache(maxsize=None)
def interpreter_name(path):
    """Return a name such as python3.6, as the interpreter itself tells its version."""
    version = subprocess.check_output([path, "-V"], universal_newlines=True).split()[1]
    return "python" + ".".join(version.split(".")[:2])


Variant = namedtuple("Variant", [
    "options",    # of the interpreter
    "variables",  # where a test sets no others
    "missing",    # name of a module that cannot be imported, or None
    "lacks",      # what a test marked needs(...) does not find there
])

# Each starts the interpreter through a shell, which drops the rights of root.
VARIANTS = {
    "dev": Variant(["-X", "dev", "-W", "error"], {}, None, {"root"}),
    "isolated": Variant(["-S", "-E", "-I"], {}, None, {"root", "python-variables"}),
    "O": Variant(["-O"], {}, None, {"root"}),
    "OO": Variant(["-OO"], {}, None, {"root"}),
    "no-ssl": Variant([], {}, "ssl", {"root", "bare-environment", "tls"}),
    "no-readline": Variant([], {}, "readline", {"root", "bare-environment", "readline"}),
    "C": Variant([], {"LC_ALL": "C"}, None, {"root", "bare-environment", "wide-readline"}),
    "latin-1": Variant([], {"PYTHONIOENCODING": "latin-1"}, None, {"root", "bare-environment", "utf-8-terminal"}),
}
NEEDS = set().union(*(variant.lacks for variant in VARIANTS.values()))
STARTED_EVERY = 8  # of so many tests that could run in a warm interpreter, one starts its own
MARKERS = [
    "needs(feature, ...): skipped where the --variant lacks one of these: " + ", ".join(sorted(NEEDS)),
    "smoke: part of tests/run --quick, and of what CI runs on every Python and in every variant",
    "process: the fixture `run` starts an interpreter, since the test is about its start or its end",
]


def variant_interpreter(name, interpreter, folder):
    """Return a program that stands in for *interpreter* and starts it as VARIANTS[*name*] says; it lives in *folder*.

    Whatever a test starts with the interpreter is run so, by hand as well:
    tests/run --variant NAME [--interpreter PATH].
    """
    options, variables, missing, _ = VARIANTS[name]
    lines = ["#!/bin/sh", "unset PWD"] + [f'export {key}="${{{key}-{value}}}"' for key, value in variables.items()]
    if missing:
        (folder / "missing").mkdir()
        (folder / "missing" / f"{missing}.py").write_text(f"raise ImportError('no {missing}')\n")
        lines.append(f'export PYTHONPATH={shlex.quote(str(folder / "missing"))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    program = folder / "python3"
    program.write_text("\n".join(lines + [" ".join(["exec", shlex.quote(interpreter), *options, '"$@"'])]) + "\n")
    program.chmod(0o755)
    return str(program)


def pytest_addoption(parser):
    parser.addoption(
        "--interpreter", action="append", type=interpreter_path, metavar="PATH",
        help="spawn the tool on this Python, 3.6 or later; may be repeated (default: the one that runs pytest)",
    )
    parser.addoption("--variant", choices=sorted(VARIANTS), help="spawn the tool in another way")
    parser.addoption("--black-box", action="store_true", help="leave out tests that do not depend on --interpreter")
    parser.addoption("--race-seconds", type=float, default=3, help="how long test_interrupts.py presses Ctrl+C")
    parser.addoption("--part", metavar="K/N", help="run the Kth of N parts, which make up the whole")


def lacking(variant, item):
    """Return what the test *item* needs and does not find in the variant of that name."""
    needed = {feature for mark in item.iter_markers("needs") for feature in mark.args}
    if needed - NEEDS:
        raise pytest.UsageError(f"{item.nodeid} needs {needed - NEEDS}, which no variant lacks")
    if "certificate" in item.fixturenames:
        needed.add("tls")
    lacks = VARIANTS[variant].lacks if variant else set()
    if variant == "C" and "python3.6" in item.callspec.id:
        lacks = lacks | {"utf-8-terminal"}  # later Pythons take C to mean UTF-8
    return needed & lacks


def pytest_collection_modifyitems(config, items):
    if config.getoption("--black-box"):
        config.hook.pytest_deselected(items=[item for item in items if "interpreter" not in item.fixturenames])
        items[:] = [item for item in items if "interpreter" in item.fixturenames]
    variant = config.getoption("--variant")
    for item in items:
        missing = "interpreter" in item.fixturenames and lacking(variant, item)
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"{variant}: no {', '.join(sorted(missing))}"))
    if config.getoption("--part"):
        number, count = map(int, config.getoption("--part").split("/"))
        parts = {part: [] for part in range(1, count + 1)}
        for item in items:  # by its name, so that a test is in the same part whatever else is selected
            parts[crc(item) % count + 1].append(item)
        items[:] = parts.pop(number)
        config.hook.pytest_deselected(items=sum(parts.values(), []))


def crc(item):
    """Return a number that depends on the name of the test *item* alone."""
    return zlib.crc32(item.nodeid.encode("utf-8", "replace"))


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    # A shell's `&` and nohup leave these ignored, and what is ignored stays so in a child; what is handled does not.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda *unused: None)


def pytest_generate_tests(metafunc):
    if "interpreter" in metafunc.fixturenames:
        paths = metafunc.config.getoption("--interpreter") or [sys.executable]
        names = [interpreter_name(path) for path in paths]
        metafunc.parametrize("interpreter", paths, ids=names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def interpreter(request, tmp_path_factory):
    """The Python that runs the tool: each --interpreter in turn, as --variant has it."""
    variant = request.config.getoption("--variant")
    return variant_interpreter(variant, request.param, tmp_path_factory.mktemp(variant)) if variant else request.param


@pytest.fixture
def env(tmp_path):
    """The whole environment of the tool, with an empty home; a test may change it."""
    home = tmp_path / "home"
    home.mkdir()
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "PYTHONWARNINGS": "error",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TERM": "xterm",
    }


@pytest.fixture(scope="session")
def command(interpreter, tmp_path_factory):
    """Return the words that start the tool, given the interpreter's options.

    Without options it is a compiled copy, which saves a fifth of each run; with them it is the file itself, since
    they change what is compiled.
    """
    compiled = tmp_path_factory.mktemp("compiled") / "xeroctl.pyc"
    code = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[2], doraise=True)"
    subprocess.run([interpreter, "-W", "error", "-c", code, str(XEROCTL), str(compiled)], check=True)

    def command(options):
        return [interpreter, *options, str(XEROCTL if options else compiled)]

    return command


def changed(env, changes):
    """Return *env* with *changes* made; a value of None removes the variable."""
    merged = {**env, **(changes or {})}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.fixture(scope="session")
def warm(interpreter, tmp_path_factory):
    """A warm interpreter for `run`; a file of tests that needs a started one has a fixture of this name that is None."""
    with Driver(interpreter, XEROCTL, tmp_path_factory.mktemp("home")) as driver:
        yield driver


@pytest.fixture
def run(request, warm, command, env):
    """Run the tool to its end and return its Result; a traceback on its stderr fails the test.

    A warm interpreter runs it where that makes no difference; one in STARTED_EVERY tests starts it all the same.
    """
    base = env
    started = request.node.get_closest_marker("process") or crc(request.node) % STARTED_EVERY == 0

    def run(*args, stdin=b"", env=None, timeout=20, interpreter_options=(), cwd=None):
        variables = changed(base, env)
        popen, words = subprocess.Popen, [*command(interpreter_options), *args]
        if warm and not started and not interpreter_options and warm.can_run(variables):
            popen, words = warm.popen, args
        source = subprocess.PIPE if isinstance(stdin, bytes) else stdin
        with Process(words, variables, cwd, stdin=source, popen=popen) as child:
            return child.run_to_end(stdin, timeout) if isinstance(stdin, bytes) else child.finish(timeout)

    return run


def starter(driver, command, base):
    """Yield a function that starts the tool under *driver*, then kill whatever it started."""
    started = []

    def start(*args, env=None, interpreter_options=(), **options):
        started.append(driver([*command(interpreter_options), *args], changed(base, env), **options))
        return started[-1]

    yield start
    for child in started:
        child.kill()


@pytest.fixture
def start(command, env):
    """Start the tool on pipes and return its Process; options: stdin, stdout, stderr, cwd."""
    yield from starter(Process, command, env)


@pytest.fixture
def terminal(command, env):
    """Start the tool on a pty and return its Terminal; options: columns, rows, stdin, stdout, stderr, cwd."""
    yield from starter(Terminal, command, env)


@pytest.fixture
def server():
    """A scripted server; a connection without a script, or a step that failed, fails the test."""
    with loopback.Server() as server:
        yield server
    assert (server.surprises, server.failures) == (0, [])


@pytest.fixture
def chat(run, server):
    """Run the tool's chat command against *server*."""

    def chat(*args, **options):
        return run("chat", "--endpoint", "my-endpoint", "--base-url", server.url + "/acme/v1", *args, **options)

    return chat


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """The path of a key and a certificate for 127.0.0.1 and localhost that signs itself, in one PEM file."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-addext", "keyUsage=digitalSignature,keyCertSign",
         "-keyout", str(path), "-out", str(path.with_suffix(".crt"))],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture(scope="session")
def xeroctl():
    """The tool as a module, for tables of cases on its pure functions."""
    return importlib.import_module("xeroctl")
