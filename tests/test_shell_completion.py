"""What bash, zsh and fish offer once they have loaded the script that the tool prints for them; the help pages."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import XEROCTL
from terminal import Process, Terminal

SHELLS = ["bash", "zsh", "fish"]
TYPED = ["bash", "zsh"]  # fish is asked what it would offer

CONTEXTS = ["lab.two", "my-old_box", "prod"]
FILES = ["ca.pem", "my prompt.txt", "notes.txt", "sub", "$(touch PWNED)", "`touch PWNED`"]

LOAD = {
    "bash": "source <(xeroctl completion bash)",
    "zsh": "source <(xeroctl completion zsh)",
    "fish": "xeroctl completion fish | source",
}

# One key puts all that is offered into the line, as the shell itself quotes it; another hands the line over.
EVERYTHING, HAND_OVER = "\x18a", "\x18r"
BASH_KEYS = r"""
PS1='ready> '
hand_over() { printf '\036%s\037' "$READLINE_LINE"; READLINE_LINE=; READLINE_POINT=0; }
bind -x '"\C-xr": hand_over'
bind '"\C-xa": insert-completions'
"""
ZSH_KEYS = r"""
PS1='ready> '
hand_over() { printf '\036%s\037' "$BUFFER"; BUFFER=; }
zle -N hand_over
bindkey '^Xr' hand_over
everything() { _main_complete; compstate[insert]=all; compstate[list]=; }
zle -C everything complete-word everything
bindkey '^Xa' everything
autoload -U compinit
compinit -u -D
"""
FISH_LOOP = r"""
while read --local line
    if string match -q '$ *' -- $line
        eval (string sub -s 3 -- $line)
    else
        complete -C $line
    end
    printf '\037'
