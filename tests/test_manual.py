"""The manual says what the tool does: commands, options, variables, statuses; both ways."""

import argparse
import os
import re
import shlex
import shutil
import subprocess

import pytest

from conftest import TOP

MANUAL = TOP / "man" / "xeroctl.1"
PAGE = MANUAL.read_text(encoding="utf-8")

OTHER_PROGRAMS_VARIABLES = {
    "HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "VISUAL", "EDITOR", "NO_COLOR", "TERM",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
}
OTHER_PROGRAMS = {"man"}  # that take our name as an argument
INTERRUPTED = 130  # by a signal, so no constant
OPERATORS = re.compile(r"[;&|<>()]+$|^(do|then|else|if|while)$")


def tree(xeroctl):
    """Return the parser of each command by the words that lead to it; that of the whole tool by none."""
    return {tuple(name.split()): xeroctl.build_parser(name) for name in xeroctl.COMMANDS}


def leaves(xeroctl):
    """Return the parsers of the commands that have none below them, by their words."""
    return {path: parser for path, parser in tree(xeroctl).items() if not parser.commands}


def options(parser):
    """Return the actions of *parser* that options start."""
    return list(dict.fromkeys(parser.options.values()))


def names(actions):
    return {name for action in actions for name in action.option_strings}


def parser_options(xeroctl):
    """Return the set of all names of options."""
    return {name for parser in tree(xeroctl).values() for name in names(options(parser))}


def option_head(action):
    """Return what heads an option's item: "Fl m , Fl -message Ar TEXT"."""
    head = " , ".join("Fl " + name[1:] for name in action.option_strings)
    if action.nargs == 0:
        return head
    return f"{head} Ar {action.metavar}" + " ..." * (action.nargs == "+")


def argument_head(action):
    """Return how an argument without an option stands in a head: "Op Ar COMMAND ..."."""
    if action.choices:
        return " | ".join(action.choices)
    return "Op " * (action.nargs in ("?", "*")) + f"Ar {action.metavar}" + " ..." * (action.nargs in ("+", "*"))


def command_head(path, commands):
    """Return what heads the item of the command *path*: "Cm config Op Cm list", "Cm config add Ar NAME"."""
    above, parser = commands[path[:-1]], commands[path]
    if above.run and parser.run is above.run:
        return f"Cm {' '.join(path[:-1])} Op Cm {path[-1]}"
    arguments = [argument_head(parser.argument)] if parser.argument else []
    return " ".join(["Cm", *path, *arguments])


def command_heads(xeroctl):
    """Return the heads of all commands that do something, in the order of the help."""
    commands = tree(xeroctl)
    return [command_head(path, commands) for path in leaves(xeroctl)]


def section(name):
    """Return the text of the manual's section *name*."""
    return re.search(rf"^\.Sh {name}\n(.*?)(?=^\.Sh |\Z)", PAGE, re.MULTILINE | re.DOTALL).group(1)


def subsection(name):
    """Return the text of the subsection *name* of the manual's description."""
    return re.search(rf"^\.Ss {name}\n(.*?)(?=^\.S[hs] |\Z)", PAGE, re.MULTILINE | re.DOTALL).group(1)


def items(text):
    """Return the heads of the list items in *text*."""
    return re.findall(r"^\.It (.*)$", text, re.MULTILINE)


def bodies(text):
    """Return the (head, text) pairs of the list items in *text*; a list within an item is left out of its text."""
    depth, found, open_items = 0, [], {}
    for line in text.split("\n"):
        depth += line.startswith(".Bl") - line.startswith(".El")
        if line.startswith(".It "):
            open_items[depth] = [line[len(".It "):], ""]
            found.append(open_items[depth])
        elif not line.startswith((".Bl", ".El")) and depth in open_items:
            open_items[depth][1] += line + "\n"
    return [tuple(item) for item in found]


def flags(text):
    """Return the options that the mdoc macros Fl in *text* name."""
    return {"-" + name for name in re.findall(r"\bFl ([A-Za-z-][\w-]*)", text)}


def commands_text():
    """Return the list of the commands in the manual."""
    return section("DESCRIPTION").partition("\n.Ss ")[0]


def listed_options():
    """Return the heads of the options that stand below each command in the manual's list, by the command's head."""
    found = {}
    for head in items(commands_text()):
        if head.startswith("Fl "):
            found[list(found)[-1]].append(head)
        else:
            found[head] = []
    return found


# -- The manual ------------------------------------------------------


@pytest.mark.smoke
def test_the_manual_has_every_command_with_its_arguments_and_no_other(xeroctl):
    assert list(listed_options()) == command_heads(xeroctl)


