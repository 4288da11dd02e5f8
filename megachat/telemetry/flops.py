"""The one place that counts the floating-point operations and bytes of a decoder-only transformer.

Every number is *global*: all rows of the batch, the whole model, all phases; it is divided by the
global time and the number of devices only at the end (`teraflops_per_device`). A multiplication and
an addition count as two operations. Matrix products are counted and nothing else: norms,
activations, softmax, sampling and the optimizer are left out.

With tokens T, (query, key) pairs P, hidden h, ffn f, embedding width d, head outputs V, L layers:

| term | forward operations |
|---|---|
| qkv | L * 2 T h 3h |
| scores, values | L * 2 P h each |
| projection | L * 2 T h h |
| mlp | L * 2 T 2 h f |
| embedding projections | 2 T d h each, where d differs from h |
| head | 2 (tokens that get an output) d V |

A backward pass is two forward passes; full recomputation repeats the layers once more, and neither
the head nor the embedding projections. DeepSpeed-Chat's published formula (Megatron-LM's
24 f B s L h^2 (1 + s/(6h) + V/(16Lh))) is the special case f = 4, dense attention, ffn = 4h, d = h.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class AttentionCost(StrEnum):
    """Which (query, key) pairs are counted."""

    CAUSAL = "causal"
    """The pairs that the result depends on: what a good kernel computes."""
    DENSE = "dense"
    """All pairs of a pass over several tokens: what an implementation that masks computes."""


class Recomputation(StrEnum):
    """What a training step computes twice."""

    NONE = "none"
    LAYERS = "layers"
    """The forward pass of all transformer layers, once more during the backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerShape:
    """The sizes that decide how much a model computes."""

    hidden: int
    ffn: int
    layers: int
    embed_dim: int
    """Width of the embeddings; where it differs from `hidden` there are two projections."""
    outputs: int
    """Width of the head: the vocabulary of a language model, 1 of a scalar head."""

    @property
    def matmul_parameters(self) -> int:
        """Weights that take part in the products of one token, head and projections included."""
        per_layer = 4 * self.hidden**2 + 2 * self.hidden * self.ffn
        return self.layers * per_layer + self._edge_parameters + self.embed_dim * self.outputs

    @property
    def _edge_parameters(self) -> int:
        """Weights of the two projections between embedding and hidden width."""
        return 0 if self.embed_dim == self.hidden else 2 * self.embed_dim * self.hidden


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFlops:
    """Operations of a forward pass, by term."""

    qkv: int
    scores: int
    values: int
    projection: int
    mlp: int
    embedding_projections: int
    head: int

    @property
    def layers(self) -> int:
        """Operations of the transformer layers alone."""
        return self.qkv + self.scores + self.values + self.projection + self.mlp

    @property
    def total(self) -> int:
        """All operations."""
        return self.layers + self.embedding_projections + self.head


def forward_flops(
    shape: TransformerShape,
    *,
    lengths: Sequence[int],
    attention: AttentionCost = AttentionCost.CAUSAL,
    head_tokens: int | None = None,
) -> ForwardFlops:
    """Operations of one forward pass over a batch.

    Args:
        shape: The model.
        lengths: Tokens of each row. Real lengths give the useful work, the padded length for every
            row gives the work done.
        attention: Which pairs to count.
        head_tokens: Tokens of the whole batch that get an output; None means all.
    """
    tokens = sum(lengths)
    pairs = sum(_pairs(length, attention) for length in lengths)
    return _forward(shape, tokens=tokens, pairs=pairs, head_tokens=head_tokens)


def training_flops(
    shape: TransformerShape,
    *,
    lengths: Sequence[int],
    attention: AttentionCost = AttentionCost.CAUSAL,
    recomputation: Recomputation = Recomputation.NONE,
) -> int:
    """Operations of a forward and a backward pass over a batch, all micro-batches together."""
    forward = forward_flops(shape, lengths=lengths, attention=attention)
    again = forward.layers if recomputation is Recomputation.LAYERS else 0
    return 3 * forward.total + again


def generation_flops(
    shape: TransformerShape,
    *,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    attention: AttentionCost = AttentionCost.CAUSAL,
) -> int:
    """Operations of generation with a key/value cache: one prefill, then one token at a time.

    The last response token is sampled and never fed back, and the head runs once per response
    token. Decoding a token attends to exactly what precedes it, so `attention` only concerns the
    prefill.

    Raises:
        ValueError: The two sequences differ in length, or a response is empty.
    """
    _check_responses(prompt_lengths, response_lengths)
    tokens = pairs = 0
    for prompt, response in zip(prompt_lengths, response_lengths, strict=True):
        fed = prompt + response - 1
        decoded_pairs = _pairs(fed, AttentionCost.CAUSAL) - _pairs(prompt, AttentionCost.CAUSAL)
        tokens += fed
        pairs += _pairs(prompt, attention) + decoded_pairs
    return _forward(shape, tokens=tokens, pairs=pairs, head_tokens=sum(response_lengths)).total


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoFlops:
    """Operations of one PPO step, by phase."""

    generate: int
    score: int
    """Forward passes of actor, reference, critic and reward model over prompt and response."""
    train: int
    """All epochs of actor and critic."""

    @property
    def total(self) -> int:
        """All phases."""
        return self.generate + self.score + self.train


