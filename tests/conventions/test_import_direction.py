"""Which part of megachat may import which, and that nothing goes round in circles."""

from collections.abc import Iterable, Mapping

import pytest

from tests.conventions.source import SourceFile, assert_none, imports_of, project_files, snippet

FOUNDATION = frozenset({"errors", "config", "records", "telemetry", "hub", "locks", "digests"})

DIRECT: Mapping[str, frozenset[str]] = {
    "": frozenset(),
    "errors": frozenset(),
    "config": frozenset({"errors"}),
    "records": frozenset({"errors"}),
    "hub": frozenset({"errors", "locks"}),
    "locks": frozenset({"errors"}),
    "digests": frozenset(),
    "telemetry": frozenset({"errors", "config"}),
    "parallel": FOUNDATION,
    # Operators over a sharded vocabulary reduce over the tensor group, and collectives have one
    # home, so that ops stand on parallel and not beside it.
    "ops": FOUNDATION | {"parallel"},
    "model": FOUNDATION | {"parallel", "ops"},
    "training": FOUNDATION | {"model"},
    "generation": FOUNDATION | {"model"},
    "reshard": FOUNDATION | {"model"},
    "hybrid": FOUNDATION | {"training", "generation", "reshard"},
    "rlhf": FOUNDATION | {"hybrid"},
    "checkpoint": FOUNDATION | {"model", "parallel"},
    "data": FOUNDATION,
    "planner": FOUNDATION | {"model", "parallel", "reshard"},
    "api": FOUNDATION | {"rlhf", "checkpoint", "data"},
    "stages": FOUNDATION | {"api"},
    "preflight": FOUNDATION | {"stages", "planner"},
    "cli": FOUNDATION | {"preflight"},
}
"""What stands directly below each part; whatever stands below that may be imported as well."""

ONLY_MODULE = {("planner", "reshard"): "megachat.reshard.plan"}
"""Where one part may see a single module of another."""


def below(part: str) -> frozenset[str]:
    """Everything that `part` may import, besides itself."""
    reached: set[str] = set()
    waiting = list(DIRECT[part])
    while waiting:
        current = waiting.pop()
        if current not in reached:
            reached.add(current)
            waiting += DIRECT[current]
    return frozenset(reached)


def complaints_about_direction(files: Iterable[SourceFile]) -> list[str]:
    """Imports that do not point down."""
    complaints = []
    for file in files:
        if not file.path.startswith("megachat/"):
            continue  # tools stand above the library and may use all of it
        if file.package not in DIRECT:
            complaints.append(f"{file.path}:1: '{file.package}' has no place in DIRECT")
            continue
        for mention in imports_of(file):
            root, _, rest = mention.name.partition(".")
            target = rest.partition(".")[0]
            if root != "megachat" or target == file.package:
                continue
            if target and target not in below(file.package):
                complaints.append(f"{file.path}:{mention.line}: must not import {mention.name}")
            only = ONLY_MODULE.get((file.package, target))
            if only and not mention.name.startswith(only):
                complaints.append(f"{file.path}:{mention.line}: may import only {only}")
    return complaints


def complaints_about_cycles(files: Iterable[SourceFile]) -> list[str]:
    """Modules that import each other, directly or through others."""
    files = list(files)
    modules = {file.module for file in files}
    edges: dict[str, set[str]] = {
        file.module: {
            target
            for target in (_module_of(mention.name, modules) for mention in imports_of(file))
            if target in modules and target != file.module
        }
        for file in files
    }
    return [
        f"{module}: imports itself through others" for module in modules if _loops(module, edges)
    ]


def _module_of(name: str, modules: set[str]) -> str:
    """The module that an imported name is, or is a part of."""
    return name if name in modules else name.rpartition(".")[0]


def _loops(start: str, edges: Mapping[str, set[str]]) -> bool:
    seen: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        current = waiting.pop()
        if current == start:
            return True
        if current not in seen:
            seen.add(current)
            waiting += edges[current]
    return False


def test_imports_point_down() -> None:
    assert_none(complaints_about_direction(project_files()))


def test_no_module_imports_itself_through_others() -> None:
    assert_none(complaints_about_cycles(project_files()))


def test_the_directions_themselves_have_no_cycle() -> None:
    assert [part for part in DIRECT if part in below(part)] == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("megachat/model/x.py", "from megachat.training.engine import TrainEngine"),
        ("megachat/model/x.py", "import megachat.rlhf.kl"),
        ("megachat/model/x.py", "from megachat import stages"),
        ("megachat/model/x.py", "def f():\n    from megachat.cli.main import main"),
        ("megachat/model/x.py", "from ..generation import runner"),
        ("megachat/training/x.py", "from megachat.generation.runner import Runner"),
        ("megachat/data/x.py", "from megachat.parallel.layout import Axis"),
        ("megachat/telemetry/x.py", "from megachat.records import Rollout"),
        ("megachat/planner/x.py", "from megachat.reshard.execute import execute"),
        ("megachat/novelty/x.py", "import os"),
    ],
)
def test_an_import_that_points_up_or_sideways_is_found(path: str, text: str) -> None:
    assert len(complaints_about_direction([snippet(text, path=path)])) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("megachat/model/x.py", "from megachat.parallel.groups import ProcessGroups"),
        ("megachat/model/x.py", "from . import specs"),
        ("megachat/stages/x.py", "from megachat.parallel.launch import launch"),
        ("megachat/planner/x.py", "from megachat.reshard.plan import build_reshard_plan"),
        ("megachat/cli/x.py", "from megachat import errors"),
        ("tools/x.py", "from megachat.stages.sft import run"),
    ],
)
def test_an_import_that_points_down_is_accepted(path: str, text: str) -> None:
    assert complaints_about_direction([snippet(text, path=path)]) == []


def test_a_cycle_of_three_modules_is_found() -> None:
    texts = {"a": "from megachat.m import b", "b": "import megachat.m.c", "c": "from .a import f"}
    files = [snippet(text, path=f"megachat/m/{name}.py") for name, text in texts.items()]
    assert len(complaints_about_cycles(files)) == 3
    assert complaints_about_cycles(files[:2]) == []
