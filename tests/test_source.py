"""The source file keeps its own rules: bottom-up, pure rooms, plain code, light imports, Python 3.6."""

import ast
import importlib
import io
import os
import re
import symtable
import tokenize

import pytest

from conftest import TOP, XEROCTL

SOURCE = XEROCTL.read_text(encoding="utf-8")
LINES = SOURCE.split("\n")
TREE = ast.parse(SOURCE)
NODES = list(ast.walk(TREE))
PURE_ROOMS = ["Config", "Wire", "Protocol", "Messages", "Text"]
IMPURE_NAMES = {"os", "sys", "open", "print", "input", "time", "socket", "signal", "subprocess", "threading", "select",
                "tempfile", "random"}
MAX_FUNCTION_LINES = 50
MAX_LINE_COLUMNS = 100
MAX_NODES_A_LINE = 5.8
MAX_CONDITIONALS_A_HUNDRED_LINES = 2
NAMEDTUPLE_NAMES = {"_asdict", "_fields", "_make", "_replace"}  # documented
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
TOKENS = list(tokenize.generate_tokens(io.StringIO(SOURCE).readline))


def banners():
    """Return the (line number, room) pairs of the file, the lines counted from 1."""
    found = [(number, re.match(r"# -- (.+?) -+$", line)) for number, line in enumerate(LINES, 1)]
    return [(number, match.group(1)) for number, match in found if match]


def rooms():
    """Return the names of the rooms in their order; `Commands: config` is a part of Commands."""
    names = [name.partition(":")[0] for _, name in banners()]
    return [name for number, name in enumerate(names) if number == 0 or names[number - 1] != name]


def statements_of(room):
    """Return the top-level statements of *room*."""
    starts = banners() + [(len(LINES) + 1, None)]
    return [node for (start, name), (end, _) in zip(starts, starts[1:]) if name == room
            for node in TREE.body if start < node.lineno < end]


