"""The one place where logits become log-probabilities: of given tokens, with entropy, any sharding.

Logits are the largest tensor of a training step (`seq x vocab` per row), so nothing of their size
is made in float32: both directions work on chunks of tokens, and what is kept for the backward
pass is the logits themselves plus two float32 numbers per token. The vocabulary may be cut over a
tensor group; each rank passes its own slice, and two small all-reduces in the forward pass (none in
the backward pass) combine the slices.

With `x` = logits / temperature: `logsumexp = log sum_k exp(x_k)`, `p_k = exp(x_k - logsumexp)`,
`logprob = x_target - logsumexp`, `entropy = logsumexp - sum_k p_k x_k`, and

    d logprob / d logit_k = ([k = target] - p_k) / temperature
    d entropy / d logit_k = -p_k (log p_k + entropy) / temperature.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megachat.errors import ConfigError
from megachat.parallel.collectives import all_reduce_max, all_reduce_sum

CHUNK_ELEMENTS = 1 << 20
"""Elements of the largest float32 temporary: 4 MiB, which a CPU core's caches still absorb."""

_NEGLIGIBLE = -1e4
"""Lowest shifted logit that is kept apart: `exp` of it is 0 in every dtype, and it times 0 is 0,
where the -inf of a padded vocabulary column times 0 would be NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """What a language model says about given tokens."""

    logprobs: Tensor
    """[batch, seq] float32 log-probability of each target token; differentiable."""
    entropy: Tensor
    """[batch, seq] float32 entropy of each predicted distribution, nats; differentiable."""
    is_greedy: Tensor
    """[batch, seq] bool, no token is likelier than the target."""


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_start: int,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Log-probability of given tokens under temperature-scaled logits.

    Args:
        logits: `[batch, seq, vocab/tp]`, any float dtype, this rank's slice of the vocabulary;
            padded columns hold the dtype's lowest number.
        targets: `[batch, seq]` int64 ids of the whole vocabulary, the same on all ranks of `group`.
        group: Ranks that share the vocabulary; None when this rank holds all of it.
        vocab_start: First vocabulary id of this rank's slice.
        temperature: Divides the logits, above 0.
        chunk_elements: Bound on the elements of a float32 temporary (one token's slice at least).

    Returns:
        `[batch, seq]` float32 (float64 for float64 logits); its gradient has the logits' dtype.

    Raises:
        ConfigError: The temperature is not above 0.
    """
    return token_statistics(
        logits,
        targets,
        group=group,
        vocab_start=vocab_start,
        temperature=temperature,
        chunk_elements=chunk_elements,
    ).logprobs


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_start: int,
    temperature: float = 1.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> TokenStatistics:
    """Log-probabilities, entropy and greedy hits in one pass over the logits.

    Arguments and errors are those of `token_logprobs`.
    """
    if not temperature > 0:
        raise ConfigError(f"log-probabilities need a temperature above 0, got {temperature}")
    if not logits.is_contiguous() and logits.transpose(0, 1).is_contiguous():
        # Megatron computes [seq, batch, vocab]; work in that order rather than copy the logits.
        swapped = token_statistics(
            logits.transpose(0, 1),
            targets.transpose(0, 1),
            group=group,
            vocab_start=vocab_start,
            temperature=temperature,
            chunk_elements=chunk_elements,
        )
        return TokenStatistics(
            logprobs=swapped.logprobs.transpose(0, 1),
            entropy=swapped.entropy.transpose(0, 1),
            is_greedy=swapped.is_greedy.transpose(0, 1),
        )
    chunk_tokens = max(1, chunk_elements // logits.shape[-1])
    logprobs, entropy, is_greedy = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), targets.flatten(), group, vocab_start, temperature, chunk_tokens
    )
    return TokenStatistics(
        logprobs=logprobs.view(targets.shape),
        entropy=entropy.view(targets.shape),
        is_greedy=is_greedy.view(targets.shape),
    )


class _TokenStatistics(torch.autograd.Function):
    """Closed-form forward and backward over `[tokens, vocab/tp]`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        group: ProcessGroup | None,
        vocab_start: int,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logprobs, entropy and is_greedy, each `[tokens]`."""
        dtype = _compute_dtype(logits)
        columns, is_local = _local_columns(targets, vocab_start=vocab_start, width=logits.shape[1])
        # The largest logit is found before scaling: exact in every dtype and free of overflow.
        shift = logits.amax(dim=1).to(dtype)
        if group is not None:
            all_reduce_max(shift, group)
        shift.div_(temperature)
        # Rows: sum exp, sum exp times the shifted logit, the target's shifted logit.
        sums = torch.zeros(3, len(targets), dtype=dtype, device=logits.device)
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            shifted = logits[part].to(dtype, copy=True).div_(temperature).sub_(shift[part, None])
            sums[2, part] = shifted.gather(1, columns[part, None]).squeeze(1)
            shifted.clamp_(min=_NEGLIGIBLE)
            weight = shifted.exp()
            sums[0, part] = weight.sum(dim=1)
            sums[1, part] = weight.mul_(shifted).sum(dim=1)
        sums[2].masked_fill_(~is_local, 0.0)
        if group is not None:
            all_reduce_sum(sums, group)
        log_total = sums[0].log()
        logprobs = sums[2] - log_total
        entropy = log_total - sums[1] / sums[0]
        is_greedy = sums[2] >= 0
        ctx.save_for_backward(logits, targets, shift + log_total, entropy)
        ctx.vocab_start, ctx.temperature, ctx.chunk_tokens = vocab_start, temperature, chunk_tokens
        ctx.mark_non_differentiable(is_greedy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy, is_greedy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        """The gradient of this rank's slice, in the dtype of the logits."""
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, None, None, None
        logits, targets, logsumexp, entropy = ctx.saved_tensors
        columns, is_local = _local_columns(
            targets, vocab_start=ctx.vocab_start, width=logits.shape[1]
        )
        gradient = torch.empty_like(logits)
        for start in range(0, len(targets), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            log_p = logits[part].to(logsumexp.dtype, copy=True).div_(ctx.temperature)
            log_p.sub_(logsumexp[part, None]).clamp_(min=_NEGLIGIBLE)
            chunk = log_p.exp()
            slope = 0.0 if grad_logprobs is None else grad_logprobs[part, None]
            if grad_entropy is None:
                chunk.mul_(-slope)
            else:
                log_p.add_(entropy[part, None]).mul_(grad_entropy[part, None]).add_(slope)
                chunk.mul_(log_p.neg_())
            if grad_logprobs is not None:
                at_target = grad_logprobs[part].masked_fill(~is_local[part], 0.0)
                chunk.scatter_add_(1, columns[part, None], at_target[:, None])
            gradient[part] = chunk.div_(ctx.temperature)
        return gradient, None, None, None, None, None


def _compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 where the logits already are."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _local_columns(targets: Tensor, *, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's slice (0 when elsewhere), and whether it is here."""
    columns = targets - vocab_start
    is_local = (columns >= 0) & (columns < width)
    return columns.masked_fill(~is_local, 0), is_local