end
"""
HANDED_OVER = re.compile(r"\A([^\036]*)\036([^\037]*)\037")
ANSWER = re.compile(r"\A([^\037]*)\037")
VARIABLES = {"bash": "compgen -v", "zsh": "print -l ${(k)parameters}", "fish": "set --names"}


def contexts_config(names):
    """Return the text of a config file that has a deployment for each of *names*."""
    return "".join(f"[deployment.'{name}']\nbase_url = 'https://x.example/v1'\n" for name in names)


class Typed:
    """An interactive bash or zsh on a pty."""

    def __init__(self, name, env, folder):
        if name == "bash":
            words, file, text = ["bash", "--noprofile", "--rcfile", f"{folder}/bashrc", "-i"], "bashrc", BASH_KEYS
        else:
            words, file, text = ["zsh", "-d", "-i"], ".zshrc", ZSH_KEYS
        (folder / file).write_text(text + LOAD[name] + "\n")
        self.child = Terminal(words, {**env, "ZDOTDIR": str(folder)}, columns=1000, rows=200,
                              cwd=folder / "work")

    def begin(self):
        """Wait for the first prompt."""
        self.child.expect("ready> ")

    def run(self, command):
        """Run a command line."""
        self.child.send(command + "\r")
        self.child.expect("\n")
        self.child.expect("ready> ")

    def type(self, keys):
        """Return the line that the shell makes of *keys*, and what it says meanwhile."""
        self.child.send(keys + HAND_OVER)
        screen, line = self.child.expect(HANDED_OVER).groups()
        return line.decode(), b"".join(re.findall(b"xeroctl: .*|\n", screen))

    def explain(self, line):
        """Return what zsh lists where *line* ends."""
        self.child.send(line + "\x04" + HAND_OVER)
        listed = self.child.expect(HANDED_OVER).group(1).decode()
        self.run("true")  # which wipes the list away
        return listed

    def complete(self, before, word):
        """Return the words that may stand in place of *word* after *before*, and what the shell says meanwhile."""
        line, said = self.type(before + word + EVERYTHING)
        assert line.startswith(before)
        return [] if line == before + word else shlex.split(line[len(before):]), said


class Asked:
    """A fish that tells what it would offer."""

    def __init__(self, name, env, folder):
        (folder / "loop.fish").write_text(LOAD[name] + FISH_LOOP)
        self.child = Process(["fish", "--no-config", f"{folder}/loop.fish"], env, cwd=folder / "work")

    def begin(self):
        """Wait until the script is loaded."""
        self.run("true")

    def answer(self, line):
        """Return what fish prints for *line*, and what comes on stderr meanwhile."""
        known = len(self.child.stderr)
        self.child.send(line.encode() + b"\n")
        return self.child.expect(ANSWER).group(1).decode(), self.child.stderr[known:]

    def run(self, command):
        """Run a command line."""
        self.answer("$ " + command)

    def explain(self, line):
        """Return what fish offers where *line* ends, with the reasons."""
        return self.answer(line)[0]

    def complete(self, before, word):
        """Return the words that may stand in place of *word* after *before*, and what fish says meanwhile."""
        answer, said = self.answer(before + word)
        return [row.partition("\t")[0] for row in answer.split("\n")[:-1]], said


class Shell:
    """A shell in a home and a folder of its own, started when it is first needed, and again after a failure."""

    def __init__(self, name, env, folder):
        self.name, self.env, self.folder = name, env, folder
        self.config = folder / "home" / ".config" / "xeroctl" / "config.toml"
        self._session = None

    def do(self, method, *args):
        """Call a method of the session."""
        try:
            if not self._session:
                self._session = (Asked if self.name == "fish" else Typed)(self.name, self.env, self.folder)
                self._session.begin()
            return getattr(self._session, method)(*args)
        except (AssertionError, OSError):
            self.close()
            raise

    def close(self):
        """End the session."""
        if self._session:
            self._session.child.kill()
        self._session = None

    def offers(self, before, word, command="xeroctl"):
        """Return, sorted, what *word* after *before* may become: values of options and names without a last '/'."""
        words, said = self.do("complete", f"{command} {before} " if before else f"{command} ", word)
        assert said == b""
        return sorted(re.sub(r"^--[\w-]+=(?=.)", "", word).rstrip("=/") for word in words)

    def write_config(self, text):
        """Make *text* the config file."""
        self.config.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.config.chmod(0o600)

    def variables(self):
        """Return the names of the shell's variables."""
        self.do("run", VARIABLES[self.name] + " > ../variables")
        return set((self.folder / "variables").read_text().split())

    def has_run_code(self):
        """Tell whether shell code in a name was run."""
        return os.path.exists(self.folder / "work" / "PWNED")


def need(name):
    """Skip the test where the shell *name* is missing, but not in CI."""
    if not shutil.which(name):
        assert os.environ.get("CI") != "true", f"{name} must be there in CI"
        pytest.skip(f"{name} is not installed")


@pytest.fixture(scope="module")
def world(command, tmp_path_factory):
    """Return a function that makes a Shell, which finds the tool as xeroctl."""
    shells = []

    def world(name):
        need(name)
        folder = tmp_path_factory.mktemp(name)
        bin_folder = folder / "home" / "bin"
        for made in (bin_folder, folder / "home" / ".config" / "xeroctl", folder / "work" / "sub"):
            made.mkdir(parents=True)
        (bin_folder / "xeroctl").write_text(f'#!/bin/sh\nexec {" ".join(map(shlex.quote, command(())))} "$@"\n')
        (bin_folder / "xeroctl").chmod(0o755)
        for file in FILES:
            if file != "sub":
                (folder / "work" / file).touch()
        (folder / "work" / "sub" / "deep.txt").touch()
        env = {
            "PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(folder / "home"), "LANG": "C.UTF-8",
            "TERM": "xterm", "INPUTRC": "/dev/null", "PYTHONWARNINGS": "error", "PYTHONDONTWRITEBYTECODE": "1",
        }
        shells.append(Shell(name, env, folder))
        shells[-1].write_config(contexts_config(CONTEXTS))
        return shells[-1]

    yield world
    for shell in shells:
        shell.close()


@pytest.fixture(scope="module", params=SHELLS)
def shell(request, world):
    """Each shell in turn, one session for all tests."""
    return world(request.param)


