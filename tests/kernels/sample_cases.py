"""The one place for cases of `sample`: the rules in plain numpy, and which tokens they allow.

A token is right if it wins the races in float64. Where two groups of tokens are closer than what
fp32 may add to their scores, or a nucleus ends within what it may add to its mass, either is: such
rows have more than one allowed token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megachat.generation.config import SamplingConfig
from megachat.ops.philox import uniforms
from megachat.ops.sample import GROUP_TOKENS
from tests.kernels.accuracy import FP32_ROUND_OFF, complaint_about
from tests.kernels.cases import Case
from tests.kernels.launch import FORMATS

Float64s = NDArray[np.float64]

THREADS = 512
GROUP_ERROR = 64 * FP32_ROUND_OFF
"""Of the logarithm of a group's mass. Its largest weight is 1. Each of 128 others errs by the
rounding of its shifted logit s, at most 0.37 round-offs as s exp(s) has no lower value, together
47; the exponential by 4 and a tree of 8 + 5 additions by 13 of the sum."""
TOKEN_ERROR = 1e-12
"""Of a logit plus noise, in double."""


def mass_error(columns: int) -> float:
    """Of a nucleus, relative: fixed point, and shifted logits that reach -28 before they vanish."""
    return columns * 2.0**-40 + 32 * FP32_ROUND_OFF


@dataclass(frozen=True)
class Inputs:
    """What is chosen from, and by which rules."""

    logits: Tensor
    """[rows, width]; NaN behind `columns`."""
    columns: int
    config: SamplingConfig
    """Its top-k and top-p are without meaning where there are edges."""
    keys: Tensor
    positions: Tensor
    history: Tensor
    history_lengths: Tensor
    suppressed: tuple[int, ...] = ()
    """Tokens of the whole vocabulary, as the others; the kernel is given columns."""
    stops: tuple[int, ...] = ()
    vocab_start: int = 0
    edges: Tensor | None = None
    """[rows] float32."""


@dataclass(frozen=True)
class SampleCase(Case):
    """`megachat_sample`: the four numbers of a row."""

    inputs: Inputs
    parts: Tensor
    """[4, rows] float64."""
    tied_rows: set[int] = field(default_factory=set)
    """Filled by `wrong_result`: rows in which more than one token is right."""

    def wrong_result(self) -> str:
        self.tied_rows.clear()
        for row in range(self.parts.shape[1]):
            found = self._wrong_row(row)
            if found:
                return f"row {row}: {found}"
        return ""

    def _wrong_row(self, row: int) -> str:
        inputs = self.inputs
        score, token, chosen, total = self.parts[:, row].tolist()
        scaled, choice = _choice(inputs, row)
        allowed = _allowed(inputs, row, choice)
        if len(allowed) > 1:
            self.tied_rows.add(row)
        column = token - inputs.vocab_start
        if column not in allowed:
            return f"token {token} was chosen, right are {sorted(allowed)} and {inputs.vocab_start}"
        if not abs(score - allowed[column]) <= GROUP_ERROR:
            return f"the score is {score}, exact is {allowed[column]}"
        if chosen != scaled[int(column)]:
            return f"the chosen logit is {chosen}, exact is {scaled[int(column)]}"
        shifted = np.maximum(scaled - scaled.max(), -800.0)  # no weight either, and no NaN below
        weights = np.exp(shifted)
        # Additions of a thread and over the block, the exponential's own error, that of its
        # argument; the logarithm is taken in double.
        roundings = inputs.columns / THREADS + 10 + 4 + (weights * -shifted).sum() / weights.sum()
        exact = scaled.max() + np.log(weights.sum())
        if not abs(total - exact) <= roundings * FP32_ROUND_OFF + 1e-12 * abs(exact):
            return f"logsumexp is {total}, exact is {exact}"
        return ""


@dataclass(frozen=True)
class CombineCase(Case):
    """`megachat_sample_combine`."""

    tokens: Tensor
    logprobs: Tensor
    expected: Tensor
    exact: Tensor

    def wrong_result(self) -> str:
        if not torch.equal(self.tokens, self.expected):
            return f"tokens are {self.tokens.tolist()}, right are {self.expected.tolist()}"
        return complaint_about("logprobs", self.logprobs, self.exact, 1e-12)


def sample_case(
    dtype: torch.dtype,
    *,
    columns: int,
    config: SamplingConfig | None = None,
    rows: int = 3,
    mean: float = 0.0,
    deviation: float = 3.0,
    suppressed: Sequence[int] = (),
    stops: Sequence[int] = (),
    vocab_start: int = 0,
) -> SampleCase:
    """Random logits, NaN behind the columns that mean something; any key, positions up to 2**32.

    Each row's history holds some of its likely tokens, and behind its length its most likely one.
    """
    generator = torch.Generator().manual_seed(columns)
    width = -(-columns // 8) * 8 + 8
    logits = torch.full((rows, width), torch.nan)
    logits[:, :columns] = mean + deviation * torch.randn(rows, columns, generator=generator)
    logits = logits.to(dtype)
    likely = logits[:, :columns].float().topk(min(6, columns), dim=1).indices + vocab_start
    elsewhere = torch.tensor([vocab_start + columns, max(0, vocab_start - 1)]).expand(rows, 2)
    history = torch.cat([likely.flip(1), elsewhere, likely[:, :1]], 1).contiguous()
    inputs = Inputs(
        logits=logits,
        columns=columns,
        config=config or SamplingConfig(),
        keys=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator),
        positions=torch.tensor([0, 3, 2**32 - 1] * rows)[:rows],
        history=history,
        history_lengths=torch.tensor([history.shape[1] - 1, 1, 2] * rows)[:rows],
        suppressed=tuple(suppressed),
        stops=tuple(stops),
        vocab_start=vocab_start,
    )
    return case_of(inputs)


def edges_case(dtype: torch.dtype, *, columns: int, keep: int, rows: int = 3) -> SampleCase:
    """A row keeps one token more than the row before it, and the first one `keep`, by its edge."""
    config = SamplingConfig(top_k=1, top_p=0.01, repetition_penalty=1.5)
    inputs = sample_case(dtype, columns=columns, config=config, rows=rows).inputs
    falling = [-np.sort(-_choice(inputs, row)[1]) for row in range(rows)]
    edges = torch.tensor([falling[row][keep + row - 1] for row in range(rows)]).float()
    return case_of(replace(inputs, edges=edges))


def case_of(inputs: Inputs) -> SampleCase:
    """The call for some inputs."""
    config, start = inputs.config, inputs.vocab_start
    parts = torch.full((4, len(inputs.logits)), torch.nan, dtype=torch.float64)
    columns = [
        torch.tensor(ids) - start if ids else None for ids in (inputs.suppressed, inputs.stops)
    ]
    return SampleCase(
        kernel="sample",
        arguments=(
            *(FORMATS[inputs.logits.dtype], inputs.logits, inputs.keys, inputs.positions),
            *(inputs.history, inputs.history_lengths, inputs.edges, *columns, parts),
            *inputs.logits.shape,
            *(inputs.columns, inputs.history.shape[1], len(inputs.suppressed), len(inputs.stops)),
            *(config.min_new_tokens, start, config.top_k),
            *(config.temperature, config.top_p, config.repetition_penalty, None),
        ),
        inputs=inputs,
        parts=parts,
    )


def combine_case(*, ranks: int, rows: int) -> CombineCase:
    """Random parts; in the last row two ranks have the same score, and one has no mass."""
    generator = torch.Generator().manual_seed(ranks)
    parts = 3 * torch.randn(ranks, 4, rows, dtype=torch.float64, generator=generator)
    parts[:, 1] = torch.randint(50000, (ranks, rows), generator=generator).double()
    parts[-1, 0, -1] = parts[:-1, 0, -1].max() if ranks > 1 else 0.0
    if ranks > 2:
        parts[1, :, -1] = torch.tensor([-torch.inf, 7.0, -torch.inf, -torch.inf])
    winner = torch.tensor(
        [max(range(ranks), key=lambda r: (parts[r, 0, i], -r)) for i in range(rows)]
    )
    chosen = parts[winner, :, torch.arange(rows)]
    tokens, logprobs = torch.full((rows,), -1), torch.full((rows,), torch.nan)
    return CombineCase(
        kernel="sample_combine",
        arguments=(parts, tokens, logprobs, ranks, rows, None),
        tokens=tokens,
        logprobs=logprobs,
        expected=chosen[:, 1].long(),
        exact=chosen[:, 2] - parts[:, 3].logsumexp(0),
    )


def _choice(inputs: Inputs, row: int) -> tuple[Float64s, Float64s]:
    """A row's scaled logits, and what is chosen from: fp32 operations that have one result each."""
    config, start = inputs.config, inputs.vocab_start
    logits = inputs.logits[row, : inputs.columns].float().numpy()
    scaled = logits / np.float32(config.temperature) if config.temperature else logits
    choice = scaled.copy()
    penalty = np.float32(config.repetition_penalty)
    length = int(inputs.history_lengths[row])
    for token in set(inputs.history[row, :length].tolist()):
        if start <= token < start + inputs.columns:
            x = scaled[token - start]
            choice[token - start] = x / penalty if x > 0 else x * penalty
    early = int(inputs.positions[row]) + 1 < config.min_new_tokens
    for token in (*inputs.suppressed, *(inputs.stops if early else ())):
        if start <= token < start + inputs.columns:
            choice[token - start] = -np.inf
    return scaled.astype(np.float64), choice.astype(np.float64)


