"""Plans of writing, up to 175B on 64 ranks, without a process group."""

import pytest
import torch

from megachat.checkpoint.save_plan import plan_files, plan_save
from megachat.model import OPT_MODELS, Head, parameter_specs
from megachat.model.specs import stage_of
from megachat.parallel.layout import ParallelLayout

BIG = OPT_MODELS["facebook/opt-175b"]
LIMIT = 5 * 10**9


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tensor=8, pipeline=8),
        ParallelLayout(tensor=8, data=8),
        ParallelLayout(tensor=8, pipeline=4, data=2),
    ],
    ids=str,
)
def test_64_ranks_write_175b_once_and_at_the_same_time(layout: ParallelLayout) -> None:
    specs = parameter_specs(BIG, tensor=layout.tensor, head=Head.LANGUAGE_MODEL)
    files = plan_files(specs, dtype=torch.bfloat16, max_shard_bytes=LIMIT)
    tasks = plan_save(files, config=BIG, layout=layout, dtype=torch.bfloat16)
    assert sorted(task.file.name for task in tasks) == [file.name for file in files]
    largest = max(spec.num_elements for spec in specs) * 2
    loads: dict[tuple[int, int], int] = {}
    for task in tasks:
        assert tuple(spec for batch in task.batches for spec in batch) == task.file.specs
        for batch in task.batches:
            assert sum(spec.num_elements for spec in batch) * 2 <= largest
        stages = {stage_of(spec, BIG, pipeline=layout.pipeline) for spec in task.file.specs}
        assert task.stage in stages and task.is_shared == (len(stages) > 1)
        place = task.stage, task.data
        loads[place] = loads.get(place, 0) + task.file.num_bytes
    assert len(loads) == layout.pipeline * layout.data
    total = sum(file.num_bytes for file in files)
    assert max(loads.values()) <= total / len(loads) + 2 * LIMIT
    shared = [task.is_shared for task in tasks]
    assert shared == sorted(shared, reverse=True)
    assert sum(shared) <= layout.pipeline - 1