@pytest.fixture(scope="module", params=TYPED)
def typed_shell(request, world):
    """Each shell that is typed at, one session for all tests."""
    return world(request.param)


@pytest.fixture
def config(shell):
    """Write the shell's config file, until the end of the test."""
    yield shell.write_config
    shell.write_config(contexts_config(CONTEXTS))


def walk(xeroctl):
    """Yield the words that lead to each command, and its parser."""
    for name in xeroctl.COMMANDS:
        yield tuple(name.split()), xeroctl.build_parser(name)


def actions_of(parser):
    """Return the actions of the options of *parser*."""
    return list(dict.fromkeys(parser.options.values()))


def option_names(parser):
    """Return, sorted, the names of all options."""
    return sorted(name for action in actions_of(parser) for name in action.option_strings)


def first_words(action):
    """Return, sorted, what may stand where *action* of a parser takes its value."""
    if action.choices:
        return sorted(action.choices)
    return sorted({"CONTEXT": CONTEXTS, "FILE": FILES}.get(action.metavar, []))


# -- All that the parser knows ---------------------------------------


def test_every_option_of_every_command_is_offered(shell, xeroctl):
    known, offered = {}, {}
    for path, parser in walk(xeroctl):
        known[path] = option_names(parser)
        offered[path] = shell.offers(" ".join(path), "-")
    assert offered == known and len(known) > 15


def test_every_command_and_every_first_argument_is_offered(shell, xeroctl):
    known, offered = {}, {}
    for path, parser in walk(xeroctl):
        known[path] = first_words(parser.argument) if parser.argument else sorted(parser.commands)
        offered[path] = [word for word in shell.offers(" ".join(path), "") if not word.startswith("-")]
    assert offered == known


def test_every_option_is_followed_by_what_it_takes(shell, xeroctl):
    known, offered = {}, {}
    for path, parser in walk(xeroctl):
        for action in actions_of(parser):
            for name in action.option_strings if action.nargs != 0 else ():
                if name not in known:
                    known[name] = first_words(action)
                    offered[name] = shell.offers(" ".join(path + (name,)), "")
    assert offered == known and len(known) > 20


@pytest.mark.smoke
@pytest.mark.parametrize("shell", ["zsh", "fish"], indirect=True)
@pytest.mark.parametrize("path", [(), ("chat",)], ids=repr)
def test_zsh_and_fish_tell_what_an_option_is_for(shell, xeroctl, path):
    told = shell.do("explain", " ".join(("xeroctl",) + path + ("-",)))
    options = actions_of(dict(walk(xeroctl))[path])
    assert [action.help for action in options if action.help not in told] == []


# -- Lines -----------------------------------------------------------

