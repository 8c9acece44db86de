"""Data is never code: what could run, import or format it does not occur in the application.

Ruff's rules of the family S find most of that too, but can be silenced in a line; this cannot.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

APP = Path(__file__).resolve().parents[1] / "app"
FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "jsonpickle", "joblib"),
    *("yaml", "jinja2", "mako", "code", "codeop", "runpy", "imp", "pty", "ctypes"),
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "execfile", "import_string"),
    *("load_component", "dump_component", "from_config", "unsafe_load", "full_load"),
    *("format_map", "vformat"),
    *("system", "popen", "create_subprocess_shell", "getoutput", "getstatusoutput"),
}
FORBIDDEN_NAMES = FORBIDDEN_CALLS | {"ComponentLoader", "Template", "Formatter", "locate"}
MAY_IMPORT_BY_NAME = {
    "app/__init__.py",  # names from a table in it
    "app/agents/profile_file.py",  # the tools that the operator names, who may do what the server may
}


@cache
def trees() -> list[tuple[str, ast.Module]]:
    files = sorted(APP.rglob("*.py"))
    return [(path.relative_to(APP.parent).as_posix(), ast.parse(path.read_text())) for path in files]


def calls() -> Iterator[tuple[str, ast.Call]]:
    for name, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield name, node


def called(call: ast.Call) -> str:
    """Return the last part of what is called, with its module where that is ``re``."""
    if isinstance(call.func, ast.Attribute):
        of_re = isinstance(call.func.value, ast.Name) and call.func.value.id == "re"
        return f"re.{call.func.attr}" if of_re else call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def is_constant(node: ast.expr) -> bool:
    """Whether it is a text of ours: a literal, or a constant of a module, or part of one."""
    if isinstance(node, ast.Subscript):
        return is_constant(node.value)
    if isinstance(node, ast.Name):
        return node.id.isupper()
    return isinstance(node, ast.Constant | ast.JoinedStr)


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield every module that is imported, and every name from one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_nothing_that_makes_objects_of_bytes_is_imported() -> None:
    """No pickle or the like, no YAML that makes objects, no templates, no loader of components."""
    found = [
        (name, module, what)
        for name, tree in trees()
        for module, what in imported(tree)
        if module.split(".")[0] in FORBIDDEN_MODULES
        or (what in FORBIDDEN_NAMES and not module.startswith("app."))
    ]
    assert found == []


def test_nothing_is_run_that_was_text() -> None:
    """No evaluation, no components from their configuration, no shell."""
    found = [(name, call.lineno, called(call)) for name, call in calls() if called(call) in FORBIDDEN_CALLS]
    assert found == []


def test_modules_are_imported_by_name_for_the_operator_only() -> None:
    """And by nobody else: no stored or sent text leads to code."""
    found = {name for name, call in calls() if called(call) == "import_module"}
    assert found == MAY_IMPORT_BY_NAME


def test_only_our_own_texts_are_formatted() -> None:
    """``str.format`` reads attributes; its text is always a constant, and never what somebody sent."""
    formats = [(name, call) for name, call in calls() if called(call) == "format"]
    assert len(formats) > 5
    assert [
        (name, call.lineno)
        for name, call in formats
        if not (isinstance(call.func, ast.Attribute) and is_constant(call.func.value))
        and ast.unparse(call.func) != "super().format"  # of a log's handler
    ] == []


def test_the_scan_sees_what_it_is_for() -> None:
    """Each way of running data is found in a line that does it."""
    lines = (
        "import pickle.x",
        "from yaml import load",
        "os.system(a)",
        "eval(b)",
        "c.format(d)",
        "X.format(e)",
    )
    tree = ast.parse("\n".join((*lines, "re.compile(f)")))
    names = [called(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert names == ["system", "eval", "format", "format", "re.compile"]
    assert {module.split(".")[0] for module, _ in imported(tree)} <= FORBIDDEN_MODULES
    constants = [is_constant(node.func.value) for node in ast.walk(tree)
                 if isinstance(node, ast.Call) and called(node) == "format"]  # fmt: skip
    assert constants == [False, True]
