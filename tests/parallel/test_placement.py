from collections.abc import Mapping

import pytest

from megachat.errors import LaunchError
from megachat.parallel.placement import (
    PORTS,
    Part,
    SameHost,
    Way,
    blocks_of,
    check_hosts,
    expand_hosts,
    meeting_port,
    part_of,
    read_task,
)

BATCH_SHELL = {
    "SLURM_JOB_ID": "1",
    "SLURM_JOB_NODELIST": "node[1-3]",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "6",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x3)",
}
"""What Slurm 22.05 sets for the script of `sbatch -N 3 --ntasks-per-node=2`."""
STEP = BATCH_SHELL | {
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
}
"""... and for the last task of `srun -N 2 -n 4` in it."""
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "2",
    "PMIX_NAMESPACE": "prterun-a-7@1",
}
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        BATCH_SHELL,
        {"SLURM_JOB_ID": "2", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[1-2]"},  # salloc
        STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # salloc, where its shell is a step
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    ],
)
def test_a_shell_is_no_rank(variables: Mapping[str, str]) -> None:
    assert read_task(variables) is None


def test_a_task_of_srun_knows_its_place_and_the_first_host_of_its_step() -> None:
    task = read_task(STEP)
    assert task is not None
    assert (task.way, task.number, task.count, task.local) == (Way.SLURM, 3, 4, 1)
    assert (task.host, task.port, task.hosts) == ("node1", None, ("node1", "node2"))


def test_every_attempt_and_step_of_a_job_meets_at_its_own_port() -> None:
    changes = ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "2"})
    found = [read_task(STEP | change) for change in changes]
    keys = {task.key for task in found if task is not None}
    assert len(keys) == 4
    assert len({meeting_port(key) for key in keys}) == 4
    assert all(meeting_port(f"slurm.{job}.0.0") in PORTS for job in range(2000))


def test_an_address_that_a_script_exports_is_taken() -> None:
    task = read_task(STEP | {"MASTER_ADDR": "ib1", "MASTER_PORT": "3000"})
    assert task is not None and (task.host, task.port) == ("ib1", 3000)


def test_torchrun_comes_before_the_srun_that_started_it() -> None:
    task = read_task(STEP | TORCHRUN)
    assert task is not None
    assert (task.way, task.number, task.count, task.local) == (Way.TORCHRUN, 5, 8, 1)
    assert (task.host, task.port, task.keeps_store) == ("10.0.0.1", 29400, True)


def test_open_mpi_comes_before_the_srun_of_its_daemons() -> None:
    task = read_task(STEP | {"SLURM_PROCID": "0"} | OPEN_MPI)
    assert task is not None
    assert (task.way, task.number, task.count, task.local) == (Way.OPEN_MPI, 2, 4, 0)
    assert task.host == "node1"


def test_mpi_on_several_unknown_hosts_does_not_guess_where_to_meet() -> None:
    alone = read_task(OPEN_MPI)
    assert alone is not None and alone.host is None
    here = read_task(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert here is not None and here.host == "127.0.0.1"


def test_pmi_that_srun_sets_is_slurms_and_that_of_mpich_is_not() -> None:
    by_srun = read_task(STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"})
    assert by_srun is not None and by_srun.way is Way.SLURM
    by_mpich = read_task(STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"} | MPICH)
    assert by_mpich is not None
    assert (by_mpich.way, by_mpich.number, by_mpich.count) == (Way.PMI, 2, 4)


def test_pmix_alone_says_nothing_of_how_many_there_are() -> None:
    task = read_task({"PMIX_RANK": "3", "PMIX_NAMESPACE": "x"})
    assert task is not None and (task.way, task.number, task.count) == (Way.PMIX, 3, None)
    assert part_of(task, processes=4, nodes=1) is Part.RANK
    with pytest.raises(LaunchError, match="process 3 of 2"):
        part_of(task, processes=2, nodes=1)


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(LaunchError, match="SLURM_PROCID is 'x' in the environment"):
        read_task(STEP | {"SLURM_PROCID": "x"})


@pytest.mark.parametrize(
    ("tasks", "processes", "nodes", "part"),
    [
        (4, 2, 2, Part.RANK),
        (2, 2, 2, Part.LAUNCHER),
        (2, 1, 2, Part.RANK),
        (1, 8, 1, Part.LAUNCHER),  # srun --pty bash
        (1, 1, 1, Part.ALONE),
    ],
)
def test_as_many_tasks_as_ranks_are_ranks_and_one_a_node_starts_them(
    tasks: int, processes: int, nodes: int, part: Part
) -> None:
    task = read_task(STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": str(tasks)})
    assert part_of(task, processes=processes, nodes=nodes) is part


def test_a_process_that_nobody_started_starts_the_others() -> None:
    assert part_of(None, processes=1, nodes=1) is Part.ALONE
    assert part_of(None, processes=1, nodes=2) is Part.LAUNCHER


def test_another_number_of_tasks_is_refused_with_both_sides_and_what_to_set() -> None:
    with pytest.raises(
        LaunchError,
        match=r"srun started the job with 4 processes on 2 nodes, but launch.processes 1 x "
        r"launch.nodes 1 = 1: set launch.processes=2 launch.nodes=2",
    ):
        part_of(read_task(STEP), processes=1, nodes=1)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu7", "gpu7"),
        ("gpu[001-003,010],x5", "gpu001 gpu002 gpu003 gpu010 x5"),
        ("a[1-2,5]b[3]", "a1b3 a2b3 a5b3"),
        ("rack[1-2]node[01-02]", "rack1node01 rack1node02 rack2node01 rack2node02"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[098-101]", "n098 n099 n100 n101"),
        ("n[1],n[3]", "n1 n3"),
        ("host.example.org", "host.example.org"),
    ],
)
def test_a_node_list_is_what_scontrol_makes_of_it(text: str, names: str) -> None:
    """Expected names are those of `scontrol show hostnames` of Slurm 22.05."""
    assert expand_hosts(text) == tuple(names.split())


@pytest.mark.parametrize("text", ["", "a[1", "a1]", "a[3-1]", "a[x]", "a[]", "a,,b", "a[1-]"])
def test_a_node_list_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(LaunchError, match="node list"):
        expand_hosts(text)


PAIRS = SameHost(why="models.actor.tensor 2", groups=((0, 1), (2, 3)))


def test_neighbours_that_share_a_host_pass() -> None:
    check_hosts(["a", "a", "b", "b"], [PAIRS, blocks_of(2, 4)], way=Way.SLURM)
    check_hosts(["a"] * 4, [PAIRS, blocks_of(1, 4)], way=None)


def test_ranks_dealt_in_turn_are_refused_with_the_option_that_helps() -> None:
    with pytest.raises(LaunchError, match=r"ranks 0, 2 are on a, .*srun --distribution=block"):
        check_hosts(["a", "b", "a", "b"], [], way=Way.SLURM)


def test_a_tensor_group_over_two_hosts_is_refused_with_its_ranks() -> None:
    with pytest.raises(
        LaunchError,
        match=r"models.actor.tensor 2: rank 2 on a and rank 3 on b have to share a host",
    ):
        check_hosts(["a", "a", "a", "b"], [PAIRS], way=Way.SLURM)


def test_nodes_of_uneven_size_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"launch.processes 2: rank 2 on a and rank 3 on b"):
        check_hosts(["a", "a", "a", "b"], [blocks_of(2, 4)], way=None)
