import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers the backend)

from megachat.errors import LayoutError
from megachat.parallel.collectives import all_reduce_sum
from megachat.parallel.groups import GenerationGroups, ProcessGroups
from megachat.parallel.layout import Axis, GenerationPlacement, ParallelLayout
from tests.harness import run_ranks

LAYOUT = ParallelLayout(tensor=2, pipeline=2, data=2)


def _ranks(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _describe(layout: ParallelLayout) -> dict[str, Any]:
    groups = ProcessGroups.create(layout)
    collection, mpu = groups.megatron, groups.deepspeed_mpu
    return {
        "own": {
            name: _ranks(group)
            for name, group in (
                ("tensor", groups.tensor),
                ("pipeline", groups.pipeline),
                ("data", groups.data),
                ("model", groups.model),
                ("embedding", groups.embedding),
                ("single", groups.single),
            )
        },
        "coordinate": groups.coordinate,
        "stages": (groups.is_first_stage, groups.is_last_stage),
        "megatron": {
            name: _ranks(value[0] if name == "hcp" else value)
            for name, value in vars(collection).items()
            if value is not None
        },
        "mpu groups": [
            _ranks(mpu.get_model_parallel_group()),
            _ranks(mpu.get_tensor_model_parallel_group()),
            _ranks(mpu.get_pipeline_model_parallel_group()),
            _ranks(mpu.get_data_parallel_group()),
        ],
        "mpu sizes": [
            mpu.get_model_parallel_world_size(),
            mpu.get_tensor_model_parallel_world_size(),
            mpu.get_pipeline_model_parallel_world_size(),
            mpu.get_data_parallel_world_size(),
        ],
        "mpu ranks": [
            mpu.get_model_parallel_rank(),
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_pipeline_model_parallel_rank(),
            mpu.get_data_parallel_rank(),
        ],
        "mpu source": mpu.get_tensor_model_parallel_src_rank(),
        "mpu data ranks": mpu.get_data_parallel_group_ranks(),
        "same objects": collection is groups.megatron and mpu is groups.deepspeed_mpu,
    }


def test_groups_and_both_adapters_equal_the_layout() -> None:
    for rank, found in enumerate(run_ranks(8, _describe, LAYOUT)):
        tensor, data, pipeline = (
            list(LAYOUT.ranks_along(axis, rank)) for axis in (Axis.TENSOR, Axis.DATA, Axis.PIPELINE)
        )
        model = next(list(group) for group in LAYOUT.model_groups() if rank in group)
        own = {
            "tensor": tensor,
            "pipeline": pipeline,
            "data": data,
            "model": model,
            "embedding": pipeline,
            "single": [rank],
        }
        assert found["own"] == own
        here = LAYOUT.coordinate(rank)
        assert found["coordinate"] == here
        assert found["stages"] == (here.pipeline == 0, here.pipeline == 1)
        assert found["mpu groups"] == [model, tensor, pipeline, data]
        assert found["mpu sizes"] == [4, 2, 2, 2]
        assert found["mpu ranks"] == [model.index(rank), here.tensor, here.pipeline, here.data]
        assert (found["mpu source"], found["mpu data ranks"]) == (tensor[0], data)
        assert found["same objects"]
        expected = {
            **dict.fromkeys(("tp", "tp_cp", "expt_tp", "tp_ep"), tensor),
            **dict.fromkeys(("dp", "dp_cp", "expt_dp"), data),
            **dict.fromkeys(("mp", "tp_ep_pp"), model),
            **dict.fromkeys(("cp", "hcp", "ep", "pos_embd"), [rank]),
            "pp": pipeline,
            "embd": pipeline,
        }
        assert found["megatron"] == expected


def _sum_in_two_layouts() -> list[list[float]]:
    """Collectives of a deep and of a flat layout, taken in turn on groups that are both alive."""
    one = ProcessGroups.create(ParallelLayout(tensor=2, pipeline=2))
    other = ProcessGroups.create(ParallelLayout(data=4))
    rank = float(dist.get_rank())
    return [
        [
            all_reduce_sum(torch.tensor(rank), group).item()
            for group in (one.tensor, other.data, one.pipeline, other.tensor, one.data, one.model)
        ]
        for _ in range(2)
    ]


def test_two_layouts_are_alive_at_once() -> None:
    for rank, (first, second) in enumerate(run_ranks(4, _sum_in_two_layouts)):
        tensor, pipeline = (1, 1, 5, 5)[rank], (2, 4, 2, 4)[rank]
        assert first == second == [tensor, 6, pipeline, rank, rank, 6]


def _embedding_groups_of_three_stages() -> list[int]:
    groups = ProcessGroups.create(ParallelLayout(pipeline=3))
    with pytest.raises(LayoutError, match=r"2 x 1 x 1 = 2 ranks, but 3 processes were started"):
        ProcessGroups.create(ParallelLayout(tensor=2))
    return _ranks(groups.embedding)


def test_a_middle_stage_has_an_embedding_group_of_its_own_and_a_wrong_world_is_refused() -> None:
    assert run_ranks(3, _embedding_groups_of_three_stages) == [[0, 2], [1], [0, 2]]


class _UnservedStore(dist.Store):
    """A store with no other rank behind it: who asks it for something would wait for one."""

    def set(self, key: str, value: Any) -> None:
        raise AssertionError(f"a rank that starts up tells the store {key}")

    def get(self, key: str) -> bytes:
        raise AssertionError(f"a rank that starts up asks the store for {key}")

    def add(self, key: str, value: int) -> int:
        raise AssertionError(f"a rank that starts up counts {key} in the store")

    def wait(self, keys: list[str], *_: Any) -> None:
        raise AssertionError(f"a rank that starts up waits for {keys}")


@contextlib.contextmanager
def _fake_world(rank: int, world_size: int) -> Iterator[list[tuple[int, ...]]]:
    """One rank of a world that does not exist; yields the ranks of each `new_group` as it comes."""
    calls: list[tuple[int, ...]] = []
    create = dist.new_group

    def counted(ranks: list[int], **options: Any) -> Any:
        calls.append(tuple(ranks))
        return create(ranks, **options)

    dist.init_process_group("fake", store=_UnservedStore(), rank=rank, world_size=world_size)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "new_group", counted)
            yield calls
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 100, 511])
def test_each_of_512_ranks_creates_the_communicators_that_it_uses_and_no_others(rank: int) -> None:
    layout = ParallelLayout(tensor=8, pipeline=8, data=8)
    with _fake_world(rank, 512) as calls:
        groups = ProcessGroups.create(layout)
        is_end = rank // 64 in (0, 7)  # a middle stage has no embedding
        own = [ranks for ranks in calls if rank in ranks and len(ranks) > 1]
        assert len(own) == len(set(own)) == 4 + is_end
        assert len(calls) == 3 * 64 + 8 + 64 + 1, "those of all ranks once, and this rank alone"
        assert [ranks for ranks in calls if len(ranks) == 1] == [(rank,)]
        assert (groups.embedding is groups.single) is not is_end

        calls.clear()
        placement = GenerationPlacement(source=layout, tensor=8)
        generation = GenerationGroups.create(placement, training=groups)
        assert calls == [placement.replica_group(first) for first in range(8)]
        assert generation.tensor is groups.tensor and generation.gather is groups.pipeline
        assert generation.tiles is groups.single

        calls.clear()
        critic = ProcessGroups.create(ParallelLayout(data=512))
        assert not calls, "the world is there, and so is this rank alone"
        assert critic.data is dist.group.WORLD and critic.tensor is critic.model is groups.single


