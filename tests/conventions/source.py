"""Reading the project's source for the convention tests: files, imports, names, definitions.

A rule is a function from `SourceFile`s to complaints, each one line `path:line: what is wrong`, so
that it can be tried on a made-up snippet as well as on the project.
"""

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megachat", "tools")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """One Python file, parsed."""

    path: str
    """Relative to the root of the repository, with forward slashes."""
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name: `megachat.rlhf.kl`, and the package's for an `__init__.py`."""
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """What stands directly below `megachat`: a sub-package or a module; "" for the root."""
        _, *below = self.module.split(".")
        return below[0] if below else ""


@dataclass(frozen=True)
class Mention:
    """A dotted name in a file: something imported or something used."""

    name: str
    line: int


def snippet(text: str, *, path: str = "megachat/rlhf/example.py") -> SourceFile:
    """A made-up file."""
    return SourceFile(path=path, text=text, tree=ast.parse(text))


@cache
def project_files() -> tuple[SourceFile, ...]:
    """Every Python file that the conventions are about."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return tuple(
        snippet(path.read_text(encoding="utf-8"), path=path.relative_to(ROOT).as_posix())
        for path in paths
    )


@cache
def repository_paths() -> tuple[Path, ...]:
    """Every file that is or would be committed; without git, every file that is not a build's."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    if not paths:
        hidden = {".git", "__pycache__", "build", "dist", "runs"}
        paths = [
            path
            for path in ROOT.rglob("*")
            if not any(
                part in hidden or part.endswith(("_cache", ".egg-info"))
                for part in path.relative_to(ROOT).parts
            )
        ]
    return tuple(sorted(path for path in paths if path.is_file()))


def imports_of(file: SourceFile) -> list[Mention]:
    """Every imported name, fully dotted; imports inside functions and for types only included."""
    found = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found += [Mention(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(file, node)
            found += [Mention(f"{base}.{alias.name}", node.lineno) for alias in node.names]
    return found


def mentions_of(file: SourceFile) -> list[Mention]:
    """Every name that is imported or used, with what the file's imports call it undone.

    After `import torch.distributed as dist`, `dist.barrier` is `torch.distributed.barrier`.
    """
    known = _aliases(file)
    found = imports_of(file)
    inner = set()  # the parts of a longer chain, which the chain itself stands for
    for node in ast.walk(file.tree):
        if id(node) in inner or not isinstance(node, ast.Name | ast.Attribute):
            continue
        chain = [node]
        while isinstance(chain[-1], ast.Attribute):
            chain.append(chain[-1].value)
            inner.add(id(chain[-1]))
        dotted = _dotted(node)
        if dotted:
            first, _, rest = dotted.partition(".")
            name = known.get(first, first) + (f".{rest}" if rest else "")
            found.append(Mention(name, node.lineno))
    return found


def functions_of(file: SourceFile) -> Iterator[Function]:
    """Every function and method, nested ones included."""
    return (node for node in ast.walk(file.tree) if isinstance(node, Function))


def public_definitions(file: SourceFile) -> Iterator[Function | ast.ClassDef]:
    """Classes, functions, methods without an underscore, not in a function or a private class."""
    yield from _public(file.tree)


def assert_none(complaints: list[str]) -> None:
    """Fails with all complaints, one a line."""
    assert not complaints, "\n" + "\n".join(complaints)


def length(node: Function | ast.ClassDef) -> int:
    """Lines from `def` or `class` to the last line."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _public(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from _public(child)


def _absolute(file: SourceFile, node: ast.ImportFrom) -> str:
    """The module of a `from` import, relative ones resolved."""
    if node.level == 0:
        return node.module or ""
    folders = file.path.split("/")[: -node.level]
    return ".".join([*folders, *([node.module] if node.module else [])])


def _aliases(file: SourceFile) -> dict[str, str]:
    """What each imported local name stands for."""
    known = {}
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname:
                    known[alias.asname] = alias.name
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(file, node)
            for alias in node.names:
                known[alias.asname or alias.name] = f"{base}.{alias.name}"
    return known


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of a chain of attributes that starts at a name, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = _dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""