LINES = [
    ("", "c", ["chat", "completion", "completions", "config"]),
    ("chat", "--st", ["--store", "--stream"]),
    ("chat", "c", []),
    ("completions", "u", ["update"]),
    ("completions list", "--or", ["--order"]),
    ("config add new --base-url https://host:80/v1", "--api", ["--api-key"]),
    ("completion", "z", ["zsh"]),

    ("--retries 3 config", "re", ["remove"]),
    ("--retries=3 config", "re", ["remove"]),
    ("-o json chat", "--st", ["--store", "--stream"]),
    ("-ojson chat", "--st", ["--store", "--stream"]),
    ("-qv chat", "--st", ["--store", "--stream"]),
    ("--base-url http://host:80/v1 --dry-run", "mo", ["models"]),
    ("--context chat", "mod", ["models"]),
    ("--api-key=config", "mod", ["models"]),
    ("completions --endpoint get", "me", ["messages"]),
    ("completions --metadata team=get", "--li", ["--limit"]),
    ("chat -m config", "--st", ["--store", "--stream"]),
    ("chat -m 'a config'", "--st", ["--store", "--stream"]),

    ("-o", "t", ["table", "text"]),
    ("", "--output=", ["json", "table", "text"]),
    ("chat", "--output=j", ["json"]),
    ("completions list --order", "d", ["desc"]),
    ("completions", "--order=a", ["asc"]),
    ("--context", "l", ["lab.two"]),
    ("chat", "--context=my-o", ["my-old_box"]),
    ("config use", "lab.", ["lab.two"]),
    ("-q config remove", "my-", ["my-old_box"]),

    ("chat --from-file", "n", ["notes.txt"]),
    ("chat", "--from-file=n", ["notes.txt"]),
    ("chat", "--from-file=m", ["my prompt.txt"]),
    ("--cacert", "c", ["ca.pem"]),
    ("chat --cacert", "my", ["my prompt.txt"]),
    ("chat --from-file", "sub/", ["sub/deep.txt"]),
    ("chat --from-file", "~/.conf", ["~/.config"]),
    ("chat --from-file", "my\\ p", ["my prompt.txt"]),
    ("chat", "--from-file=my\\ p", ["my prompt.txt"]),
    ("chat --from-file", "none", []),
    ("chat --demo -m Hi >", "n", ["notes.txt"]),
    ("chat --demo <", "n", ["notes.txt"]),

    ("chat -m", "c", []),
    ("chat", "--message=c", []),
    ("chat --system", "n", []),
    ("chat --endpoint", "c", []),
    ("completions --endpoint", "l", []),
    ("completions --metadata", "team=g", []),
    ("--base-url", "http:c", []),
]


@pytest.mark.parametrize("before, word, offered", LINES, ids=[f"{before} {word}" for before, word, _ in LINES])
def test_a_line_is_completed(shell, before, word, offered):
    assert shell.offers(before, word) == offered


@pytest.mark.smoke
@pytest.mark.parametrize("word", ['"my p', "'my p"])
def test_a_name_in_quotes_that_are_still_open_is_completed(shell, word):
    assert shell.offers("chat --from-file", word) == ["my prompt.txt"]


def test_a_tool_that_is_called_by_its_path_completes_too(shell):
    assert shell.offers("config use", "p", command="~/bin/xeroctl") == ["prod"]
    assert shell.offers("chat", "--str", command="~/bin/xeroctl") == ["--stream"]


@pytest.mark.parametrize("keys, line", [
    ("xeroctl ch\t--str\t", "xeroctl chat --stream "),
    ("xeroctl --output=j\tconf\trem\tmy\t", "xeroctl --output=json config remove my-old_box "),
    ("xeroctl chat --from-file my\t-i", "xeroctl chat --from-file my\\ prompt.txt -i"),
    ("xeroctl chat --from-file su\td\t", "xeroctl chat --from-file sub/deep.txt "),
    ("xeroctl chat -m c\t", "xeroctl chat -m c"),
], ids=repr)
def test_tab_completes_the_line(typed_shell, keys, line):
    assert typed_shell.do("type", keys) == (line, b"")


# -- Names that a shell would run, and configs that say nothing ------


@pytest.mark.smoke
def test_shell_code_in_the_name_of_a_file_is_not_run(shell):
    assert shell.offers("chat --from-file", "") == sorted(FILES)
    assert shell.offers("--cacert", "") == sorted(FILES)
    assert not shell.has_run_code()


@pytest.mark.smoke
def test_shell_code_in_the_line_is_not_run(shell):
    assert shell.offers('chat -m "$(touch PWNED)" --system $(touch PWNED)', "--st") == ["--store", "--stream"]
    assert not shell.has_run_code()


@pytest.mark.parametrize("before", ["--context", "config use"])
def test_the_name_of_a_context_is_one_word_whatever_it_holds(shell, config, before):
    names = ["$(touch PWNED)", "`touch PWNED`", "${HOME}", "a b", "a\\b", 'say"so', "x;y"]
    config(contexts_config(names))
    assert shell.offers(before, "") == sorted(names)
    assert not shell.has_run_code()


@pytest.mark.parametrize("text", ["[[[", "", b"\xff\n"], ids=repr)
def test_a_config_without_contexts_offers_nothing_and_says_nothing(shell, config, text):
    config(text)
    assert shell.offers("--context", "") == []
    assert shell.offers("config use", "p") == []