@pytest.mark.smoke
def test_the_synopsis_has_every_command_with_its_arguments_and_no_other(xeroctl):
    commands = {command_head(path, tree(xeroctl)): parser for path, parser in leaves(xeroctl).items()}
    found = []
    for block in section("SYNOPSIS").split(".Nm\n")[1:-1]:
        words = [line[1:] for line in block.split("\n") if re.match(r"\.(Op )?(Cm|Ar) (?!options$)", line)]
        found.append(" ".join(words))
        assert flags(block) <= names(options(commands[found[-1]])), found[-1]
    assert list(dict.fromkeys(found)) == command_heads(xeroctl)


@pytest.mark.smoke
def test_no_sentence_of_the_manual_names_another_command(xeroctl):
    commands = tree(xeroctl)
    known = set(commands) | {(*path, word) for path, parser in commands.items()
                             if parser.argument for word in parser.argument.choices or ()}
    named = [tuple(words.split()) for words in re.findall(r"\bCm ([a-z]+(?: [a-z]+)*)", section("DESCRIPTION"))]
    named = [words for words in named if words[:1] in commands]
    assert len(named) > 20
    assert [words for words in named if words not in known] == []


def section_options(name, chat_heads):
    """Return the heads of the options in a subsection: its items, and those of chat that its first paragraph names."""
    text = subsection(name)
    shared = flags(text.partition("\n.Bl ")[0])
    return set(items(text)) | {head for head in chat_heads if flags(head) & shared}


@pytest.mark.smoke
def test_the_manual_has_every_option_of_every_command_and_no_other(xeroctl):
    """The global ones once, those that say which endpoint is asked once, the others where their command is."""
    commands = tree(xeroctl)
    everywhere = {option_head(action) for action in options(commands[()])}
    of_endpoints = set(items(subsection("Endpoint options")))
    asking = set(re.findall(r"^\.Cm (\w+)", subsection("Endpoint options"), re.MULTILINE))
    chat_heads = items(subsection("Options of chat"))
    listed = [head for head in items(subsection("Global options")) if head.startswith("Fl ")]
    assert set(listed) == everywhere
    for path, parser in commands.items():
        if not path:
            continue
        heads = {option_head(action) for action in options(parser)}
        assert everywhere - heads == ({"Fl -retries Ar N"} if path == ("bench",) else set())
        heads -= everywhere
        if path[0] in asking:
            assert of_endpoints <= heads, path
            heads -= of_endpoints
        if parser.commands:  # as its default
            path = next((below for below in commands if below[:-1] == path and below[-1] == "list"))
        documented = set(listed_options()[command_head(path, commands)])
        if path in (("chat",), ("batch",), ("bench",)):
            documented |= section_options(f"Options of {path[0]}", chat_heads)
        assert documented == heads, path


def test_the_manual_describes_no_option_of_a_command_twice():
    everywhere = items(subsection("Global options"))
    of_endpoints = items(subsection("Endpoint options"))
    lists = {head: items(subsection(f"Options of {head}")) for head in ("chat", "batch", "bench")}
    lists.update(listed_options())
    for command, heads in lists.items():
        asks_one_endpoint = not command.startswith(("bench", "Cm config"))
        heads = everywhere + of_endpoints * asks_one_endpoint + heads
        assert len(set(heads)) == len(heads), command


@pytest.mark.smoke
def test_no_sentence_of_the_manual_names_another_option(xeroctl):
    assert flags(PAGE) - parser_options(xeroctl) == set()


@pytest.mark.smoke
def test_the_manual_has_the_words_that_a_value_can_be(xeroctl):
    with_choices = {option_head(action): action for parser in tree(xeroctl).values() for action in options(parser)
                    if action.choices}
    assert len(with_choices) >= 2
    for head, action in with_choices.items():
        text = next(text for found, text in bodies(PAGE) if found == head)
        assert set(action.choices) - set(re.findall(r"\bCm (\w+)", text)) == set(), head


@pytest.mark.smoke
def test_the_manual_says_which_options_may_be_repeated(xeroctl):
    repeatable = {option_head(action) for parser in tree(xeroctl).values() for action in options(parser)
                  if isinstance(action, argparse._AppendAction)}
    found = [head for head, text in bodies(section("DESCRIPTION")) if re.search("May be repeated|it is repeated", text)]
    assert set(found) == repeatable
    assert found.count("Fl -metadata Ar NAME=VALUE") == 3
    assert found.count("Fl e , Fl -endpoint Ar SLUG") == 1  # of bench


