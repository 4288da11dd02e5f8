"""The one place for the loss formulas: pure functions of tensors, no model, no batch record.

Every function takes `weights`, the share of each token or row in the global loss (its mask times
its row weight, divided by the global count), and returns sums of weight times term. Weights add up
to 1 over the global batch, so losses and metrics are means over it after summation. An entry with
weight 0 has no influence and receives gradient 0, whatever it holds.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megachat.rlhf.kl import LOG_RATIO_LIMIT, k3
from megachat.training.loss import LossTerms

TOKEN_METRICS = ("token_accuracy",)
"""Metrics of `token_loss`."""
BRADLEY_TERRY_METRICS = ("accuracy", "margin", "chosen_score", "rejected_score", "score_square")
"""Metrics of the two pair losses."""
POLICY_METRICS = (
    "surrogate",
    "clip_fraction",
    "approx_kl",
    "ratio_mean",
    "log_ratio_mean",
    "entropy",
)
"""Metrics of `policy_loss`."""
POLICY_MAXIMA = ("ratio_max", "log_ratio_max")
"""Maxima of `policy_loss`."""
VALUE_METRICS = ("value_error", "value_clip_fraction", "value_mean", "return_mean")
"""Metrics of `value_loss`."""


def token_loss(logprobs: Tensor, *, is_greedy: Tensor, weights: Tensor) -> LossTerms:
    """Negative log-likelihood of target tokens.

    Args:
        logprobs: `[rows, seq]` log-probability of each target, with gradient.
        is_greedy: `[rows, seq]` bool, the model likes no token better than the target.
        weights: `[rows, seq]` share of each target.

    Returns:
        The loss in nats per target, and the share of targets that greedy decoding would hit.
    """
    return LossTerms(
        loss=-_weighted_sum(_kept(logprobs, weights), weights),
        metrics={"token_accuracy": _weighted_sum(is_greedy.float(), weights)},
    )


def bradley_terry_loss(
    *, chosen: Tensor, rejected: Tensor, weights: Tensor, center_coef: float = 0.0
) -> LossTerms:
    """Negative log-likelihood of the preferences under Bradley-Terry.

    Per pair `-log sigmoid(chosen - rejected) + center_coef * (chosen^2 + rejected^2) / 2`; the
    second term takes away the freedom to add a constant to all scores.

    Args:
        chosen: `[pairs]` scores with gradient.
        rejected: `[pairs]` scores with gradient.
        weights: `[pairs]` share of each pair.
        center_coef: Weight of the mean square of the scores.
    """
    chosen, rejected = _kept(chosen, weights), _kept(rejected, weights)
    losses = -logsigmoid(chosen - rejected)
    return _pair_terms(losses, chosen, rejected, weights=weights, center_coef=center_coef)


def tokenwise_pair_loss(
    values: Tensor, *, tokens: Tensor, lengths: Tensor, weights: Tensor, center_coef: float = 0.0
) -> LossTerms:
    """DeepSpeed-Chat's pair loss, with no padding in it; for comparison with that system.

    Per pair the mean of `-log sigmoid(chosen_p - rejected_p)` over the positions p from the first
    at which the rows differ up to the last real token of the longer row. Past the end of the
    shorter row its final score stands in, where DeepSpeed-Chat reads the scores of pads; so both
    final scores, the ones that PPO uses, are trained. Identical rows count as differing at their
    last token alone, where the gradients of their equal scores cancel in the parameters.

    Args:
        values: `[pairs, 2, seq]` scalar-head outputs with gradient, chosen first.
        tokens: `[pairs, 2, tokens_seq]` int64; wider or narrower than `values` by padding only.
        lengths: `[pairs, 2]` int64.
        weights: `[pairs]` share of each pair.
        center_coef: Weight of the mean square of the final scores.
    """
    seq = min(values.shape[-1], tokens.shape[-1])
    columns = torch.arange(seq, device=values.device)
    held = torch.minimum(columns, (lengths[..., None] - 1).clamp(min=0))  # [pairs, 2, seq]
    scores = _kept(values.gather(2, held), weights[:, None, None])
    shorter, longer = lengths.amin(dim=1)[:, None], lengths.amax(dim=1)[:, None]
    differs = (tokens[:, 0, :seq] != tokens[:, 1, :seq]) | (columns >= shorter)
    differs = differs | (columns == longer - 1)
    is_counted = (differs.cumsum(dim=1) > 0) & (columns < longer)
    losses = -logsigmoid(scores[:, 0] - scores[:, 1]) * is_counted
    chosen, rejected = scores[..., -1].unbind(dim=1)
    return _pair_terms(
        losses.sum(dim=1) / is_counted.sum(dim=1).clamp(min=1),
        chosen,
        rejected,
        weights=weights,
        center_coef=center_coef,
    )


def policy_loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    weights: Tensor,
    clip_range: float,
    dual_clip: float,
    entropy_coef: float,
) -> LossTerms:
    """PPO's clipped surrogate (Schulman et al., 2017, eq. 7) minus an entropy bonus.

    Per token `max(-A r, -A clip(r, 1 +- clip_range))` with the ratio `r = exp(logprob - old)`;
    where A < 0 at most `-A dual_clip` (Ye et al., 2019, eq. 3).

    Args:
        logprobs: `[batch, response_len]` under the policy in training, with gradient.
        old_logprobs: `[batch, response_len]` under the policy that sampled.
        advantages: `[batch, response_len]`.
        entropy: `[batch, response_len]` of the policy in training, nats; with gradient where
            `entropy_coef` is above 0.
        weights: `[batch, response_len]` share of each token.
        clip_range: Half-width of the interval the ratio is rewarded in.
        dual_clip: Bound on the ratio where the advantage is negative; `inf` is none.
        entropy_coef: Bonus per nat.

    Returns:
        The loss; the surrogate alone; the share of tokens whose clip is active; the k3 estimate of
        KL(old || new), since the old policy sampled; mean and largest ratio; mean and largest
        absolute log-ratio; entropy.
    """
    log_ratio = _kept(logprobs - old_logprobs, weights)
    # Beyond the limit the gradient is 0 rather than the NaN of inf times 0.
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, distance = log_ratio.exp(), log_ratio.detach().abs()
    gains = _kept(advantages, weights)
    plain, clipped = -gains * ratio, -gains * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    losses = torch.maximum(plain, clipped)
    if dual_clip < float("inf"):
        losses = torch.where(gains < 0, torch.minimum(losses, -gains * dual_clip), losses)
    surrogate = _weighted_sum(losses, weights)
    mean_entropy = _weighted_sum(_kept(entropy, weights), weights)
    loss = surrogate - entropy_coef * mean_entropy if entropy_coef > 0 else surrogate
    with torch.no_grad():
        return LossTerms(
            loss=loss,
            metrics={
                "surrogate": surrogate.detach(),
                "clip_fraction": _weighted_sum((clipped > plain).float(), weights),
                "approx_kl": _weighted_sum(k3(-log_ratio), weights),
                "ratio_mean": _weighted_sum(ratio, weights),
                "log_ratio_mean": _weighted_sum(distance, weights),
                "entropy": mean_entropy.detach(),
            },
            maxima={
                "ratio_max": _largest(_kept(ratio, weights)),
                "log_ratio_max": _largest(_kept(distance, weights)),
            },
        )


def value_loss(
    values: Tensor, *, old_values: Tensor, returns: Tensor, weights: Tensor, clip_range: float
) -> LossTerms:
    """PPO's clipped squared error.

    Per token `max((V - R)^2, (clip(V, old +- clip_range) - R)^2) / 2`.

    Args:
        values: `[batch, response_len]` of the critic in training, with gradient.
        old_values: `[batch, response_len]` of the critic that the returns were made with.
        returns: `[batch, response_len]`.
        weights: `[batch, response_len]` share of each token.
        clip_range: How far a value may move from its old one and still gain; `inf` is no clip.

    Returns:
        The loss; the unclipped mean squared error; the share of tokens whose clip is active; the
        means of values and returns.
    """
    values, old_values, returns = (_kept(each, weights) for each in (values, old_values, returns))
    # Exactly the value itself inside the range; old + (value - old) would round, and count as clip.
    near = values.clamp(old_values - clip_range, old_values + clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * _weighted_sum(torch.maximum(plain, clipped), weights)
    with torch.no_grad():
        return LossTerms(
            loss=loss,
            metrics={
                "value_error": _weighted_sum(plain, weights),
                "value_clip_fraction": _weighted_sum((clipped > plain).float(), weights),
                "value_mean": _weighted_sum(values, weights),
                "return_mean": _weighted_sum(returns, weights),
            },
        )


def _pair_terms(
    losses: Tensor, chosen: Tensor, rejected: Tensor, *, weights: Tensor, center_coef: float
) -> LossTerms:
    """Adds centring and metrics to the per-pair losses."""
    square = 0.5 * (chosen.square() + rejected.square())
    loss = _weighted_sum(losses, weights)
    if center_coef > 0:
        loss = loss + center_coef * _weighted_sum(square, weights)
    with torch.no_grad():
        margin = chosen - rejected
        # A tie is half right, so a reward model that says nothing has accuracy 0.5.
        accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
        return LossTerms(
            loss=loss,
            metrics={
                "accuracy": _weighted_sum(accuracy, weights),
                "margin": _weighted_sum(margin, weights),
                "chosen_score": _weighted_sum(chosen, weights),
                "rejected_score": _weighted_sum(rejected, weights),
                "score_square": _weighted_sum(square, weights),
            },
        )


def _kept(values: Tensor, weights: Tensor) -> Tensor:
    """float32 values, 0 in value and gradient where the weight is 0, even if they are NaN there."""
    return values.float().masked_fill(weights == 0, 0.0)


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Scalar sum of weight times value."""
    return (values * weights).sum()


def _largest(values: Tensor) -> Tensor:
    """Scalar maximum, 0 of nothing."""
    return values.max() if values.numel() else values.new_zeros(())
