"""The manual and the README say what the tool does: options, variables, statuses, commands; both ways."""

import argparse
import os
import re
import shlex
import shutil
import subprocess

import pytest

from conftest import TOP

MANUAL = TOP / "man" / "xeroctl.1"
README = TOP / "README.md"
PAGE = MANUAL.read_text(encoding="utf-8")
GUIDE = README.read_text(encoding="utf-8")

OTHER_PROGRAMS_VARIABLES = {
    "HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "VISUAL", "EDITOR", "NO_COLOR", "TERM", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
}
INTERRUPTED = 130  # by a signal, so no constant
OPERATORS = re.compile(r"[;&|<>()]+$|^(do|then|else|if|while)$")


def parsers(xeroctl):
    """Return the parser and those of its commands."""
    parser = xeroctl.build_parser()
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += action.choices.values()
    return found


def parser_options(xeroctl):
    """Return the set of all names of options."""
    return {name for parser in parsers(xeroctl) for action in parser._actions for name in action.option_strings}


def section(name):
    """Return the text of the manual's section *name*."""
    return re.search(rf"^\.Sh {name}\n(.*?)(?=^\.Sh |\Z)", PAGE, re.MULTILINE | re.DOTALL).group(1)


def items(text):
    """Return the heads of the list items in *text*."""
    return re.findall(r"^\.It (.*)$", text, re.MULTILINE)


def flags(text):
    """Return the options that the mdoc macros Fl in *text* name."""
    return {"-" + name for name in re.findall(r"\bFl ([A-Za-z-][\w-]*)", text)}


# -- The manual ------------------------------------------------------


def test_the_manual_has_every_option_and_no_other(xeroctl):
    assert flags("\n".join(items(PAGE))) == parser_options(xeroctl)


def test_no_sentence_of_the_manual_names_another_option(xeroctl):
    assert flags(PAGE) - parser_options(xeroctl) == set()


@pytest.mark.parametrize("kind", ["value", "no value"])
def test_the_manual_says_which_options_take_a_value(xeroctl, kind):
    actions = [action for parser in parsers(xeroctl) for action in parser._actions if action.option_strings]
    taking = {name for action in actions if action.nargs != 0 for name in action.option_strings}
    heads = [head for head in items(PAGE) if "Fl" in head and ("Ar" in head.split()) == (kind == "value")]
    expected = taking if kind == "value" else parser_options(xeroctl) - taking
    assert flags("\n".join(heads)) == expected


def test_the_manual_has_every_variable_and_no_other(xeroctl):
    ours = {value for name, value in vars(xeroctl).items() if name.startswith("ENV_")}
    listed = {name for head in items(section("ENVIRONMENT")) for name in re.findall(r"Ev (\w+)", head)}
    assert ours and ours <= listed
    assert listed - ours - OTHER_PROGRAMS_VARIABLES == set()
    assert set(re.findall(r"\bEv (\w+)", PAGE)) - listed == set()


def test_the_manual_has_every_exit_status_and_no_other(xeroctl):
    ours = {value for name, value in vars(xeroctl).items() if name.startswith("EXIT_")}
    assert {int(head) for head in items(section("EXIT STATUS"))} == ours | {INTERRUPTED}


def test_the_manual_has_the_defaults(xeroctl):
    for option, value in [("connect-timeout", xeroctl.DEFAULT_CONNECT_TIMEOUT_SECONDS),
                          ("timeout", xeroctl.DEFAULT_TIMEOUT_SECONDS), ("retries", xeroctl.DEFAULT_RETRIES)]:
        text = re.search(rf"^\.It Fl -{option} (.*?)(?=^\.It|^\.El)", PAGE, re.MULTILINE | re.DOTALL).group(1)
        assert f"default is {value}." in text