def bound_names(node):
    """Return the names that the top-level statement *node* binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    return {name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}


def global_names(table):
    """Return the names of the module that the symbol table *table* of a function or class uses."""
    names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return names.union(*(global_names(child) for child in table.get_children()))


def nodes_of(kind, inside=None):
    """Return the nodes of a *kind* in the file, or *inside* a node of it."""
    return [node for node in (NODES if inside is None else ast.walk(inside)) if isinstance(node, kind)]


def docstrings():
    """Return the statements that are docstrings."""
    documented = nodes_of((ast.Module, ast.FunctionDef, ast.ClassDef))
    return [node.body[0] for node in documented if ast.get_docstring(node) is not None]


def code_lines():
    """Return the numbers of the lines with code on them: no blank line, comment or docstring."""
    lines = set()
    for token in TOKENS:
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in docstrings():
        lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def dotted(node):
    """Return the name that the expression *node* is, such as http.client.HTTPConnection, or None."""
    if isinstance(node, ast.Name):
        return node.id
    above = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return above and f"{above}.{node.attr}"


def standard_class(name):
    """Return the class of the standard library that *name* is in the file, or None."""
    for node in nodes_of(ast.ImportFrom):
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return getattr(importlib.import_module(node.module), alias.name)
    module, _, attribute = name.rpartition(".")
    imported = {alias.name for node in nodes_of(ast.Import) for alias in node.names}
    return getattr(importlib.import_module(module), attribute) if module in imported else None


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


def test_no_table_names_a_method_of_a_class_below_it():
    methods = {method.name: node.lineno for node in nodes_of(ast.ClassDef) for method in node.body
               if isinstance(method, ast.FunctionDef) and method.name.startswith("do_")}
    texts = [node for node in nodes_of(ast.Constant) if isinstance(node.value, str)]
    assert [node.value for node in texts if node.lineno < methods.get(node.value, 0)] == []
    assert methods


def test_no_name_is_defined_twice():
    names = [node.name for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_every_name_is_defined(xeroctl):
    import builtins

    known = set(vars(xeroctl)) | set(dir(builtins))
    tables = symtable.symtable(SOURCE, "xeroctl.py", "exec").get_children()
    assert {(table.get_name(), name) for table in tables for name in global_names(table) - known} == set()


def test_the_map_in_the_docstring_lists_the_rooms_in_order():
    assert re.findall(r"^    ([A-Z][A-Za-z ]*?)  +\S", ast.get_docstring(TREE), re.MULTILINE) == rooms()


def test_the_map_marks_the_pure_rooms():
    marked = re.findall(r"^    ([A-Z][A-Za-z ]*?)  +.*\(pure\)$", ast.get_docstring(TREE), re.MULTILINE)
    assert marked == [room for room in rooms() if room in PURE_ROOMS]


def test_a_banner_is_as_wide_as_the_others():
    assert {len(LINES[number - 1]) for number, _ in banners()} == {95}


@pytest.mark.parametrize("room", PURE_ROOMS)
def test_a_pure_room_names_nothing_of_the_world(room):
    nodes = [node for statement in statements_of(room) for node in ast.walk(statement)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    modules = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert names
    assert (names | modules) & IMPURE_NAMES == set()


def test_every_public_name_says_what_it_promises():
    named = [node for node in TREE.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert [node.name for node in named if node.name[0] != "_" and not ast.get_docstring(node)] == []


# -- Style -----------------------------------------------------------


def test_no_function_is_long():
    assert [node.name for node in nodes_of(ast.FunctionDef) if node.end_lineno - node.lineno >= MAX_FUNCTION_LINES] == []


def test_one_blank_line_parts_two_definitions_and_no_line_is_wide():
    assert "\n\n\n" not in SOURCE
    assert [number for number, line in enumerate(LINES, 1) if len(line) > MAX_LINE_COLUMNS] == []


def test_a_line_of_code_holds_one_thought():
    contexts = (ast.Load, ast.Store, ast.Del)
    nodes = sum(not isinstance(node, contexts) for node in NODES)
    assert nodes / len(code_lines()) <= MAX_NODES_A_LINE


def test_conditional_expressions_are_rare_and_never_nested():
    conditionals = nodes_of(ast.IfExp)
    assert [node.lineno for node in conditionals if len(nodes_of(ast.IfExp, inside=node)) > 1] == []
    assert 100 * len(conditionals) / len(code_lines()) <= MAX_CONDITIONALS_A_HUNDRED_LINES


def test_no_lambda_has_a_name_and_no_operator_is_a_statement():
    assert [node.lineno for node in nodes_of(ast.Assign) if isinstance(node.value, ast.Lambda)] == []
    assert [node.lineno for node in nodes_of(ast.Expr) if isinstance(node.value, (ast.BoolOp, ast.IfExp))] == []


def is_code(text):
    """Return whether *text* is a statement of Python, or a call, and no word of English."""
    try:
        statements = ast.parse(text).body
    except SyntaxError:
        return False
    return any(not isinstance(node, ast.Expr) or isinstance(node.value, ast.Call) for node in statements)


def test_comments_leave_nothing_to_do_and_hold_no_code():
    comments = [token for token in TOKENS if token.type == tokenize.COMMENT]
    assert [token.start[0] for token in comments if is_code(token.string.lstrip("#! "))] == []
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", SOURCE)


# -- Words that it does without --------------------------------------


def test_a_handler_of_everything_passes_it_on():
    handlers = nodes_of(ast.ExceptHandler)
    greedy = [node for node in handlers if node.type is None or re.search("'(Base)?Exception'", ast.dump(node.type))]
    assert [node.lineno for node in greedy if ast.dump(node.body[-1]) != ast.dump(ast.Raise())] == []
    assert handlers


def test_nothing_is_asserted():
    assert [node.lineno for node in nodes_of(ast.Assert)] == []


@pytest.mark.parametrize("attribute", ["version_info", "splitlines", "hexversion", "removeprefix", "setitimer"])
def test_an_attribute_is_never_used(attribute):
    assert [node.lineno for node in nodes_of(ast.Attribute) if node.attr == attribute] == []


def test_it_never_sleeps_and_never_joins_a_thread_without_a_limit():
    calls = [node for node in nodes_of(ast.Call) if isinstance(node.func, ast.Attribute)]
    assert [node.lineno for node in calls if node.func.attr == "sleep"] == []
    assert [node.lineno for node in calls if node.func.attr == "join" and not node.args + node.keywords] == []


def test_a_class_is_made_once():
    cached = {"functools.lru_cache"}
    within = [(function, node.name) for function in nodes_of(ast.FunctionDef)
              for node in nodes_of(ast.ClassDef, inside=function)]
    demo = statements_of("Demo endpoint")  # one server a process
    assert [name for function, name in within if function not in demo
            and not cached & {dotted(getattr(mark, "func", mark)) for mark in function.decorator_list}] == []
    assert [node.lineno for node in nodes_of(ast.Call) if dotted(node.func) == "type" and len(node.args) > 1] == []


def test_it_uses_no_private_name_of_the_standard_library():
    ours = {node.name for node in nodes_of((ast.FunctionDef, ast.ClassDef))} | NAMEDTUPLE_NAMES
    ours |= {node.attr for node in nodes_of(ast.Attribute) if isinstance(node.ctx, ast.Store)}
    ours |= {name.id for node in nodes_of(ast.ClassDef) for name in nodes_of(ast.Name, inside=node)}
    parsers = [node for node in nodes_of(ast.ClassDef) if any("argparse" in ast.dump(base) for base in node.bases)]
    of_parsers = {id(node) for parser in parsers for node in nodes_of(ast.Attribute, inside=parser)}
    foreign = [(node.lineno, node.attr) for node in nodes_of(ast.Attribute) if re.match("_(?!_)", node.attr)
               and node.attr not in ours and id(node) not in of_parsers]
    assert foreign == []
    overridden = []
    for node in nodes_of(ast.ClassDef):
        bases = [standard_class(dotted(base) or "") for base in node.bases if node not in parsers]
        methods = [method.name for method in node.body if isinstance(method, ast.FunctionDef)]
        overridden += [(node.name, name) for name in methods for base in bases
                       if base and re.match("_(?!_)", name) and hasattr(base, name)]
    assert overridden == []


def test_the_process_ends_in_the_last_line_alone():
    exits = [node.lineno for node in nodes_of(ast.Call) if dotted(node.func) in ("sys.exit", "exit", "os._exit", "quit")]
    assert exits == [len(SOURCE.rstrip("\n").split("\n"))]


# -- Python ----------------------------------------------------------


@pytest.mark.smoke
def test_the_syntax_is_that_of_python_3_6():
    ast.parse(SOURCE, feature_version=(3, 6))


@pytest.mark.smoke
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


@pytest.mark.smoke
@pytest.mark.parametrize("options", [["--help"], ["--version"], ["chat", "--help"], []], ids=" ".join)
def test_help_and_version_load_nothing_heavy(run, options):
    result = run(*options, interpreter_options=("-S", "-c", REPORTING))
    assert result.stderr.decode().split("\n")[-1] == ("0 []" if options else "2 []")


def test_what_is_imported_at_the_top_is_in_every_python():
    allowed = {"argparse", "contextlib", "functools", "itertools", "json", "os", "re", "signal", "sys", "time", "collections"}
    imported = {alias.name for node in TREE.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in TREE.body if isinstance(node, ast.ImportFrom)}
    assert imported and imported <= allowed


def test_the_version_stands_in_one_place(xeroctl, run):
    assert re.fullmatch(r"\d+\.\d+\.\d+", xeroctl.__version__)
    assert run("--version") == (0, f"xeroctl {xeroctl.__version__}\n".encode(), b"")
    text = (TOP / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^dynamic = \[[^\]]*"version"', text, re.MULTILINE)
    assert 'attr = "xeroctl.__version__"' in text
    assert not re.search(r'^version = "', text, re.MULTILINE)
