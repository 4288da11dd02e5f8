"""What messages call a key of the configuration has to be one."""

import ast
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from megachat.stages.config import RunConfig
from tests.conventions.source import SourceFile, assert_none, project_files, snippet

_KEY = re.compile(r"(?<![\w./-])([a-z]\w*(?:\.(?:[a-z]\w*|\{\}|\*|\d+))+)")
"""A dotted name; `{}` stands for what an f-string puts in."""

_NOT_KEYS = frozenset({"json", "jsonl", "model", "toml", "fingerprint"})
"""Endings of file names that begin like a section."""


def _nested(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configuration classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _nested(part)


def _below(model: type[BaseModel], name: str) -> tuple[bool, list[type[BaseModel]]]:
    """Whether a class has such a field, and the classes that it may hold."""
    if name in ("{}", "*"):
        found = [inner for key in model.model_fields.values() for inner in _nested(key.annotation)]
        return True, found
    field = model.model_fields.get(name)
    return field is not None, [] if field is None else list(_nested(field.annotation))


def _exists(key: str) -> bool:
    models: list[type[BaseModel]] = [RunConfig]
    for name in key.split("."):
        if name.isdigit():
            continue  # an entry of a list
        steps = [_below(model, name) for model in models]
        if not any(known for known, _ in steps):
            return False
        models = [inner for _, found in steps for inner in found]
    return True


def _sections(model: type[BaseModel] = RunConfig) -> frozenset[str]:
    """Names of all tables, at any depth: a key that begins with one of them is meant as a key."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        for inner in _nested(field.annotation):
            names |= {name} | _sections(inner)
    return frozenset(names)


def _texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """String literals that are no docstrings, with their lines."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            parts = [
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            ]
            yield node.lineno, "".join(parts)
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if isinstance(node, ast.Constant) and is_text and id(node) not in skipped:
            yield node.lineno, str(node.value)


def complaints_about_keys(files: typing.Iterable[SourceFile]) -> list[str]:
    """Keys in string literals that the configuration does not have."""
    sections = _sections()
    return [
        f"{file.path}:{line}: there is no key {key}"
        for file in files
        if file.path.startswith("megachat/")
        for line, text in _texts(file.tree)
        for key in _KEY.findall(text)
        if key.split(".")[0] in sections and key.split(".")[-1] not in _NOT_KEYS
        if not _exists(key)
    ]


def test_every_key_that_a_message_names_exists() -> None:
    assert_none(complaints_about_keys(project_files()))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("'raise data.validation_share'", 0),
        ("'raise data.validation_shares'", 1),
        ("'see ppo.kl.horizon'", 1),
        ("'see rlhf.ppo.kl.horizon and models.*.tensor'", 0),
        ("f'models.{role}.tensor and models.{role}.tensors'", 1),
        ("'data.sources.0.split or data.sources.name'", 0),
        ("'tokenizer.json of megachat.data.nothing'", 0),
    ],
)
def test_a_key_that_does_not_exist_is_found(text: str, count: int) -> None:
    assert len(complaints_about_keys([snippet(f"x = {text}")])) == count
