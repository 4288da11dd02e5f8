"""Tells from the variables of a launcher which rank a process is, and where the ranks meet.

Pure: variables come in as a mapping, host names as sequences. What each launcher sets:

* torchrun, and many scripts by hand: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK;
* srun: SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_LOCALID. The shell of a batch
  script has SLURM_PROCID=0, too, but no variable of a step, and that of salloc has neither. These
  are no ranks, and SLURM_NTASKS there is what the job could start;
* Open MPI: OMPI_COMM_WORLD_RANK and its like; PMI (MPICH, Intel MPI): PMI_RANK, PMI_SIZE; PMIx:
  PMIX_RANK, which says nothing of how many there are.
"""

import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megachat.errors import LaunchError

PORTS = range(20000, 30000)
"""Ports that are derived from a job's number: below those that systems give to clients."""
LOOPBACK = "127.0.0.1"
_INTERACTIVE_STEP = 0xFFFFFFFA
"""Slurm's number of the step in which salloc may run the user's shell (slurm/slurm.h)."""

Variables = Mapping[str, str]


class Way(StrEnum):
    """Who starts the processes of a job."""

    TORCHRUN = "torchrun"
    SLURM = "srun"
    OPEN_MPI = "Open MPI"
    PMI = "PMI"
    PMIX = "PMIx"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One of the processes that something else than megachat has started together."""

    way: Way
    number: int
    """Of this process, from 0."""
    count: int | None
    """Of all of them; None where nothing tells."""
    local: int | None = None
    """Number of this process among those on its host, where known."""
    key: str
    """Names the job and this attempt at it; equal on all of its processes."""
    host: str | None = None
    """Where process 0 runs, where known."""
    port: int | None = None
    """Where the processes meet on that host, where something has chosen it."""
    keeps_store: bool = False
    """Whether the launcher itself answers at that port with a store of torch's."""
    hosts: tuple[str, ...] = ()
    """The nodes by name, where known."""


