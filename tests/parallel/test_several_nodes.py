"""Jobs of several launchers, or of ranks that nothing of ours has started, on this machine."""

import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from megachat.parallel import launch as started
from megachat.parallel.launch import LaunchConfig, launch
from megachat.parallel.placement import SameHost
from tests.harness.nodes import End, Nodes, wait_for
from tests.harness.ports import free_port
from tests.parallel import entries

MESSAGE = "LayoutError: heads 7 are not a multiple of tensor 2: choose 1 or 7"
SECONDS_TO_END = 10.0
"""From a failure to the end of the last process of the job."""
HOST = socket.gethostname()


def config_of(shape: tuple[int, int]) -> LaunchConfig:
    """For nodes and ranks on each of them that meet at a free port."""
    return LaunchConfig(
        device="cpu",
        threads=1,
        nodes=shape[0],
        processes=shape[1],
        rendezvous=f"127.0.0.1:{free_port()}",
    )


def launchers(nodes: Nodes, shape: tuple[int, int], entry: Callable[..., None], *args: Any) -> None:
    """Starts one launcher for each of `shape[0]` nodes, with `shape[1]` ranks each."""
    config = config_of(shape)
    for _ in range(shape[0]):
        nodes.start(launch, config, entry, *args)


def srun(rank: int, count: int, *, port: int, nodes: str = "localhost") -> Mapping[str, str]:
    """The variables that Slurm 22.05 sets for a task of a step, as far as they matter."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_NTASKS": "99",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def torchrun(rank: int, count: int, *, port: int) -> Mapping[str, str]:
    """The variables that torchrun sets, where nobody keeps a store."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def open_mpi(rank: int, count: int, *, port: int) -> Mapping[str, str]:
    """The variables that Open MPI sets, and where the ranks meet."""
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(count),
        "PMIX_NAMESPACE": "prterun-here-1@1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


WAYS = pytest.mark.parametrize("way", [srun, torchrun, open_mpi])


def tasks(
    nodes: Nodes, way: Callable[..., Mapping[str, str]], count: int, entry: Any, *args: Any
) -> None:
    """Starts ranks as another launcher would."""
    port = free_port()
    config = LaunchConfig(device="cpu", threads=1, processes=count)
    for rank in range(count):
        nodes.start(launch, config, entry, *args, variables=way(rank, count, port=port))