def test_the_manual_has_the_commands_of_a_conversation_and_no_other(xeroctl):
    heads = [head.split()[1] for head in items(subsection("Chat")) if head.startswith("Cm /")]
    assert heads == [command.name for command in xeroctl.CHAT_COMMANDS]


def test_the_manual_has_the_steps_of_status_in_their_order(xeroctl):
    assert items(subsection("Status")) == ["Sy " + step for step in xeroctl.STATUS_STEPS]
    assert f"at most {xeroctl.STATUS_MAX_TOKENS} tokens" in subsection("Status")


def test_the_manual_has_the_keys_of_the_config_file_and_no_other(xeroctl):
    heads = [head for head in items(section("FILES")) if head.startswith("Cm ")]
    assert sorted(heads) == sorted("Cm " + name for name in ("current", *xeroctl.FIELD_TYPES))


def test_the_config_file_in_the_manual_holds_known_keys_alone(xeroctl):
    text = re.search(r"^\.Bd -literal\n(current.*?)^\.Ed", PAGE, re.MULTILINE | re.DOTALL).group(1)
    config = xeroctl.parse_config(text, "the manual")
    assert config.current in config.deployments
    assert {name for deployment in config.deployments.values() for name in deployment} <= set(xeroctl.FIELD_TYPES)


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


def test_the_manual_is_without_a_mistake():
    if not shutil.which("mandoc"):
        assert os.environ.get("CI") != "true", "mandoc must be there in CI"
        pytest.skip("mandoc is not installed")
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", str(MANUAL)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode, done.stdout.decode()) == (0, "")


# -- Commands in the manual ------------------------------------------


def manual_lines():
    """Return the lines of the manual's examples that a shell would get."""
    text = joined(section("EXAMPLES").replace("\\e\n", "\\\n").replace("\\-", "-").replace("\\e", "\\"))
    return [line.split("$ ", 1)[1] for line in text.split("\n") if re.match(r"(\.Dl )?\$ ", line)]


def joined(text):
    """Return the shell lines *text* with each command on one line."""
    return text.replace("\\\n", " ").replace("|\n", "| ")


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
        by_name = token == "xeroctl" and before not in OTHER_PROGRAMS
        by_python = token in ("xeroctl.py", "-") and re.match(r"python3", os.path.basename(before))
        by_path = token.endswith("/xeroctl.py") and (OPERATORS.search(before) or re.match("python3", before))
        if by_name or by_python or by_path:
            end = next((end for end in range(at, len(tokens)) if OPERATORS.search(tokens[end])), len(tokens))
            start = max([0, *(place + 1 for place in range(at) if OPERATORS.search(tokens[place]))])
            given = ["something"] if tokens[start] == "xargs" else []
            yield tokens[at + 1:end] + given
        elif " " in token:
            yield from tool_commands(token)


MANUAL_COMMANDS = [command for line in manual_lines() for command in tool_commands(line)]
NEEDS_ENDPOINT = {"chat", "models", "completions"}


@pytest.mark.smoke
@pytest.mark.parametrize("command", MANUAL_COMMANDS, ids=" ".join)
def test_a_command_in_the_manual_parses(xeroctl, command):
    command = [re.sub(r"^\$\w+$", "some", word) for word in command]
    try:
        found = xeroctl.parse_arguments(command)
    except xeroctl.TextRequested:
        return
    assert found.command
    assert found.demo or found.endpoint or found.command not in NEEDS_ENDPOINT
    if found.run is xeroctl.run_config_add:
        assert found.base_url
    if found.run is xeroctl.run_completions_update:
        assert found.metadata


@pytest.mark.parametrize("line, commands", [
    ("xeroctl confg add prod", [["confg", "add", "prod"]]),
    ("source <(xeroctl completion bash)", [["completion", "bash"]]),
    ('eval "$(xeroctl completion bash)"', [["completion", "bash"]]),
    ("xeroctl completion fish | source", [["completion", "fish"]]),
    ("man xeroctl", []),
    ("ls | cut -f 1 | xargs -r xeroctl completions delete --yes", [["completions", "delete", "--yes", "something"]]),
    ("A=b xeroctl status && xeroctl models", [["status"], ["models"]]),
    ("ssh HOST 'python3 - chat -m \"Hello\"' < xeroctl.py", [["chat", "-m", "Hello"]]),
], ids=str)
def test_a_call_of_the_tool_is_found_whatever_it_says(line, commands):
    assert list(tool_commands(line)) == commands


def test_the_commands_are_found():
    assert len(MANUAL_COMMANDS) == sum(line.count("xeroctl ") for line in manual_lines()) > 20
