"""The one place for drawing one token a row from logits: what rules it, the races, the winner.

Logits are divided by the temperature; tokens that were said are penalised, some are forbidden, and
top-k and top-p cut the tail. A token is drawn by two Gumbel-max races (the largest of `log p +
noise` is a draw from p): first among groups of `GROUP_TOKENS` neighbouring tokens by their total
mass, then among the tokens of the winning group. That is exact, and takes `vocab / 128 + 128`
random numbers instead of `vocab`. Noise is named by the row's key, the position and the group or
token.

The vocabulary may be cut over a tensor group. Each rank draws from its slice and leaves its parts,
`[4, rows]` float64: the score that the token won its race with, the token, its scaled logit, and
the logsumexp of the slice's scaled logits, forbidden ones included. From the parts of all ranks
`sample_combine` makes tokens and log-probs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.errors import ConfigError
from megachat.ops import cpu_kernels, cuda_kernels
from megachat.ops.philox import GROUP_TOKENS, uniforms
from megachat.ops.registry import Backend, CudaKernel, Op, register
from megachat.ops.truncation import lowest_kept

_GROUP_STREAM, _TOKEN_STREAM = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawRules:
    """What is the same for all rows."""

    suppressed: Tensor
    """[n] int64 columns that are never chosen."""
    stops: Tensor
    """[n] int64 columns that are not chosen before `min_new_tokens`."""
    min_new_tokens: int
    """Where `positions + 1` is below it, it is too early for a stop."""
    first_group: int
    """Number of the first column's group in the whole vocabulary, which names its noise."""
    temperature: float
    """Divides the logits; 0 takes the largest, whatever top-k and top-p are."""
    top_k: int = 0
    """How many tokens of the vocabulary are kept; 0 for all."""
    top_p: float = 1.0
    """The mass of the fewest tokens that are kept, of that of exactly k; 1 for all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative scaled logits of what a row's history holds."""

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p cuts what is drawn from."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What each row's request consists of so far."""

    tokens: Tensor
    """[rows, seq] int64, prompt and response in ids of the whole vocabulary, padding to the
    right."""
    lengths: Tensor
    """[rows] int64, at least 1."""


def scale(logits: Tensor, temperature: float) -> Tensor:
    """The logits in float32 over the temperature."""
    logits = logits.float()
    return _quotient(logits, temperature) if temperature else logits


def _quotient(x: Tensor, divisor: float) -> Tensor:
    """Rounded once.

    On a GPU torch multiplies by the rounded reciprocal of a number, but divides by a tensor. So do
    the kernels, and an edge that is found here has to be one of their logits to the last bit.
    """
    return x / x.new_full((1, 1), divisor)


def choices(
    scaled: Tensor, *, positions: Tensor, rules: DrawRules, history: History | None
) -> Tensor:
    """What is chosen from, before top-k and top-p.

    Args:
        scaled: `[rows, columns]` float32, from `scale`.
        positions: As `sample`.
        rules: As `sample`.
        history: As `sample`.

    Returns:
        `[rows, columns]` float32, the scaled logits after the penalty, minus infinity where a token
        is forbidden.

    Raises:
        ConfigError: There is a penalty and no history.
    """
    return _forbid(_penalize(scaled, rules, history), positions, rules)


def _penalize(scaled: Tensor, rules: DrawRules, history: History | None) -> Tensor:
    """A copy of the logits in which tokens that were said are less likely."""
    penalty = rules.repetition_penalty
    if penalty == 1.0:
        return scaled.clone()
    history = _needed(history, rules)
    rows, columns = scaled.shape
    seen = torch.arange(history.tokens.shape[1], device=scaled.device)
    local = history.tokens - rules.first_group * GROUP_TOKENS
    outside = (local < 0) | (local >= columns) | (seen >= history.lengths[:, None])
    said = scaled.new_zeros(rows, columns + 1, dtype=torch.bool)
    said.scatter_(1, local.masked_fill(outside, columns), True)
    penalized = torch.where(scaled > 0, _quotient(scaled, penalty), scaled * penalty)
    return torch.where(said[:, :-1], penalized, scaled)


def _needed(history: History | None, rules: DrawRules) -> History:
    """The history that a penalty is about."""
    if history is None:
        raise ConfigError(
            f"repetition_penalty {rules.repetition_penalty} needs the tokens so far, and none were "
            "given"
        )
    return history


def _forbid(choice: Tensor, positions: Tensor, rules: DrawRules) -> Tensor:
    """Makes suppressed tokens, and stop tokens that come too early, impossible; in place."""
    choice[:, rules.suppressed] = -torch.inf
    if rules.min_new_tokens > 1:
        early = positions[:, None] + 1 < rules.min_new_tokens
        stops = rules.stops
        choice[:, stops] = choice[:, stops].masked_fill(early, -torch.inf)
    return choice