def ppo_flops(
    *,
    actor: TransformerShape,
    critic: TransformerShape,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    epochs: int,
    recomputation: Recomputation = Recomputation.NONE,
    attention: AttentionCost = AttentionCost.CAUSAL,
) -> PpoFlops:
    """Operations of one PPO step over the global batch.

    Args:
        actor: Shape of actor and reference.
        critic: Shape of critic and reward model.
        prompt_lengths: Tokens of each prompt of the global batch.
        response_lengths: Tokens of each response.
        epochs: Passes of training over the experience.
        recomputation: What training computes twice.
        attention: Which pairs to count.

    Raises:
        ValueError: The two sequences differ in length, or a response is empty.
    """
    _check_responses(prompt_lengths, response_lengths)
    lengths = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    scored = training = 0
    for shape in (actor, critic):
        scored += 2 * forward_flops(shape, lengths=lengths, attention=attention).total
        training += epochs * training_flops(
            shape, lengths=lengths, attention=attention, recomputation=recomputation
        )
    generated = generation_flops(
        actor,
        prompt_lengths=prompt_lengths,
        response_lengths=response_lengths,
        attention=attention,
    )
    return PpoFlops(generate=generated, score=scored, train=training)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeBytes:
    """Bytes that the decode steps of a generation have to read, by source."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        """Both sources."""
        return self.weights + self.cache


def decode_bytes(
    shape: TransformerShape,
    *,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    bytes_per_value: int,
) -> DecodeBytes:
    """Bytes that decoding must read: every weight once a step, every row's own keys and values.

    All rows decode together, so there are as many steps as the longest response has tokens, less
    the first, which the prefill gives. Divided by the time of decoding this is a bandwidth.

    Args:
        shape: The model.
        prompt_lengths: Tokens of each prompt of the batch that is decoded together.
        response_lengths: Tokens of each response.
        bytes_per_value: Size of a weight and of a cached value.

    Raises:
        ValueError: The two sequences differ in length, or a response is empty.
    """
    _check_responses(prompt_lengths, response_lengths)
    steps = max(response_lengths, default=1) - 1
    cached = 0  # (row, step, earlier token) triples
    for prompt, response in zip(prompt_lengths, response_lengths, strict=True):
        fed = prompt + response - 1
        cached += _pairs(fed, AttentionCost.CAUSAL) - _pairs(prompt, AttentionCost.CAUSAL)
    return DecodeBytes(
        weights=steps * shape.matmul_parameters * bytes_per_value,
        cache=cached * 2 * shape.hidden * shape.layers * bytes_per_value,
    )


def teraflops_per_device(flops: int, *, seconds: float, devices: int) -> float:
    """Throughput of one device: the work of the global batch over global time and all devices."""
    return flops / seconds / devices / 1e12


def _forward(
    shape: TransformerShape, *, tokens: int, pairs: int, head_tokens: int | None
) -> ForwardFlops:
    outputs = tokens if head_tokens is None else head_tokens
    return ForwardFlops(
        qkv=shape.layers * 2 * tokens * shape.hidden * 3 * shape.hidden,
        scores=shape.layers * 2 * pairs * shape.hidden,
        values=shape.layers * 2 * pairs * shape.hidden,
        projection=shape.layers * 2 * tokens * shape.hidden * shape.hidden,
        mlp=shape.layers * 2 * tokens * 2 * shape.hidden * shape.ffn,
        embedding_projections=2 * tokens * shape._edge_parameters,
        head=2 * outputs * shape.embed_dim * shape.outputs,
    )


def _pairs(length: int, attention: AttentionCost) -> int:
    """(query, key) pairs of one pass over `length` tokens."""
    if attention is AttentionCost.DENSE:
        return length * length
    return length * (length + 1) // 2


def _check_responses(prompt_lengths: Sequence[int], response_lengths: Sequence[int]) -> None:
    if len(prompt_lengths) != len(response_lengths):
        raise ValueError(
            f"{len(prompt_lengths)} prompt lengths, but {len(response_lengths)} response lengths"
        )
    if any(length < 1 for length in response_lengths):
        raise ValueError("a response has at least one token, its end-of-sequence token")
