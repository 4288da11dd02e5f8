"""The one place for inputs of the kernels, their float64 references and what counts as wrong.

What a kernel must not read is NaN or points far outside; what it must write starts as NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.accuracy import FP32_ROUND_OFF, complaint_about
from tests.kernels.build import KERNELS, Variant
from tests.kernels.launch import FORMATS, Argument, Order, Outcome, run_here, run_isolated

FAR_OUTSIDE = 10**9
"""A block that no cache has: reading it ends the process."""


@dataclass(frozen=True)
class Case:
    """One call of a launcher; a subclass knows the result."""

    kernel: str
    arguments: tuple[Argument, ...]

    @property
    def source(self) -> Path:
        return KERNELS / "cuda" / f"{self.kernel}.cu"

    @property
    def function(self) -> str:
        return f"megachat_{self.kernel}"

    def wrong_result(self) -> str:
        """What is wrong with the outputs, "" if they are right."""
        raise NotImplementedError

    def fault_here(self, order: Order) -> str:
        """Runs in this process; what went wrong, "" if nothing did."""
        return self._judge(run_here(self.source, self.function, self.arguments, order))

    def fault_isolated(
        self, order: Order, *, variant: Variant, folder: Path, source: Path | None = None
    ) -> str:
        """Runs in a process of its own, perhaps from another source; what went wrong."""
        outcome = run_isolated(
            source or self.source,
            self.function,
            self.arguments,
            order,
            variant=variant,
            folder=folder,
        )
        return self._judge(outcome)

    def _judge(self, outcome: Outcome) -> str:
        return outcome.complaint or self.wrong_result()


@dataclass(frozen=True)
class LayerNormCase(Case):
    """`bias_residual_layer_norm`."""

    total: Tensor
    """float64 x + bias + residual."""
    stream: Tensor | None
    normalised: Tensor
    gamma: Tensor
    beta: Tensor

    def wrong_result(self) -> str:
        # x + bias + residual: two additions.
        internal = 2 * FP32_ROUND_OFF * self.total.abs().max()
        normed = self.total
        if self.stream is not None:
            found = complaint_about("stream", self.stream, self.total, internal.item())
            if found:
                return found
            normed = self.stream.double()  # the stream as it is stored is what is normalised
        exact, bound = _layer_norm(normed, self.gamma.double(), self.beta.double())
        return complaint_about("normalised", self.normalised, exact, bound)


EPSILON = 1e-5


def _layer_norm(total: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """float64 LayerNorm and a bound on what fp32 may add to its error.

    The mean and each value err by a few round-offs of the largest value, which the division by the
    deviation magnifies; a block sums in a tree, so the number of roundings grows with its depth: at
    most 32 in a thread and 10 over the block.
    """
    mean = total.mean(1, keepdim=True)
    deviation = (total.var(1, unbiased=False, keepdim=True) + EPSILON).sqrt()
    normed = (total - mean) / deviation
    exact = normed * gamma + beta
    roundings = 42 * FP32_ROUND_OFF
    magnified = total.abs().amax(1, keepdim=True) / deviation
    bound = roundings * ((magnified + normed.abs()) * gamma.abs() + exact.abs() + beta.abs())
    return exact, bound


def layer_norm_case(
    dtype: torch.dtype, *, hidden: int, tokens: int = 3, pre: bool = True, in_place: bool = False
) -> LayerNormCase:
    """Random input with a mean that is not zero.

    Args:
        dtype: Of all tensors.
        hidden: Columns.
        tokens: Rows.
        pre: Pre-LN: the stream is written too.
        in_place: The stream replaces the residual, or in post-LN the result does.
    """
    generator = torch.Generator().manual_seed(hidden)
    x, residual = (torch.randn(tokens, hidden, generator=generator).to(dtype) for _ in range(2))
    bias, beta = (torch.randn(hidden, generator=generator).to(dtype) for _ in range(2))
    gamma = (1 + torch.randn(hidden, generator=generator) / 4).to(dtype)
    residual += 1
    total = x.double() + bias.double() + residual.double()
    written = residual if in_place else torch.full_like(x, torch.nan)
    stream = written if pre else None
    normalised = torch.full_like(x, torch.nan) if pre else written
    return LayerNormCase(
        kernel="bias_residual_layer_norm",
        arguments=(
            *(FORMATS[dtype], x, bias, residual, gamma, beta, stream, normalised),
            *(tokens, hidden, EPSILON, None),
        ),
        total=total,
        stream=stream,
        normalised=normalised,
        gamma=gamma,
        beta=beta,
    )


@dataclass(frozen=True)
class AppendCase(Case):
    """`kv_append`: everything it writes, bit by bit."""

    got: tuple[Tensor, Tensor, Tensor]
    """Queries, keys, values."""
    expected: tuple[Tensor, Tensor, Tensor]

    def wrong_result(self) -> str:
        for name, got, expected in zip(
            ("query", "keys", "values"), self.got, self.expected, strict=True
        ):
            different = (_bits(got) != _bits(expected)).flatten().nonzero()
            if len(different):
                return f"{name} differs in {len(different)} elements, first {different[0].item()}"
        return ""


def append_case(
    dtype: torch.dtype, *, head_dim: int, block_size: int, tokens: int = 5, heads: int = 3
) -> AppendCase:
    """Tokens that go to random slots of a cache full of NaN, which stay NaN elsewhere."""
    generator = torch.Generator().manual_seed(head_dim + block_size)
    qkv = torch.randn(tokens, 3 * heads * head_dim, generator=generator).to(dtype)
    bias = torch.randn(3 * heads * head_dim, generator=generator).to(dtype)
    blocks = tokens // block_size + 2
    keys = torch.full((blocks, block_size, heads, head_dim), torch.nan).to(dtype)
    values = keys.clone()
    query = torch.full((tokens, heads, head_dim), torch.nan).to(dtype)
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    expected = (query.clone(), keys.clone(), values.clone())
    for token, slot in enumerate(slots.tolist()):
        total = (qkv[token].float() + bias.float()).to(dtype).view(heads, 3, head_dim)
        expected[0][token] = total[:, 0]
        expected[1][slot // block_size, slot % block_size] = total[:, 1]
        expected[2][slot // block_size, slot % block_size] = total[:, 2]
    return AppendCase(
        kernel="kv_append",
        arguments=(
            *(FORMATS[dtype], qkv, bias, query, keys, values, slots),
            *(tokens, heads, head_dim, None),
        ),
        got=(query, keys, values),
        expected=expected,
    )


@dataclass(frozen=True)
class DecodeCase(Case):
    """`paged_attention_decode`."""

    out: Tensor
    exact: Tensor
    internal: Tensor

    def wrong_result(self) -> str:
        return complaint_about("out", self.out, self.exact, self.internal)


def decode_case(
    dtype: torch.dtype,
    *,
    head_dim: int,
    block_size: int,
    lengths: Sequence[int],
    splits: int = 1,
    heads: int = 2,
) -> DecodeCase:
    """Sequences scattered over the cache; unused slots NaN, unused table entries far outside."""
    generator = torch.Generator().manual_seed(head_dim * block_size + splits)
    rows, columns = len(lengths), max(-(-length // block_size) for length in lengths) + 1
    blocks = rows * columns
    query = torch.randn(rows, heads, head_dim, generator=generator).to(dtype)
    keys = torch.full((blocks, block_size, heads, head_dim), torch.nan).to(dtype)
    values = keys.clone()
    pages = torch.randperm(blocks, generator=generator).view(rows, columns)
    tables = torch.full((rows, columns), FAR_OUTSIDE, dtype=torch.int32)
    exact = torch.zeros(rows, heads, head_dim, dtype=torch.float64)
    internal = torch.zeros(rows, heads, 1, dtype=torch.float64)
    for row, length in enumerate(lengths):
        used = -(-length // block_size)
        tables[row, :used] = pages[row, :used]
        position = torch.arange(length)
        place = (pages[row, position // block_size], position % block_size)
        for cache in (keys, values):
            cache[place] = torch.randn(length, heads, head_dim, generator=generator).to(dtype)
        if length:
            exact[row], internal[row] = _attention(query[row], keys[place], values[place], splits)
    out = torch.full_like(query, torch.nan)
    parts = rows * heads * splits if splits > 1 else 0
    workspace = torch.full((parts * (head_dim + 2),), torch.nan) if parts else None
    return DecodeCase(
        kernel="paged_attention_decode",
        arguments=(
            *(FORMATS[dtype], query, keys, values, tables, torch.tensor(lengths), out, workspace),
            *(rows, heads, head_dim, block_size, columns, splits, None),
        ),
        out=out,
        exact=exact,
        internal=internal,
    )


def _attention(query: Tensor, keys: Tensor, values: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """float64 attention of `[heads, d]` to `[tokens, heads, d]`, and a bound on what fp32 adds.

    A score is a sum of at most 8 products in a lane and 5 levels over lanes, scaled before: 14
    roundings of at most the sum of absolute products; the exponential turns that into a relative
    error of its weight, to which its own few roundings come. Weights and their sum then go through
    one addition a token of a group, of which there are at least four, and the tree above. The
    result is a mean of values, so its error is that relative error times a mean of absolute
    values, twice: above and below the fraction.
    """
    products = query.double() * keys.double()
    scale = query.shape[1] ** -0.5
    scores = products.sum(2) * scale
    weights = scores.softmax(0)
    exact = torch.einsum("th,thd->hd", weights, values.double())
    spread = torch.einsum("th,thd->hd", weights, values.double().abs()).amax(1, keepdim=True)
    in_score = 14 * (products.abs().sum(2) * scale).amax(0)
    in_sums = len(keys) / 4 / splits + splits + 16
    return exact, 2 * FP32_ROUND_OFF * (in_score + in_sums)[:, None] * spread


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)
