"""Memory that all ranks of a group reach: who can have it, and that it is what the others see."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from megachat.generation.graphs import CudaGraphRecorder
from megachat.ops import cuda_kernels, peer_memory
from megachat.ops.all_reduce import PeerSum, group_sum
from megachat.ops.peer_memory import map_regions, share_memory
from megachat.ops.registry import Backend
from tests.harness import run_ranks

GPU_TIMEOUT_SECONDS = 300.0
"""For two processes that start, build the kernels and sum."""


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _written() -> list[int]:
    """What a rank reads after all have written their number, each in its own place."""
    group = _world()
    memory = share_memory(group, 64)
    assert memory is not None
    assert bytes(memory) == bytes(64)
    dist.barrier()
    memory[group.rank()] = group.rank() + 1
    dist.barrier()
    return list(memory[:3])


def test_ranks_see_what_others_write_in_shared_memory() -> None:
    assert run_ranks(3, _written) == [[1, 2, 3]] * 3


def _pretend(patch: pytest.MonkeyPatch, uuids: list[str], *, reach: bool = True) -> None:
    """A process that sees these GPUs, without any."""
    properties = {number: SimpleNamespace(uuid=uuid) for number, uuid in enumerate(uuids)}
    patch.setattr(torch.cuda, "device_count", lambda: len(uuids))
    patch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: properties[device if isinstance(device, int) else device.index],
    )
    patch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: reach)


OBSTACLES = {
    "another host": "ranks 0 and 1 are on different hosts",
    "hidden": "rank 0 does not see the GPU of rank 1",
    "apart": "cuda:0 of rank 0 cannot access cuda:1 of rank 1",
    "cannot share": "torch cannot share memory of cuda:1: no such allocator",
    "cannot map": "cuda:1 cannot map memory of another rank: not permitted",
}


def _map_with(obstacle: str) -> tuple[bool, list[str]]:
    """Whether there are regions, and the lines that say why not."""
    rank, lines = _world().rank(), []

    def refuse(text: str) -> Any:
        def call(*_: object) -> Any:
            raise RuntimeError(text)

        return call

    with pytest.MonkeyPatch.context() as patch:
        _pretend(patch, ["a", "b"], reach=obstacle != "apart")
        if obstacle == "another host":
            patch.setattr(peer_memory, "_place", lambda device: (f"host {rank}", "a"))
        if obstacle == "hidden" and rank == 0:
            _pretend(patch, ["a"])
        offers = refuse("no such allocator") if (obstacle, rank) == ("cannot share", 1) else _offers
        mapped = refuse("not permitted") if (obstacle, rank) == ("cannot map", 1) else _mapped
        patch.setattr(peer_memory, "_offers", offers)
        patch.setattr(peer_memory, "_mapped", mapped)
        zeros = torch.zeros
        patch.setattr(torch, "zeros", lambda size, *, dtype, device: zeros(size, dtype=dtype))
        stream = SimpleNamespace(synchronize=lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda device: stream)
        patch.setattr(peer_memory._LOG, "info", lambda text, *values: lines.append(text % values))
        regions = map_regions(_world(), torch.device("cuda", rank), 32)
    return regions is not None, lines


def _offers(own: Tensor, group: dist.ProcessGroup) -> list[tuple[int, int] | None]:
    """To each other rank, who offers it to whom."""
    return [None if rank == group.rank() else (group.rank(), rank) for rank in range(group.size())]


def _mapped(handle: tuple[int, int], device: torch.device) -> Tensor:
    assert handle == (1 - device.index, device.index)
    return torch.ones(32, dtype=torch.uint8)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_keeps_one_rank_from_memory_of_a_gpu_is_said_on_all(obstacle: str) -> None:
    for found, lines in run_ranks(2, _map_with, obstacle):
        assert not found
        assert lines == [f"sums of a tensor group go through NCCL: {OBSTACLES[obstacle]}"]


def test_without_an_obstacle_each_rank_maps_what_was_offered_to_it() -> None:
    assert run_ranks(2, _map_with, "") == [(True, [])] * 2


def test_two_ranks_may_use_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which cannot access itself as a peer."""
    _pretend(monkeypatch, ["a"], reach=False)
    assert peer_memory._obstacle([("host", "a")] * 2, 1, torch.device("cuda", 0)) == ""


def test_torch_tells_other_processes_of_a_storage_as_this_project_expects() -> None:
    """The number of the GPU, then a handle: the same that torch's own queues hand on."""
    names = list(rebuild_cuda_tensor.__code__.co_varnames)
    assert names[6:10] == [
        "storage_device",
        "storage_handle",
        "storage_size_bytes",
        "storage_offset_bytes",
    ]
    assert names[11:15] == [
        "ref_counter_handle",
        "ref_counter_offset",
        "event_handle",
        "event_sync_required",
    ]


def _sum_on_one_gpu(rank: int, store: str) -> None:
    """Computed, then recorded and replayed, in all dtypes."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    add_up = group_sum(_world(), Backend.CUDA, device=device)
    assert isinstance(add_up, PeerSum)
    most = cuda_kernels.ALL_REDUCE_BYTES
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (16 // dtype.itemsize, 3 * 4096, most // dtype.itemsize):
            whole = torch.arange(count, device=device).remainder(97).to(dtype)
            for _ in range(3):
                message = whole * (rank + 1)
                assert add_up(message) is message
                assert torch.equal(message, whole * 3), (dtype, count)
    message = torch.ones(64, device=device)
    recording = CudaGraphRecorder(device).record(lambda: add_up(message * (rank + 1)))
    for value in (1.0, 5.0, 7.0):
        message.fill_(value)
        recording.replay()
        assert torch.equal(recording.output, message * 3)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.gpu
def test_two_processes_on_one_gpu_sum_through_its_memory(tmp_path: Path) -> None:
    """They start anew: a process that was forked from one with CUDA has none."""
    store = (tmp_path / "store").as_uri()
    context = torch.multiprocessing.spawn(_sum_on_one_gpu, (store,), nprocs=2, join=False)
    deadline = time.monotonic() + GPU_TIMEOUT_SECONDS
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the processes did not finish: do they wait?"
    finally:
        for process in context.processes:
            process.kill()
