"""The ways to have the tool without a network and without pip, and the places where it then has to run."""

import os
import pwd
import shutil
import subprocess

import pytest

from conftest import XEROCTL, changed
from loopback import DONE, USAGE, chunk, completion, json_response, stream
from terminal import Process

HELLO = json_response(completion())
ANSWER = stream(chunk("Hello!"), chunk(finish="stop"), chunk(usage=USAGE, choices=[]), DONE)
NOBODY = 12345


def ask(server, *more):
    return ("chat", "--endpoint", "my-endpoint", "--base-url", server.url + "/v1", *more)


@pytest.fixture
def bin_folder(interpreter, env, tmp_path):
    """A folder that is first on PATH, where python3 is the chosen interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python3").symlink_to(interpreter)
    env["PATH"] = f"{folder}:/usr/bin:/bin"
    return folder


@pytest.fixture
def launch(request, bin_folder, env):
    """Start any program with that PATH and return its Process; None in *env* removes a variable."""
    def launch(*argv, env=None, **options):
        child = Process(argv, changed(base, env), **options)
        request.addfinalizer(child.kill)
        return child

    base = env
    return launch


def copied(path, mode):
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(str(XEROCTL), str(path))
    path.chmod(mode)
    return path


# -- Ways to install -------------------------------------------------


def copy_with_another_name(tmp_path, bin_folder):
    return ["python3", str(copied(tmp_path / "ask", 0o644))]


def executable_copy(tmp_path, bin_folder):
    return [str(copied(tmp_path / "some where" / "ask.me", 0o755))]


def copy_on_the_path(tmp_path, bin_folder):
    copied(bin_folder / "xeroctl", 0o755)
    return ["xeroctl"]


def symlink_on_the_path(tmp_path, bin_folder):
    (bin_folder / "xeroctl").symlink_to(XEROCTL)
    return ["xeroctl"]


def path_with_blanks_and_letters(tmp_path, bin_folder):
    return ["python3", str(copied(tmp_path / "mein Ordner é 日本 😀" / "x 'ctl'.py", 0o644))]


def folder_that_is_read_only(tmp_path, bin_folder):
    path = copied(tmp_path / "read-only" / "xeroctl.py", 0o444)
    path.parent.chmod(0o555)
    return ["python3", str(path)]


def standard_input(tmp_path, bin_folder):
    return ["sh", "-c", 'exec python3 - "$@" <"$0"', str(XEROCTL)]


def standard_input_through_a_pipe(tmp_path, bin_folder):
    return ["sh", "-c", 'cat "$0" | python3 - "$@"', str(XEROCTL)]


def zipapp(tmp_path, bin_folder):
    copied(tmp_path / "app" / "__main__.py", 0o644)
    archive = str(tmp_path / "xeroctl.pyz")
    subprocess.run([str(bin_folder / "python3"), "-m", "zipapp", str(tmp_path / "app"), "-o", archive,
                    "-p", "/usr/bin/env python3"], check=True)
    return [archive]


def entry_point(tmp_path, bin_folder):
    folder = copied(tmp_path / "site-packages" / "xeroctl.py", 0o644).parent
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from xeroctl import main; sys.exit(main())"
    return ["python3", "-c", code]


WAYS = [copy_with_another_name, executable_copy, copy_on_the_path, symlink_on_the_path, path_with_blanks_and_letters,
        folder_that_is_read_only, standard_input, standard_input_through_a_pipe, zipapp, entry_point]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.replace("_", " "))
def test_however_it_is_installed_answers_and_statuses_come_through(launch, tmp_path, bin_folder, server, way):
    tool = way(tmp_path, bin_folder)
    server.script(HELLO)
    asking = launch(*tool, *ask(server, "-m", "héllo 日"), env={"PYTHONDONTWRITEBYTECODE": None})
    failing = launch(*tool, "chat", "--endpoint", "e", "--base-url", "http://127.0.0.1:1", "--retries", "0", "-m", "Hi")
    assert asking.finish() == (0, b"Hello!\n", b"")
    assert server.requests[0].json["messages"] == [{"role": "user", "content": "héllo 日"}]
    assert failing.finish() == (6, b"", b"xeroctl: error: 127.0.0.1:1 refused the connection: is the server running?\n")


@pytest.mark.smoke
def test_a_run_leaves_nothing_beside_the_file_nor_in_the_current_folder(launch, tmp_path, server):
    path, current = copied(tmp_path / "there" / "xeroctl.py", 0o755), tmp_path / "here"
    current.mkdir()
    server.always(HELLO)
    child = launch(str(path), *ask(server, "-m", "Hi"), cwd=str(current), env={"PYTHONDONTWRITEBYTECODE": None})
    assert child.finish() == (0, b"Hello!\n", b"")
    assert (os.listdir(str(path.parent)), os.listdir(str(current))) == (["xeroctl.py"], [])


@pytest.mark.smoke
def test_files_of_the_current_folder_are_not_mistaken_for_modules(launch, tmp_path, server):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("json", "argparse", "socket", "ssl", "tempfile", "tomllib", "xeroctl"):
        (here / f"{name}.py").write_text("raise SystemExit('imported from the current folder')\n")
    server.always(HELLO)
    assert launch("python3", str(XEROCTL), *ask(server, "-m", "Hi"), cwd=str(here)).finish() == (0, b"Hello!\n", b"")


# -- Places to run in ------------------------------------------------


@pytest.fixture
def tool(bin_folder):
    """The words that start the tool."""
    (bin_folder / "xeroctl").symlink_to(XEROCTL)
    return "xeroctl"


@pytest.mark.smoke
@pytest.mark.parametrize("home", ["/dev/null", "/proc/none"])
def test_a_home_that_cannot_be_written_stops_no_chat(terminal, server, home):
    server.always(ANSWER)
    child = terminal(*ask(server, "-i"), env={"HOME": home}, columns=200)
    for _ in range(2):
        child.expect("> ")
        child.send("one\r")
        child.expect("Hello!")
    child.expect("> ")
    child.send("/quit\r")
    assert child.finish() == 0
    reason = "Not a directory" if home == "/dev/null" else "No such file or directory"
    note = f"xeroctl: note: no history: cannot write {home}/.local/state/xeroctl/history: {reason}\r\n"
    assert (child.output.decode().count(note), child.output.count(b"no history")) == (1, 1)


@pytest.mark.smoke
def test_a_home_that_cannot_be_written_is_an_error_of_one_line_for_a_change(run):
    result = run("config", "add", "a", "--base-url", "http://127.0.0.1:1/v1", env={"HOME": "/dev/null"})
    assert result == (2, b"", b"xeroctl: error: cannot make /dev/null/.config/xeroctl: Not a directory\n")


@pytest.mark.smoke
def test_without_the_variable_home_it_is_that_of_the_user(run, server, tmp_path):
    server.script(HELLO)
    home = pwd.getpwuid(os.getuid()).pw_dir
    assert run("config", "path", env={"HOME": None}) == (0, f"{home}/.config/xeroctl/config.toml\n".encode(), b"")
    assert run(*ask(server, "-m", "Hi"), env={"HOME": None, "XDG_CONFIG_HOME": str(tmp_path)}) == (0, b"Hello!\n", b"")


@pytest.mark.smoke
def test_an_empty_home_is_no_crash(run, server, tmp_path):
    server.always(HELLO)
    assert run("config", "path", env={"HOME": ""}).status == 0
    assert run(*ask(server, "-m", "Hi"), env={"HOME": "", "XDG_CONFIG_HOME": str(tmp_path)}) == (0, b"Hello!\n", b"")


@pytest.fixture
def unknown_user():
    """A preexec_fn that gives the process a user id that has no name; its rights stay those of root."""
    if os.geteuid():
        pytest.skip("only root may have another user id")
    with pytest.raises(KeyError):
        pwd.getpwuid(NOBODY)
    return lambda: os.setresuid(NOBODY, 0, 0)


@pytest.mark.smoke
@pytest.mark.needs("root")
def test_a_user_without_a_name_and_a_home_is_no_crash(command, env, server, unknown_user):
    def run(*args):
        without = {name: value for name, value in env.items() if name != "HOME"}
        done = subprocess.run([*command(()), *args], env=without, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, preexec_fn=unknown_user)
        return done.returncode, done.stdout

    server.script(HELLO)
    assert run("config", "path") == (0, b"/nonexistent/.config/xeroctl/config.toml\n")
    assert run("config", "list") == (0, b"xeroctl: note: no deployments in /nonexistent/.config/xeroctl/config.toml: "
                                        b"add one with: xeroctl config init\n")
    assert run(*ask(server, "-m", "Hi", "--from-file", "~/gone")) == (
        2, b"xeroctl: error: cannot read ~/gone: No such file or directory\n")
    assert run(*ask(server, "-m", "Hi")) == (0, b"Hello!\n")


def test_an_environment_of_path_alone_is_enough(launch, tool, env, server):
    server.script(HELLO)
    alone = ["env", "-i", "PATH=" + env["PATH"]]
    assert launch(*alone, tool, "--version").finish()[::2] == (0, b"")
    child = launch(*alone, "XDG_CONFIG_HOME=" + env["HOME"], tool, *ask(server, "-m", "héllo"))
    assert child.finish() == (0, b"Hello!\n", b"")
    assert server.requests[0].json["messages"][0]["content"] == "héllo"


LEAVING = """
import os, runpy, sys
os.rmdir(os.getcwd())
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_current_folder_that_is_gone_is_no_crash(launch, tmp_path, server):
    def run(number, *args, stdin=b""):
        here = tmp_path / f"gone-{number}"
        here.mkdir()
        child = launch("python3", str(leaving), str(XEROCTL), *args, cwd=str(here))
        child.send(stdin)
        child.end_input()
        return child.finish()

    leaving = tmp_path / "leaving.py"
    leaving.write_text(LEAVING)
    server.script(HELLO, ANSWER)
    assert run(1, *ask(server, "-m", "Hi")) == (0, b"Hello!\n", b"")
    status, out, err = run(2, *ask(server, "-i", "-q"), stdin=b"one\n/tokens\n/save kept.json\n")
    assert (status, out, err.count(b"\n")) == (2, b"Hello!\n", 3)
    assert b"messages: 2\n" in err and b"cannot write kept.json" in err
    status, out, err = run(3, *ask(server, "-i", "-q"), stdin=b"/load kept.json\n")
    assert (status, out, err.count(b"\n")) == (2, b"", 1)
    assert b"cannot read kept.json" in err
    assert run(4, *ask(server, "-m", "Hi", "--from-file", "gone.txt")) == (
        2, b"", b"xeroctl: error: cannot read gone.txt: No such file or directory\n")
