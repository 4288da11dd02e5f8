"""When reductions of gradients start, and in which order."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megachat.model import Recompute
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.training import buffers, gradients
from megachat.training.gradients import GradientReducer
from tests.harness import run_ranks
from tests.training import tasks
from tests.training.tasks import TASKS


class _Chain(nn.Module):
    """Three matrices after each other, and one that no pass comes to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.unused = (
            nn.Parameter(torch.full((2, 2), float(value))) for value in (1, 2, 3, 4)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.first @ self.second @ self.third


def _record_starts() -> list[str]:
    """What happens from now on: each `start` of a reduction, and the `finish` of all."""
    events: list[str] = []
    start, finish = gradients.start_reduce_scatter, GradientReducer.finish

    def noted_start(flat: Tensor, group: dist.ProcessGroup) -> Any:
        events.append("start")
        return start(flat, group)

    def noted_finish(reducer: GradientReducer) -> None:
        events.append("finish")
        finish(reducer)

    vars(gradients)["start_reduce_scatter"] = noted_start
    GradientReducer.finish = noted_finish  # type: ignore[method-assign]
    return events


def _reduce_chain(shared: list[str], buffers: list[list[str]]) -> tuple[list[str], list[float]]:
    """Two passes; the sums of all buffers' own parts over both ranks and passes."""
    events = _record_starts()
    group = ProcessGroups.create(ParallelLayout(data=2)).data
    model = _Chain()
    named = dict(model.named_parameters())
    flats = [torch.zeros(4 * len(names)) for names in buffers]
    for names, flat in zip(buffers, flats, strict=True):
        for name, part in zip(names, flat.split(4), strict=True):
            named[name].grad = part.view(2, 2)
    reducer = GradientReducer(
        [[named[name] for name in names] for names in buffers],
        forward_order=list(named.values()),
        shared=[named[name] for name in shared],
        group=group,
    )
    reducer.begin(flats, passes=2)
    for name, parameter in named.items():
        parameter.register_hook(partial(_note, events, name))
    for _ in range(2):
        model(torch.eye(2)).sum().backward()
        events.append("pass")
    reducer.finish()
    own = [flat.chunk(2)[dist.get_rank()].sum().item() for flat in flats]
    return events, own


def _note(events: list[str], name: str, _: Tensor) -> None:
    events.append(name)


def test_a_buffer_starts_with_its_last_gradient_in_the_last_pass_and_the_rest_follow() -> None:
    buffers = [["first"], ["second", "third"]]
    for events, _ in run_ranks(2, _reduce_chain, [], buffers):
        first_pass, second_pass, rest = " ".join(events).replace("pass", "|").split("|")
        assert "start" not in first_pass
        assert second_pass.split() == ["third", "second", "start", "first", "start"]
        assert rest.split() == ["finish"]


def test_shared_gradients_and_those_that_never_come_wait_for_the_end() -> None:
    """The order of starts is the same on ranks whose gradients come in another one."""
    buffers = [["first"], ["second"], ["third"], ["unused"]]
    for events, _ in run_ranks(2, _reduce_chain, ["second"], buffers):
        last = events.index("finish")
        # `unused` stands last in the model, so everything is behind it in the order.
        assert events.count("start") == 4
        assert "start" not in events[:last]
    for events, _ in run_ranks(2, _reduce_chain, ["second"], buffers[:3]):
        last = events.index("finish")
        assert (events[:last].count("start"), events[last:].count("start")) == (2, 1)


def test_the_sums_are_those_of_both_ranks_and_passes() -> None:
    (_, own), (_, other) = run_ranks(2, _reduce_chain, [], [["first"], ["second"], ["third"]])
    model = _Chain()
    model(torch.eye(2)).sum().backward()
    for index, parameter in enumerate((model.first, model.second, model.third)):
        assert parameter.grad is not None
        assert own[index] + other[index] == 4 * parameter.grad.sum().item()


def _grow_late() -> str:
    group = ProcessGroups.create(ParallelLayout(data=2)).data
    model = _Chain()
    flat = torch.zeros(4)
    model.third.grad = flat.view(2, 2)
    reducer = GradientReducer(
        [[model.third]], forward_order=list(model.parameters()), shared=[], group=group
    )
    reducer.begin([flat], passes=1)
    model(torch.eye(2)).sum().backward()
    with pytest.raises(RuntimeError) as late:
        model(torch.eye(2)).sum().backward()
    reducer.finish()
    return str(late.value)


def test_a_gradient_that_grows_after_it_was_sent_is_an_error() -> None:
    for message in run_ranks(2, _grow_late):
        assert "after 1 backward passes" in message


def _starts_of_a_training(options: dict[str, Any], degrees: dict[str, int]) -> tuple[int, int]:
    """Reductions that began before the backward passes were over, and all of them."""
    vars(buffers)["BUFFER_ELEMENTS"] = 1000
    events = _record_starts()
    layout = ParallelLayout.for_world(dist.get_world_size(), **degrees)
    engine = tasks.make_engine("sft", layout, micro_batch_rows=1, **options)
    batch = TASKS["sft"].make_batch(tasks.ROWS, 0)
    engine.forward_backward(batch, TASKS["sft"].objective(engine, batch))
    assert events.count("finish") == 1
    return events.index("finish"), events.count("start")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_most_reductions_begin_while_the_last_micro_batch_runs_backward(
    dtype: torch.dtype,
) -> None:
    """Also where activations are computed again, in a pipeline, and with filler micro-batches."""
    options = {"dtype": dtype, "recompute": Recompute.FULL}
    for early, every in run_ranks(2, _starts_of_a_training, options, {}):
        assert (early, every) == (every, every)
        assert every > 6
    for early, every in run_ranks(4, _starts_of_a_training, options, {"pipeline": 2}):
        # The tied word embedding waits for its copy on the other stage.
        assert every - 2 <= early < every
