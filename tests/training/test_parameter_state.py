"""What an optimizer hangs on a parameter is taken off, and nothing else."""

import torch
from torch import nn

from megachat.training.parameter_state import ParameterState


def test_what_came_later_is_taken_off_and_what_was_there_stays() -> None:
    parameter = nn.Parameter(torch.ones(2))
    calls: list[str] = []
    parameter.mark = "the model's own"  # type: ignore[attr-defined]
    parameter.register_post_accumulate_grad_hook(lambda _: calls.append("own"))
    state = ParameterState.of(parameter)
    parameter.mark = "changed"  # type: ignore[attr-defined]
    parameter._link = torch.ones(3)  # type: ignore[attr-defined]
    parameter.register_post_accumulate_grad_hook(lambda _: calls.append("later"))
    parameter.register_hook(lambda _: calls.append("later, too"))
    parameter.sum().backward()
    assert sorted(calls) == ["later", "later, too", "own"] and parameter.grad is not None
    for _ in range(2):
        state.restore()
    assert vars(parameter) == {"mark": "changed"} and parameter.grad is None
    calls.clear()
    parameter.sum().backward()
    assert calls == ["own"]
    assert torch.equal(parameter, torch.ones(2))


def test_a_parameter_without_hooks_is_left_without() -> None:
    parameter = nn.Parameter(torch.ones(2))
    state = ParameterState.of(parameter)
    handle = parameter.register_hook(lambda gradient: gradient)
    state.restore()
    assert not parameter._backward_hooks
    handle.remove()  # who registered it may still do so
