"""Files that must be there, and words that must not be in any of them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from tests.conventions.source import ROOT, assert_none, project_files, repository_paths

PRIVATE_FOLDER = re.compile(r"(?<![\w.$}/-])/(?:home|opt|root|Users|work|mnt)/[A-Za-z0-9_.]+")
"""An absolute path into some person's or some machine's own folders."""

REGISTRY_HOSTS = re.compile(
    "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("download", "pytorch", "org"),
            ("registry", "npmjs", "org"),
            ("deb", "debian", "org"),
            ("crates", "io"),
        )
    )
)
"""Package registries: packages are named, and each machine knows where it gets them."""

TESTED_ELSEWHERE: Mapping[str, str] = {
    "megachat/generation/packed.py": "values without behaviour; each step of the runner reads them",
    "megachat/planner/records.py": "values without behaviour; every test of the planner reads them",
}
"""Modules without a test module of their own, and why."""


def complaints_about_words(path: str, text: str) -> list[str]:
    """Private paths and registry hosts in one file."""
    complaints = []
    for number, line in enumerate(text.splitlines(), start=1):
        for kind, pattern in (("path", PRIVATE_FOLDER), ("registry host", REGISTRY_HOSTS)):
            found = pattern.search(line)
            if found:
                complaints.append(f"{path}:{number}: {kind} {found.group()}")
    return complaints


def mirror_of(path: str) -> str:
    """Where the tests of a source file are."""
    folder, _, name = path.removeprefix("megachat/").rpartition("/")
    return "/".join(part for part in ("tests", folder, f"test_{name}") if part)


def complaints_about_missing_tests(
    sources: Iterable[str], *, present: Iterable[str], excused: Mapping[str, str]
) -> list[str]:
    """Source files without tests of the mirrored name, and excuses that are not needed."""
    sources, present = set(sources), set(present)
    complaints = [f"{path}: listed as tested elsewhere, but absent" for path in excused]
    for path in sorted(sources):
        if path in excused:
            complaints.remove(f"{path}: listed as tested elsewhere, but absent")
        tested = mirror_of(path) in present
        if tested and path in excused:
            complaints.append(f"{path}: listed as tested elsewhere, but has {mirror_of(path)}")
        if not tested and path not in excused:
            complaints.append(f"{path}: no {mirror_of(path)}")
    return complaints


def relative_paths() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in repository_paths()]


def test_no_file_names_a_private_folder_or_a_registry() -> None:
    complaints = []
    for path in repository_paths():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        complaints += complaints_about_words(path.relative_to(ROOT).as_posix(), text)
    assert_none(complaints)


def test_every_module_has_its_tests() -> None:
    sources = [file.path for file in project_files() if not file.path.endswith("__init__.py")]
    complaints = complaints_about_missing_tests(
        sources, present=relative_paths(), excused=TESTED_ELSEWHERE
    )
    assert_none(complaints)


def test_every_folder_with_python_in_it_is_a_package() -> None:
    """Test modules of equal name in two folders collide otherwise; and setup.py finds packages."""
    folders = {
        Path(path).parent
        for path in relative_paths()
        if path.endswith(".py") and path.startswith(("tests/", "megachat/"))
    }
    missing = sorted(f for f in folders if not (ROOT / f / "__init__.py").exists())
    assert_none([f"{folder}: no __init__.py" for folder in missing])


@pytest.mark.parametrize(
    "line",
    [
        "see /" + "home/alice/data",
        "'/" + "work/main/megachat'",
        "--prefix=/" + "opt/venv",
        "https://files.python" + "hosted.org/packages",
        "index-url = https://" + "pypi" + ".org/simple",
    ],
)
def test_a_private_folder_or_a_registry_is_found(line: str) -> None:
    assert len(complaints_about_words("x", f"fine\n{line}\n")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "/home/$USER/runs and /home/<you>/runs",
        "facebook/opt/model",
        "$HOME/work/main",
        "runs/work/a",
        "/usr/local/cuda",
        "https://example.com/home/page",
    ],
)
def test_words_that_only_look_like_a_private_folder_are_accepted(line: str) -> None:
    assert complaints_about_words("x", line) == []


def test_a_module_without_tests_is_found() -> None:
    def complaints(present: list[str], excused: dict[str, str]) -> list[str]:
        return complaints_about_missing_tests(
            ["megachat/rlhf/kl.py", "tools/inspect.py"], present=present, excused=excused
        )

    both = ["tests/rlhf/test_kl.py", "tests/tools/test_inspect.py"]
    assert complaints(both, {}) == []
    assert complaints(both[:1], {}) == ["tools/inspect.py: no tests/tools/test_inspect.py"]
    assert complaints(both[:1], {"tools/inspect.py": "reason"}) == []
    assert len(complaints(both, {"tools/inspect.py": "no longer needed"})) == 1
    assert len(complaints(both, {"tools/gone.py": "stale"})) == 1
