"""What the started ranks of the launch tests do."""

import os
import signal
import time
from pathlib import Path

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
    (folder / f"pid{worker.rank}").write_text(str(os.getpid()))
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