def test_a_communicator_ends_with_the_last_layout_that_uses_it() -> None:
    with _fake_world(1, 4) as calls:
        layout = ParallelLayout(tensor=2, data=2)
        one, other = ProcessGroups.create(layout), ProcessGroups.create(layout)
        placement = GenerationPlacement(source=layout, tensor=1)
        generation = GenerationGroups.create(placement, training=one)
        assert one.tensor is other.tensor is generation.tiles
        for _ in range(2):  # the second time there is nothing left to give back
            one.close()
        assert _ranks(other.tensor) == [0, 1], "the other layout still uses it"
        other.close()
        assert _ranks(generation.tiles) == [0, 1], "generation still uses it"
        generation.close()
        assert len(dist.distributed_c10d._world.pg_names) == 2, "the world, and this rank alone"
        calls.clear()
        assert _ranks(ProcessGroups.create(layout).tensor) == [0, 1]
        assert calls == [(0, 1), (2, 3), (0, 2), (1, 3)]


def test_groups_may_be_closed_after_their_world_has_ended() -> None:
    with _fake_world(0, 2):
        groups = ProcessGroups.create(ParallelLayout(tensor=2))
    groups.close()
    with _fake_world(0, 2):
        again = ProcessGroups.create(ParallelLayout(tensor=2))
        groups.close()
        assert _ranks(again.tensor) == [0, 1]


def _threads_over_the_life_of_groups() -> tuple[int, int, int]:
    """Threads of this process before a layout has groups, with them, and after their end."""

    def count() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    ProcessGroups.create(ParallelLayout(data=4))  # what all layouts share stays
    before = count()
    groups = ProcessGroups.create(ParallelLayout(tensor=2, pipeline=2))
    all_reduce_sum(torch.ones(1), groups.tensor)
    during = count()
    if dist.get_rank() != 2:  # nobody waits for who does not come
        groups.close()
    del groups
    gc.collect()
    return before, during, count()


def test_closed_groups_leave_no_threads_and_wait_for_nobody() -> None:
    for rank, (before, during, after) in enumerate(
        run_ranks(4, _threads_over_the_life_of_groups, timeout=60)
    ):
        assert during > before
        assert after == (during if rank == 2 else before)