def _allowed(inputs: Inputs, row: int, choice: Float64s) -> dict[int, float]:
    """Columns that may be chosen and the score that each comes with."""
    if inputs.config.temperature == 0:
        return {int(choice.argmax()): float(choice.max())}
    allowed: dict[int, float] = {}
    for edge in _edges(inputs, row, choice):
        kept = np.where(choice >= edge, choice, -np.inf)
        allowed |= _winners(inputs, row, kept)
    return allowed


def _edges(inputs: Inputs, row: int, choice: Float64s) -> set[float]:
    """The lowest logit that is kept; several where the nucleus ends at its mass's round-off."""
    if inputs.edges is not None:
        return {float(inputs.edges[row])}
    config = inputs.config
    falling = -np.sort(-choice)
    if config.top_k:
        falling = falling[: config.top_k]
    if config.top_p >= 1:
        return {float(falling[-1])}
    masses = np.exp(falling - falling[0])
    reached = masses.cumsum() / masses.sum()
    wanted, error = float(np.float32(config.top_p)), mass_error(len(choice))
    places = [int((reached < wanted * (1 + sign * error)).sum()) for sign in (-1, 0, 1)]
    return {float(falling[min(place, len(falling) - 1)]) for place in places}


def _winners(inputs: Inputs, row: int, kept: Float64s) -> dict[int, float]:
    first_group = inputs.vocab_start // GROUP_TOKENS
    groups = [kept[at : at + GROUP_TOKENS] for at in range(0, len(kept), GROUP_TOKENS)]
    masses = np.array([np.logaddexp.reduce(group) for group in groups])
    scores = masses + _noise(inputs, row, stream=0, first=first_group, count=len(groups))
    winners = {}
    for group in np.flatnonzero(scores >= scores.max() - 2 * GROUP_ERROR):
        stream = 1 + first_group + int(group)
        noise = _noise(inputs, row, stream=stream, first=0, count=len(groups[group]))
        tokens = groups[group] + noise
        for token in np.flatnonzero(tokens >= tokens.max() - TOKEN_ERROR):
            winners[int(group) * GROUP_TOKENS + int(token)] = float(scores[group])
    return winners


def _noise(inputs: Inputs, row: int, *, stream: int, first: int, count: int) -> Float64s:
    keys, positions = inputs.keys[row : row + 1], inputs.positions[row : row + 1]
    numbers = uniforms(keys, positions=positions, stream=stream, first=first, count=count)
    return -np.log(-np.log(numbers[0].numpy()))
