"""An optimizer that keeps its flat buffers where it is told to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.training.schedules import OptimizerConfig
from megachat.training.zero1 import Zero1Optimizer
from tests.harness import run_ranks

CONFIG = OptimizerConfig(learning_rate=0.1, epsilon=1e-3, weight_decay=0.0, clip_norm=100.0)


@dataclass
class Shelf:
    """Groups in an order of their own; stage 1 lacks the last one."""

    parameter_groups: Sequence[Sequence[str]]
    buffers: dict[int, Tensor] = field(default_factory=dict)
    changes: int = 0

    def place(self, index: int, flat: Tensor) -> Tensor:
        assert index not in self.buffers, "each group is placed once"
        self.buffers[index] = torch.full_like(flat, torch.nan).copy_(flat)
        return self.buffers[index]

    def owns(self, tensor: Tensor) -> bool:
        storages = {b.untyped_storage().data_ptr() for b in self.buffers.values()}
        return tensor.untyped_storage().data_ptr() in storages

    def weights_changed(self) -> None:
        self.changes += 1


def _train(dtype: torch.dtype) -> tuple[list[str], int, float]:
    """Names outside the storage, noted changes, and the weight after a step and a load."""
    groups = ProcessGroups.create(ParallelLayout(pipeline=2, data=2))
    model = nn.Module()
    model.matrix = nn.Parameter(torch.full((3, 5), 2.0, dtype=dtype))
    if groups.is_first_stage:
        model.edge = nn.Parameter(torch.full((7,), 1.0, dtype=dtype))
    shelf = Shelf([["matrix"], ["edge"] if groups.is_first_stage else []])
    optimizer = Zero1Optimizer(
        model, groups=groups, config=CONFIG, decayed={"matrix"}, storage=shelf
    )
    optimizer.begin_gradients(passes=1)
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.reduce_gradients()
    report = optimizer.step(0.1)
    assert report.gradient_norm > 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(10.0)
    optimizer.weights_loaded()
    optimizer.begin_gradients(passes=1)
    for parameter in model.parameters():
        parameter.sum().backward()
    optimizer.reduce_gradients()
    optimizer.step(0.0)
    strays = [name for name, value in optimizer.stored_tensors().items() if not shelf.owns(value)]
    return strays, shelf.changes, model.matrix.detach().float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_stays_in_the_storage_and_loads_are_taken_over(dtype: torch.dtype) -> None:
    for strays, changes, weight in run_ranks(4, _train, dtype):
        assert strays == []
        assert changes == 3, "a step, a load, a step"
        assert weight == pytest.approx(11.9, abs=0.05), "2 less one step of 0.1, then 10 more"
