"""The one place where logits become log-probabilities: of given tokens, with entropy, any sharding.

Logits are the largest tensor of a training step (`seq x vocab` per row), so nothing of their size
is made in float32: the reference works on chunks of tokens in both directions, a CUDA kernel in
registers, and what is kept for the backward pass is the logits themselves plus two float32 numbers
per token. The vocabulary may be cut over a tensor group; each rank passes its own slice. What is
done with a slice is two operations of the registry, `token_logprobs_forward` and
`token_logprobs_backward`; in between, two small all-reduces (none in the backward pass) put the
slices together.

With `x` = logits / temperature: `logsumexp = log sum_k exp(x_k)`, `p_k = exp(x_k - logsumexp)`,
`logprob = x_target - logsumexp`, `entropy = logsumexp - sum_k p_k x_k`, and

    d logprob / d logit_k = ([k = target] - p_k) / temperature
    d entropy / d logit_k = -p_k (log p_k + entropy) / temperature.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megachat.errors import ConfigError
from megachat.ops import cpu_kernels, cuda_kernels
from megachat.ops.registry import Backend, CudaKernel, Op, register
from megachat.parallel.collectives import all_reduce_max, all_reduce_sum

CHUNK_ELEMENTS = 1 << 20
"""Elements of the reference's largest float32 temporary (one token's slice at least): 4 MiB, which
a CPU core's caches still absorb."""

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
    backend: Backend = Backend.REFERENCE,
) -> Tensor:
    """Log-probability of given tokens under temperature-scaled logits.

    Args:
        logits: `[batch, seq, vocab/tp]`, any float dtype, this rank's slice of the vocabulary;
            padded columns hold the dtype's lowest number.
        targets: `[batch, seq]` int64 ids of the whole vocabulary, the same on all ranks of `group`.
        group: Ranks that share the vocabulary; None when this rank holds all of it.
        vocab_start: First vocabulary id of this rank's slice.
        temperature: Divides the logits, above 0.
        backend: Who computes what is done with a slice.

    Returns:
        `[batch, seq]` float32 (float64 for float64 logits); its gradient has the logits' dtype.

    Raises:
        ConfigError: The temperature is not above 0.
        KernelError: The backend does not compute this, or not for such logits.
    """
    return token_statistics(
        logits,
        targets,
        group=group,
        vocab_start=vocab_start,
        temperature=temperature,
        backend=backend,
    ).logprobs


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    group: ProcessGroup | None,
    vocab_start: int,
    temperature: float = 1.0,
    backend: Backend = Backend.REFERENCE,
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
            backend=backend,
        )
        return TokenStatistics(
            logprobs=swapped.logprobs.transpose(0, 1),
            entropy=swapped.entropy.transpose(0, 1),
            is_greedy=swapped.is_greedy.transpose(0, 1),
        )
    logprobs, entropy, is_greedy = _TokenStatistics.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), targets.flatten(), group, vocab_start, temperature, backend
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
        backend: Backend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logprobs, entropy and is_greedy, each `[tokens]`."""
        of_slice = token_logprobs_forward.on(backend)(logits, targets, vocab_start, temperature)
        shift, total, weighted, target = _put_together(of_slice, group)
        log_total = total.log()
        logprobs = target - shift - log_total
        entropy = log_total - weighted / total
        # A NaN among the logits is in the sums, but a maximum may have passed over it.
        is_greedy = (target >= shift) & ~total.isnan()
        ctx.save_for_backward(logits, targets, shift + log_total, entropy)
        ctx.vocab_start, ctx.temperature, ctx.backend = vocab_start, temperature, backend
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
        gradient = token_logprobs_backward.on(ctx.backend)(
            logits,
            targets,
            logsumexp,
            entropy,
            grad_logprobs,
            grad_entropy,
            ctx.vocab_start,
            ctx.temperature,
        )
        return gradient, None, None, None, None, None


def _put_together(of_slice: Tensor, group: ProcessGroup | None) -> Tensor:
    """The statistics of the whole vocabulary, `[4, tokens]`, from those of each rank's slice."""
    if group is None:
        return of_slice
    maximum, total, weighted, target = of_slice
    shift = all_reduce_max(maximum.clone(), group)
    step = (maximum - shift).clamp_(min=_NEGLIGIBLE)
    factor = step.exp()
    sums = torch.stack([factor * total, factor * (weighted + step * total), target])
    return torch.cat([shift[None], all_reduce_sum(sums, group)])


