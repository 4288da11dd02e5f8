"""`run_ranks`: a function on N gloo ranks, results in rank order, the first failure as an error.

Ranks are forked from a server process that has torch, megatron-core and DeepSpeed loaded, which
costs a fraction of a second a rank instead of the ten that a fresh interpreter takes.
"""

import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240.0
"""Longest time a multi-rank test may take on a busy machine."""


class RankError(AssertionError):
    """A rank failed; the message holds its rank and its own traceback."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Runs module-level `function(*args)` on every rank of a new gloo world.

    Returns:
        The picklable results in rank order.

    Raises:
        RankError: A rank raised, died or did not finish in time; the others are ended at once.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, f"{folder}/store", sender, function, args),
                daemon=True,
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        try:
            return _collect(pipes, timeout)
        finally:
            _end(processes)


def _collect(pipes: Sequence[Connection], timeout: float) -> list[Any]:
    """Waits for one message of every rank; the first failure ends the wait."""
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} did not finish in {timeout:g} s")
        for pipe in ready:
            rank = waiting[pipe]
            try:
                ok, payload = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RankError(f"rank {rank} died without a message") from None
            if not ok:
                raise RankError(f"rank {rank} failed:\n{payload}")
            results[rank] = payload
    return [results[rank] for rank in range(len(pipes))]


def _end(processes: Sequence[BaseProcess]) -> None:
    """Ends what still runs and reaps everything."""
    for process in processes:
        process.join(timeout=0.5)
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def _rank_main(
    rank: int,
    world_size: int,
    store: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Joins the world, runs the function and sends `(ok, result or traceback)`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    import torch
    import torch.distributed as dist

    from megachat.parallel import cpu_compat

    torch.set_num_threads(1)
    try:
        cpu_compat.install()
        dist.init_process_group(
            "gloo",
            init_method=Path(store).as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        message = (True, function(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))
    sender.close()
    # A healthy world leaves together; after a failure the others may hang in a collective, and the
    # parent ends them.
    if message[0]:
        dist.barrier()
        dist.destroy_process_group()