class Part(StrEnum):
    """What a process does in the job."""

    ALONE = "alone"
    """It is the only rank."""
    RANK = "rank"
    """It is a rank among others that something else has started."""
    LAUNCHER = "launcher"
    """It starts the ranks of its node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SameHost:
    """Groups of ranks each of which has to be on one host."""

    why: str
    """The setting that makes them so, with its value."""
    groups: tuple[tuple[int, ...], ...]


def read_task(variables: Variables) -> Task | None:
    """The process that the variables describe; None where nobody but the user started it.

    torchrun and mpirun may themselves have been started by srun, so they come first.

    Raises:
        LaunchError: A variable is not what it has to be.
    """
    readers: Sequence[Callable[[Variables], Task | None]] = (
        _torchrun_task,
        _open_mpi_task,
        _pmi_task,
        _slurm_task,
        _pmix_task,
    )
    return next((task for task in (read(variables) for read in readers) if task), None)


def part_of(task: Task | None, *, processes: int, nodes: int) -> Part:
    """What a process does in a job of `nodes` nodes with `processes` ranks each.

    As many tasks as ranks are the ranks; one task on each node starts the ranks of its node.

    Raises:
        LaunchError: The tasks are neither.
    """
    world_size = processes * nodes
    if task is None:
        return Part.ALONE if world_size == 1 else Part.LAUNCHER
    count = task.count if task.count is not None else world_size
    if task.number >= count:
        raise LaunchError(f"{task.way}: this is process {task.number} of {count}")
    if count == world_size:
        return Part.ALONE if world_size == 1 else Part.RANK
    if count == nodes and task.way is not Way.TORCHRUN:
        return Part.LAUNCHER
    on_nodes = f" on {len(task.hosts)} nodes" if task.hosts else ""
    raise LaunchError(
        f"{task.way} started the job with {count} processes{on_nodes}, but launch.processes "
        f"{processes} x launch.nodes {nodes} = {world_size}: "
        f"{_advice(task, count=count, world_size=world_size, nodes=nodes)}"
    )


def _advice(task: Task, *, count: int, world_size: int, nodes: int) -> str:
    """How tasks and settings come to agree."""
    known = len(task.hosts) or nodes
    each, rest = divmod(count, known)
    fitting = "" if rest else f"set launch.processes={each} launch.nodes={known}, or "
    starters = f" or {nodes}, one on each node" if task.way is not Way.TORCHRUN else ""
    return f"{fitting}start {world_size} processes, one for each rank{starters}"


def meeting_port(key: str) -> int:
    """A port that all processes of a job find without asking anyone.

    Two jobs on one node get the same one in a case out of ten thousand; the second is then refused.
    """
    return PORTS[zlib.crc32(key.encode()) % len(PORTS)]


def parse_rendezvous(text: str) -> tuple[str, int]:
    """Host and port of `launch.rendezvous`.

    Raises:
        LaunchError: It is not host:port.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise LaunchError(f"launch.rendezvous is {text!r}: expected host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def expand_hosts(text: str) -> tuple[str, ...]:
    """Host names of a Slurm node list, as `scontrol show hostnames` writes them.

    Example: `gpu[001-003,010],x5` is gpu001, gpu002, gpu003, gpu010, x5. Several brackets in a name
    count like the digits of a number, the last one fastest.

    Raises:
        LaunchError: A bracket or range is not closed, empty or backwards.
    """
    names: list[str] = []
    for item in _split_outside_brackets(text):
        parts = re.split(r"\[([^\[\]]*)\]", item)
        if not item or any(mark in part for part in parts[::2] for mark in "[]"):
            raise LaunchError(f"node list {text!r}: cannot read {item!r}")
        choices = [
            _expand_range(part, text) if index % 2 else [part] for index, part in enumerate(parts)
        ]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return tuple(names)


def _split_outside_brackets(text: str) -> list[str]:
    """Parts between commas that stand outside brackets."""
    return re.split(r",(?![^\[]*\])", text)


def _expand_range(text: str, whole: str) -> list[str]:
    """Numbers of one bracket, as wide as the first number of their range."""
    numbers: list[str] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = found.groups() if found else ("", None)
        if not first or int(last or first) < int(first):
            raise LaunchError(f"node list {whole!r}: cannot read the range {part!r}")
        width = len(first)
        numbers += [f"{n:0{width}}" for n in range(int(first), int(last or first) + 1)]
    return numbers


def check_hosts(hosts: Sequence[str], rules: Iterable[SameHost], *, way: Way | None) -> None:
    """Makes sure that ranks are on the hosts that the layouts take them to be on.

    Args:
        hosts: Host of each rank.
        rules: Ranks that have to share a host.
        way: Who started them, for the advice.

    Raises:
        LaunchError: Ranks of a host are not neighbours, or a group spans hosts.
    """
    runs = [host for host, _ in itertools.groupby(hosts)]
    if len(runs) > len(set(runs)):
        torn = next(host for host in runs if runs.count(host) > 1)
        mine = ", ".join(str(rank) for rank, host in enumerate(hosts) if host == torn)
        raise LaunchError(
            f"ranks {mine} are on {torn}, with ranks of other hosts between them, but neighbours "
            f"have to share a host: {_block_option(way)}"
        )
    for rule in rules:
        for group in rule.groups:
            where = {
                host: [r for r in group if hosts[r] == host] for host in _hosts_of(group, hosts)
            }
            if len(where) > 1:
                places = " and ".join(f"{_ranks(ranks)} on {host}" for host, ranks in where.items())
                raise LaunchError(
                    f"{rule.why}: {places} have to share a host: lower it, or start as many "
                    f"neighbouring ranks on each host{_per_node_option(way)}"
                )


def blocks_of(processes: int, world_size: int) -> SameHost:
    """The ranks of each node, which `launch.processes` says share a host."""
    starts = range(0, world_size, processes)
    groups = tuple(tuple(range(start, start + processes)) for start in starts)
    return SameHost(why=f"launch.processes {processes}", groups=groups)


def _hosts_of(group: Sequence[int], hosts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(hosts[rank] for rank in group))


def _ranks(ranks: Sequence[int]) -> str:
    """Ranks for a message."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _block_option(way: Way | None) -> str:
    if way is Way.SLURM:
        return "start with srun --distribution=block"
    return "start the ranks of a host one after the other (Open MPI: --map-by ppr:N:node)"


def _per_node_option(way: Way | None) -> str:
    return " (srun --ntasks-per-node=N --distribution=block)" if way is Way.SLURM else ""


def _number(variables: Variables, name: str) -> int | None:
    """The value of a variable; None where it is not set.

    Raises:
        LaunchError: It is not a number.
    """
    text = variables.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise LaunchError(f"{name} is {text!r} in the environment: expected a number")
    return int(text)


def _chosen_endpoint(variables: Variables) -> tuple[str | None, int | None]:
    """MASTER_ADDR and MASTER_PORT, which many batch scripts export."""
    port = _number(variables, "MASTER_PORT")
    host = variables.get("MASTER_ADDR")
    return (host, port) if host and port else (None, None)


def _torchrun_task(variables: Variables) -> Task | None:
    number, count = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    host, port = _chosen_endpoint(variables)
    if number is None or count is None or host is None:
        return None
    run = variables.get("TORCHELASTIC_RUN_ID", "job")
    return Task(
        way=Way.TORCHRUN,
        number=number,
        count=count,
        local=_number(variables, "LOCAL_RANK"),
        key=f"torchrun.{run}.{variables.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        host=host,
        port=port,
        keeps_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _mpi_task(
    variables: Variables,
    way: Way,
    number: int,
    count: int | None,
    local: int | None,
    *,
    all_here: bool,
) -> Task:
    """A process of an MPI launcher: in a job of Slurm's the nodes are known by name."""
    host, port = _chosen_endpoint(variables)
    nodes = expand_hosts(variables.get("SLURM_JOB_NODELIST", "")) if _in_slurm(variables) else ()
    name = variables.get("PMIX_NAMESPACE") or variables.get("OMPI_MCA_ess_base_jobid")
    job = variables.get("SLURM_JOB_ID") if _in_slurm(variables) else None
    restart = variables.get("SLURM_RESTART_COUNT", "0")
    if host is None and (name or job):  # without a name nothing tells two jobs of a machine apart
        host = LOOPBACK if all_here else (nodes[0] if nodes else None)
    return Task(
        way=way,
        number=number,
        count=count,
        local=local,
        key=f"{way}.{job}.{name}.{restart}",
        host=host,
        port=port,
    )


def _in_slurm(variables: Variables) -> bool:
    return "SLURM_JOB_ID" in variables and "SLURM_JOB_NODELIST" in variables


def _open_mpi_task(variables: Variables) -> Task | None:
    number = _number(variables, "OMPI_COMM_WORLD_RANK")
    count = _number(variables, "OMPI_COMM_WORLD_SIZE")
    if number is None or count is None:
        return None
    here = _number(variables, "OMPI_COMM_WORLD_LOCAL_SIZE")
    local = _number(variables, "OMPI_COMM_WORLD_LOCAL_RANK")
    return _mpi_task(variables, Way.OPEN_MPI, number, count, local, all_here=here == count)


def _pmi_task(variables: Variables) -> Task | None:
    """Srun --mpi=pmi2 sets these as well: then they agree with Slurm's own, which tell more."""
    number, count = _number(variables, "PMI_RANK"), _number(variables, "PMI_SIZE")
    if number is None or count is None:
        return None
    slurm = _slurm_task(variables)
    if slurm is not None and (slurm.number, slurm.count) == (number, count):
        return slurm
    local = _number(variables, "MPI_LOCALRANKID")
    here = _number(variables, "MPI_LOCALNRANKS")
    return _mpi_task(variables, Way.PMI, number, count, local, all_here=here == count)


def _pmix_task(variables: Variables) -> Task | None:
    number = _number(variables, "PMIX_RANK")
    if number is None:
        return None
    return _mpi_task(variables, Way.PMIX, number, None, None, all_here=False)


def _slurm_task(variables: Variables) -> Task | None:
    number = _number(variables, "SLURM_PROCID")
    count = _number(variables, "SLURM_STEP_NUM_TASKS")
    nodes = variables.get("SLURM_STEP_NODELIST")
    step = _number(variables, "SLURM_STEP_ID")
    if number is None or count is None or nodes is None or step == _INTERACTIVE_STEP:
        return None
    hosts = expand_hosts(nodes)
    host, port = _chosen_endpoint(variables)
    restart = variables.get("SLURM_RESTART_COUNT", "0")
    return Task(
        way=Way.SLURM,
        number=number,
        count=count,
        local=_number(variables, "SLURM_LOCALID"),
        key=f"slurm.{variables.get('SLURM_JOB_ID', '')}.{step}.{restart}",
        host=host or hosts[0],
        port=port,
        hosts=hosts,
    )