def _statistics_of_slice(
    logits: Tensor, targets: Tensor, vocab_start: int, temperature: float
) -> Tensor:
    """What the columns of one slice say about given tokens.

    Args:
        logits: `[tokens, vocab/tp]`.
        targets: `[tokens]` int64 ids of the whole vocabulary.
        vocab_start: First vocabulary id of the slice.
        temperature: Divides the logits, above 0.

    Returns:
        `[4, tokens]` float32 (float64 for float64 logits). With x = logits / temperature: the
        largest x, the sums over the slice of `exp(x - largest)` and of `exp(x - largest) *
        (x - largest)`, and x of the target, 0 where it belongs to another slice.
    """
    dtype = _compute_dtype(logits)
    columns, is_local = _local_columns(targets, vocab_start=vocab_start, width=logits.shape[1])
    statistics = torch.empty(4, len(targets), dtype=dtype, device=logits.device)
    maximum, total, weighted, target = statistics
    # The largest logit is found before scaling: exact in every dtype and free of overflow. That of
    # padding alone may overflow when it is scaled, and infinities have no difference.
    maximum.copy_(logits.amax(dim=1)).div_(temperature).clamp_(min=torch.finfo(dtype).min)
    for part in _chunks(logits):
        shifted = logits[part].to(dtype, copy=True).div_(temperature)
        target[part] = shifted.gather(1, columns[part, None]).squeeze(1)
        shifted.sub_(maximum[part, None]).clamp_(min=_NEGLIGIBLE)
        weight = shifted.exp()
        total[part] = weight.sum(dim=1)
        weighted[part] = weight.mul_(shifted).sum(dim=1)
    target.masked_fill_(~is_local, 0.0)
    return statistics


def _gradient_of_slice(
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    vocab_start: int,
    temperature: float,
) -> Tensor:
    """The gradient of one slice's logits.

    Args:
        logits: `[tokens, vocab/tp]`.
        targets: `[tokens]` int64 ids of the whole vocabulary.
        logsumexp: `[tokens]` of logits / temperature, over the whole vocabulary.
        entropy: `[tokens]`, over the whole vocabulary.
        grad_logprobs: `[tokens]`; None is 0.
        grad_entropy: `[tokens]`; None is 0.
        vocab_start: First vocabulary id of the slice.
        temperature: Divides the logits, above 0.

    Returns:
        `[tokens, vocab/tp]` of the dtype of the logits.
    """
    columns, is_local = _local_columns(targets, vocab_start=vocab_start, width=logits.shape[1])
    gradient = torch.empty_like(logits)
    for part in _chunks(logits):
        log_p = logits[part].to(logsumexp.dtype, copy=True).div_(temperature)
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
        gradient[part] = chunk.div_(temperature)
    return gradient


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Rows that are computed at once."""
    tokens, width = logits.shape
    rows = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, start + rows) for start in range(0, tokens, rows))


def _compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 where the logits already are."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _local_columns(targets: Tensor, *, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """Column of each target in this rank's slice (0 when elsewhere), and whether it is here."""
    columns = targets - vocab_start
    is_local = (columns >= 0) & (columns < width)
    return columns.masked_fill(~is_local, 0), is_local


token_logprobs_forward = register(
    Op(
        name="token_logprobs_forward",
        schema="(Tensor logits, Tensor targets, int vocab_start, float temperature) -> Tensor",
        reference=_statistics_of_slice,
        # The result is float32 whatever the logits are.
        tolerance=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 1e-5),
        backends={Backend.CPU: cpu_kernels.token_logprobs_forward},
        cuda=CudaKernel(
            launch=cuda_kernels.token_logprobs_forward, fake=cuda_kernels.new_token_statistics
        ),
    )
)
"""What a slice of the vocabulary says about given tokens: four numbers a token."""

token_logprobs_backward = register(
    Op(
        name="token_logprobs_backward",
        schema=(
            "(Tensor logits, Tensor targets, Tensor logsumexp, Tensor entropy, "
            "Tensor? grad_logprobs, Tensor? grad_entropy, int vocab_start, float temperature) "
            "-> Tensor"
        ),
        reference=_gradient_of_slice,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4},
        backends={Backend.CPU: cpu_kernels.token_logprobs_backward},
        cuda=CudaKernel(
            launch=cuda_kernels.token_logprobs_backward,
            fake=lambda logits, *_: torch.empty_like(logits),
        ),
    )
)
"""The gradient of a slice's logits."""
