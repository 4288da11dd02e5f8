"""The one place for cases of `token_logprobs`: forward statistics and gradients of a slice."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.accuracy import FP32_ROUND_OFF, complaint_about
from tests.kernels.cases import Case
from tests.kernels.launch import FORMATS

TEMPERATURE = 0.7


@dataclass(frozen=True)
class StatisticsCase(Case):
    """The forward pass over one slice of the vocabulary."""

    statistics: Tensor
    """[4, tokens]: maximum, sum, weighted sum, target."""
    x: Tensor
    """float64 logits over the temperature."""
    columns: Tensor
    """Of the targets in the slice; outside of it where another slice has them."""

    @property
    def function(self) -> str:
        return "megachat_token_logprobs_forward"

    def wrong_result(self) -> str:
        """Compares each number; a padded column is one whose weight is 0.

        A thread adds up its share of the columns, which it may rescale at each, and 8 levels
        follow; a shifted logit errs by a few round-offs of the largest one, and so does its weight.
        """
        width = self.x.shape[1]
        real = self.x[:, self.x[0] > -1e30]
        shifted = real - real.amax(1, keepdim=True)
        weight, size = shifted.exp(), real.abs().amax(1)
        relative = FP32_ROUND_OFF * (2 * width / 256 + 64 + 6 * size)
        here = (self.columns >= 0) & (self.columns < width)
        target = self.x.gather(1, self.columns.clamp(0, width - 1)[:, None]).squeeze(1)
        exact = {
            "maximum": (real.amax(1), 3 * FP32_ROUND_OFF * size),
            "sum": (weight.sum(1), relative * weight.sum(1)),
            "weighted": (
                (weight * shifted).sum(1),
                relative * (weight * (1 - shifted)).sum(1),
            ),
            "target": (target.where(here, 0.0), 3 * FP32_ROUND_OFF * size),
        }
        found = [
            complaint_about(name, got, *exact[name])
            for name, got in zip(exact, self.statistics, strict=True)
        ]
        return next(filter(None, found), "")


@dataclass(frozen=True)
class GradientCase(Case):
    """The backward pass over one slice."""

    gradient: Tensor
    exact: Tensor
    internal: Tensor

    @property
    def function(self) -> str:
        return "megachat_token_logprobs_backward"

    def wrong_result(self) -> str:
        return complaint_about("gradient", self.gradient, self.exact, self.internal)


def statistics_case(
    dtype: torch.dtype, *, width: int, padding: int = 0, tokens: int = 4, vocab_start: int = 100
) -> StatisticsCase:
    """Targets, two of other slices next to this one; padded columns hold the lowest number."""
    logits, targets = _logits(dtype, width, padding, tokens, vocab_start)
    statistics = torch.full((4, tokens), torch.nan)
    return StatisticsCase(
        kernel="token_logprobs",
        arguments=(
            *(FORMATS[dtype], logits, targets, statistics),
            *(tokens, width, vocab_start, TEMPERATURE, None),
        ),
        statistics=statistics,
        x=logits.double() / TEMPERATURE,
        columns=targets - vocab_start,
    )


def gradient_case(
    dtype: torch.dtype,
    *,
    width: int,
    padding: int = 0,
    tokens: int = 4,
    in_place: bool = False,
    of: tuple[bool, bool] = (True, True),
) -> GradientCase:
    """The reference is autograd's, in float64, through log-softmax.

    Args:
        dtype: Of the logits.
        width: Columns of this slice, behind which come as many that this slice does not see.
        padding: Last columns of the slice that hold the lowest number.
        tokens: Rows.
        in_place: The gradient replaces the logits.
        of: Whether the log-probabilities and the entropy have gradients.
    """
    vocab_start = 100
    logits, targets = _logits(dtype, width, padding, tokens, vocab_start)
    generator = torch.Generator().manual_seed(width + 1)
    elsewhere = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    whole = torch.cat([logits.double(), elsewhere], 1).requires_grad_()
    log_p = (whole / TEMPERATURE).log_softmax(1)
    logsumexp = (whole / TEMPERATURE).logsumexp(1).float().detach()
    # The target of an earlier slice becomes that of a later one.
    columns = (targets - vocab_start) % (2 * width)
    logprobs = log_p.gather(1, columns[:, None]).squeeze(1)
    probability = log_p.exp()
    entropy = -(probability * log_p.clamp(min=-1e4)).sum(1)
    given = [torch.randn(tokens, generator=generator) if wanted else None for wanted in of]
    total = sum(
        (grad.double() * value).sum()
        for grad, value in zip(given, (logprobs, entropy), strict=True)
        if grad is not None
    )
    (exact,) = torch.autograd.grad(total, whole)
    # exp turns the absolute error of log p into a relative one of p; the rest is a few operations.
    kept = log_p.detach().clamp(min=-100)[:, :width]
    slope = sum(grad.abs().double() for grad in given if grad is not None)[:, None] * (9 - kept)
    size = (whole.detach().abs() / TEMPERATURE).clamp(max=100)[:, :width] + logsumexp[:, None].abs()
    error = FP32_ROUND_OFF * (4 * size + 16) * probability.detach()[:, :width] * slope
    at_target = FP32_ROUND_OFF * 4 * exact.abs()[:, :width]
    gradient = logits if in_place else torch.full_like(logits, torch.nan)
    return GradientCase(
        kernel="token_logprobs",
        arguments=(
            *(FORMATS[dtype], logits, targets, logsumexp, entropy.float().detach(), *given),
            *(gradient, tokens, width, vocab_start, TEMPERATURE, None),
        ),
        gradient=gradient,
        exact=exact[:, :width],
        internal=(error / TEMPERATURE + at_target),
    )


def _logits(
    dtype: torch.dtype, width: int, padding: int, tokens: int, vocab_start: int
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    logits = (3 * torch.randn(tokens, width, generator=generator)).to(dtype)
    logits[:, width - padding :] = torch.finfo(dtype).min
    columns = torch.randint(width - padding, (tokens,), generator=generator)
    targets = vocab_start + columns
    targets[1] = vocab_start - 1
    targets[2:3] = vocab_start + width
    return logits, targets
