"""JSON is written as its grammar has it: NaN and infinity are no words of it."""

import ast
from collections.abc import Iterable

import pytest

from tests.conventions.source import SourceFile, assert_none, project_files, snippet

WRITERS = ("json.dump", "json.dumps", "json.JSONEncoder")


def complaints_about_json(files: Iterable[SourceFile]) -> list[str]:
    """Calls that would write a bare NaN, which most readers refuse; imports that would hide one."""
    complaints = []
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.ImportFrom) and node.module == "json":
                complaints.append(f"{file.path}:{node.lineno}: import json, not names of it")
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in WRITERS:
                continue
            strict = [word.value for word in node.keywords if word.arg == "allow_nan"]
            if [ast.unparse(value) for value in strict] != ["False"]:
                complaints.append(f"{file.path}:{node.lineno}: give allow_nan=False")
    return complaints


def test_json_is_written_strictly() -> None:
    assert_none(complaints_about_json(project_files()))


@pytest.mark.parametrize(
    "text",
    [
        "import json\njson.dumps(x)",
        "import json\njson.dump(x, file, indent=2)",
        "import json\njson.dumps(x, allow_nan=True)",
        "import json\njson.JSONEncoder(indent=2)",
        "from json import dumps",
    ],
)
def test_a_lenient_writer_is_found(text: str) -> None:
    assert len(complaints_about_json([snippet(text)])) == 1


def test_a_strict_one_is_accepted() -> None:
    text = "import json\njson.dumps(x, indent=2, allow_nan=False)\njson.loads(text)"
    assert complaints_about_json([snippet(text)]) == []
