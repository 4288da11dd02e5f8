"""The one place that predicts how long a decode step takes on a CPU: `predict`.

A step is the sum of its products, its attention and what it costs to dispatch. The first two each
take memory and arithmetic at the same time: the longer one counts whole, and of the shorter one
what does not hide behind it. Ceilings are measured in the same run; the shares of them that the
kernels reach are constants, measured once on a processor with AVX2.
"""

from dataclasses import dataclass

from megachat.model.config import OptConfig
from megachat.telemetry.flops import TransformerShape, decode_bytes, forward_flops

PHASES_PER_LAYER = 7
"""Between barriers: norm, QKV, attention, projection, norm, first and second product."""
EDGE_PHASES = 5
"""Embedding, positions, last norm, logits, their padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a machine does at best, with the threads of the run."""

    read: float
    """Bytes a second."""
    multiply_add: float
    """Operations a second in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Of the limits, what the kernels reach where nothing else holds them up."""

    read: float
    product: float
    """Of arithmetic, in products of fewer than `MANY_ROWS` rows."""
    product_of_many: float
    """Of arithmetic, in products of at least so many."""
    attention: float
    """Of arithmetic, in attention: one query leaves little to reuse."""
    unhidden: float
    """Of the shorter one of reading and arithmetic, the part that does not overlap."""


SHARES = {
    "fp32": Shares(read=0.76, product=0.52, product_of_many=0.67, attention=0.05, unhidden=0.15),
    "bf16": Shares(read=0.60, product=0.49, product_of_many=0.52, attention=0.08, unhidden=0.15),
}
"""Of ceilings that are the best of a few tries; fitted to three runs of `bench_kernels` each.

bf16 values are widened before they can be multiplied: once for many rows, else for each four.
"""
MANY_ROWS = 12
"""From so many rows on, products are computed the other way (`kMany` of kernels/cpu/linear.h)."""
PHASE_SECONDS = 5e-6
"""From the end of one phase to the beginning of the next: the slower thread, and the barrier."""
CALL_SECONDS = 60e-6
"""Python, once a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeWork:
    """What one step of equally long sequences has to do."""

    rows: int
    """Sequences."""
    weight_bytes: int
    cache_bytes: int
    product_flops: int
    attention_flops: int
    dispatches: int
    """Phases of the step."""


def work_of(config: OptConfig, *, batch: int, context: int, value_bytes: int) -> DecodeWork:
    """Counts a step.

    Args:
        config: The model.
        batch: Sequences.
        context: Tokens that each attends to, the new one included.
        value_bytes: Of a weight and of a cached value.
    """
    shape = TransformerShape(
        hidden=config.hidden,
        ffn=config.ffn,
        layers=config.layers,
        embed_dim=config.embed_dim,
        outputs=config.vocab_size,
    )
    read = decode_bytes(
        shape,
        prompt_lengths=[context - 1] * batch,
        response_lengths=[2] * batch,
        bytes_per_value=value_bytes,
    )
    one_token = forward_flops(shape, lengths=[1] * batch)
    scores = one_token.scores + one_token.values
    return DecodeWork(
        rows=batch,
        weight_bytes=read.weights,
        cache_bytes=read.cache,
        product_flops=one_token.total - scores,
        attention_flops=scores * context,
        dispatches=PHASES_PER_LAYER * config.layers + EDGE_PHASES,
    )


def predict(work: DecodeWork, limits: Limits, shares: Shares) -> float:
    """Seconds of a step."""
    read = limits.read * shares.read
    product = shares.product if work.rows < MANY_ROWS else shares.product_of_many
    products = _overlapped(
        work.weight_bytes / read,
        work.product_flops / (limits.multiply_add * product),
        unhidden=shares.unhidden,
    )
    attention = _overlapped(
        work.cache_bytes / read,
        work.attention_flops / (limits.multiply_add * shares.attention),
        unhidden=shares.unhidden,
    )
    return products + attention + work.dispatches * PHASE_SECONDS + CALL_SECONDS


def _overlapped(first: float, second: float, *, unhidden: float) -> float:
    """Seconds of two things that go on together."""
    return max(first, second) + unhidden * min(first, second)
