"""Notes what a parameter carries, so that what an optimizer hangs on it can be taken off again."""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterState:
    """Attributes and hooks of a parameter before an optimizer is built on it.

    DeepSpeed links parameters to its own tensors by attributes, and by hooks whose closures hold
    the whole optimizer. Its `destroy()` leaves some of both, and a model outlives its optimizer.
    """

    parameter: nn.Parameter
    attributes: frozenset[str]
    hooks: frozenset[int]
    """By their keys in the parameter's tables."""

    @classmethod
    def of(cls, parameter: nn.Parameter) -> "ParameterState":
        """As it is now."""
        return cls(
            parameter=parameter,
            attributes=frozenset(vars(parameter)),
            hooks=frozenset(key for table in _hook_tables(parameter) for key in table),
        )

    def restore(self) -> None:
        """Takes off what came later, and the gradient."""
        for name in vars(self.parameter).keys() - self.attributes:
            delattr(self.parameter, name)
        for table in _hook_tables(self.parameter):
            for key in table.keys() - self.hooks:
                del table[key]
        self.parameter.grad = None


def _hook_tables(parameter: nn.Parameter) -> list[dict[int, Any]]:
    """What torch calls when a gradient exists, and when it has been accumulated."""
    tables = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
    return [table for table in tables if table]
