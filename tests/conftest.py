"""What every test starts from: the chosen interpreters, a bare environment, the spawned tool, a scripted server."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import loopback
from terminal import Process, Result, Terminal, checked, exit_status

TOP = Path(__file__).resolve().parent.parent
XEROCTL = TOP / "xeroctl.py"
sys.path.insert(0, str(TOP))


def interpreter_path(text):
    """Return the absolute path of the interpreter that a shell would start for *text*."""
    path = shutil.which(text)
    if path is None:
        raise argparse.ArgumentTypeError(f"no such program: {text!r}")
    return os.path.abspath(path)


def interpreter_name(path):
    """Return a name such as python3.6, as the interpreter itself tells its version."""
    version = subprocess.check_output([path, "-V"], universal_newlines=True).split()[1]
    return "python" + ".".join(version.split(".")[:2])


VARIANTS = {  # name: options of the interpreter, variables where a test sets no others, a module that is missing
    "dev": (["-X", "dev", "-W", "error"], {}, None),
    "isolated": (["-S", "-E", "-I"], {}, None),
    "O": (["-O"], {}, None),
    "OO": (["-OO"], {}, None),
    "no-ssl": ([], {}, "ssl"),
    "no-readline": ([], {}, "readline"),
    "C": ([], {"LC_ALL": "C"}, None),
    "latin-1": ([], {"PYTHONIOENCODING": "latin-1"}, None),
}
SHOWN_ON_A_TERMINAL = (
    "(stderr_in_a_pipe_is|cannot_drive_the_terminal|sends_drives_the_terminal|shows_models_under_a_header"
    "|get_on_a_terminal_does_not|the_file_drives_a_terminal|shows_a_failure_below_its_step|columns_stay_in_line)")
VARIANT_SKIPS = [  # variants, tests, why these cannot hold there; tests with the certificate fixture need TLS too
    ("no-ssl", "tls|https|cacert|certificate|tunnel|connecting|handshake", "needs TLS"),
    ("no-readline", "keys_of_the_manual|tab_completes|a_pasted_block|what_is_typed_is_utf8|colour_has_no_width"
     "|history_lasts|history_entry_of_many|history_that_cannot|wide_characters_in_a_narrow|is_back_with_up"
     "|comes_back_with_up|takes_the_question_back|keys_typed_during_a_reply|leaves_its_start_in_the_history",
     "needs readline"),
    ("isolated", "a_python_without_ssl_says|a_terminal_that_cannot_show_a_character", "sets variables of Python"),
    ("latin-1", SHOWN_ON_A_TERMINAL + "|wide_characters_in_a_narrow|history_entry_of_many|what_is_typed_is_utf8"
     "|a_pasted_block|a_terminal_that_cannot_show_a_character", "a terminal has the encoding of the variant"),
    ("C", f"({SHOWN_ON_A_TERMINAL}|init_asks_until).*" + r"python3\.6", "a terminal has ASCII before Python 3.7"),
    ("C", "wide_characters_in_a_narrow", "this readline draws bytes"),
    (" ".join(VARIANTS), "a_user_without_a_name", "the shell of the variant drops the rights of root"),
    ("C latin-1 no-ssl no-readline", "test_run_builds_the_environment", "the variant is a variable"),
]


def variant_interpreter(name, interpreter, folder):
    """Return a program that stands in for *interpreter* and starts it as VARIANTS[*name*] says; it lives in *folder*.

    Whatever a test starts with the interpreter is so run in the variant, by hand as well:
    tests/run --variant NAME [--interpreter PATH].  What a variant rightly changes is in VARIANT_SKIPS.
    """
    options, variables, missing = VARIANTS[name]
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
    parser.addoption("--part", metavar="K/N", help="run the Kth of N parts, which make up the whole")


def pytest_collection_modifyitems(config, items):
    variant = config.getoption("--variant")
    for item in items if variant else ():
        reasons = [reason for variants, tests, reason in VARIANT_SKIPS
                   if variant in variants.split() and re.search(tests, item.name)]
        if variant == "no-ssl" and "certificate" in item.fixturenames:
            reasons.append("needs TLS")
        if reasons and "interpreter" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason=f"{variant}: {reasons[0]}"))
    if config.getoption("--part"):
        number, count = map(int, config.getoption("--part").split("/"))
        parts = {part: [] for part in range(1, count + 1)}
        for item in items:  # by its name, so that a test is in the same part whatever else is selected
            parts[zlib.crc32(item.nodeid.encode("utf-8", "replace")) % count + 1].append(item)
        items[:] = parts.pop(number)
        config.hook.pytest_deselected(items=sum(parts.values(), []))


def pytest_configure(config):
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


@pytest.fixture
def run(command, env):
    """Run the tool to its end and return its Result; a traceback on its stderr fails the test."""
    base = env

    def run(*args, stdin=b"", env=None, timeout=20, interpreter_options=(), cwd=None):
        source = {"input": stdin} if isinstance(stdin, bytes) else {"stdin": stdin}
        try:
            done = subprocess.run(
                [*command(interpreter_options), *args], env=changed(base, env), cwd=cwd,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout, start_new_session=True, **source,
            )
        except subprocess.TimeoutExpired as late:
            pytest.fail(f"no end within {timeout} s; stdout: {late.stdout}, stderr: {late.stderr}")
        return checked(Result(exit_status(done.returncode), done.stdout, done.stderr))

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
