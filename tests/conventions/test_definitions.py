"""What every definition must have, and statements that must not be there."""

import ast
from collections.abc import Iterable

import pytest

from tests.conventions.source import (
    Function,
    SourceFile,
    assert_none,
    functions_of,
    mentions_of,
    project_files,
    public_definitions,
    snippet,
)

PRINTING_FOLDERS = ("megachat/cli/", "tools/")
PROBES_PER_1000_LINES = 0.5
"""How often an attribute may be probed for (`hasattr`, `getattr` with a default)."""


def complaints_about_documentation(files: Iterable[SourceFile]) -> list[str]:
    """Modules and public definitions without a docstring."""
    complaints = []
    for file in files:
        if ast.get_docstring(file.tree) is None:
            complaints.append(f"{file.path}:1: the module has no docstring")
        for node in public_definitions(file):
            if ast.get_docstring(node) is None:
                complaints.append(f"{file.path}:{node.lineno}: {node.name} has no docstring")
    return complaints


def complaints_about_types(files: Iterable[SourceFile]) -> list[str]:
    """Functions with an argument or a return value that has no type."""
    complaints = []
    for file in files:
        for function in functions_of(file):
            missing = [
                argument.arg
                for argument in _arguments(function)
                if argument.annotation is None and argument.arg not in {"self", "cls"}
            ]
            if function.returns is None:
                missing.append("return")
            if missing:
                complaints.append(
                    f"{file.path}:{function.lineno}: {function.name} has no type for "
                    f"{', '.join(missing)}"
                )
    return complaints


def complaints_about_statements(files: Iterable[SourceFile]) -> list[str]:
    """`global`, and `print` where nobody is meant to read it."""
    complaints = []
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Global):
                complaints.append(f"{file.path}:{node.lineno}: no global statements")
        if file.path.startswith(PRINTING_FOLDERS):
            continue
        for mention in mentions_of(file):
            if mention.name == "print":
                complaints.append(f"{file.path}:{mention.line}: print; log through logging instead")
    return complaints


def probes_of(files: Iterable[SourceFile]) -> list[str]:
    """Places that ask an object what it has."""
    found = []
    for file in files:
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            given = len(node.args)
            if node.func.id == "hasattr" or (node.func.id == "getattr" and given == 3):
                found.append(f"{file.path}:{node.lineno}: {node.func.id}")
    return found


def _arguments(function: Function) -> list[ast.arg]:
    given = function.args
    star = [argument for argument in (given.vararg, given.kwarg) if argument is not None]
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *star]


def test_everything_public_is_documented() -> None:
    assert_none(complaints_about_documentation(project_files()))


def test_every_function_is_fully_typed() -> None:
    assert_none(complaints_about_types(project_files()))


def test_there_is_no_global_and_no_print() -> None:
    assert_none(complaints_about_statements(project_files()))


def test_objects_are_hardly_ever_asked_what_they_have() -> None:
    lines = sum(len(file.text.splitlines()) for file in project_files())
    found = probes_of(project_files())
    assert len(found) <= PROBES_PER_1000_LINES * lines / 1000, found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1", 1),
        ('"""Doc."""\nclass A:\n    def f(self) -> None: pass', 2),
        ('"""Doc."""\nclass A:\n    """Doc."""\n    def _f(self) -> None: pass', 0),
        ('"""Doc."""\nclass _A:\n    def f(self) -> None: pass', 0),
        ('"""Doc."""\ndef f() -> None:\n    """Doc."""\n    def inner() -> None: pass', 0),
        ('"""Doc."""\nasync def f() -> None: pass', 1),
    ],
)
def test_a_missing_docstring_is_found(text: str, found: int) -> None:
    assert len(complaints_about_documentation([snippet(text)])) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f(a: int, *args: int, b: int = 1, **rest: int) -> int: ...", 0),
        ("def f(a, /) -> int: ...", 1),
        ("def f(a: int): ...", 1),
        ("def f(*args) -> int: ...", 1),
        ("def f(*, a, **rest) -> int: ...", 1),
        ("class A:\n    def f(self, a: int) -> int: ...", 0),
        ("class A:\n    @classmethod\n    def f(cls) -> int: ...", 0),
    ],
)
def test_a_missing_type_is_found(text: str, found: int) -> None:
    assert len(complaints_about_types([snippet(text)])) == found


def test_global_and_print_are_found_where_they_do_not_belong() -> None:
    text = "def f() -> None:\n    global x\n    print(x)"
    assert len(complaints_about_statements([snippet(text)])) == 2
    assert len(complaints_about_statements([snippet(text, path="megachat/cli/main.py")])) == 1
    assert len(complaints_about_statements([snippet("show = print")])) == 1
    assert complaints_about_statements([snippet("console.print(1)")]) == []


def test_probes_are_found() -> None:
    text = "hasattr(a, 'b')\ngetattr(a, 'b', None)\ngetattr(a, 'b')"
    assert len(probes_of([snippet(text)])) == 2
