"""What this machine allows, and ranks beyond that."""

import os
import resource
from pathlib import Path

import pytest
import torch

from megachat.errors import CapacityError, LaunchError, MegachatError
from megachat.parallel.launch import LaunchConfig
from megachat.preflight.host import Host, Limit, check_processes, existing_parent, this_host
from tests.preflight.case import GB, host

CPU = torch.device("cpu")


def refusals(launch: LaunchConfig, machine: Host, device: torch.device = CPU) -> list[str]:
    return [
        f"{type(problem).__name__}: {problem}"
        for problem in check_processes(launch, machine, device)
    ]


def test_a_hundred_thousand_processes_are_refused_on_any_machine() -> None:
    launch = LaunchConfig().model_copy(update={"processes": 100_000})
    problems = list(check_processes(launch, this_host(), CPU))
    assert problems and all(isinstance(each, MegachatError) for each in problems)
    for problem in problems:
        assert "launch.processes 100000" in str(problem) and "\n" not in str(problem)


@pytest.mark.parametrize(
    ("settings", "limits", "needles"),
    [
        (
            {"processes": 9, "threads": 2},
            {"tasks": Limit(value=17, source="ulimit -u")},
            ["LaunchError", "9 x 2 threads make 18", "allows 17 (ulimit -u)", "launch.threads"],
        ),
        (
            {"processes": 8, "nodes": 100},
            {"open_files": 887},
            ["LaunchError", "launch.nodes 100", "888 open files", "887 are allowed", "ulimit -n"],
        ),
        (
            {"processes": 8},
            {"memory_bytes": 4 * GB - 1},
            ["CapacityError", "4.0 GB before they hold any tensor", "launch.memory_check"],
        ),
    ],
)
def test_one_more_than_there_is_room_for_is_refused_with_both_numbers(
    settings: dict[str, int], limits: dict[str, Limit | int], needles: list[str]
) -> None:
    launch = LaunchConfig(**settings)
    [line] = refusals(launch, host(**limits))
    for needle in needles:
        assert needle in line
    [(name, limit)] = limits.items()
    enough = Limit(value=limit.value + 1, source="") if isinstance(limit, Limit) else limit + 1
    assert refusals(launch, host(**{name: enough})) == []


def test_memory_is_not_asked_for_where_it_is_not_checked_or_elsewhere() -> None:
    little = host(memory_bytes=GB)
    assert refusals(LaunchConfig(processes=8, memory_check="warn"), little) == []
    assert refusals(LaunchConfig(processes=8), little, torch.device("cuda", 0)) == []
    assert refusals(LaunchConfig(), host(memory_bytes=1)) == []  # one process is this one


def test_the_kernel_is_asked(tmp_path: Path) -> None:
    here = this_host()
    state = os.statvfs(tmp_path)
    assert abs(here.free_bytes(tmp_path) - state.f_bavail * state.f_frsize) < GB
    assert here.memory_bytes > 0
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert here.open_files in (soft, None)
    assert here.tasks is not None
    assert here.tasks.value <= int(Path("/proc/sys/kernel/pid_max").read_text())


def test_the_nearest_folder_that_is_there_is_found(tmp_path: Path) -> None:
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    assert existing_parent(tmp_path / "file" / "b") == tmp_path / "file"


def test_errors_are_of_the_kinds_that_the_command_line_knows() -> None:
    kinds = {type(each) for each in check_processes(LaunchConfig(processes=99), host(
        open_files=1, memory_bytes=1), CPU)}  # fmt: skip
    assert kinds == {LaunchError, CapacityError}
