"""The one place for drawing one token a row from logits: temperature, forbidden tokens, the race.

A token is drawn by two Gumbel-max races (the largest of `log p + noise` is a draw from p): first
among groups of `GROUP_TOKENS` neighbouring tokens by their total mass, then among the tokens of the
winning group. That is exact, and takes `vocab / 128 + 128` random numbers instead of `vocab`.
Noise is named by the row's key, the position and the group or token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megachat.ops import cpu_kernels, cuda_kernels
from megachat.ops.philox import GROUP_TOKENS, uniforms
from megachat.ops.registry import Backend, CudaKernel, Op, register

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
    """Divides the logits; 0 takes the largest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """One column for every row."""

    columns: Tensor
    """[rows] int64."""
    scores: Tensor
    """[rows] float64, what the column won its race with."""
    chosen: Tensor
    """[rows] float32, its scaled logit."""
    totals: Tensor
    """[rows] float32, logsumexp of the scaled logits, forbidden ones included."""


def scale(logits: Tensor, temperature: float) -> Tensor:
    """The logits in float32 over the temperature."""
    logits = logits.float()
    return logits / temperature if temperature else logits


def forbid(choice: Tensor, positions: Tensor, rules: DrawRules) -> Tensor:
    """Makes suppressed tokens, and stop tokens that come too early, impossible; in place."""
    choice[:, rules.suppressed] = -torch.inf
    if rules.min_new_tokens > 1:
        early = positions[:, None] + 1 < rules.min_new_tokens
        stops = rules.stops
        choice[:, stops] = choice[:, stops].masked_fill(early, -torch.inf)
    return choice


def choose(
    choice: Tensor, scaled: Tensor, *, keys: Tensor, positions: Tensor, rules: DrawRules
) -> Drawn:
    """Takes the largest of `choice`, or draws by it.

    Args:
        choice: `[rows, columns]` float32, minus infinity where impossible.
        scaled: `[rows, columns]` float32, what log-probs are of.
        keys: As `sample`.
        positions: As `sample`.
        rules: As `sample`.
    """
    if rules.temperature == 0:
        scores, columns = choice.max(dim=1)
    else:
        scores, columns = _race(choice, keys, positions, rules.first_group)
    return Drawn(
        columns=columns,
        scores=scores.double(),
        chosen=scaled.gather(1, columns[:, None]).squeeze(1),
        totals=scaled.logsumexp(dim=1),
    )


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


def _sample(logits: Tensor, keys: Tensor, positions: Tensor, rules: DrawRules) -> Drawn:
    """Chooses one column a row.

    Args:
        logits: `[rows, columns]`, any float dtype, rows contiguous.
        keys: `[rows]` int64, the random stream of each row.
        positions: `[rows]` int64 in [0, 2**32), which part of the stream.
        rules: What is the same for all rows.
    """
    scaled = scale(logits, rules.temperature)
    choice = forbid(scaled.clone(), positions, rules)
    return choose(choice, scaled, keys=keys, positions=positions, rules=rules)


def _on_cpu(logits: Tensor, keys: Tensor, positions: Tensor, rules: DrawRules) -> Drawn:
    """One pass over the logits, without copies."""
    columns, scores, chosen, totals = cpu_kernels.sample(
        logits,
        (keys, positions, rules.suppressed, rules.stops),
        min_new_tokens=rules.min_new_tokens,
        first_group=rules.first_group,
        temperature=float(rules.temperature),
    )
    return Drawn(columns=columns, scores=scores, chosen=chosen, totals=totals)


def _on_cuda(logits: Tensor, keys: Tensor, positions: Tensor, rules: DrawRules) -> Drawn:
    """A block for every row, which keeps nothing of the size of the logits."""
    columns, scores, chosen, totals = torch.ops.megachat.sample(
        logits,
        keys,
        positions,
        rules.suppressed,
        rules.stops,
        rules.min_new_tokens,
        rules.first_group,
        rules.temperature,
    )
    return Drawn(columns=columns, scores=scores, chosen=chosen, totals=totals)


sample = register(
    Op(
        name="sample",
        schema=(
            "(Tensor logits, Tensor keys, Tensor positions, Tensor suppressed, Tensor stops, "
            "int min_new_tokens, int first_group, float temperature) -> "
            "(Tensor columns, Tensor scores, Tensor chosen, Tensor totals)"
        ),
        reference=_sample,
        # Of log-probs. Two columns whose scores are as close as that may win in each other's place.
        tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6},
        backends={Backend.CPU: _on_cpu, Backend.CUDA: _on_cuda},
        cuda=CudaKernel(launch=cuda_kernels.sample, fake=cuda_kernels.new_draws),
    )
)
"""The next token of every row, where nothing but temperature and forbidden tokens rules it."""