def test_the_manual_has_every_command(xeroctl):
    commands = parsers(xeroctl)[0]._subparsers._group_actions[0].choices
    assert set(re.findall(r"^\.It Cm (\w+)", section("DESCRIPTION"), re.MULTILINE)) == set(commands)


def test_the_manual_is_without_a_mistake():
    if not shutil.which("mandoc"):
        assert os.environ.get("CI") != "true", "mandoc must be there in CI"
        pytest.skip("mandoc is not installed")
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", str(MANUAL)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout.decode()) == (0, "")


# -- Commands in the documents ---------------------------------------


def fenced_lines():
    """Return the lines of the README's shell blocks, continued lines joined."""
    blocks = re.findall(r"^```(?:sh|shell|bash|console)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ").split("\n")


def manual_lines():
    """Return the lines of the manual's examples that a shell would get."""
    text = section("EXAMPLES").replace("\\e\n", " ").replace("\\-", "-")
    return [line.split("$ ", 1)[1] for line in text.split("\n") if re.match(r"(\.Dl )?\$ ", line)]


def words(line):
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def tool_commands(line):
    """Yield the arguments of each call of the tool in the shell line *line*, also of those inside quotes."""
    try:
        tokens = words(line)
    except ValueError:  # a quotation over several lines
        return
    for at, token in enumerate(tokens):
        before = tokens[at - 1] if at else ";"
        after = tokens[at + 1] if at + 1 < len(tokens) else ";"
        by_name = token == "xeroctl" and re.match(r"chat$|-", after)
        by_python = token in ("xeroctl.py", "-") and re.match(r"python3", os.path.basename(before))
        by_path = token.endswith("/xeroctl.py") and (OPERATORS.search(before) or re.match("python3", before))
        if by_name or by_python or by_path:
            end = next((end for end in range(at, len(tokens)) if OPERATORS.search(tokens[end])), len(tokens))
            yield tokens[at + 1:end]
        elif " " in token:
            yield from tool_commands(token)


README_COMMANDS = [command for line in fenced_lines() for command in tool_commands(line)]
MANUAL_COMMANDS = [command for line in manual_lines() for command in tool_commands(line)]


@pytest.mark.parametrize("command", README_COMMANDS + MANUAL_COMMANDS, ids=" ".join)
def test_a_command_in_the_documents_parses(xeroctl, command):
    command = [re.sub(r"^\$\w+$", "some", word) for word in command]
    try:
        options = xeroctl.build_parser().parse_args(command)
    except xeroctl.Page:
        return
    assert options.command == "chat"
    assert options.demo or options.endpoint


def test_the_commands_are_found():
    assert len(README_COMMANDS) >= sum("xeroctl chat" in line for line in fenced_lines()) > 10
    assert len(MANUAL_COMMANDS) == sum("xeroctl" in line for line in manual_lines()) > 4
    assert ["chat", "--demo", "--stream", "-m", "Hello"] in README_COMMANDS


def test_the_readme_names_no_option_that_does_not_exist(xeroctl):
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", GUIDE)) - parser_options(xeroctl) == set()


def test_the_readme_and_the_manual_have_the_same_statuses_and_variables(xeroctl):
    statuses = {int(number) for number in re.findall(r"^\| (\d+) \|", GUIDE, re.MULTILINE)}
    assert statuses == {int(head) for head in items(section("EXIT STATUS"))}
    ours = {value for name, value in vars(xeroctl).items() if name.startswith("ENV_")}
    assert set(re.findall(r"\bXEROTIER_[A-Z_]+", GUIDE)) == ours


def test_the_first_command_of_the_readme_does_what_it_says(run):
    first = next(line for line in fenced_lines() if line)
    assert first.startswith("python3 xeroctl.py chat --demo")
    result = run(*shlex.split(first)[2:])
    assert (result.status, b"Hello" in result.stdout) == (0, True)
    assert re.fullmatch(rb"-- \d+ tokens in [\d.]+s \([\d.]+ tok/s\)\n", result.stderr)
