"""The one place that reads the environment and starts or joins processes.

`launch` runs a function on every rank: in this process for a world of one, through torchrun's API
for more, and directly where the process is already a rank of a job that torchrun or srun started.
A rank that fails ends the whole job, and the parent raises what that rank raised.
"""

import contextlib
import json
import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import torch.distributed as dist
from pydantic import Field
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig as ElasticConfig
from torch.distributed.launcher.api import elastic_launch

from megachat import errors
from megachat.config import ConfigModel
from megachat.errors import LaunchError, MegachatError
from megachat.parallel import GROUP_TIMEOUT, cpu_compat
from megachat.parallel.heap import keep_freed_memory

_LOOPBACK = "127.0.0.1"
_JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each rank of a job."""

_LAST_WORDS_SECONDS = 1.0
"""How long a rank outlives an unexpected error. A rank that is killed leaves no message, and its
peers fail at once because they lost it; staying a little, they let the parent see who died first.
"""


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
        description="host:port of the first node, for jobs of several nodes; one node needs none.",
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
    def threads_per_process(self) -> int:
        """CPU threads that each process uses."""
        return self.threads or max(1, num_cores() // self.processes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """What a rank knows of itself once it has joined the world."""

    rank: int
    world_size: int
    device: torch.device


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def prepare_ranks(config: LaunchConfig, module: str) -> None:
    """Starts the server that ranks are forked from; it imports their module meanwhile.

    Imports take seconds. On the CPU they happen once for all ranks of this node, and beside what
    the caller does before it launches. CUDA does not survive a fork: its ranks are spawned, and
    import for themselves. Without this call the server starts with the launch.
    """
    if not _is_rank() and config.world_size > 1 and _forks(config):
        _set_threads(config)
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when it is imported
        multiprocessing.set_forkserver_preload([module])
        multiprocessing.forkserver.ensure_running()


def launch(config: LaunchConfig, entry: Callable[..., None], *args: Any) -> None:
    """Runs module-level `entry(worker, *args)` on every rank and waits for all of them.

    Raises:
        MegachatError: What the first failing rank raised.
        LaunchError: A rank died, or the job could not be started.
    """
    _set_threads(config)
    if _is_rank():
        with joined_world(config) as worker:
            entry(worker, *args)
    elif config.world_size == 1:
        with tempfile.TemporaryDirectory() as folder, _environment_of_one(folder):
            with joined_world(config, store=f"file://{folder}/store") as worker:
                entry(worker, *args)
    else:
        prepare_ranks(config, entry.__module__)
        _launch_processes(config, entry, args)


def _is_rank() -> bool:
    """Whether this process is a rank of a job that torchrun or srun started."""
    return all(name in os.environ for name in _JOB_VARIABLES)


def _forks(config: LaunchConfig) -> bool:
    """Whether the ranks of this node are forked."""
    return select_device(config.device).type == "cpu"


def _set_threads(config: LaunchConfig) -> None:
    """Thread pools of libraries have the size that the environment names when they are loaded."""
    os.environ["OMP_NUM_THREADS"] = str(config.threads_per_process)


@contextlib.contextmanager
def joined_world(config: LaunchConfig, *, store: str = "env://") -> Iterator[Worker]:
    """Joins the default process group for the length of the body.

    Raises:
        LaunchError: The started world is not the configured one, or it cannot be joined.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size != config.world_size:
        raise LaunchError(
            f"the job was started with {world_size} processes, but launch.processes "
            f"{config.processes} x launch.nodes {config.nodes} = {config.world_size}"
        )
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
            init_method=store,
            rank=rank,
            world_size=world_size,
            timeout=GROUP_TIMEOUT,
        )
    except (RuntimeError, dist.DistError) as error:
        raise LaunchError(f"rank {rank} cannot join the job: {_first_line(error)}") from error
    try:
        yield Worker(rank=rank, world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()


def select_device(name: str) -> torch.device:
    """The device of this rank for `auto`, `cpu` or `cuda`.

    Raises:
        LaunchError: CUDA is asked for, but this torch or machine has none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise LaunchError(
            f"launch.device is cuda, but torch {torch.__version__} finds no CUDA device here: "
            "use launch.device=cpu, or install a CUDA build of torch"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def _environment_of_one(folder: str) -> Iterator[None]:
    """The variables that DeepSpeed and torch expect of a rank, for a world of one."""
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
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


def _launch_processes(config: LaunchConfig, entry: Callable[..., None], args: Any) -> None:
    """Starts the ranks of this node through torchrun's API."""
    endpoint = _endpoint(config)
    start_method = "forkserver" if _forks(config) else "spawn"
    for name in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    elastic = ElasticConfig(
        min_nodes=config.nodes,
        max_nodes=config.nodes,
        nproc_per_node=config.processes,
        run_id="megachat" if config.nodes > 1 else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=0,
        start_method=start_method,
        local_addr=_LOOPBACK if config.nodes == 1 else None,
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=2,  # a rank that lost a peer has nothing to save
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            elastic_launch(elastic, _worker_main)(folder, config, entry, args)
        except ChildFailedError as error:
            raise _first_failure(Path(folder), error) from None
        except SignalException as error:
            name = signal.Signals(error.sigval).name
            raise LaunchError(f"the job was ended by {name}, as it was told") from None
        except (RuntimeError, dist.DistError) as error:
            raise LaunchError(
                f"cannot start the job at {endpoint}: {_first_line(error)}"
            ) from error


def _endpoint(config: LaunchConfig) -> str:
    """Where the nodes meet; a single node takes a free loopback port.

    Raises:
        LaunchError: Several nodes without a rendezvous, a malformed one, or a port in use here.
    """
    if config.rendezvous is None:
        if config.nodes > 1:
            raise LaunchError(
                f"launch.nodes is {config.nodes}, but launch.rendezvous is not set: give host:port "
                "of the first node"
            )
        return f"{_LOOPBACK}:0"
    host, _, port = config.rendezvous.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise LaunchError(f"launch.rendezvous is {config.rendezvous!r}: expected host:port")
    if config.nodes == 1:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                raise LaunchError(
                    f"launch.rendezvous {config.rendezvous}: cannot listen there "
                    f"({error.strerror}): choose another port, or leave it out on one node"
                ) from error
    return config.rendezvous


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """What a failing rank leaves for the parent."""

    rank: int
    time_ns: int
    kind: str
    message: str
    stack: str


def _worker_main(
    folder: str, config: LaunchConfig, entry: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """Main function of a started rank: failures travel to the parent, which reports the first."""
    try:
        with joined_world(config) as worker:
            try:
                entry(worker, *args)
            except Exception as error:
                # Inside the world and at once: tearing down the groups first would let the
                # "connection closed" errors of the other ranks overtake this rank's own message.
                _leave_with(error, folder)
    except Exception as error:
        _leave_with(error, folder)


def _leave_with(error: Exception, folder: str) -> NoReturn:
    """Records the failure for the parent and ends this process without any teardown."""
    failure = _Failure(
        rank=int(os.environ["RANK"]),
        time_ns=time.time_ns(),
        kind=type(error).__name__,
        message=str(error),
        stack="".join(traceback.format_exception(error)),
    )
    draft = Path(folder, f"{failure.rank}.draft")
    draft.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    draft.rename(draft.with_suffix(".json"))
    sys.stdout.flush()
    if not isinstance(error, MegachatError):
        time.sleep(_LAST_WORDS_SECONDS)
    os._exit(2 if isinstance(error, MegachatError) else 1)


def _first_failure(folder: Path, error: ChildFailedError) -> MegachatError:
    """The error of the rank that failed first, as this process should raise it.

    A MegachatError wins over the errors of ranks that merely lost their peer, and so does a death
    without a message.
    """
    failures = [_Failure(**json.loads(path.read_text("utf-8"))) for path in folder.glob("*.json")]
    failures.sort(key=lambda failure: failure.time_ns)
    for failure in failures:
        kind = vars(errors).get(failure.kind)
        if isinstance(kind, type) and issubclass(kind, MegachatError):
            return kind(failure.message)
    rank, process = error.get_first_failure()
    if rank in {failure.rank for failure in failures}:
        return LaunchError(f"rank {failures[0].rank} failed:\n{failures[0].stack}")
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        return LaunchError(f"rank {rank} was killed by {name}: see whether memory ran out")
    return LaunchError(f"rank {rank} ended without a message: exit code {process.exitcode}")


def _first_line(error: BaseException) -> str:
    """The last line of the exception's own summary, without its stack."""
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]