def assert_ended(ends: list[End], folder: Path, *words: str) -> None:
    """All said the same and ended soon after the failure."""
    failed = float((folder / "failed").read_text())
    for end in ends:
        assert end.exit_code == 2, end
        assert all(word in end.message for word in words), end
        assert end.at - failed < SECONDS_TO_END
    for path in folder.glob("pid*"):
        wait_for(functools.partial(_has_ended, int(path.read_text())), "the end of a rank")


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[1][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


SHAPES = pytest.mark.parametrize("shape", [(2, 2), (4, 1)], ids=["2x2", "4x1"])


@SHAPES
def test_ranks_of_several_launchers_are_one_world(tmp_path: Path, shape: tuple[int, int]) -> None:
    with Nodes(tmp_path) as nodes:
        launchers(nodes, shape, entries.report_place, tmp_path)
        assert [(end.exit_code, end.message) for end in nodes.ends()] == [(0, "")] * shape[0]
    for rank in range(4):
        assert (tmp_path / str(rank)).read_text() == f"{rank} 4 cpu 10 1 1 gloo"
        assert (tmp_path / f"place{rank}").read_text() == f"{rank} 4 {rank} 4"  # one host


@SHAPES
@pytest.mark.parametrize("phase", ["collective", "teardown"])
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_failing_rank_ends_all_launchers_with_its_own_message(
    tmp_path: Path, shape: tuple[int, int], phase: str, how: str
) -> None:
    with Nodes(tmp_path) as nodes:
        launchers(nodes, shape, entries.fail_in_phase, tmp_path, 2, phase, how)
        ends = nodes.ends()
    assert_ended(ends, tmp_path, MESSAGE if how == "raise" else "rank 2 was killed by SIGKILL")


def _launch_with_broken_rank(config: LaunchConfig, folder: Path, how: str) -> None:
    """A launcher, one of whose ranks fails before it has joined its world."""

    def break_down() -> bool:
        entries.leave(folder / f"pid{os.environ['RANK']}", str(os.getpid()))
        if os.environ["RANK"] == "2":
            entries.end_by(folder, how)
        return True

    started.keep_freed_memory = break_down
    launch(config, entries.stay, folder)


@SHAPES
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_that_fails_before_it_joins_ends_all_launchers_with_its_own_message(
    tmp_path: Path, shape: tuple[int, int], how: str
) -> None:
    with Nodes(tmp_path) as nodes:
        config = config_of(shape)
        for _ in range(shape[0]):
            nodes.start(_launch_with_broken_rank, config, tmp_path, how)
        ends = nodes.ends()
    assert_ended(ends, tmp_path, MESSAGE if how == "raise" else "rank 2 was killed by SIGKILL")


@SHAPES
@pytest.mark.parametrize("killed", [0, 1])
def test_a_launcher_that_is_killed_ends_the_others_and_its_own_ranks(
    tmp_path: Path, shape: tuple[int, int], killed: int
) -> None:
    """The first one is where all others meet."""
    config = config_of(shape)
    with Nodes(tmp_path) as nodes:
        nodes.start(launch, config, entries.stay, tmp_path)
        wait_for(lambda: listens(int(str(config.rendezvous).split(":")[1])), "the first launcher")
        for _ in range(shape[0] - 1):
            nodes.start(launch, config, entries.stay, tmp_path)
        wait_for(lambda: len(list(tmp_path.glob("pid*"))) == 4, "the ranks")
        entries.leave(tmp_path / "failed", str(time.time()))
        nodes.kill(killed)
        ends = list(nodes.ends())
    assert ends.pop(killed).exit_code == -signal.SIGKILL
    lost = "lost contact with the first node at" if killed == 0 else "lost contact with node "
    assert_ended(ends, tmp_path, f"LaunchError: {lost}")


@WAYS
def test_ranks_that_another_launcher_started_are_one_world(
    tmp_path: Path, way: Callable[..., Mapping[str, str]]
) -> None:
    with Nodes(tmp_path) as nodes:
        tasks(nodes, way, 2, entries.report_place, tmp_path)
        assert [(end.exit_code, end.message) for end in nodes.ends()] == [(0, "")] * 2
    for rank in range(2):
        assert (tmp_path / str(rank)).read_text() == f"{rank} 2 cpu 3 1 1 gloo"
        assert (tmp_path / f"place{rank}").read_text() == f"{rank} 2 {rank} 2"


@WAYS
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_rank_without_a_launcher_above_ends_the_others(
    tmp_path: Path, way: Callable[..., Mapping[str, str]], how: str
) -> None:
    with Nodes(tmp_path) as nodes:
        tasks(nodes, way, 2, entries.fail_in_phase, tmp_path, 1, "collective", how)
        ends = nodes.ends()
    if how == "kill":
        assert ends[1].exit_code == -signal.SIGKILL
        assert_ended([ends[0]], tmp_path, f"LaunchError: lost contact with rank 1 on {HOST}")
    else:
        assert_ended(list(ends), tmp_path, MESSAGE)


def test_a_teardown_that_never_returns_does_not_keep_a_failing_rank(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        tasks(nodes, srun, 2, entries.raise_and_tear_down_for_ever, tmp_path)
        ends = nodes.ends()
    assert_ended(list(ends), tmp_path, MESSAGE)


def test_the_loss_of_the_first_rank_is_named(tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        tasks(nodes, srun, 2, entries.fail_in_phase, tmp_path, 0, "collective", "kill")
        ends = nodes.ends()
    assert_ended([ends[1]], tmp_path, "LaunchError: lost contact with the first node at 127.0.0.1:")


def test_one_task_on_each_node_starts_the_ranks_of_its_node(tmp_path: Path) -> None:
    port = free_port()
    config = LaunchConfig(device="cpu", threads=1, nodes=2, processes=2)
    with Nodes(tmp_path) as nodes:
        for number in range(2):
            nodes.start(
                launch, config, entries.report_place, tmp_path, variables=srun(number, 2, port=port)
            )
        assert [(end.exit_code, end.message) for end in nodes.ends()] == [(0, "")] * 2
    assert (tmp_path / "3").read_text() == "3 4 cpu 10 1 1 gloo"


def _launch_with_rule(config: LaunchConfig, host: str, folder: Path) -> None:
    """A launcher on a machine of this name, whose job wants ranks 0 and 1 on one host."""
    socket.gethostname = lambda: host
    rule = SameHost(why="models.actor.tensor 2", groups=((0, 1),))
    launch(config, entries.report, folder, same_host=[rule])


def test_a_tensor_group_over_two_hosts_is_refused_before_any_rank_starts(tmp_path: Path) -> None:
    config = LaunchConfig(
        device="cpu", threads=1, nodes=2, processes=1, rendezvous=f"127.0.0.1:{free_port()}"
    )
    with Nodes(tmp_path) as nodes:
        for host in ("east", "west"):
            nodes.start(_launch_with_rule, config, host, tmp_path)
        ends = nodes.ends()
    for end in ends:
        assert end.exit_code == 2
        assert "models.actor.tensor 2: rank 0 on " in end.message
        assert "east" in end.message and "west" in end.message
    assert not (tmp_path / "0").exists()


def listens(port: int) -> bool:
    """Whether the system lists a listener; calling it would disturb it."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(words[1].endswith(f":{port:04X}") and words[3] == "0A" for words in lines)
