"""The one place for advantages: generalised estimation, whitening and explained variance.

All tensors are `[batch, response_len]`, aligned to response tokens, and a response is a prefix of
its row. Rows are the whole experience, so that every statistic is over the global batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megachat.rlhf.config import Whitening

_VARIANCE_EPSILON = 1e-8
"""Keeps whitening finite where all advantages are equal. Deviations far below 1e-4, round-off of
equal numbers among them, are not blown up to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageEstimates:
    """What PPO trains the two models towards."""

    advantages: Tensor
    """[batch, response_len] float32, not whitened; 0 where masked."""
    returns: Tensor
    """[batch, response_len] float32, advantage plus value, the critic's target; 0 where masked."""


def generalized_advantages(
    *, rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> AdvantageEstimates:
    """Generalised advantage estimation (Schulman et al., 2015, eq. 16) over responses.

    `delta_t = r_t + gamma V_{t+1} - V_t` and `A_t = delta_t + gamma lam A_{t+1}`. The episode ends
    with the last response token, finished or cut off: nothing after it is valued. The step that
    emits EOS is a step like any other.

    Args:
        rewards: `[batch, response_len]`.
        values: `[batch, response_len]`, value of the state in which each token is chosen.
        response_mask: `[batch, response_len]` bool.
        gamma: Discount per token.
        lam: Decay of the estimate; 1 is the discounted return minus the value.

    Returns:
        Advantages and returns; values at masked positions have no influence.
    """
    rewards = rewards.float().masked_fill(~response_mask, 0.0)
    values = values.float().masked_fill(~response_mask, 0.0)
    next_values = torch.zeros_like(values)
    next_values[:, :-1] = values[:, 1:]
    deltas = rewards + gamma * next_values - values
    advantages = torch.empty_like(deltas)
    ahead = deltas.new_zeros(deltas.shape[0])
    for column in range(deltas.shape[1] - 1, -1, -1):
        # Beyond a response every delta is 0, so what is carried into its last token is 0.
        ahead = deltas[:, column] + gamma * lam * ahead
        advantages[:, column] = ahead
    return AdvantageEstimates(advantages=advantages, returns=advantages + values)


def whiten(values: Tensor, *, mask: Tensor, whitening: Whitening) -> Tensor:
    """Standardises the unmasked entries over the whole batch.

    Args:
        values: `[batch, response_len]`.
        mask: `[batch, response_len]` bool.
        whitening: Nothing, scale alone, or scale and mean.

    Returns:
        `[batch, response_len]`, 0 where masked. With `scale` and `full` the variance v of the
        unmasked entries becomes `v / (v + 1e-8)`: 1 unless they were almost equal. With `scale`
        their mean is divided like them; with `full` it becomes 0.
    """
    kept = values.masked_fill(~mask, 0.0)
    if whitening is Whitening.NONE:
        return kept
    mean = masked_mean(values, mask=mask)
    scale = (masked_variance(values, mask=mask) + _VARIANCE_EPSILON).rsqrt()
    if whitening is Whitening.SCALE:
        return kept * scale
    return ((kept - mean) * scale).masked_fill(~mask, 0.0)


def explained_variance(values: Tensor, *, returns: Tensor, mask: Tensor) -> Tensor:
    """How much of the returns' variance the critic's values account for.

    Args:
        values: `[batch, response_len]`.
        returns: `[batch, response_len]`.
        mask: `[batch, response_len]` bool.

    Returns:
        Scalar `1 - Var(returns - values) / Var(returns)`: 1 is perfect, 0 no better than a
        constant; 0 also where the returns do not vary.
    """
    total = masked_variance(returns, mask=mask)
    residual = masked_variance(returns - values, mask=mask)
    return torch.where(total > 0, 1.0 - residual / total.clamp(min=1e-30), 0.0)


def masked_mean(values: Tensor, *, mask: Tensor) -> Tensor:
    """Scalar mean of the unmasked entries; 0 where there are none."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(values: Tensor, *, mask: Tensor) -> Tensor:
    """Scalar mean squared deviation of the unmasked entries; 0 where there are none."""
    deviations = values - masked_mean(values, mask=mask)
    return masked_mean(deviations.square(), mask=mask)
