"""The source file keeps its own rules: bottom-up, pure rooms, light imports, Python 3.6."""

import ast
import os
import re
import symtable
import tokenize

import pytest

from conftest import TOP, XEROCTL

SOURCE = XEROCTL.read_text(encoding="utf-8")
LINES = SOURCE.split("\n")
TREE = ast.parse(SOURCE)
PURE_ROOMS = ["Settings", "Config edits", "Requests", "Event stream", "Replies", "Conversation", "Text"]
IMPURE_NAMES = {"os", "sys", "open", "print", "input", "time", "socket", "signal", "subprocess", "threading"}
MAX_FUNCTION_LINES = 40


def banners():
    """Return the (line number, room) pairs of the file, the lines counted from 1."""
    found = [(number, re.match(r"# -- (.+?) -+$", line)) for number, line in enumerate(LINES, 1)]
    return [(number, match.group(1)) for number, match in found if match]


def room_statements(room):
    """Return the top-level statements of *room*."""
    starts = banners() + [(len(LINES) + 1, None)]
    for (start, name), (end, _) in zip(starts, starts[1:]):
        if name == room:
            return [node for node in TREE.body if start < node.lineno < end]
    return []


def bound_names(node):
    """Return the names that the top-level statement *node* binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def global_names(table):
    """Return the names of the module that the symbol table *table* of a function or class uses."""
    names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return names.union(*(global_names(child) for child in table.get_children()))


def functions():
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


# -- Layout ----------------------------------------------------------


def test_nothing_names_what_stands_below_it():
    defined = {name: node.lineno for node in reversed(TREE.body) for name in bound_names(node)}
    below = [
        f"{table.get_name()} (line {table.get_lineno()}) names {name} (line {defined[name]})"
        for table in symtable.symtable(SOURCE, "xeroctl.py", "exec").get_children()
        for name in sorted(global_names(table) & set(defined))
        if defined[name] > table.get_lineno() and name != table.get_name()
    ]
    assert below == []
    assert len(defined) > 100


def test_the_map_in_the_docstring_lists_the_rooms_in_order():
    rooms = re.findall(r"^    ([A-Z][A-Za-z ]*?)  +\S", ast.get_docstring(TREE), re.MULTILINE)
    assert rooms == [room for _, room in banners()]


def test_the_map_marks_the_pure_rooms():
    marked = re.findall(r"^    ([A-Z][A-Za-z ]*?)  +.*\(pure\)$", ast.get_docstring(TREE), re.MULTILINE)
    assert marked == [room for _, room in banners() if room in PURE_ROOMS]


@pytest.mark.parametrize("room", PURE_ROOMS)
def test_a_pure_room_names_nothing_of_the_world(room):
    statements = room_statements(room)
    if room == "Conversation" and not statements:
        pytest.skip("this room is not built yet")
    nodes = [node for statement in statements for node in ast.walk(statement)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    modules = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names
    assert (names | modules) & IMPURE_NAMES == set()


def test_every_public_name_says_what_it_promises():
    named = [node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [node.name for node in named if node.name[0] != "_" and not ast.get_docstring(node)] == []


def test_no_function_is_long_but_a_parser_that_lists():
    long = [node.name for node in functions() if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES]
    assert [name for name in long if not name.startswith("add_") and name != "build_parser"] == []


# -- Words that it does without --------------------------------------


def test_a_handler_of_everything_passes_it_on():
    handlers = [node for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler)]
    greedy = [node for node in handlers if node.type is None or re.search("'(Base)?Exception'", ast.dump(node.type))]
    assert [node.lineno for node in greedy if ast.dump(node.body[-1]) != ast.dump(ast.Raise())] == []
    assert handlers


def test_nothing_is_asserted():
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("attribute", ["version_info", "splitlines", "hexversion", "removeprefix"])
def test_an_attribute_is_never_used(attribute):
    assert [node.lineno for node in ast.walk(TREE) if getattr(node, "attr", None) == attribute] == []


def test_nothing_is_left_to_do():
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", SOURCE)


def test_the_process_ends_in_the_last_line_alone():
    exits = [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Call)
             and ast.dump(node.func).count("'exit'") + ast.dump(node.func).count("'_exit'")]
    assert exits == [len(SOURCE.rstrip("\n").split("\n"))]


# -- Python ----------------------------------------------------------


def test_the_syntax_is_that_of_python_3_6():
    ast.parse(SOURCE, feature_version=(3, 6))


def test_the_interpreter_compiles_it_without_a_warning(run):
    compiling = "import sys\nwith open(sys.argv[1], 'rb') as file: compile(file.read(), sys.argv[1], 'exec')"
    assert run(interpreter_options=("-W", "error", "-c", compiling)) == (0, b"", b"")


def test_the_file_is_a_program():
    assert os.access(str(XEROCTL), os.X_OK)
    assert LINES[0] == "#!/usr/bin/env python3"
    with open(str(XEROCTL), "rb") as file:
        assert tokenize.detect_encoding(file.readline)[0] == "utf-8"
    assert "\t" not in SOURCE and "\r" not in SOURCE


HEAVY = ["socket", "ssl", "http.client", "http.server", "urllib.request", "urllib.parse", "threading", "email",
         "readline", "socketserver", "typing", "inspect", "logging", "tempfile", "subprocess", "asyncio", "tomllib"]
REPORTING = f"""
import sys
import argparse, shutil  # which argparse asks for the width, and which has threading in its train on 3.8 and 3.9
if "--help" in sys.argv:
    argparse.ArgumentParser().format_help()  # has inspect in its train on 3.14
before = set(sys.modules)
sys.argv.pop(0)  # -c; the tool's path follows
try:
    with open(sys.argv[0], "rb") as file:
        code = compile(file.read(), sys.argv[0], "exec")
    exec(code, {{"__name__": "__main__"}})
except SystemExit as end:
    sys.stderr.write("%s %s" % (end.code, sorted(set(sys.modules).intersection({HEAVY}) - before)))
"""


@pytest.mark.parametrize("options", [["--help"], ["--version"], ["chat", "--help"], []], ids=" ".join)
def test_help_and_version_load_nothing_heavy(run, options):
    result = run(*options, interpreter_options=("-S", "-c", REPORTING))
    assert result.stderr.decode().split("\n")[-1] == ("0 []" if options else "2 []")


def test_what_is_imported_at_the_top_is_in_every_python():
    allowed = {"argparse", "codecs", "contextlib", "errno", "functools", "itertools", "json", "os", "re", "signal", "sys", "time",
               "collections", "locale", "math", "shutil", "stat"}
    imported = {alias.name for node in TREE.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in TREE.body if isinstance(node, ast.ImportFrom)}
    assert imported and imported <= allowed


def test_the_version_stands_in_one_place(xeroctl, run):
    assert re.fullmatch(r"\d+\.\d+\.\d+", xeroctl.__version__)
    assert run("--version") == (0, f"xeroctl {xeroctl.__version__}\n".encode(), b"")
    project = TOP / "pyproject.toml"
    if not project.exists():
        pytest.skip("pyproject.toml is not there yet")
    text = project.read_text(encoding="utf-8")
    assert re.search(r'^dynamic = \[[^\]]*"version"', text, re.MULTILINE)
    assert 'attr = "xeroctl.__version__"' in text
    assert not re.search(r'^version = "', text, re.MULTILINE)
