from typing import Any

import pytest
import torch
import torch.distributed as dist

from megachat.errors import LayoutError
from megachat.parallel.collectives import all_reduce_sum
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import Axis, ParallelLayout
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
