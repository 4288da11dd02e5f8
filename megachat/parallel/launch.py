"""Starts the ranks of a job, or joins the job that this process is already a rank of.

`launch` runs a function on every rank: in this process for a world of one, in processes of its own
for more, and directly where torchrun, srun or an MPI launcher has started the ranks. However they
were started, a rank that fails ends the whole job on all nodes, and everywhere the first failure is
told (docs/decisions/0011-starting-and-failing.md). Only this module reads and sets the environment.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch._C._distributed_c10d import FileStore, Store

from megachat.config import ConfigModel
from megachat.errors import LaunchError
from megachat.parallel import GROUP_TIMEOUT, cpu_compat
from megachat.parallel.ending import Watcher, signals_raise, watch_ranks
from megachat.parallel.failures import Signalled, failure_of, first_line
from megachat.parallel.heap import keep_freed_memory
from megachat.parallel.lifeline import Member, News
from megachat.parallel.local_ranks import Channel, LocalRanks
from megachat.parallel.placement import (
    Part,
    SameHost,
    blocks_of,
    check_hosts,
    parse_rendezvous,
    part_of,
    read_task,
)
from megachat.parallel.rendezvous import Meeting, check_gpus, check_listening, meet
from megachat.parallel.seats import (
    Nodes,
    Seat,
    meeting_of_nodes,
    meeting_of_ranks,
    seat_of,
    seats_of_node,
)

_CUDA_DEFAULTS: Mapping[str, str] = {
    # One queue: a collective that is launched before the product it overlaps with starts before it.
    # megatron-core's tensor-parallel layers count on that.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # After a collective that failed or timed out the process ends at once. The other way, to abort
    # NCCL's communicators first, can wait for the very peer that is gone.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # NCCL says why it failed: without this it leaves "unhandled system error".
    "NCCL_DEBUG": "WARN",
}
"""What ranks on CUDA get where the user has not set it. torch's allocator keeps its own defaults
(docs/decisions/0012-device-memory.md says why)."""
_SOCKET_FOLDER_LENGTH = 60
"""Of the path of a folder for sockets; a whole path has at most 107 characters (unix(7))."""
_SYSTEM_FOLDER = "/tmp"


class MemoryCheck(StrEnum):
    """What happens before the launch to a run whose plan exceeds the memory of a rank."""

    REFUSE = "refuse"
    """It is not started."""
    WARN = "warn"
    """It is started, after one line with the numbers."""
    OFF = "off"
    """Nothing is planned."""


class LaunchConfig(ConfigModel):
    """How many processes run the job, where, and on which device."""

    processes: int = Field(default=1, ge=1, description="Processes on each node.")
    nodes: int = Field(default=1, ge=1, description="Nodes of the job.")
    rendezvous: str | None = Field(
        default=None,
        description="host:port of the first node, for jobs of several nodes. One node needs none, "
        "and srun tells it.",
    )
    join_seconds: float = Field(
        default=600.0, gt=0, description="How long nodes wait for those that are not there yet."
    )
    device: str = Field(
        default="auto", pattern="^(auto|cpu|cuda)$", description="auto takes CUDA where present."
    )
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads a process; None shares the cores evenly."
    )

    keep_freed_memory: bool = Field(
        default=True,
        description="On CPUs: memory that tensors leave stays with the process, up to 2 GiB, "
        "since new pages cost a quarter of a training step.",
    )
    max_skipped_steps: int = Field(
        default=10,
        ge=1,
        description="Optimizer steps in a row that may be skipped, since a gradient was not "
        "finite, before the run ends and leaves the weights of before in last_good.",
    )
    memory_check: Annotated[MemoryCheck, Field(strict=False)] = MemoryCheck.REFUSE
    """What happens to a run that cannot fit into memory."""

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.processes * self.nodes

    @property
    def where(self) -> Nodes:
        """Where the job runs."""
        return Nodes(
            processes=self.processes,
            nodes=self.nodes,
            rendezvous=self.rendezvous,
            join_seconds=self.join_seconds,
        )

    @property
    def threads_per_process(self) -> int:
        """CPU threads that each process uses."""
        return self.threads or max(1, num_cores() // self.processes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """What a rank knows of itself once it has joined the world."""

    rank: int
    world_size: int
    device: torch.device


def prepare_ranks(config: LaunchConfig, module: str) -> None:
    """Starts the server that ranks are forked from; it imports their module meanwhile.

    Imports take seconds. On the CPU they happen once for all ranks of this node, and beside what
    the caller does before it launches. CUDA does not survive a fork: its ranks are spawned, and
    import for themselves. Without this call the server starts with the launch.

    Raises:
        LaunchError: This process was started by another launcher in a way that does not fit.
    """
    if _part(config) is Part.LAUNCHER and not _on_cuda(config):
        _set_threads(config)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
        _choose_socket_folder()
        multiprocessing.set_forkserver_preload([module])
        multiprocessing.forkserver.ensure_running()


def check_start(config: LaunchConfig) -> torch.device:
    """Refuses what `launch` would refuse before it meets anyone; starts nothing.

    Returns:
        What the first rank of this node would compute on.

    Raises:
        LaunchError: Another launcher started this process in a way that does not fit, a device is
            not there, or the ranks cannot meet where they are told to.
    """
    part, task = _part(config), read_task(os.environ)
    if config.rendezvous is not None:
        parse_rendezvous(config.rendezvous)  # one process needs none, but a typo is one there, too
    device = select_device(config.device)
    if part is Part.RANK:
        assert task is not None, "a rank among others was started by something"
        meeting_of_ranks(config.where, task)
    elif part is Part.LAUNCHER:
        if _on_cuda(config):
            _check_device_count(config)
        point = meeting_of_nodes(config.where, task)
        if config.nodes == 1:  # of several nodes, the others may be calling already
            check_listening(point)
    return device


def launch(
    config: LaunchConfig,
    entry: Callable[..., None],
    *args: Any,
    same_host: Sequence[SameHost] = (),
) -> None:
    """Runs module-level `entry(worker, *args)` on every rank and waits for all of them.

    Where this process is itself one of several ranks, it does not return from a failure: it writes
    the message and ends, since a teardown could wait for ranks that are gone.

    Args:
        config: Where and how many.
        entry: What each rank does.
        args: What it gets beside its `Worker`.
        same_host: Ranks that have to be on one host; those of a node are taken to be.

    Raises:
        MegachatError: What the first failing rank raised.
        LaunchError: A rank died, or the job could not be started.
    """
    part = _part(config)
    _set_threads(config)
    rules = (blocks_of(config.processes, config.world_size), *same_host)
    if part is Part.ALONE:
        with tempfile.TemporaryDirectory() as folder, _variables(Seat(rank=0, world_size=1)):
            with joined_world(config, store=FileStore(f"{folder}/store", 1)) as worker:
                entry(worker, *args)
    elif part is Part.RANK:
        _run_as_rank(config, entry, args, rules)
    else:
        prepare_ranks(config, entry.__module__)
        _run_node(config, entry, args, rules)


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def select_device(name: str) -> torch.device:
    """The device of this rank for `auto`, `cpu` or `cuda`.

    A rank that sees one GPU of its own (`srun --gpus-per-task=1`) takes that, whatever its number.

    Raises:
        LaunchError: CUDA is asked for, but this torch or machine has none, or too few devices.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise LaunchError(
            f"launch.device is cuda, but torch {torch.__version__} finds no CUDA device here: "
            "use launch.device=cpu, or install a CUDA build of torch"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    local, count = _local_rank(), torch.cuda.device_count()
    if local < count:
        return torch.device("cuda", local)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if count == 1 and visible and "," not in visible:
        return torch.device("cuda", 0)
    raise LaunchError(
        f"rank {local} of {socket.gethostname()} has no CUDA device: there are {count}: start at "
        "most as many ranks on a node (launch.processes, srun --ntasks-per-node)"
    )


@contextlib.contextmanager
def joined_world(config: LaunchConfig, *, store: Store) -> Iterator[Worker]:
    """Joins the default process group for the length of the body.

    Raises:
        LaunchError: The world cannot be joined.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = select_device(config.device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    torch.set_num_threads(config.threads_per_process)
    cpu_compat.install()
    if device.type == "cpu" and config.keep_freed_memory:
        keep_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=GROUP_TIMEOUT,
        )
    except (RuntimeError, dist.DistError) as error:
        raise LaunchError(f"rank {rank} cannot join the job: {first_line(error)}") from error
    try:
        yield Worker(rank=rank, world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()


def _part(config: LaunchConfig) -> Part:
    """What this process does in the job."""
    return part_of(read_task(os.environ), processes=config.processes, nodes=config.nodes)


def _on_cuda(config: LaunchConfig) -> bool:
    """Whether the ranks compute on CUDA; whoever asks for it in vain is told."""
    if config.device == "cuda" and not torch.cuda.is_available():
        select_device(config.device)  # raises
    return config.device != "cpu" and torch.cuda.is_available()


def _local_rank() -> int:
    """Number of this process among those of its host, as far as the environment tells."""
    text = os.environ.get("LOCAL_RANK")
    if text is not None:
        return int(text)
    task = read_task(os.environ)
    return (task.local if task is not None else None) or 0


def _set_threads(config: LaunchConfig) -> None:
    """Thread pools of libraries have the size that the environment names when they are loaded."""
    os.environ["OMP_NUM_THREADS"] = str(config.threads_per_process)


def _set_cuda_defaults() -> None:
    """Before CUDA starts: what the user has set stays."""
    for name, value in _CUDA_DEFAULTS.items():
        os.environ.setdefault(name, value)


def _choose_socket_folder() -> None:
    """Lets the fork server listen where a socket's path is short enough, under a long TMPDIR, too.

    Raises:
        LaunchError: There is no such folder.
    """
    chosen = tempfile.gettempdir()
    if len(os.fsencode(chosen)) <= _SOCKET_FOLDER_LENGTH:
        return
    if not os.access(_SYSTEM_FOLDER, os.W_OK | os.X_OK):
        raise LaunchError(
            f"TMPDIR is {chosen}: too long for a socket, and {_SYSTEM_FOLDER} cannot be written: "
            f"choose a TMPDIR of at most {_SOCKET_FOLDER_LENGTH} characters"
        )
    tempfile.tempdir = _SYSTEM_FOLDER
    try:
        multiprocessing.util.get_temp_dir()  # chosen once for this process and those below it
    finally:
        tempfile.tempdir = chosen


@contextlib.contextmanager
def _variables(seat: Seat) -> Iterator[None]:
    """What torch, DeepSpeed and others read of a rank, for the length of the body."""
    values = {
        "RANK": str(seat.rank),
        "WORLD_SIZE": str(seat.world_size),
        "LOCAL_RANK": str(seat.local),
        "LOCAL_WORLD_SIZE": str(seat.local_size),
    }
    if seat.store_port:
        values |= {"MASTER_ADDR": seat.host, "MASTER_PORT": str(seat.store_port)}
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _myself(name: str, number: int | None, gpu: str = "") -> Member:
    """This process, as the others get to know it."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return Member(name=name, host=socket.gethostname(), number=number, cores=cores, gpu=gpu)


def _sharing_cores(config: LaunchConfig, meeting: Meeting, ranks_each: int) -> LaunchConfig:
    """The configuration with as many threads as are left to a rank.

    Members on one host may have all of its cores together, or each its own.
    """
    mine = meeting.members[meeting.number]
    sharing = sum((each.host, each.cores) == (mine.host, mine.cores) for each in meeting.members)
    threads = config.threads or max(1, num_cores() // (sharing * ranks_each))
    return config.model_copy(update={"threads": threads})


def _run_as_rank(
    config: LaunchConfig,
    entry: Callable[..., None],
    args: tuple[Any, ...],
    rules: Sequence[SameHost],
) -> None:
    """Joins the ranks that another launcher has started beside this one."""
    task = read_task(os.environ)
    assert task is not None, "a rank among others was started by something"
    gpu = ""
    if _on_cuda(config):
        _set_cuda_defaults()
        gpu = _only_gpu(select_device(config.device))
    meeting = meet(meeting_of_ranks(config.where, task), _myself("rank", task.number, gpu))
    seat = seat_of(meeting, task)
    watcher = Watcher(meeting)
    try:
        check_hosts([member.host for member in meeting.members], rules, way=task.way)
        check_gpus(meeting.members)
        config = _sharing_cores(config, meeting, 1)
        with _variables(seat), joined_world(config, store=seat.open_store()) as worker:
            try:
                entry(worker, *args)
            except BaseException as error:  # inside: a teardown could wait for ever
                watcher.leave(failure_of(error, origin=seat.title))
    except BaseException as error:
        watcher.leave(failure_of(error, origin=seat.title))
    watcher.finish()


def _only_gpu(device: torch.device) -> str:
    """The GPU of a process that sees no other; empty where it sees several."""
    if torch.cuda.device_count() > 1:
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def _check_device_count(config: LaunchConfig) -> None:
    """Refuses more ranks on this node than it has CUDA devices."""
    if config.processes > torch.cuda.device_count():
        raise LaunchError(
            f"launch.processes is {config.processes}, but {socket.gethostname()} has "
            f"{torch.cuda.device_count()} CUDA devices: lower it"
        )


def _run_node(
    config: LaunchConfig,
    entry: Callable[..., None],
    args: tuple[Any, ...],
    rules: Sequence[SameHost],
) -> None:
    """Starts the ranks of this node and waits for all ranks of the job."""
    on_cuda = _on_cuda(config)
    if on_cuda:
        _set_cuda_defaults()
        _check_device_count(config)
    task = read_task(os.environ)
    context = multiprocessing.get_context("spawn" if on_cuda else "forkserver")
    ranks = LocalRanks(context, on_cuda=on_cuda)
    with signals_raise():
        number = task.number if task is not None else None
        meeting = meet(meeting_of_nodes(config.where, task), _myself("node", number))
        try:
            hosts = [each.host for each in meeting.members for _ in range(config.processes)]
            check_hosts(hosts, rules, way=task.way if task is not None else None)
            config = _sharing_cores(config, meeting, config.processes)
            for seat in seats_of_node(meeting, processes=config.processes):
                ranks.start(seat.title, _rank_main, seat, config, entry, args)
            news = watch_ranks(ranks, meeting)
        except Signalled as signalled:
            news = News(meeting.fail(failure_of(signalled, origin="the launcher")))
        except Exception as error:
            meeting.fail(failure_of(error, origin=meeting.members[meeting.number].title))
            raise
        finally:
            ranks.end()
            meeting.close()
    if news.failure is not None:
        raise news.failure.error()


def _rank_main(
    channel: Channel,
    seat: Seat,
    config: LaunchConfig,
    entry: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """Main function of a started rank: failures travel to the launcher."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher gets it as well, and decides
    try:
        _set_threads(config)
        with _variables(seat), joined_world(config, store=seat.open_store()) as worker:
            try:
                entry(worker, *args)
            except BaseException as error:  # inside: a teardown could wait for ever
                channel.leave(failure_of(error, origin=seat.title))
    except BaseException as error:
        channel.leave(failure_of(error, origin=seat.title))