@pytest.mark.smoke
def test_no_config_offers_nothing_and_says_nothing(shell, config):
    shell.config.unlink()
    assert shell.offers("--context", "") == []


def test_a_config_that_asks_for_json_changes_nothing(shell, config):
    config('output = "json"\n' + contexts_config(["prod"]))
    assert shell.offers("--context", "") == ["prod"]


# -- The scripts -----------------------------------------------------


def test_a_script_that_is_loaded_twice_works_and_says_nothing(shell):
    shell.do("run", LOAD[shell.name] + " 2> ../said")
    assert (shell.folder / "said").read_text() == ""
    assert shell.offers("chat", "--st") == ["--store", "--stream"]
    assert shell.offers("config use", "p") == ["prod"]


def test_a_completion_leaves_no_variable_behind(shell):
    shell.do("complete", "ls ", "--al")  # what the shell itself sets
    before = shell.variables()
    shell.do("run", LOAD[shell.name])
    shell.offers("--context prod chat", "--st")
    shell.offers("chat --from-file", "n")
    shell.offers("--output json config use", "p")
    assert shell.variables() - before == set()


def test_zsh_finds_the_script_in_a_folder_of_completions(world, run):
    shell = world("zsh")
    functions = shell.folder / "functions"
    functions.mkdir()
    (functions / "_xeroctl").write_bytes(run("completion", "zsh").stdout)
    (shell.folder / "home" / ".zshrc").write_text(f"fpath=({functions} $fpath)\n" + ZSH_KEYS)
    with Terminal(["zsh", "-d", "-i"], shell.env, columns=1000) as child:
        child.expect("ready> ")
        for start in ("xeroctl chat --str", "xeroctl chat --str"):
            child.send(start + "\t" + HAND_OVER)
            assert child.expect(HANDED_OVER).group(2) == b"xeroctl chat --stream "


@pytest.mark.parametrize("name", SHELLS)
def test_the_shell_finds_no_mistake_in_its_script(run, env, tmp_path, name):
    need(name)
    result = run("completion", name)
    assert (result.status, result.stderr) == (0, b"")
    script = tmp_path / "script"
    script.write_bytes(result.stdout)
    done = subprocess.run([name, "-n", str(script)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("name", SHELLS)
def test_every_python_prints_the_same_script(run, env, name):
    ours = subprocess.run([sys.executable, str(XEROCTL), "completion", name], env=env, stdout=subprocess.PIPE)
    assert run("completion", name) == (0, ours.stdout, b"")


@pytest.mark.parametrize("words", [(), ("tcsh",), ("bash", "zsh")], ids=repr)
def test_completion_wants_one_shell_that_it_knows(run, words):
    result = run("completion", *words)
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)


# -- Help ------------------------------------------------------------


@pytest.mark.parametrize("path", [(), ("chat",), ("config", "add")], ids=repr)
def test_help_shows_the_page_of_a_command(run, path):
    page = run("help", *path)
    assert page == run(*path, "--help")
    assert (page.status, page.stderr) == (0, b"")
    assert page.stdout.decode().startswith(" ".join(("usage: xeroctl",) + path))


@pytest.mark.parametrize("path", [("nonsense",), ("config", "nonsense")], ids=repr)
def test_help_on_an_unknown_command_is_a_usage_error(run, path):
    result = run("help", *path)
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)


def test_every_page_fits_80_columns_and_names_every_option(start, xeroctl):
    commands = [(path, parser, start("help", *path, env={"COLUMNS": "80"})) for path, parser in walk(xeroctl)]
    faults = []
    for path, parser, child in commands:
        page = child.finish().stdout.decode()
        faults += [(path, line) for line in page.split("\n") if len(line) > 80 or re.search(r"==SUPPRESS==|%\(", line)]
        words = set(re.findall(r"[\w-]+", page))
        faults += [(path, name) for name in option_names(parser) if name not in words]
    assert faults == []
