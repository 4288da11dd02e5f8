"""The one place for dropout whose masks can be told before they are drawn.

A mask comes from its own generator, seeded with what it is for (micro-batch, layer, place, tensor
rank where the tensor is a shard), so it depends neither on the pipeline cut nor on what was drawn
before, and a recomputed layer repeats it. Nothing here touches the global random state.
"""

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from megachat.errors import ConfigError
from megachat.model.config import ModelOptions


def dropout_mask(like: Tensor, *, probability: float, seed: int) -> Tensor:
    """A mask of `like`'s shape: 0 with the given probability, else 1 / (1 - probability).

    Drawn from its own generator, so it depends on the seed and the shape only.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    keep = 1.0 - probability
    return torch.empty_like(like).bernoulli_(keep, generator=generator).div_(keep)


class ResidualAdd(nn.Module):
    """residual + dropout(x + bias), then a norm where the model is post-LN.

    Takes the place of megatron's bias-dropout-add, whose masks depend on how many random numbers
    were drawn before. `seed` is set by the layer before each use.
    """

    def __init__(self, *, norm: Callable[[], nn.Module] | None) -> None:
        """Creates the norm, if there is one."""
        super().__init__()
        self.norm = norm() if norm is not None else None
        self.seed: int | None = None

    def forward(self, training: bool, _fused: bool) -> Callable[..., Tensor]:
        """Megatron's protocol: returns the function to apply."""
        return functools.partial(self._apply_to, training=training)

    def _apply_to(
        self,
        x_and_bias: tuple[Tensor, Tensor | None],
        residual: Tensor,
        probability: float,
        *,
        training: bool,
    ) -> Tensor:
        x, bias = x_and_bias
        if bias is not None:
            x = x + bias
        if training and probability and self.seed is not None:
            x = x * dropout_mask(x, probability=probability, seed=self.seed)
        out = residual + x
        return cast(Tensor, self.norm(out)) if self.norm is not None else out


def attention_with_dropout(
    query: Tensor, key: Tensor, value: Tensor, probability: float, seed: int
) -> Tensor:
    """Plain attention: fused kernels draw their masks from the global generator."""
    seq = query.shape[2]
    future = torch.ones(seq, seq, dtype=torch.bool, device=query.device).triu(1)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    weights = scores.float().masked_fill(future, -torch.inf).softmax(-1).to(query.dtype)
    dropped: Tensor = weights * dropout_mask(weights, probability=probability, seed=seed)
    return dropped @ value


def require_dropout_key(options: ModelOptions, key: int | None) -> None:
    """Refuses a training forward pass whose masks would have no seed.

    Raises:
        ConfigError: Dropout is on and no key was set.
    """
    if key is None and (options.hidden_dropout or options.attention_dropout):
        raise ConfigError(
            f"hidden_dropout {options.hidden_dropout} and attention_dropout "
            f"{options.attention_dropout} need a key: call set_dropout_key before each micro-batch"
        )
