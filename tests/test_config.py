"""The config file as `xeroctl config` shows and changes it, and keys that are kept elsewhere."""

import contextlib
import fcntl
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import loopback
from conftest import XEROCTL
from driver import Driver
from loopback import completion, json_response
from terminal import Process, checked, screen

KEY = "xero_acme_0123456789"
OTHER_KEY = "xero_other_abcdefghij"
MASKED = "****6789"
MODELS = json_response({"object": "list", "data": [{"id": "m"}]})
TWO = f"""\
current = "prod"

[deployment.prod]
base_url = "https://api.example/acme/v1"
api_key = "{KEY}"

[deployment.staging]
base_url = "https://staging.example/v1"
api_key_keychain = "xeroctl-staging"
"""
ADD = ["add", "c", "--base-url", "https://c/v1"]


def write_config(home, content, mode=0o600):
    """Write the config file below *home* and return its path."""
    path = Path(home, ".config", "xeroctl", "config.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    path.chmod(mode)
    return path


def mode(path):
    return stat.S_IMODE(os.lstat(str(path)).st_mode)


def table(**values):
    """Return the TOML text of a deployment prod of texts, the chosen one."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(['current = "prod"', "[deployment.prod]", *lines, ""])


@pytest.fixture(scope="module")
def driver(interpreter, tmp_path_factory):
    """One process that runs the tool many times, with an empty standard input and a PATH of its own."""
    home = tmp_path_factory.mktemp("driver")
    with Driver(interpreter, XEROCTL, home) as driver:
        driver.env["PATH"] = str(home / "bin")
        yield driver


@pytest.fixture
def stored(driver):
    """Write the config file of `config` and return its path; with None there is no file, and no folder."""
    def stored(content, mode=0o600):
        shutil.rmtree(os.path.join(driver.env["HOME"], ".config"), ignore_errors=True)
        path = Path(driver.env["HOME"], ".config", "xeroctl", "config.toml")
        return path if content is None else write_config(driver.env["HOME"], content, mode)

    stored(None)
    return stored


@pytest.fixture
def config(driver, stored):
    """Run a config command in the driver."""
    return lambda *args: driver.run("config", *args)


@pytest.fixture
def home(tmp_path):
    """Make another home, with this config file if any, and return its path."""
    def home(content=None):
        path = tmp_path / f"home{len(list(tmp_path.iterdir()))}"
        path.mkdir()
        if content is not None:
            write_config(path, content)
        return path
    return home


@pytest.fixture
def shell(request, command, env):
    """Start a line of sh in which "$@" is the tool with the given arguments."""
    def shell(line, *args, home=None):
        child = Process(["sh", "-c", line, "sh", *command(()), *args], {**env, "HOME": str(home or env["HOME"])})
        request.addfinalizer(child.kill)
        return child
    return shell


@pytest.fixture(scope="session")
def reads_all_toml(interpreter):
    """Whether the interpreter has the standard library's reader, from Python 3.11 on."""
    return subprocess.run([interpreter, "-c", "import tomllib"], stderr=subprocess.DEVNULL).returncode == 0


# -- Edits, line by line ---------------------------------------------

# Each line of a picture says in its first columns when it is there: o in the old file, a after `add c`, u after
# `use b`, r after `remove a`; without any it always is.  A < in place of | takes the end off the line before.

ADDED = """\
 a  |
 a  |[deployment.c]
 a  |base_url = "https://c/v1"
"""
TOP = """\
oa  |current = "a"
  u |current = "b"
"""
TOP_ALWAYS = """\
    |current = "a"
"""
NO_TOP = """\
  u |current = "b"
 a  |current = "c"
 au |
"""
PICTURES = {
    "as the tool writes it": TOP + """\
oau |
oau |[deployment.a]
oau |base_url = "A"
oau |api_key = "of a"
oau |
    |[deployment.b]
    |base_url = "B"
""" + ADDED,

    "comments everywhere": """\
    |# my servers
    |
oa  |current = "a"   # at home; "b" at work
  u |current = "b"   # at home; "b" at work
    |# about the first
oau |[deployment.a]  # the first
oau |# its address
oau |base_url = "A"  # an A
oau |# its end
oau |
    |# about the second
    |[deployment.b]# the second
    |base_url = "B"# a B
    |
    |# the end
""" + ADDED,

    "odd spacing": """\
oa  |\tcurrent\t=\t'a'\x20
  u |\tcurrent\t=\t"b"\x20
oau |  [ deployment . a ]\x20\x20
oau |  base_url  =  "A"
oau |\t
    |[\tdeployment\t.\t"b"\t]
    |base_url="B"
    |\t
 a  |[deployment.c]
 a  |base_url = "https://c/v1"
""",

    "unknown tables and keys": """\
    |theme = "dark"
oa  |current = "a"
  u |current = "b"
    |size = 1
    |
    |[ui]
    |current = "a"
    |
oau |[deployment.a]
oau |base_url = "A"
oau |frontend_url = "https://app.example"
oau |
    |[other.deployment.a]
    |x = 1
    |
    |[deployment.b]
    |base_url = "B"
    |retries = 3
    |
    |[a]
    |y = "z"
""" + ADDED,

    "tables in a deployment": TOP + """\
oau |
oau |[deployment.a]
oau |base_url = "A"
oau |
oau |[deployment.a.headers]
oau |# one
oau |x = "y"
oau |
oau |[deployment.a.headers.more]
oau |z = "w"
oau |
    |[deployment.ab]
    |base_url = "AB"
    |
    |[deployment.b.a]
    |q = 1
    |
    |[deployment.b]
    |base_url = "B"
""" + ADDED,

    "tables of a deployment far apart": NO_TOP + """\
oau |[deployment.a.headers]
oau |x = "y"
    |[deployment.b]
    |base_url = "B"
    |[ui]
    |z = 1
oau |[deployment.a]
oau |base_url = "A"
oau |
    |# the end
""" + ADDED,

    "no empty line and a comment above the next table": TOP + """\
oau |[deployment.a]
oau |base_url = "A"
    |# about b
    |# and more
    |[deployment.b]
    |base_url = "B"
""" + ADDED,

    "no line end at the end": TOP + """\
oau |[deployment.a]
oau |base_url = "A"
    |[deployment.b]
    |base_url = "B"
o ur<
""" + ADDED,

    "no line end after a comment at the end": TOP + """\
oau |[deployment.a]
oau |base_url = "A"
    |[deployment.b]
    |# nothing here
o ur<
""" + ADDED,

    "the last table": TOP + """\
    |[deployment.b]
    |base_url = "B"
oau |
oau |[deployment.a]
oau |base_url = "A"
oau |# about a
""" + ADDED,

    "the last table right below the one before": TOP + """\
    |[deployment.b]
    |base_url = "B"
oau |[deployment.a]
oau |base_url = "A"
""" + ADDED,

    "no line end at the end of the last table": TOP + """\
    |[deployment.b]
    |base_url = "B"
oau |[deployment.a]
oau |base_url = "A"
o u <
""" + ADDED,

    "current below other keys, above a table": """\
    |x = 1
    |# the chosen one
oa  |current = "a"
  u |current = "b"
oau |[deployment.a]
    |[deployment.b]
""" + ADDED,

    "no current": NO_TOP + """\
oau |[deployment.a]
oau |base_url = "A"
oau |
    |[deployment.b]
    |base_url = "B"
""" + ADDED,

    "no current, and a comment at the top": NO_TOP + """\
    |# mine
    |size = 2
    |
oau |[deployment.a]
oau |base_url = "A"
oau |
    |[deployment.b]
    |base_url = "B"
""" + ADDED,

    "no current, and an empty line at the top": """\
  u |current = "b"
 a  |current = "c"
    |
oau |[deployment.a]
    |[deployment.b]
""" + ADDED,

    "another is the current one": """\
  u |current = "b"  # not z
o  r|current = "z"  # not z
 a  |current = "c"  # not z
    |
oau |[deployment.a]
oau |base_url = "A"
oau |
    |[deployment.b]
    |base_url = "B"
""" + ADDED,

    "signs in texts": """\
oa  |current = "a" # = "b" # 'c'
  u |current = "b" # = "b" # 'c'
oau |[deployment.a] # [deployment.b]
oau |base_url = "A#[deployment.b]"
oau |note = '# = "'
    |[deployment.b]
    |api_key = "[deployment.a] # \\"x\\" current = 'a'"
    |base_url = '[deployment.c] ]'
""" + ADDED,

    "booleans and numbers": """\
    |verbose = true
    |ratio = -0.5
oa  |current = "a"
  u |current = "b"
    |count = 3
    |
oau |[deployment.a]
oau |tls = false
oau |weight = 1.50
oau |
    |[deployment.b]
    |tls = true
    |weight = 2
""" + ADDED,

    "a table above them all": TOP + """\
oau |
    |[deployment]
oau |[deployment.a]
oau |base_url = "A"
    |[deployment.b]
""" + ADDED,

    "many empty lines": """\
    |
    |
oa  |current = "a"
  u |current = "b"
    |
    |
oau |[deployment.a]
oau |
oau |base_url = "A"
oau |
    |
    |[deployment.b]
    |base_url = "B"
    |
    |
 a  |[deployment.c]
 a  |base_url = "https://c/v1"
""",
}
QUOTED = """\
oa  |current = "a b"
  u |current = "x.y"
oau |[deployment."a b"]
oau |base_url = "A"
oau |[deployment.'a b'."c"]
oau |z = 1
    |[deployment.a]
    |base_url = "of a"
    |[deployment.'x.y']
    |base_url = "X.Y"
    |[deployment.x]
    |y = "is not x.y"
    |[deployment."a b#"]
    |"base_url" = "#"
""" + ADDED
FULL_TOML = {
    "arrays of tables": TOP + """\
    |[[server]]
    |x = 1
oau |[deployment.a]
oau |base_url = "A"
    |[[ server ]]
    |x = 2
    |
    |[deployment.b]
    |base_url = "B"
    |[[server.part]]
""" + ADDED,

    "values over many lines": """\
    |started = 2026-01-01T00:00:00Z
    |text = '''
    |x = 1
    |'''
oa  |current = "a"
  u |current = "b"
    |[deployment.b]
    |base_url = "B"
    |tags = [
    |  "x",  # one
    |  "y",
    |]
    |point = { x = 1, y = [ 0x1f, 1e3, inf ] }
oau |[deployment.a]
oau |tags = [
oau |  "x",
oau |]
oau |base_url = '''
oau |A'''
    |[z]
    |hex = 0xff
""" + ADDED,
}
ONLY_ADD = {
    "no file": None,
    "an empty file": """\
 a  |current = "c"
""" + ADDED,
    "empty lines": """\
 a  |current = "c"
    |
    |
 a  |[deployment.c]
 a  |base_url = "https://c/v1"
""",
    "only comments": """\
 a  |current = "c"
 a  |
    |# mine
    |# [deployment.a]
""" + ADDED,
}


def drawn(picture, state):
    """Return the text of *picture* in *state*, one of o, a, u and r."""
    text = ""
    for line in picture.split("\n")[:-1]:
        if not line[:4].strip() or state in line[:4]:
            text = text[:-1] if line[4] == "<" else text + line[5:] + "\n"
    return text


def assert_edits(config, stored, picture, changes):
    """Make each of *changes*, arguments by the state that they lead to, to the file of *picture*."""
    for state, arguments in changes.items():
        old, new = drawn(picture, "o"), drawn(picture, state)
        for mark, end in (("", "\n"), ("\ufeff", "\r\n" if "\n" in old else "\n")):
            path = stored(mark + old.replace("\n", end))
            assert config(*arguments, "--quiet") == (0, b"", b""), (arguments, end)
            assert path.read_bytes().decode() == mark + new.replace("\n", end), (arguments, end)


CHANGES = {"a": ADD, "u": ["use", "b"], "r": ["remove", "a"]}


@pytest.mark.parametrize("picture", PICTURES.values(), ids=PICTURES)
def test_a_change_touches_no_other_line(config, stored, picture):
    assert_edits(config, stored, picture, CHANGES)


def test_a_name_may_be_quoted(config, stored):
    assert_edits(config, stored, QUOTED, {"a": ADD, "u": ["use", "x.y"], "r": ["remove", "a b"]})


@pytest.mark.parametrize("picture", FULL_TOML.values(), ids=FULL_TOML)
def test_a_file_of_all_that_toml_has_is_changed_or_refused(config, stored, reads_all_toml, picture):
    if reads_all_toml:
        assert_edits(config, stored, picture, CHANGES)
    for arguments in CHANGES.values() if not reads_all_toml else ():
        path = stored(drawn(picture, "o"))
        status, out, err = config(*arguments)
        assert (status, out, err.count(b"\n")) == (2, b"", 1)
        assert err.startswith(f"xeroctl: error: {path}: broken TOML: cannot read this (at line ".encode())
        assert path.read_bytes() == drawn(picture, "o").encode()


@pytest.mark.parametrize("picture", list(ONLY_ADD.values())[1:], ids=list(ONLY_ADD)[1:])
def test_a_file_without_deployments_gets_its_first(config, stored, picture):
    assert_edits(config, stored, picture, {"a": ADD})


def test_a_file_is_made_where_there_is_none(config, stored):
    path = stored(None)
    assert config(*ADD, "-q") == (0, b"", b"")
    assert path.read_text() == drawn(ONLY_ADD["an empty file"], "a")


def test_what_was_added_can_be_removed_again(config, stored):
    path = stored("")
    assert config(*ADD, "-q") == config("remove", "c", "-q") == (0, b"", b"")
    assert path.read_bytes() == b""


def test_the_chosen_one_may_be_chosen_again(config, stored):
    for text in (TWO, TWO.replace('"', "'", 2), TWO.rstrip()):
        path = stored(text)
        assert config("use", "prod", "-q") == (0, b"", b"")
        assert path.read_bytes() == text.encode()


SET = {
    "fields of a deployment": TOP_ALWAYS + """\
    |[deployment.a]  # the first
os  |base_url = "A"  # an A
  t |base_url = "https://z/v1"  # an A
o   |api_key = "of a"
o   |endpoint='e' # why
 s  |endpoint="f" # why
    |weight = 2
    |
    |# about b
    |[deployment.b]
    |base_url = "B"
    |endpoint = "e"
""",

    "fields that are not there": TOP_ALWAYS + """\
    |
    |[deployment.a]
    |weight = 2
  t |base_url = "https://z/v1"
 s  |endpoint = "f"
    |# the end
    |
    |[deployment.a.headers]
    |x = "y"
    |
    |[deployment.b]
    |endpoint = "e"
""",

    "only a table in it": TOP_ALWAYS + """\
    |[deployment.a.headers]
    |base_url = "not this"
 st |
 st |[deployment.a]
  t |base_url = "https://z/v1"
 s  |endpoint = "f"
""",

    "no line end at the end": TOP_ALWAYS + """\
    |[deployment.b]
    |[deployment.a]
    |size = 1
  t |base_url = "https://z/v1"
 s  |endpoint = "f"
o   <
""",
}
SETTINGS = {"s": ["set", "a", "--endpoint", "f", "--api-key", ""],
            "t": ["set", "a", "--base-url", "https://z/v1/", "--endpoint", "", "--api-key", ""]}


@pytest.mark.smoke
@pytest.mark.parametrize("picture", SET.values(), ids=SET)
def test_set_changes_the_lines_of_its_fields_alone(config, stored, picture):
    assert_edits(config, stored, picture, SETTINGS)


# -- Edits, at random ------------------------------------------------


def changed_document(document, change, name, tables):
    """Return what *document* is after *change* to the deployment *name*."""
    tables, current = dict(tables), document.get("current")
    if change == "add":
        tables[name], current = {"base_url": "https://c/v1"}, current or name
    elif change == "use":
        current = name
    else:
        del tables[name]
        current = None if current == name else current
    document = dict(document, deployment=tables, current=current)
    return {key: value for key, value in document.items() if value not in (None, {})}


def canonical(document):
    """Return *document* as text that is equal for equal ones, whatever the order, nan equal to nan."""
    return json.dumps({key: value for key, value in document.items() if value != {}}, sort_keys=True, default=str)


def random_file(rng):
    """Return pairs of a line and whether it belongs to deployment a, in some order, and who is the current one."""
    def filler(inside):
        count = rng.choice([0, 0, 1, 2])
        return [(rng.choice(["", "# note", "  # [deployment.b]", "\t"]), inside) for _ in range(count)]

    def keys(inside):
        names = rng.sample(["x", "base_url", "api_key", "'z w'"], rng.randrange(1, 4))
        values = ['"A"', '"#"', "'[x]'", '"\\""']
        return [pair for name in names for pair in
                [(f"{name}{rng.choice([' = ', '=', ' =  '])}{rng.choice(values)}", inside)] + filler(inside)]

    current = rng.choice([None, "a", "b", "z"])
    top = filler(False) + [("v = true", False)] * rng.randrange(2)
    if current:
        top += [(rng.choice(['current = "%s"', "current='%s' # one", ' current = "%s"']) % current, False)]
    top += [("w = 1", False)] * rng.randrange(2) + filler(False)
    headers = [("[deployment.a]", True), ("[ deployment . 'b' ] # b", False), ("[deployment.a.sub]", True),
               ("[ui]", False), ("[deployment.ab]", False), ('[other."deployment.a"]', False)]
    rng.shuffle(headers)
    return top + [pair for header in headers for pair in [header] + keys(header[1]) + filler(header[1])], current


def is_part(part, lines):
    """Tell whether *part* is *lines* without some of them."""
    rest = iter(lines)
    return all(line in rest for line in part)


def says_nothing(line):
    return not line.strip() or line.lstrip().startswith("#")


@pytest.mark.parametrize("reader", ["tomllib", "the small reader"])
def test_whatever_the_file_only_what_is_meant_changes(xeroctl, monkeypatch, reader):
    tomllib = pytest.importorskip("tomllib")
    if reader != "tomllib":
        monkeypatch.setitem(sys.modules, "tomllib", None)
    for seed in range(200):
        rng = random.Random(seed)
        pairs, current = random_file(rng)
        text = "\n".join(line for line, _ in pairs) + rng.choice(["", "\n"])
        old, end = tomllib.loads(text), rng.choice(["\n", "\r\n"])
        for change, name in (("add", "c"), ("use", "b"), ("remove", "a")):
            wanted = changed_document(old, change, name, old["deployment"])
            new = xeroctl.edit_config(
                text.replace("\n", end), "file", wanted.get("current"), wanted["deployment"])
            assert new.count("\n") == new.count(end), seed
            new = new.replace("\r\n", "\n")
            assert canonical(tomllib.loads(new)) == canonical(wanted), (seed, change)
            lines, found = text.split("\n"), new.split("\n")
            if change == "add":
                top = "" if current else 'current = "c"\n\n' if lines[0].strip() else 'current = "c"\n'
                added = r'\n{0,2}\[deployment\.c\]\nbase_url = "https://c/v1"\n'
                assert new.startswith(top + text) and re.fullmatch(added, new[len(top + text):]), seed
            elif change == "use" and not current:
                assert new.partition("\n")[2].lstrip("\n") == text.lstrip("\n"), seed
            elif change == "use":
                assert sum(one != other for one, other in zip(found, lines)) == (current != "b"), seed
                assert len(found) == len(lines), seed
            else:
                assert is_part(new.splitlines(), text.splitlines()), seed
                kept = [line for line, inside in pairs if not inside and not says_nothing(line)]
                kept = [line for line in kept if current != "a" or "current" not in line]
                assert [line for line in found if not says_nothing(line)] == kept, seed


# -- Files that are hard to change -----------------------------------

BOTH = '[deployment.a]\nbase_url = "A"\n[deployment.b]\nbase_url = "B"\n'
HARD = [  # and what of a (add), u (use), r (remove) is refused where all of TOML is read
    ("one inline table", 'current = "a"\ndeployment = { a = { base_url = "A" }, b = { base_url = "B" } }\n', "ar"),
    ("inline tables", 'current = "a"\n[deployment]\na = { base_url = "A" }\nb = { base_url = "B" }\n', "r"),
    ("dotted keys", 'current = "a"\ndeployment.a.base_url = "A"\ndeployment.b.base_url = "B"\n', "r"),
    ("dotted keys in a table", 'current = "a"\n[deployment]\na.base_url = "A"\nb.base_url = "B"\n', "r"),
    ("dotted and not", 'deployment.a.api_key = "K"\n[deployment.b]\nbase_url = "B"\n[deployment.a.x]\ny = 1\n', "r"),
    ("a header in a text", 'current = "a"\n[deployment.a]\nnote = """\n[deployment.b]\n"""\n[deployment.b]\n', "r"),
    ("the header in a text", 'current = "a"\n[ui]\nnote = """\n[deployment.a]\n[x]\n"""\n' + BOTH, "r"),
    ("the header alone in a text", "current = 'a'\n[ui]\nnote = '''\n[deployment.a]'''\n" + BOTH, ""),
    ("current in a text", 'note = """\ncurrent = "a"\n"""\ncurrent = "a"\n' + BOTH, "ur"),
    ("current quoted", '"current" = "a"\n' + BOTH, "ur"),
    ("current over many lines", 'current = """\na"""\n' + BOTH, "ur"),
    ("current below an array", "x = [\n[1],\n[2],\n]\ncurrent = 'a'\n" + BOTH, "ur"),
    ("an array in a deployment", 'current = "b"\n[deployment.a]\nx = [\n[ 1 ],\n[2]\n]\n[deployment.b]\n', "r"),
    ("an array of tables in a deployment", 'current = "a"\n' + BOTH + "[[deployment.a.hosts]]\nx = 1\n", "r"),
]
OPEN = [
    ("an escape in a header", '[deployment.b."\\U0001F600"]\n' + BOTH),
    ("a tab in a header", '[deployment.b."x\ty"]\n' + BOTH),
    ("a broken header in a text", "[ui]\nnote = '''\n[\"\\q\"]\n'''\n" + BOTH),
    ("not a number", "x = nan\n" + BOTH),
]


def assert_changed_or_refused(config, stored, text, state):
    """Make the change that leads to *state*; return whether it was refused, and the file left alone."""
    tomllib = pytest.importorskip("tomllib")
    path, old = stored(text), tomllib.loads(text)
    status, out, err = config(*CHANGES[state])
    if status == 0:
        change, name = {"a": ("add", "c"), "u": ("use", "b"), "r": ("remove", "a")}[state]
        wanted = changed_document(old, change, name, old["deployment"])
        assert canonical(tomllib.loads(path.read_text())) == canonical(wanted)
        return False
    assert (status, out, err.count(b"\n")) == (2, b"", 1)
    assert path.read_text() == text
    assert os.listdir(path.parent) == ["config.toml"]
    return True


@pytest.mark.parametrize("text, refused", [case[1:] for case in HARD], ids=[case[0] for case in HARD])
def test_what_cannot_be_changed_line_by_line_is_left_alone(config, stored, reads_all_toml, text, refused):
    found = [state for state in CHANGES if assert_changed_or_refused(config, stored, text, state)]
    assert not reads_all_toml or "".join(found) == refused


@pytest.mark.parametrize("text", [case[1] for case in OPEN], ids=[case[0] for case in OPEN])
def test_what_stands_elsewhere_does_not_hinder_a_change(config, stored, reads_all_toml, text):
    found = [state for state in CHANGES if assert_changed_or_refused(config, stored, text, state)]
    assert not reads_all_toml or found == []


def test_a_refusal_says_what_is_the_matter(config, stored):
    path = stored('current = "a"\ndeployment.a.base_url = "A"\n')
    line = f"xeroctl: error: {path} is written in a way that only an editor can change\n"
    assert config("remove", "a") == (2, b"", line.encode())


@pytest.mark.parametrize("name", ["é", "😀", 'say "hi"', "back\\slash", "a\tb", "del\x7f"], ids=ascii)
def test_a_name_that_an_editor_gave_may_be_chosen_and_removed(config, stored, name):
    tomllib = pytest.importorskip("tomllib")
    quoted = json.dumps(name, ensure_ascii=False).replace("\x7f", "\\u007f")
    path = stored(f"[deployment.{quoted}]\nbase_url = \"A\"\n\n[deployment.b]\n")
    assert config("use", name, "-q") == (0, b"", b"")
    assert tomllib.loads(path.read_text(encoding="utf-8"))["current"] == name
    assert config("remove", name, "-q") == (0, b"", b"")
    assert tomllib.loads(path.read_text()) == {"deployment": {"b": {}}}


# -- Writing ---------------------------------------------------------


@contextlib.contextmanager
def umask(value):
    """Have processes that are started inside begin with this mask."""
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


def test_what_is_made_is_its_owners_alone(start, home):
    children = []
    for value in (0o022, 0o000, 0o077):
        where = home()
        with umask(value):
            children.append((where, start("config", *ADD, "-q", env={"HOME": str(where)})))
    for where, child in children:
        assert child.finish() == (0, b"", b"")
        made = [where / ".config", where / ".config" / "xeroctl", where / ".config" / "xeroctl" / "config.toml"]
        assert [oct(mode(path)) for path in made] == ["0o700", "0o700", "0o600"]


@pytest.mark.parametrize("before", [0o644, 0o600, 0o666, 0o400], ids=oct)
def test_a_file_that_is_changed_becomes_its_owners_alone(config, stored, before):
    path = stored(TWO, before)
    path.parent.chmod(0o755)
    assert config("use", "staging", "-q") == (0, b"", b"")
    assert (mode(path), mode(path.parent)) == (0o600, 0o755)


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_a_link_stays_a_link(config, stored, driver, relative):
    path = stored(TWO)
    kept = Path(driver.env["HOME"], "dotfiles", "config.toml")
    kept.parent.mkdir(exist_ok=True)
    path.rename(kept)
    path.symlink_to("../../dotfiles/config.toml" if relative else kept)
    for arguments in (["use", "staging"], ADD, ["remove", "c"]):
        assert config(*arguments, "-q") == (0, b"", b"")
    assert path.is_symlink() and os.listdir(path.parent) == ["config.toml"]
    assert kept.read_text() == TWO.replace('"prod"', '"staging"', 1)
    assert (mode(kept), os.listdir(kept.parent)) == (0o600, ["config.toml"])


def test_a_link_that_leads_nowhere_is_named(config, stored):
    path = stored(TWO)
    path.unlink()
    path.symlink_to("gone.toml")
    assert config(*ADD) == (2, b"", f"xeroctl: error: cannot read {path}: No such file or directory\n".encode())


def test_on_a_full_disk_the_old_file_stays(shell, home):
    where = home(TWO)
    path = where / ".config" / "xeroctl" / "config.toml"
    children = [shell('ulimit -f 0; exec "$@"', "config", *arguments, home=where)
                for arguments in (ADD, ["use", "staging"], ["remove", "prod"])]
    line = f"xeroctl: error: cannot write {path}: File too large\n"
    assert {child.finish() for child in children} == {(2, b"", line.encode())}
    assert (path.read_text(), os.listdir(path.parent)) == (TWO, ["config.toml"])


FAILING = """
import errno, os, sys
sys.path.insert(0, os.path.dirname(sys.argv.pop(1)))
import xeroctl

def fail(*unused):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

def hang(*arguments):
    os.write(1, b"writing\\n")
    os.read(0, 1)
    return real(*arguments)

real = os.%s
os.%s = %s
sys.exit(xeroctl.main())
"""


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(run, env, function):
    path = write_config(env["HOME"], TWO)
    result = run("config", "use", "staging", interpreter_options=("-c", FAILING % (function, function, "fail")))
    assert result == (2, b"", f"xeroctl: error: cannot write {path}: No space left on device\n".encode())
    assert (path.read_text(), os.listdir(path.parent)) == (TWO, ["config.toml"])


def test_a_file_that_another_process_is_changing_is_left_alone(xeroctl, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(xeroctl, "CONFIG_LOCK_SECONDS", 0.01)
    folder = tmp_path / "xeroctl"
    folder.mkdir()
    (folder / "config.toml").write_text(TWO)
    descriptor = os.open(str(folder), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(xeroctl.UsageError, match="another process is changing"), xeroctl.change_config() as config:
        config.deployments.clear()
    os.close(descriptor)
    assert (folder / "config.toml").read_text() == TWO


def test_an_end_in_the_middle_of_a_write_leaves_a_whole_file(start, home):
    children = []
    for function, number in (("fsync", signal.SIGKILL), ("replace", signal.SIGKILL), ("fsync", signal.SIGTERM),
                             ("replace", signal.SIGINT)):
        where = home(TWO)
        children.append((number, where / ".config" / "xeroctl", start(
            "config", "use", "staging", env={"HOME": str(where)},
            interpreter_options=("-c", FAILING % (function, function, "hang")))))
    for number, folder, child in children:
        child.expect("writing")
        temporary, = set(os.listdir(folder)) - {"config.toml"}
        assert mode(folder / temporary) == 0o600
        assert (folder / temporary).read_text() == TWO.replace('"prod"', '"staging"', 1)
        child.signal(number)
        if number != signal.SIGKILL:
            child.send(b"\n")
        assert child.finish() == (128 + number, b"writing\n", b"")
        if number == signal.SIGKILL:
            assert (folder / "config.toml").read_text() == TWO
        else:  # the write comes first
            assert os.listdir(folder) == ["config.toml"]


def test_a_file_that_is_left_of_a_kill_does_no_harm(config, stored):
    path = stored(TWO)
    (path.parent / ".xeroctl-left").write_text("half a fi")
    assert config("use", "staging", "-q") == (0, b"", b"")
    assert path.read_text() == TWO.replace('"prod"', '"staging"', 1)


def test_a_folder_that_cannot_be_made_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    status, out, err = run("config", *ADD, env={"XDG_CONFIG_HOME": str(tmp_path / "file")})
    assert (status, out, err.count(b"\n")) == (2, b"", 1)
    assert err.startswith(f"xeroctl: error: cannot make {tmp_path}/file/xeroctl: ".encode())


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything")
def test_a_folder_without_permission_is_named(config, stored):
    path = stored(TWO)
    path.parent.chmod(0o500)
    try:
        assert config("use", "staging") == (2, b"", f"xeroctl: error: cannot write {path}: Permission denied\n".encode())
    finally:
        path.parent.chmod(0o700)
    assert path.read_text() == TWO


# -- add, use, remove ------------------------------------------------


@pytest.mark.smoke
def test_the_first_one_becomes_the_current_one_and_the_second_does_not(config, stored):
    path = stored(None)
    assert config("add", "prod", "--base-url", "https://api.example/v1/", "--api-key", KEY) == (
        0, b"", f"xeroctl: note: added prod to {path}: it is the current one\n".encode())
    assert config("add", "x.y", "--base-url=http://localhost:1/v1") == (
        0, b"", f"xeroctl: note: added x.y to {path}: choose it with --context x.y, or with: "
                "xeroctl config use x.y\n".encode())
    assert path.read_text() == (
        f'current = "prod"\n\n[deployment.prod]\nbase_url = "https://api.example/v1"\napi_key = "{KEY}"\n\n'
        '[deployment."x.y"]\nbase_url = "http://localhost:1/v1"\n')


@pytest.mark.smoke
def test_use_and_remove_say_what_they_did(config, stored):
    path = stored(TWO)
    assert config("use", "staging") == (0, b"", b"xeroctl: note: staging is the current context\n")
    assert config("remove", "staging") == (
        0, b"", b"xeroctl: note: removed staging: no context is chosen now, choose one with: "
                b"xeroctl config use CONTEXT\n")
    assert path.read_text() == "\n".join(TWO.split("\n")[2:5] + [""])
    assert config("remove", "prod") == (0, b"", b"xeroctl: note: removed prod\n")
    assert path.read_bytes() == b""


def test_remove_leaves_another_current_one_alone(config, stored):
    path = stored(TWO)
    assert config("remove", "staging") == (0, b"", b"xeroctl: note: removed staging\n")
    assert path.read_text() == "\n".join(TWO.split("\n")[:5] + [""])


def test_an_endpoint_may_be_added_and_is_listed(config, stored):
    path = stored(None)
    assert config(*ADD, "--endpoint", "my-endpoint", "-q") == (0, b"", b"")
    assert path.read_text() == (
        'current = "c"\n\n[deployment.c]\nbase_url = "https://c/v1"\nendpoint = "my-endpoint"\n')
    assert config("add", "d", "--base-url", "https://d/v1", "-q") == (0, b"", b"")
    assert config() == (0, b"c\t*\thttps://c/v1\t\tmy-endpoint\nd\t\thttps://d/v1\t\n", b"")
    assert config("show") == (0, b"name: c\nbase_url: https://c/v1\nendpoint: my-endpoint\n", b"")
    whole = "http://localhost:1/v1/chat/completions"
    assert config("add", "e", "--base-url", whole, "--endpoint", "meta/llama3.2:1b", "-q") == (0, b"", b"")
    assert config("show", "e") == (0, f"name: e\nbase_url: {whole}\nendpoint: meta/llama3.2:1b\n".encode(), b"")


@pytest.mark.smoke
def test_set_says_what_it_did_and_whom_a_key_goes_to(config, stored):
    path = stored(TWO)
    changed = f"xeroctl: note: changed prod in {path}\n"
    goes = "xeroctl: note: the API key of prod goes to https://other.example/v1 from now on\n"
    assert config("set", "prod", "--endpoint", "e") == (0, b"", changed.encode())
    assert config("set", "prod", "--base-url", "https://api.example/v2") == (0, b"", changed.encode())
    assert config("set", "prod", "--base-url", "https://other.example/v1") == (0, b"", (changed + goes).encode())
    assert path.read_text() == TWO.replace("api.example/acme", "other.example").replace(
        f'"{KEY}"\n', f'"{KEY}"\nendpoint = "e"\n')
    assert config("set", "prod", "--base-url", "https://api.example", "--api-key", OTHER_KEY)[2] == changed.encode()
    assert f'api_key = "{OTHER_KEY}"' in path.read_text()


@pytest.mark.parametrize("field", ["api_key", "api_key_keychain", "api_key_command"])
def test_an_empty_key_removes_it_wherever_it_is_kept(config, stored, field):
    path = stored(f'[deployment.a]\n{field} = "x"\nbase_url = "A"\n')
    assert config("set", "a", "--api-key", "", "-q") == (0, b"", b"")
    assert path.read_text() == '[deployment.a]\nbase_url = "A"\n'


def test_a_key_for_set_may_come_from_standard_input(start, home):
    where = home(TWO)
    child = start("config", "set", "prod", "--api-key", "-", "-q", env={"HOME": str(where)})
    child.send(OTHER_KEY.encode() + b"\n")
    child.end_input()
    assert child.finish() == (0, b"", b"")
    path = where / ".config" / "xeroctl" / "config.toml"
    assert path.read_text() == TWO.replace(KEY, OTHER_KEY)


PIPED = [
    (KEY.encode() + b"\n", True), (KEY.encode(), True), (b"  " + KEY.encode() + b" \r\nmore\n", True),
    (b"", False), (b"\n", False), (b" \n" + KEY.encode(), False), (b"-\n", False),
    (KEY.encode() + b" x\n", False), (KEY.encode() + b"\xff\n", False), (KEY.encode() + b"\0\n", False),
]


def test_a_key_may_come_from_standard_input(start, home):
    children = []
    for data, good in PIPED:
        where = home()
        child = start("config", "add", "c", "--base-url", "https://c/v1", "--api-key", "-", env={"HOME": str(where)})
        child.send(data)
        child.end_input()
        children.append((data, good, child, where / ".config" / "xeroctl" / "config.toml"))
    for data, good, child, path in children:
        result = child.finish()
        assert (result.status, result.stdout, result.stderr.count(b"\n")) == (0 if good else 2, b"", 1), data
        assert KEY.encode() not in result.stderr
        assert path.exists() is good
        if good:
            assert path.read_text().endswith(f'[deployment.c]\nbase_url = "https://c/v1"\napi_key = "{KEY}"\n')


def test_a_closed_standard_input_has_no_key(shell):
    child = shell('exec "$@" <&-', "config", *ADD, "--api-key", "-")
    assert checked(child.finish()) == (2, b"", b"xeroctl: error: no API key on standard input\n")


def test_a_key_for_add_is_asked_for_unseen_at_a_terminal(terminal, home):
    children = []
    for keys in (KEY + "\n", "\n", "\x04"):
        where = home()
        children.append((keys, where, terminal("config", *ADD, "--api-key", "-", env={"HOME": str(where)})))
    for keys, where, child in children:
        child.expect("API key, not shown: ")
        child.send(keys)
        assert child.finish() == (0 if KEY in keys else 2)
        assert KEY.encode() not in child.output
        path = where / ".config" / "xeroctl" / "config.toml"
        assert KEY in path.read_text() if KEY in keys else not path.exists()


WRONG_NAME = "a deployment's name is letters, digits, '.', '_', '-', not %s"
WRONG_URL = "not a base URL: %r: one is https://api.xerotier.ai/PROJECT/v1"
WRONG_ENDPOINT = ("--endpoint must be letters, digits, '.', '_' and '-', not %r: a server that takes any name has the base "
                  "URL https://%s/v1/chat/completions")
WRONG_KEY = "the API key has a space, a line end or another character that no key has"
REFUSED = [
    (["add", "prod", *ADD[2:]], "prod already exists: change it with: xeroctl config set prod"),
    (["add", "c"], "no base URL: give --base-url URL"),
    (["add", "a b", *ADD[2:]], WRONG_NAME % "'a b'"),
    (["add", "", *ADD[2:]], WRONG_NAME % "''"),
    (["add", "a]\nb", *ADD[2:]], WRONG_NAME % "'a]\\nb'"),
    (["add", "é", *ADD[2:]], WRONG_NAME % "'é'"),
    (["add", "c", "--base-url", "c/v1"], WRONG_URL % "c/v1"),
    (["add", "c", "--base-url", "https://me:pw@c/v1"], "a base URL holds no user or password: use --api-key"),
    ([*ADD, "--api-key", KEY + "\n"], WRONG_KEY),
    ([*ADD, "--api-key=" + KEY + "é"], WRONG_KEY),
    (["set", "prod"], "nothing to change: give --base-url, --api-key or --endpoint"),
    (["set", "gone", "--endpoint", "e"], "unknown context 'gone': {path} has: prod, staging"),
    (["set", "prod", "--base-url", "c/v1"], WRONG_URL % "c/v1"),
    (["set", "prod", "--base-url", KEY], WRONG_URL % MASKED),
    (["set", "prod", "--endpoint", "a b"], WRONG_ENDPOINT % ("a b", "api.example/acme")),
    (["set", "prod", "--endpoint", "meta/llama"], WRONG_ENDPOINT % ("meta/llama", "api.example/acme")),
    (["set", "prod", "--endpoint", "e", "--dry-run"], "--dry-run shows requests: config cannot be tried with it"),
    ([*ADD, "--endpoint", "a/b"], WRONG_ENDPOINT % ("a/b", "c")),
    (["use", KEY], f"unknown context '{MASKED}': {{path}} has: prod, staging"),
    (["add"], "NAME is missing"),
    (["use", "gone"], "unknown context 'gone': {path} has: prod, staging"),
    (["use", ""], "unknown context '': {path} has: prod, staging"),
    (["show", "gone"], "unknown context 'gone': {path} has: prod, staging"),
    (["show", "--context", "gone"], "unknown context 'gone': {path} has: prod, staging"),
    (["remove", "gone"], "unknown context 'gone': {path} has: prod, staging"),
    (["remove", "prod", "staging"], "unexpected argument 'staging': see "
                                    "xeroctl config remove --help"),
    (["init"], "config init asks at a terminal: without one use xeroctl config add"),
    (["init", "--dry-run"], "--dry-run shows requests: config cannot be tried with it"),
    ([*ADD, "--dry-run"], "--dry-run shows requests: config cannot be tried with it"),
    (["--dry-run", *ADD], "--dry-run shows requests: config cannot be tried with it"),
    (["use", "staging", "--dry-run"], "--dry-run shows requests: config cannot be tried with it"),
    (["remove", "staging", "--dry-run"], "--dry-run shows requests: config cannot be tried with it"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=lambda value: ascii(value)[:60])
def test_what_is_wrong_is_told_in_one_line_and_nothing_written(config, stored, arguments, message):
    path = stored(TWO)
    status, out, err = config(*arguments)
    assert (status, out, err.count(b"\n")) == (2, b"", 1)
    assert err.decode() == "xeroctl: error: " + message.format(path=path) + "\n"
    assert KEY.encode() not in err and b"pw" not in err
    assert path.read_text() == TWO


def test_a_value_with_a_quote_in_it_is_written_so_that_it_is_read_again(config, stored):
    tomllib = pytest.importorskip("tomllib")
    key = "k\"'\\#=[]{}~" + KEY
    path = stored(None)
    assert config("add", "c", "--base-url", 'https://c/"v1', "--api-key", key, "-q") == (0, b"", b"")
    assert tomllib.loads(path.read_text())["deployment"]["c"] == {"base_url": 'https://c/"v1', "api_key": key}


def test_errors_and_notes_are_objects_when_asked_for(config, stored):
    path = stored(TWO)
    note = {"kind": "note", "message": "staging is the current context"}
    error = {"kind": "usage", "message": f"unknown context 'gone': {path} has: prod, staging"}
    for name, status, said in (("staging", 0, note), ("gone", 2, error)):
        found, out, err = config("use", name, "-o", "json")
        assert (found, out) == (status, b"")
        assert {key: value for key, value in json.loads(err.decode()).items() if value} == said


def test_the_environment_adds_nothing(start, home):
    variables = {"XEROTIER_BASE_URL": "https://env.example/v1", "XEROTIER_API_KEY": KEY, "XEROTIER_CONTEXT": "env"}
    first, second = home(), home()
    children = [start("config", "add", "c", *more, env={"HOME": str(where), **variables})
                for where, more in ((first, ADD[2:]), (second, []))]
    path = first / ".config" / "xeroctl" / "config.toml"
    assert children[0].finish() == (0, b"", f"xeroctl: note: added c to {path}: it is the current one\n".encode())
    assert path.read_text() == drawn(ONLY_ADD["an empty file"], "a")
    assert children[1].finish() == (2, b"", b"xeroctl: error: no base URL: give --base-url URL\n")


# -- list, show, path ------------------------------------------------

SIX = f"""\
current = "prod"
[deployment.prod]
base_url = "https://api.example/acme/v1"
api_key = "{KEY}"
output = "json"
[deployment.short]
base_url = "http://localhost:8080/v1"
api_key = "123456789012345"
[deployment.sixteen]
api_key = "abcdefghijklmnop"
[deployment.chain]
base_url = "https://c.example/v1"
api_key_keychain = "xeroctl chain"
[deployment.run]
base_url = "https://r.example/v1"
api_key_command = "pass show 'a b'"
[deployment."a b"]
weight = 2
tls = true
[deployment.a.headers]
x = "y"
"""
ROWS = [
    ("prod", "*", "https://api.example/acme/v1", MASKED),
    ("short", "", "http://localhost:8080/v1", "****"),
    ("sixteen", "", "", "****mnop"),
    ("chain", "", "https://c.example/v1", "keychain xeroctl chain"),
    ("run", "", "https://r.example/v1", "command pass show 'a b'"),
    ("a b", "", "", ""),
    ("a", "", "", ""),
]


@pytest.mark.smoke
def test_a_list_in_a_pipe_is_separated_by_tabs(config, stored):
    stored(SIX)
    lines = "".join("\t".join(row) + "\n" for row in ROWS).encode()
    assert config() == config("list") == config("list", "-o", "table") == (0, lines, b"")


def test_a_list_notes_that_others_can_read_the_file(config, stored):
    path = stored("[deployment.a]\n", 0o644)
    note = f"xeroctl: note: others can read {path}: chmod 600 it\n"
    assert config() == (0, b"a\t\t\t\n", note.encode())
    assert config("-q") == (0, b"a\t\t\t\n", b"")


def test_a_list_on_a_terminal_is_a_table(terminal, env):
    write_config(env["HOME"], SIX)
    child = terminal("config", columns=120)
    assert child.finish() == 0
    assert screen(child.output, 120) == [
        "   NAME     KEY                      ENDPOINT  BASE URL",
        "*  prod     ****6789                           https://api.example/acme/v1",
        "   short    ****                               http://localhost:8080/v1",
        "   sixteen  ****mnop",
        "   chain    keychain xeroctl chain             https://c.example/v1",
        "   run      command pass show 'a b'            https://r.example/v1",
        "   a b",
        "   a",
    ]
    assert child.output.startswith(b"\x1b[1m   NAME") and child.output.count(b"\x1b[") == 2


def test_a_list_cuts_urls_in_the_middle_where_the_terminal_is_narrow(terminal, env):
    url = "https://a-long-name.example/and/a-long/path/v1"
    write_config(env["HOME"], table(base_url=url, api_key_command="pass show of/a/rather/long/name", endpoint="e"))
    child = terminal("config", columns=80, env={"NO_COLOR": "1"})
    assert child.finish() == 0
    heading, line = screen(child.output, 80)
    assert heading == "   NAME  KEY                             ENDPOINT  BASE URL"
    assert re.fullmatch(r"\*  prod  command pass \S+\.\.\.\S+/long/name  e         https://a\S+\.\.\.\S+/v1", line)
    assert len(line) == 80


@pytest.mark.parametrize("text", [None, "", "# mine\n", "[ui]\nx = 1\n"], ids=ascii)
def test_an_empty_list_says_how_to_add_one(config, stored, text):
    note = f"xeroctl: note: no deployments in {stored('')}: add one with: xeroctl config init\n"
    stored(text)
    assert config() == (0, b"", note.encode())
    assert config("-q") == (0, b"", b"")


def test_the_list_as_json_has_the_file_with_its_keys_masked(config, stored):
    stored(SIX)
    status, out, err = config("-o", "json")
    assert (status, err) == (0, b"")
    assert json.loads(out.decode()) == {"current": "prod", "deployment": {
        "prod": {"base_url": "https://api.example/acme/v1", "api_key": MASKED, "output": "json"},
        "short": {"base_url": "http://localhost:8080/v1", "api_key": "****"},
        "sixteen": {"api_key": "****mnop"},
        "chain": {"base_url": "https://c.example/v1", "api_key_keychain": "xeroctl chain"},
        "run": {"base_url": "https://r.example/v1", "api_key_command": "pass show 'a b'"},
        "a b": {"weight": 2, "tls": True}, "a": {"headers": {"x": "y"}}}}
    stored("")
    assert json.loads(config("-o", "json")[1].decode()) == {"current": None, "deployment": {}}


@pytest.mark.smoke
def test_show_tells_of_the_chosen_one_or_of_another(config, stored):
    stored(SIX)
    prod = f"name: prod\nbase_url: https://api.example/acme/v1\napi_key: {MASKED}\noutput: json\n".encode()
    assert config("show") == config("show", "prod") == config("show", "prod", "--context", "run") == (0, prod, b"")
    run = b"name: run\nbase_url: https://r.example/v1\napi_key_command: pass show 'a b'\n"
    assert config("show", "--context", "run") == config("show", "run") == (0, run, b"")
    assert config("show", "a b") == (0, b"name: a b\nweight: 2\ntls: true\n", b"")
    status, out, err = config("show", "chain", "-o", "json")
    assert (status, err) == (0, b"")
    assert json.loads(out.decode()) == {
        "name": "chain", "base_url": "https://c.example/v1", "api_key_keychain": "xeroctl chain"}


def test_show_heeds_the_context_of_the_environment(run, env):
    write_config(env["HOME"], SIX)
    assert run("config", "show", env={"XEROTIER_CONTEXT": "sixteen"}) == (0, b"name: sixteen\napi_key: ****mnop\n", b"")


def test_show_without_a_choice_names_the_known_ones(config, stored):
    path = stored("[deployment.b]\n[deployment.a]\n")
    assert config("show") == (2, b"", f"xeroctl: error: no context is chosen: {path} has: a, b\n".encode())
    path = stored('current = "gone"\n[deployment.a]\n')
    assert config("show") == (2, b"", f"xeroctl: error: unknown context 'gone': {path} has: a\n".encode())


def test_a_date_is_shown_as_it_is_written(config, stored, reads_all_toml):
    stored('[deployment.a]\nsince = 2026-01-02\nlist = [1, "x"]\n')
    if reads_all_toml:
        assert config("show", "a") == (0, b'name: a\nsince: 2026-01-02\nlist: [1, "x"]\n', b"")
    else:
        assert config("show", "a")[0] == 2


@pytest.mark.smoke
@pytest.mark.needs("utf-8-terminal")
def test_nothing_in_the_file_drives_a_terminal(terminal, env):
    values = 'base_url = "\\u001b[31mred\\u009b2J\\r"\nx = "\\u001b]0;t"\n'
    write_config(env["HOME"], 'current = "a"\n[deployment.a]\n' + values)
    children = [terminal("config", verb) for verb in ("list", "show")]
    for child in children:
        assert child.finish() == 0
        assert b"\x1b" not in child.output.replace(b"\x1b[1m", b"").replace(b"\x1b[0m", b"") and "\u241b[31mred".encode() in child.output


def test_the_path_is_shown_whatever_is_there(config, stored):
    for content in (None, TWO, "broken", b"\xff"):
        path = str(stored(content))
        assert config("path") == (0, path.encode() + b"\n", b"")
        status, out, err = config("path", "-o", "json")
        assert (status, json.loads(out.decode()), err) == (0, path, b"")


def test_the_folder_of_config_files_may_be_another(start, env, tmp_path):
    other = tmp_path / "other"
    path = other / "xeroctl" / "config.toml"
    below_home = os.path.join(env["HOME"], ".config", "xeroctl", "config.toml")
    children = [start("config", *arguments, env={"XDG_CONFIG_HOME": folder}) for folder, arguments in (
        (str(other), [*ADD, "-q"]), (str(other), ["path"]), ("other", ["path"]), ("", ["path"]))]
    shown = [child.finish() for child in children]
    assert shown == [(0, out.encode(), b"") for out in ("", f"{path}\n", f"{below_home}\n", f"{below_home}\n")]
    assert path.read_text() == drawn(ONLY_ADD["an empty file"], "a")
    assert not os.path.exists(below_home)


@pytest.mark.parametrize("changes", [{}, {"LC_ALL": "C", "LANG": None}], ids=["UTF-8", "C"])
def test_names_in_the_environment_are_utf8(start, tmp_path, changes):
    folder = tmp_path / "ключ"
    children = [start("config", "path", *form, env=dict(changes, XDG_CONFIG_HOME=str(folder)))
                for form in ([], ["-o", "json"])]
    path = str(folder / "xeroctl" / "config.toml")
    text, as_json = [child.finish() for child in children]
    assert text == (0, path.encode() + b"\n", b"")
    assert (as_json.status, json.loads(as_json.stdout.decode()), as_json.stderr) == (0, path, b"")
    write_config(tmp_path, '[deployment."é"]\nbase_url = "https://h/v1"\n')
    children = [start("config", "show", env=dict(changes, HOME=str(tmp_path), XEROTIER_CONTEXT=name))
                for name in ("é", "ü")]
    found, missing = [child.finish() for child in children]
    assert found == (0, "name: é\nbase_url: https://h/v1\n".encode(), b"")
    assert (missing.status, missing.stderr.decode().startswith("xeroctl: error: unknown context 'ü': ")) == (2, True)


def test_changes_at_the_same_time_are_all_made(start, env):
    path = write_config(env["HOME"], "")
    names = [f"d{number}" for number in range(8)]
    children = [start("config", "add", name, "--base-url", "https://h/v1") for name in names]
    assert [child.finish().status for child in children] == [0] * len(names)
    assert sorted(re.findall("deployment.(d.)]", path.read_text())) == names


def test_an_empty_current_is_none(run, env):
    path = write_config(env["HOME"], 'current = "" # not yet\n[deployment.a]\nbase_url = "https://a/v1"\n')
    for arguments in (["status"], ["config", "show"]):
        result = run(*arguments)
        assert (result.status, b"no context is chosen" in result.stderr) == (2, True)
    assert run("config", "remove", "a").status == 0
    assert path.read_text() == 'current = "" # not yet\n'
    assert run("config", "add", "b", "--base-url", "https://b/v1").status == 0
    assert path.read_text().startswith('current = "b" # not yet\n')


VERBS = [[], ["list"], ["show"], ["show", "prod"], ["use", "prod"], ["remove", "prod"], ADD]
BROKEN = [
    (f'[deployment.prod]\napi_key = "{KEY}"\napi_key = "{KEY}"\n', 3),
    (f'[deployment.prod]\napi_key = {KEY}\n', 2),
    (f'[deployment.prod]\napi_key = "{KEY}\n', 2),
    (f'[deployment.prod]\n\napi_key = "{KEY}" "{KEY}"\n', 3),
    (f'current = "{KEY}"\n[deployment.prod\n', 2),
    (f'[deployment.prod]\n{KEY}\n', 2),
    (f'[deployment.prod]\r\napi_key = "\\{KEY}"\r\n', 2),
    (f'[deployment.prod]\napi_key = "{KEY}\xe9"\n'.encode("latin-1"), 2),
]


@pytest.mark.parametrize("text, line", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_file_is_left_alone_and_its_line_named(config, stored, text, line):
    path = stored(text)
    old = path.read_bytes()
    for arguments in VERBS:
        status, out, err = config(*arguments)
        assert (status, out, err.count(b"\n")) == (2, b"", 1)
        assert err.startswith(f"xeroctl: error: {path}: ".encode()) and f"(at line {line}".encode() in err
        assert KEY.encode() not in err
    assert path.read_bytes() == old


@pytest.mark.parametrize("text", [
    'current = 1\n', 'deployment = "x"\n', f'[deployment]\nprod = "{KEY}"\n', "[deployment.prod.api_key]\nx = 1\n",
    "[deployment.prod]\napi_key = 1234567890123456\n", "[deployment.prod]\napi_key_keychain = true\n",
], ids=ascii)
def test_a_value_of_the_wrong_kind_is_named_and_left_alone(config, stored, text):
    path = stored(text)
    for arguments in VERBS:
        status, out, err = config(*arguments)
        assert (status, out, err.count(b"\n")) == (2, b"", 1)
        assert re.match(rf"xeroctl: error: {re.escape(str(path))}: [\w.]+ is not (text|a table)\n", err.decode())
        assert b"1234" not in err and KEY.encode() not in err
    assert path.read_text() == text


def test_no_key_is_ever_shown_in_full(config, stored):
    text = TWO.replace("api_key_keychain", f'api_key = "{OTHER_KEY}"\napi_key_keychain')
    new = ["add", "new", "--base-url", "https://n/v1", "--api-key", KEY + "new"]
    others = [new, new[:2], ["add", "staging", *new[2:]], ["use", "staging"], ["use", "gone"], ["path"]]
    for arguments in VERBS + others:
        for options in ([], ["-o", "json", "-v"]):
            stored(text)
            status, out, err = config(*arguments, *options)
            assert status in (0, 2)
            assert KEY.encode() not in out + err and OTHER_KEY.encode() not in out + err


# -- init ------------------------------------------------------------

NAME, URL, SECRET, ENDPOINT = "name [default]: ", "completions): ", "Enter for none: ", "with each command]: "
KEEP = "Keep it anyway? [y/N] "
CTRL_C, CTRL_D = "\x03", "\x04"


def type_in(child, *pairs):
    """Wait for each prompt and type what answers it."""
    for prompt, text in pairs:
        child.expect(prompt)
        child.send(text)
    return child


def written(child):
    """Return the end of an init: its status, and the file if it wrote one."""
    path = child.home / ".config" / "xeroctl" / "config.toml"
    status = child.finish()
    assert KEY.encode() not in child.output + child.stdout + child.stderr
    return status, path.read_text() if path.exists() else None


@pytest.fixture
def init(terminal, home):
    """Start `config init` at a terminal, in a home of its own with this config file."""
    def init(*args, content=None, env=None, **options):
        where = home(content)
        child = terminal("config", "init", *args, columns=120, env={"HOME": str(where), **(env or {})}, **options)
        child.home = where
        return child
    return init


@pytest.fixture
def nobody():
    """The base URL of a port at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


def kept(url, name="default", **fields):
    """Return the text of a file with one deployment."""
    lines = [f'current = "{name}"', "", f"[deployment.{name}]", f'base_url = "{url}"']
    return "\n".join(lines + [f'{field} = "{value}"' for field, value in fields.items()] + [""])


@pytest.mark.needs("utf-8-terminal")
@pytest.mark.smoke
def test_init_asks_until_it_has_an_answer_and_checks_the_address(init, server):
    server.script(MODELS)
    url = server.url + "/acme/v1"
    child = init(env={"XEROTIER_BASE_URL": "http://a.invalid", "XEROTIER_API_KEY": OTHER_KEY, "XEROTIER_CONTEXT": "x"})
    type_in(child, (NAME, "a b\n"), (NAME, "prod\n"), (URL, "\n"), (URL, "api.example/v1\n"), (URL, url + "/\n"),
            (SECRET, KEY + " é\n"), (SECRET, KEY + "\n"), (ENDPOINT, "a b\n"), (ENDPOINT, "\n"))
    assert written(child) == (0, kept(url, "prod", api_key=KEY))
    request, = server.requests
    assert (request.method, request.target) == ("GET", "/acme/v1/models")
    assert request.headers["authorization"] == "Bearer " + KEY
    path = child.home / ".config" / "xeroctl" / "config.toml"
    asks_url = "base URL (Xerotier .../PROJECT/v1, else .../chat/completions): "
    asks_key = "API key, not shown; Enter for none:"
    asks_endpoint = "endpoint [to be given with each command]:"
    assert " ".join(screen(child.output, 400)).split() == " ".join([
        "name [default]: a b", "xeroctl: error: " + WRONG_NAME % "'a b'", "name [default]: prod",
        asks_url, "xeroctl: error: " + WRONG_URL % "", asks_url, "api.example/v1", "xeroctl: error: " + WRONG_URL % "api.example/v1",
        asks_url, url + "/", asks_key, "xeroctl: error: " + WRONG_KEY, asks_key,
        asks_endpoint, "a b", "xeroctl: error: the endpoint must be letters, digits, '.', '_' and '-', not 'a b': a server that takes",
        f"any name has the base URL {url}/chat/completions", asks_endpoint,
        f"xeroctl: note: added prod to {path}: it is the current one",
        "xeroctl: note: next: xeroctl chat --context prod --endpoint SLUG -m Hello"]).split()


def test_init_asks_for_another_name_where_one_is_taken(init, server):
    server.script(MODELS)
    text = kept("https://api.example/v1", api_key=KEY)
    child = type_in(init(content=text), (NAME, "\n"))
    child.expect("default already exists: take another name")
    type_in(child, (NAME, "default\n"), (NAME, "two\n"), (URL, server.url + "/v1\n"), (SECRET, "\n"),
            (ENDPOINT, "\n"))
    assert written(child) == (0, text + f'\n[deployment.two]\nbase_url = "{server.url}/v1"\n')
    assert "authorization" not in server.requests[0].headers


ANSWERS = [  # of the server, and whether init asks if the address is to be kept
    (MODELS, False), (json_response({"detail": "Not Found"}, "404 Not Found"), False),
    (json_response({"error": "no"}, "405 No"), False), (json_response({"error": "no"}, "401 No"), True),
    (json_response({"error": "no"}, "403 No"), True), (json_response({"error": "boom"}, "500 Broken"), True),
    (loopback.response(b"<html></html>", headers={"Content-Type": "text/html"}), True),
]


def test_init_asks_whether_to_keep_an_address_that_does_not_answer_as_it_should(init, server):
    children = [init() for _ in ANSWERS]
    for child, (answer, doubtful) in zip(children, ANSWERS):
        type_in(child, (NAME, "\n"), (URL, server.url + "/v1\n"))
        type_in(child, (SECRET, KEY + "\n"))
        child.expect(ENDPOINT)
        server.script(answer)
        child.send("\n")
        if doubtful:
            child.expect(KEEP)
            child.send("y\n")
        assert written(child) == (0, kept(server.url + "/v1", api_key=KEY)), answer
        assert (b"Keep it" in child.output) is doubtful, answer


def test_init_tells_why_an_address_is_doubtful(init, server, nobody):
    children = [init(), init()]
    server.script(json_response({"error": {"message": f"unknown key {KEY}"}}, "401 Unauthorized"))
    lines = ["unknown key ", "cannot connect|refused"]
    for child, url, line in zip(children, (server.url + "/v1", nobody), lines):
        type_in(child, *until(KEEP, url))
        child.expect(re.compile("error.*" + line, re.IGNORECASE))
        type_in(child, (KEEP, "yes\n"))
        assert written(child) == (0, kept(url, api_key=KEY))


def test_init_writes_nothing_unless_a_doubtful_address_is_kept(init, nobody):
    replies = ["n\n", "\n", "what\n", CTRL_D]
    children = [init() for _ in replies]
    for child, reply in zip(children, replies):
        type_in(child, *until(KEEP, nobody), (KEEP, reply))
    for child in children:
        assert written(child) == (2, None)
        assert screen(child.output, 120)[-1].endswith("xeroctl: error: nothing was written")
        assert os.listdir(child.home) == []


def until(prompt, url):
    """Return the answers to all prompts before *prompt*."""
    pairs = [(NAME, "\n"), (URL, url + "\n"), (SECRET, KEY + "\n"), (ENDPOINT, "\n")]
    return pairs[:[NAME, URL, SECRET, ENDPOINT, KEEP].index(prompt)]


def test_ctrl_d_at_any_question_of_init_writes_nothing(init, nobody):
    prompts = [NAME, URL, SECRET, ENDPOINT]
    children = [init() for _ in prompts]
    for child, prompt in zip(children, prompts):
        type_in(child, *until(prompt, nobody), (prompt, CTRL_D))
    for child in children:
        assert written(child) == (2, None)
        assert screen(child.output, 120)[-1].endswith("xeroctl: error: nothing was written")


def test_ctrl_c_at_any_question_of_init_writes_nothing(init, nobody):
    prompts = [NAME, URL, SECRET, ENDPOINT, KEEP]
    children = [init() for _ in prompts]
    for child, prompt in zip(children, prompts):
        type_in(child, *until(prompt, nobody))
        child.expect(prompt)
    for child in children:
        for timeout in (1, 1, 10):  # one just before Python waits for a key is seen with the next key
            child.send(CTRL_C)
            with contextlib.suppress(AssertionError) if timeout == 1 else contextlib.ExitStack():
                status = child.finish(timeout)
                break
        assert (status, os.listdir(child.home)) == (130, [])
        assert KEY.encode() not in child.output


def test_ctrl_c_while_init_checks_the_address_writes_nothing(init, server):
    server.script([loopback.Hold()])
    child = type_in(init(), *until(KEEP, server.url))
    server.wait_requests()
    child.send(CTRL_C)
    assert (child.finish(), os.listdir(child.home)) == (130, [])


def test_an_address_with_a_place_for_the_endpoint_is_kept_unasked(init):
    child = type_in(init(), (NAME, "\n"), (URL, "https://{endpoint}.api.invalid/v1\n"), (SECRET, KEY + "\n"),
                    (ENDPOINT, "\n"))
    assert written(child) == (0, kept("https://{endpoint}.api.invalid/v1", api_key=KEY))


def test_init_keeps_its_questions_off_a_pipe(init, server):
    server.script(MODELS)
    child = init("--quiet", stdout=subprocess.PIPE)
    type_in(child, (NAME, "prod\n"), (URL, server.url + "\n"), (SECRET, KEY + "\n"), (ENDPOINT, "\n"))
    assert written(child) == (0, kept(server.url, "prod", api_key=KEY))
    assert child.stdout == b""


PLAIN = {  # base URL, what is asked for, and the base URL that is kept
    "slug": ("/acme/v1", ["/acme/e/v1/models"], "/acme/v1"),
    "plain": ("/v1", ["/e/v1/models", "/v1/models"], "/v1/chat/completions"),
    "without v1": ("", ["/e/v1/models", "/v1/models"], "/v1/chat/completions"),
    "whole": ("/v1/chat/completions", ["/v1/models"], "/v1/chat/completions"),
    "neither": ("/other/v1", ["/other/e/v1/models", "/other/v1/models"], "/other/v1"),
    "down": ("/down/v1", ["/down/e/v1/models", "/down/v1/models"], "/down/v1"),
}


@pytest.mark.parametrize("base, targets, keeps", PLAIN.values(), ids=PLAIN)
def test_init_tries_the_address_that_a_server_without_slugs_would_have(init, server, base, targets, keeps):
    missing = json_response({"detail": "Not Found"}, "404 Not Found")
    answers = {"/acme/e/v1/models": MODELS, "/v1/models": MODELS, "/down/v1/models": loopback.response(b"<html></html>")}
    for target in targets:
        server.script(answers.get(target, missing))
    child = type_in(init(), (NAME, "\n"), (URL, server.url + base + "\n"), (SECRET, KEY + "\n"), (ENDPOINT, "e\n"))
    assert written(child) == (0, kept(server.url + keeps, api_key=KEY, endpoint="e"))
    assert [request.target for request in server.requests] == targets
    assert (b"answers: that is kept" in child.output) is (keeps != base)
    assert b"next: xeroctl chat --context default -m Hello" in child.output


@pytest.mark.parametrize("base", ["/v1", "", "/v1/chat/completions"])
def test_init_takes_the_name_of_a_model_for_a_server_without_slugs(init, server, base):
    server.script(MODELS)
    child = type_in(init(), (NAME, "\n"), (URL, server.url + base + "\n"), (SECRET, "\n"), (ENDPOINT, "meta/llama3.2:1b\n"))
    assert written(child) == (0, kept(server.url + "/v1/chat/completions", endpoint="meta/llama3.2:1b"))
    assert [request.target for request in server.requests] == ["/v1/models"]
    assert (b"is not a slug: the base URL is" in child.output) is ("chat" not in base)


def test_init_takes_what_options_give(init, server):
    server.script(MODELS)
    child = type_in(init("--base-url", server.url + "/v1", "--endpoint", "e", "--api-key", KEY), (NAME, "\n"))
    assert written(child) == (0, kept(server.url + "/v1", api_key=KEY, endpoint="e"))


def test_init_takes_no_notice_of_a_context(init, server):
    server.script(MODELS)
    child = type_in(init("--context", "gone"), (NAME, "\n"), (URL, server.url + "\n"), (SECRET, "\n"), (ENDPOINT, "\n"))
    assert written(child) == (0, kept(server.url))


def test_init_sees_what_cannot_work_before_it_asks(init):
    children = [(init(content="broken"), b"broken TOML"), (init("--dry-run"), b"--dry-run shows requests: config")]
    for child, line in children:
        assert child.finish() == 2
        assert line in child.output and NAME.encode() not in child.output


# -- Keys kept elsewhere ---------------------------------------------


class Programs:
    """A folder of programs, each of which logs how it was run."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def add(self, name, body):
        """Add a program *name* that logs its arguments and a line of its stdin, if any, then does *body*."""
        path = self.folder / name
        path.write_text(
            f'#!/bin/sh\nrun="<{name}>"\nfor word; do run="$run<$word>"; done\n'
            'if read -r line || [ -n "$line" ]; then run="$run and on stdin $line"; fi\n'
            f"printf '%s\\n' \"$run\" >>'{self.folder}/.log'\n{body}\n")
        path.chmod(0o755)
        return self

    def runs(self):
        """Return the lines of the log, and begin a new one."""
        log = self.folder / ".log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return lines


@pytest.fixture
def programs(driver):
    """The only programs that the tool in the driver finds: none at first."""
    shutil.rmtree(driver.env["PATH"], ignore_errors=True)
    return Programs(Path(driver.env["PATH"]))


@pytest.fixture
def ask(driver, stored):
    """Ask something in the driver, with a config file of *text*."""
    def ask(text, *options):
        stored(text)
        return driver.run("chat", "--endpoint", "e", "-m", "hi", *options)
    return ask


HELLO = (0, b"Hello!\n", b"")
PRINTS_KEY = f"echo {KEY}"
PRINTS_MORE = f"printf ' {KEY} \\r\\nlogin: me\\n'; echo a warning >&2"
SECURITY, SECRET_TOOL = "<security><find-generic-password><-s><%s><-w>", "<secret-tool><lookup><service><%s>"


@pytest.mark.parametrize("names, service, line", [
    (["security"], "x", SECURITY), (["secret-tool"], "x", SECRET_TOOL), (["security", "secret-tool"], "x", SECURITY),
    (["secret-tool"], "my $(key); 'a' \"b\" *", SECRET_TOOL), (["security"], "-x", SECURITY),
], ids=["security", "secret-tool", "both", "signs", "dash"])
def test_a_key_in_a_keychain_is_fetched_and_sent(ask, server, programs, names, service, line):
    server.always(json_response(completion()))
    text = table(base_url=server.url + "/v1", api_key_keychain=service)
    for body in (PRINTS_KEY, PRINTS_MORE):
        for name in names:
            programs.add(name, body)
        assert ask(text) == HELLO
        assert programs.runs() == [line % service]
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer " + KEY] * 2


@pytest.mark.parametrize("text, line", [
    ("pass show xeroctl/prod", "<pass><show><xeroctl/prod>"),
    ("pass show 'a b'  \"c\\\"d\" e\\ f", "<pass><show><a b><c\"d><e f>"),
    ("pass $HOME `id` *; rm | x > y & # z", "<pass><$HOME><`id`><*;><rm><|><x><>><y><&><#><z>"),
    ("  pass\t-o ''", "<pass><-o><>"),
], ids=["plain", "quoted", "signs", "blanks"])
def test_a_key_is_fetched_by_a_command_that_no_shell_sees(ask, server, programs, text, line):
    server.script(json_response(completion()))
    programs.add("pass", PRINTS_KEY)
    assert ask(table(base_url=server.url + "/v1", api_key_command=text)) == HELLO
    assert programs.runs() == [line]
    assert server.requests[0].headers["authorization"] == "Bearer " + KEY


def test_a_key_in_the_file_comes_before_a_keychain_and_that_before_a_command(ask, server, programs):
    server.always(json_response(completion()))
    programs.add("security", PRINTS_KEY).add("pass", "echo " + OTHER_KEY)
    elsewhere = {"api_key_keychain": "x", "api_key_command": "pass"}
    assert (ask(table(base_url=server.url, api_key=KEY, **elsewhere)), programs.runs()) == (HELLO, [])
    assert (ask(table(base_url=server.url, **elsewhere)), programs.runs()) == (HELLO, [SECURITY % "x"])
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer " + KEY] * 2


KEYCHAIN_AND_COMMAND = pytest.mark.parametrize(
    "place", [{"api_key_keychain": "x"}, {"api_key_command": "pass x"}], ids=["keychain", "command"])
ELSEWHERE = b"xeroctl: note: the key of context prod is for another server and is not sent\n"


@KEYCHAIN_AND_COMMAND
def test_no_program_is_run_for_a_key_that_is_not_needed(ask, start, home, server, programs, driver, place):
    programs.add("security", PRINTS_KEY).add("secret-tool", PRINTS_KEY).add("pass", PRINTS_KEY)
    text = table(base_url=server.url + "/v1", **place)
    with loopback.Server() as other:
        for at in (server, other):
            at.always(json_response(completion()))
        children = [start("chat", "--endpoint", "e", "-m", "hi", env={
            "PATH": driver.env["PATH"], "HOME": str(home(text)), **variables}) for variables in (
            {"XEROTIER_API_KEY": OTHER_KEY}, {"XEROTIER_BASE_URL": other.url})]
        assert ask(text, "--api-key", OTHER_KEY) == HELLO
        assert ask(text, "--base-url", other.url) == (*HELLO[:2], ELSEWHERE)
        assert ask(text, "--base-url", other.url, "--api-key", OTHER_KEY) == HELLO
        assert ask(text, "--demo", "-q")[::2] == (0, b"")
        assert [child.finish() for child in children] == [HELLO, (*HELLO[:2], ELSEWHERE)]
        sent = [[request.headers.get("authorization") for request in at.requests] for at in (server, other)]
    assert sent[0] == ["Bearer " + OTHER_KEY] * 2
    assert sorted(sent[1], key=str) == ["Bearer " + OTHER_KEY, None, None]
    assert programs.runs() == []


def test_no_program_is_run_to_show_or_change_the_file(config, stored, programs):
    programs.add("security", PRINTS_KEY).add("pass", PRINTS_KEY)
    text = table(base_url="https://api.example", api_key_keychain="x") + '[deployment.b]\napi_key_command = "pass"\n'
    for arguments in (["list"], ["list", "-o", "json"], ["show"], ["show", "b"], ["use", "b"], ["remove", "b"], ADD):
        stored(text)
        assert config(*arguments)[0] == 0
    assert programs.runs() == []


@KEYCHAIN_AND_COMMAND
def test_the_program_does_not_eat_the_message(start, home, server, programs, driver, place):
    server.always(json_response(completion()))
    body = f"while read -r line; do :; done; {PRINTS_KEY}"
    programs.add("security", body).add("pass", body)
    env = {"PATH": driver.env["PATH"], "HOME": str(home(table(base_url=server.url, **place)))}
    children = [start("chat", "--endpoint", "e", *message, env=env) for message in ([], ["-m", "-"])]
    for child in children:
        child.send(b"one\ntwo\n")
        child.end_input()
    assert [child.finish() for child in children] == [HELLO] * 2
    assert [request.json["messages"][0]["content"] for request in server.requests] == ["one\ntwo"] * 2
    assert programs.runs() == [SECURITY % "x" if "api_key_keychain" in place else "<pass><x>"] * 2


def test_a_fetched_key_is_never_shown(ask, driver, server, programs):
    server.always(json_response({"error": {"message": f"bad key {KEY}"}}, "401 Unauthorized"))
    programs.add("pass", PRINTS_KEY)
    text = table(base_url=server.url, api_key_command="pass")
    results = [ask(text, *options) for options in (["-v"], ["-o", "json"], ["--dry-run"])]
    results.append(driver.run("models", "--endpoint", "e"))
    assert [status for status, _, _ in results] == [3, 3, 0, 3]
    assert all(KEY.encode() not in out + err for _, out, err in results)
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer " + KEY] * 3


@pytest.mark.parametrize("place", ["api_key_keychain", "api_key_command"])
def test_no_program_is_run_for_a_key_that_goes_nowhere(ask, driver, programs, place):
    for name in ("pass", "secret-tool", "security"):
        programs.add(name, PRINTS_KEY)
    status, out, err = ask(table(base_url="https://api.invalid/v1", **{place: "pass"}), "--dry-run")
    assert (status, b"Bearer $XEROTIER_API_KEY" in out, err) == (0, True, b"")
    status, out, err = driver.run("chat", "-m", "hi")
    assert (status, out, err.startswith(b"xeroctl: error: no endpoint: ")) == (2, b"", True)
    assert programs.runs() == []


KEYCHAIN, COMMAND = {"api_key_keychain": "x"}, {"api_key_command": "pass x"}
FAILURES = [
    (KEYCHAIN, f"echo {KEY}; echo one >&2; echo not found >&2; echo >&2; exit 44",
     "security gave no API key (status 44): not found"),
    (KEYCHAIN, "exit 1", "security gave no API key (status 1)"),
    (KEYCHAIN, "", "security gave no API key (status 0)"),
    (KEYCHAIN, f"echo; echo {KEY}", "security gave no API key (status 0)"),
    (KEYCHAIN, "printf 'a\\033[31mb\\377\\n' >&2; exit 2", "security gave no API key (status 2): a\u241b[31mb\ufffd"),
    (COMMAND, "echo '  '", "pass x gave no API key (status 0)"),
    (COMMAND, "exit 2", "pass x gave no API key (status 2)"),
    (COMMAND, f"echo {KEY} {KEY}", WRONG_KEY),
    (COMMAND, f"printf '{KEY}\\377\\n'", WRONG_KEY),
    ({"api_key_command": "gone x"}, "", "cannot run gone x for the API key: No such file or directory"),
    ({"api_key_command": "/ x"}, "", "cannot run / x for the API key: Permission denied"),
    ({"api_key_command": "pass 'x"}, "", "cannot run pass 'x for the API key: No closing quotation"),
    ({"api_key_command": "pass x\\"}, "", "cannot run pass x\\ for the API key: No escaped character"),
    ({**KEYCHAIN, **COMMAND}, "exit 1", "security gave no API key (status 1)"),
]


@pytest.mark.parametrize("place, body, line", FAILURES, ids=range(len(FAILURES)))
def test_a_key_that_cannot_be_fetched_is_one_line(ask, programs, place, body, line):
    programs.add("security", body).add("pass", body)
    status, out, err = ask(table(base_url="https://api.invalid/v1", **place))
    assert (status, out) == (2, b"")
    assert err.decode().replace(": 'gone'", "") == f"xeroctl: error: {line}\n"  # Python 3.6 and 3.7 name the file once more


def test_what_a_command_says_is_shown_while_it_runs(start, home, programs, driver, tmp_path):
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    programs.add("pass", f"echo touch your key >&2; read -r line <'{fifo}'; echo and why >&2; exit 3")
    where = home(table(base_url="https://api.invalid/v1", api_key_command="pass x"))
    child = start("chat", "--endpoint", "e", "-m", "hi", "-q", stderr=subprocess.STDOUT,
                  env={"PATH": driver.env["PATH"], "HOME": str(where)})
    child.expect("touch your key\n")
    Path(fifo).write_text("touched\n")
    assert child.finish() == (
        2, b"touch your key\nand why\nxeroctl: error: pass x gave no API key (status 3)\n", b"")
    assert programs.runs() == ["<pass><x>"]


@pytest.mark.parametrize("text", [" ", "\t", "''"], ids=repr)
def test_a_command_of_blanks_is_not_called_a_keychain(ask, programs, text):
    status, out, err = ask(table(base_url="https://api.invalid/v1", api_key_command=text))
    assert (status, out, err.count(b"\n")) == (2, b"", 1)
    assert b"keychain" not in err and b"None" not in err


def test_a_keychain_that_nothing_here_can_read_is_named(ask, programs):
    text = table(base_url="https://api.invalid/v1", api_key_keychain="my key")
    message = ("the API key is 'my key' in a keychain, and neither security nor secret-tool is here to read it: "
               "set XEROTIER_API_KEY")
    assert ask(text) == (2, b"", f"xeroctl: error: {message}\n".encode())
    status, out, err = ask(text, "-o", "json")
    assert (status, out, json.loads(err.decode())["message"]) == (2, b"", message)
    status, out, err = ask(text, "--dry-run", "--api-key", KEY)
    assert (status, err) == (0, b"") and b"Authorization" in out


def test_a_signal_ends_the_wait_for_a_program_and_the_program(start, home, programs, driver, tmp_path):
    where = home(table(base_url="https://api.invalid/v1", api_key_command="pass"))
    for number in (signal.SIGINT, signal.SIGTERM):
        fifo = str(tmp_path / str(int(number)))
        os.mkfifo(fifo)
        more_than_a_pipe_holds = 'printf "%0200000d" 0'
        programs.add("pass", f"exec 4>'{fifo}'; {more_than_a_pipe_holds}; echo waiting >&4; exec /bin/sleep 60")
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        child = start("chat", "--endpoint", "e", "-m", "hi", env={"PATH": driver.env["PATH"], "HOME": str(where)})
        assert select.select([reader], [], [], 10)[0] and os.read(reader, 20) == b"waiting\n"
        child.signal(number)
        assert child.finish(5) == (128 + number, b"", b"")
        assert select.select([reader], [], [], 10)[0] and os.read(reader, 20) == b""
        os.close(reader)


def test_what_may_be_a_secret_is_masked_whatever_its_name(config, stored):
    stored('current = "a"\n[deployment.a]\nbase_url = "https://ann:hunter22@h/v1"\n'
           'api-key = "xero_acme_secret_0123"\nToken = "abc"\nnote = "shown"\n'
           '[deployment.a.other]\ntoken = "abc"\nhint = "seen"\n[deployment.a.keys]\nold = "abc"\n'
           '[deployment.a.headers]\nAuthorization = "Bearer abc"\n')
    for verb in ("list", "show"):
        for form in ("text", "json"):
            status, out, _ = config(verb, "-o", form)
            assert (status, b"hunter22" in out, b"secret_0123" in out, b"abc" in out) == (0, False, False, False)
    assert b"note: shown\n" in config("show")[1] and b'"hint": "seen"' in config("show")[1]