def _race(
    choice: Tensor, keys: Tensor, positions: Tensor, first_group: int
) -> tuple[Tensor, Tensor]:
    """The winning column of each row, and its group's score."""
    rows, columns = choice.shape
    num_groups = -(-columns // GROUP_TOKENS)
    choice = F.pad(choice, (0, num_groups * GROUP_TOKENS - columns), value=-torch.inf)
    grouped = choice.view(rows, num_groups, GROUP_TOKENS)
    scores = grouped.logsumexp(dim=2).double() + _gumbel(
        keys, positions, stream=_GROUP_STREAM, first=first_group, count=num_groups
    )
    best, group = scores.max(dim=1)
    tokens = grouped[torch.arange(rows, device=choice.device), group].double()
    # Every group of a row has noise of its own, or neighbouring groups would be alike.
    noise = _gumbel(
        keys, positions, stream=_TOKEN_STREAM + first_group + group, first=0, count=GROUP_TOKENS
    )
    return best, group * GROUP_TOKENS + (tokens + noise).argmax(dim=1)


def _gumbel(
    keys: Tensor, positions: Tensor, *, stream: int | Tensor, first: int, count: int
) -> Tensor:
    """`[rows, count]` float64 standard Gumbel noise; see `uniforms` for the arguments."""
    numbers = uniforms(keys, positions=positions, stream=stream, first=first, count=count)
    return numbers.log_().neg_().log_().neg_()


def _sample(
    logits: Tensor,
    *,
    keys: Tensor,
    positions: Tensor,
    rules: DrawRules,
    history: History | None = None,
    edges: Tensor | None = None,
) -> Tensor:
    """Chooses one token a row.

    Args:
        logits: `[rows, columns]`, any float dtype, rows contiguous.
        keys: `[rows]` int64, the random stream of each row.
        positions: `[rows]` int64 in [0, 2**32), which part of the stream.
        rules: What is the same for all rows.
        history: What was said so far; needed for a penalty.
        edges: `[rows]` float32, the lowest logit that top-k and top-p keep, where rows are slices;
            None where they are whole, and it is found here.

    Returns:
        The parts, `[4, rows]` float64.

    Raises:
        ConfigError: There is a penalty and no history.
    """
    scaled = scale(logits, rules.temperature)
    choice = choices(scaled, positions=positions, rules=rules, history=history)
    if rules.temperature == 0:
        scores, columns = choice.max(dim=1)
    else:
        if rules.truncates and edges is None:
            edges = lowest_kept(choice, top_k=rules.top_k, top_p=rules.top_p)
        if edges is not None:
            choice.masked_fill_(choice < edges[:, None], -torch.inf)
        scores, columns = _race(choice, keys, positions, rules.first_group)
    chosen = scaled.gather(1, columns[:, None]).squeeze(1)
    tokens = columns + rules.first_group * GROUP_TOKENS
    parts = (scores, tokens, chosen, scaled.logsumexp(dim=1))
    return torch.stack([part.double() for part in parts])


def _on_cpu(
    logits: Tensor,
    *,
    keys: Tensor,
    positions: Tensor,
    rules: DrawRules,
    history: History | None = None,
    edges: Tensor | None = None,
) -> Tensor:
    """One pass over the logits, without copies.

    The CPU kernel knows temperature and forbidden tokens alone; with a penalty or truncation the
    reference chooses.
    """
    if rules.repetition_penalty != 1.0 or rules.truncates or edges is not None:
        return _sample(
            logits, keys=keys, positions=positions, rules=rules, history=history, edges=edges
        )
    return cpu_kernels.sample(
        logits,
        (keys, positions, rules.suppressed, rules.stops),
        min_new_tokens=rules.min_new_tokens,
        first_group=rules.first_group,
        temperature=float(rules.temperature),
    )


def _on_cuda(
    logits: Tensor,
    *,
    keys: Tensor,
    positions: Tensor,
    rules: DrawRules,
    history: History | None = None,
    edges: Tensor | None = None,
) -> Tensor:
    """A block for every row, which keeps nothing of the size of the logits."""
    said = _needed(history, rules) if rules.repetition_penalty != 1.0 else None
    parts: Tensor = torch.ops.megachat.sample(
        logits,
        keys,
        positions,
        rules.suppressed,
        rules.stops,
        rules.min_new_tokens,
        rules.first_group,
        rules.temperature,
        rules.top_k,
        rules.top_p,
        rules.repetition_penalty,
        said.tokens if said is not None else None,
        said.lengths if said is not None else None,
        edges,
    )
    return parts


def _combine(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Picks the best of the ranks' tokens; of equal ones that of the lowest rank.

    Args:
        parts: `[ranks, 4, rows]` float64, what `sample` left on each of them.

    Returns:
        Tokens, `[rows]` int64, and their log-probs, `[rows]` float32, under the scaled logits
        before penalties, forbidden tokens and truncation.
    """
    winner = parts[:, 0].argmax(dim=0, keepdim=True)
    tokens, chosen = (parts[:, part].gather(0, winner).squeeze(0) for part in (1, 2))
    return tokens.long(), (chosen - parts[:, 3].logsumexp(dim=0)).float()


sample = register(
    Op(
        name="sample",
        schema=(
            "(Tensor logits, Tensor keys, Tensor positions, Tensor suppressed, Tensor stops, "
            "int min_new_tokens, int first_group, float temperature, int top_k, float top_p, "
            "float repetition_penalty, Tensor? tokens, Tensor? lengths, Tensor? edges) -> Tensor"
        ),
        reference=_sample,
        # Of log-probs. Two columns whose scores are as close as that may win in each other's place.
        tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6},
        backends={Backend.CPU: _on_cpu, Backend.CUDA: _on_cuda},
        cuda=CudaKernel(launch=cuda_kernels.sample, fake=cuda_kernels.new_parts),
    )
)
"""Each rank's candidate for the next token of every row."""

sample_combine = register(
    Op(
        name="sample_combine",
        schema="(Tensor parts) -> (Tensor tokens, Tensor logprobs)",
        reference=_combine,
        # Both backends compute in float64: a log-prob is rounded once.
        tolerance={torch.float64: 2.0**-23},
        # A few numbers a row, which on a CPU torch is as good at.
        backends={Backend.CPU: _combine},
        cuda=CudaKernel(launch=cuda_kernels.sample_combine, fake=cuda_kernels.new_sampled_tokens),
    )
)
"""The next token of every row and its log-prob, from the parts of all ranks."""
