"""How large things may grow before they must be cut."""

import ast
from collections.abc import Iterable

import pytest

from tests.conventions.source import (
    SourceFile,
    assert_none,
    functions_of,
    length,
    project_files,
    snippet,
)

FILE_LINES = 500
FUNCTION_LINES = 80
FUNCTION_LINES_P95 = 50
CLASS_LINES = 300
ARGUMENTS = 8


def complaints_about_sizes(files: Iterable[SourceFile]) -> list[str]:
    """Files, classes, functions and signatures over their limits."""
    complaints = []
    for file in files:
        lines = len(file.text.splitlines())
        if lines > FILE_LINES:
            complaints.append(f"{file.path}:1: {lines} lines, at most {FILE_LINES}")
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ClassDef) and length(node) > CLASS_LINES:
                complaints.append(
                    f"{file.path}:{node.lineno}: {node.name} has {length(node)} lines, "
                    f"at most {CLASS_LINES}"
                )
        for function in functions_of(file):
            place = f"{file.path}:{function.lineno}: {function.name} has"
            if length(function) > FUNCTION_LINES:
                complaints.append(f"{place} {length(function)} lines, at most {FUNCTION_LINES}")
            given = function.args
            named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            arguments = [argument for argument in named if argument.arg not in {"self", "cls"}]
            if len(arguments) > ARGUMENTS:
                complaints.append(f"{place} {len(arguments)} arguments, at most {ARGUMENTS}")
    return complaints


def long_function_length(files: Iterable[SourceFile]) -> int:
    """The length that 95 % of all functions do not exceed."""
    lengths = sorted(length(function) for file in files for function in functions_of(file))
    return lengths[(len(lengths) * 95 + 99) // 100 - 1]


def test_nothing_has_grown_too_large() -> None:
    assert_none(complaints_about_sizes(project_files()))


def test_nearly_all_functions_fit_on_a_screen() -> None:
    assert long_function_length(project_files()) <= FUNCTION_LINES_P95


def lines(count: int, *, indent: str = "    ") -> str:
    return "\n".join(f"{indent}x = {number}" for number in range(count))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (lines(500, indent=""), 0),
        (lines(501, indent=""), 1),
        (f"def f():\n{lines(79)}", 0),
        (f"def f():\n{lines(80)}", 1),
        (f"class A:\n{lines(299)}", 0),
        (f"class A:\n{lines(300)}", 1),
        ("def f(a, b, c, d, *, e, f, g, h): pass", 0),
        ("def f(a, b, c, d, /, e, *, f, g, h, i): pass", 1),
        ("class A:\n    def f(self, a, b, c, d, e, f, g, h): pass", 0),
    ],
)
def test_a_size_over_its_limit_is_found(text: str, found: int) -> None:
    assert len(complaints_about_sizes([snippet(text)])) == found


def test_the_95th_percentile_is_the_smallest_length_that_covers_95_of_100_functions() -> None:
    text = "\n".join(
        f"def f{number}():\n{lines(number)}" for number in range(1, 101)
    )  # lengths 2 to 101
    assert long_function_length([snippet(text)]) == 96
