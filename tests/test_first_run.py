"""The first run: nothing is set up, and the tool names the ways out."""

import re
import shlex

import pytest

COMMANDS = [
    ("chat", "-m", "hi"), ("chat", "--endpoint", "x", "-m", "hi"), ("models",), ("completions",), ("status",),
]


@pytest.mark.smoke
@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_with_nothing_set_up_one_line_names_the_three_ways_out(run, args):
    result = run(*args)
    assert (result.status, result.stderr.count(b"\n")) == (2, 1)
    for way in (b"xeroctl config init", b"XEROTIER_BASE_URL", b"XEROTIER_API_KEY", b"--demo"):
        assert way in result.stderr
    assert result.stdout == b"" or args[0] == "status"


@pytest.mark.smoke
def test_the_way_out_that_needs_nothing_works_as_it_is_written(run):
    words = shlex.split(re.search(r"xeroctl (chat --demo .*)", run("models").stderr.decode()).group(1))
    result = run(*words)
    assert (result.status, b"Hello" in result.stdout) == (0, True)


def test_alone_it_shows_the_short_help_on_stderr(run, xeroctl):
    result = run()
    lines = result.stderr.decode().split("\n")
    assert (result.status, result.stdout, lines[0]) == (2, b"", "usage: xeroctl COMMAND [options]")
    assert {line.split()[0] for line in lines if line.startswith("  ")} == set(xeroctl.build_parser().commands)
    assert "xeroctl chat --demo -m Hello" in lines[-2] and "xeroctl help COMMAND" in lines[-2]
    assert len(lines) < 20


@pytest.mark.parametrize("args", [("-q",), ("-o", "text"), ("--demo", "-m", "hi")], ids=" ".join)
def test_options_without_a_command_are_one_line(run, args):
    result = run(*args)
    assert (result.status, result.stdout, result.stderr.count(b"\n")) == (2, b"", 1)


@pytest.mark.parametrize("options", [(), ("--stream",)], ids=str)
@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "true", "[]", "{}"])
def test_the_demo_refuses_a_limit_that_is_no_number(run, value, options):
    status, out, err = run("chat", "--demo", "-m", "hi", "--param", f"max_tokens={value}", *options)
    assert (status, out) == (4, b"") and b"max_tokens must be a whole number of at least 1" in err
