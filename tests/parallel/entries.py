"""What the started ranks of the launch tests do.

Libraries that every rank needs are imported here, and so once for all ranks of a launcher.
"""

import os
import signal
import threading
import time
from pathlib import Path

import deepspeed.comm.torch  # noqa: F401
import megatron.core.pipeline_parallel.schedules  # noqa: F401
import torch
import torch.distributed as dist

from megachat.errors import LayoutError
from megachat.parallel.launch import Worker


def report(worker: Worker, folder: Path) -> None:
    """Takes part in a collective and leaves what this rank knows of itself."""
    total = torch.tensor(float(worker.rank + 1))
    dist.all_reduce(total)
    words = f"{worker.rank} {worker.world_size} {worker.device} {total.item():g}"
    threads = f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}"
    (folder / str(worker.rank)).write_text(f"{words} {threads} {dist.get_backend()}")


def fail(worker: Worker, folder: Path, how: str, launcher: int) -> None:
    """Rank 1 ends in one of several ways while the others wait for it in a collective."""
    leave_pid(folder, worker.rank)
    dist.barrier()
    if worker.rank == 1:
        (folder / "failed").write_text(str(time.time()))
        if how == "megachat":
            raise LayoutError("heads 7 are not a multiple of tensor 2: choose 1 or 7")
        if how == "unexpected":
            raise KeyError("no such thing")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "end the launcher":
            os.kill(launcher, signal.SIGTERM)
            dist.barrier()
        os._exit(7)
    dist.all_reduce(torch.zeros(1))
    raise AssertionError("the collective cannot succeed")


def fail_alone(worker: Worker) -> None:
    """The only rank raises what the user has to read."""
    raise LayoutError(f"rank {worker.rank} of {worker.world_size} has a reason")


def fail_in_phase(worker: Worker, folder: Path, rank: int, phase: str, how: str) -> None:
    """One rank fails in a phase of a job; the others go on to where they need it."""
    if worker.rank == rank and phase == "teardown":
        _fail_when_torn_down(folder, how)
    dist.barrier()
    leave_pid(folder, worker.rank)
    if phase == "teardown":
        return
    if worker.rank == rank:
        _wait_for_all(folder, worker.world_size)
        end_by(folder, how)
    dist.all_reduce(torch.zeros(1))
    raise AssertionError("the collective cannot succeed")


def leave_pid(folder: Path, rank: int) -> None:
    """Leaves this process's number, whole: the next moment it may be killed."""
    draft = folder / f"draft{rank}"
    draft.write_text(str(os.getpid()))
    draft.rename(folder / f"pid{rank}")


def end_by(folder: Path, how: str) -> None:
    """Raises, or is killed."""
    (folder / "failed").write_text(str(time.time()))
    if how == "raise":
        raise LayoutError("heads 7 are not a multiple of tensor 2: choose 1 or 7")
    os.kill(os.getpid(), signal.SIGKILL)


def _fail_when_torn_down(folder: Path, how: str) -> None:
    dist.destroy_process_group = lambda: end_by(folder, how)


def _wait_for_all(folder: Path, world_size: int) -> None:
    """Until every rank has said that it is in the last collective, or about to be."""
    while len(list(folder.glob("pid*"))) < world_size:
        time.sleep(0.01)


def stay(worker: Worker, folder: Path) -> None:
    """Says that it is there and waits for a rank that never comes."""
    dist.barrier()
    leave_pid(folder, worker.rank)
    if worker.rank > 0:
        dist.all_reduce(torch.zeros(1))
    while True:
        time.sleep(1.0)


def raise_and_tear_down_for_ever(worker: Worker, folder: Path) -> None:
    """One rank raises where `destroy_process_group` would never return."""
    dist.destroy_process_group = _never_return
    dist.barrier()
    if worker.rank == 1:
        end_by(folder, "raise")
    dist.all_reduce(torch.zeros(1))


def _never_return() -> None:
    threading.Event().wait()


def report_place(worker: Worker, folder: Path) -> None:
    """Leaves what a rank's environment tells of its place."""
    report(worker, folder)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    words = " ".join(os.environ[name] for name in names)
    (folder / f"place{worker.rank}").write_text(words)
