"""The one place that turns logits into tokens: `Sampler`.

The vocabulary may be cut over a tensor group; ranks exchange a few numbers a row, never logits.
Tokens are drawn by `megachat.ops.sample`, with noise that is named by the request's key, the
position and the token, so a response depends neither on which other requests are in the batch nor
on the parallel layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from megachat.errors import ConfigError
from megachat.generation.config import SamplingConfig
from megachat.ops.philox import GROUP_TOKENS
from megachat.ops.registry import Backend
from megachat.ops.sample import Drawn, DrawRules, choose, forbid, sample, scale
from megachat.parallel.collectives import all_gather_last_dim, all_gather_rows, all_reduce_sum
from megachat.parallel.rng import seed_for

_DIGIT_BITS = 8
"""Width of a digit in the search for the edge of a nucleus."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VocabularySlice:
    """The part of the vocabulary whose logits this rank has."""

    start: int
    """First id, a multiple of `GROUP_TOKENS`."""
    size: int
    """Columns of logits that mean something; padding follows."""
    group: ProcessGroup
    """Ranks that have the other parts, in the order of their ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """What each row's request consists of so far."""

    tokens: Tensor
    """[rows, seq] int64, prompt and response, padding to the right."""
    lengths: Tensor
    """[rows] int64, at least 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTokens:
    """One new token for every row."""

    tokens: Tensor
    """[rows] int64."""
    logprobs: Tensor
    """[rows] float32, under the temperature-scaled distribution before penalties, forbidden tokens
    and truncation: the one that a training pass recomputes."""


def request_keys(ids: Sequence[int], *, seed: int, num_samples: int = 1) -> Tensor:
    """The random stream of each sample of each request.

    Args:
        ids: Identity of each request.
        seed: Of the call.
        num_samples: Answers to each request.

    Returns:
        `[len(ids) * num_samples]` int64, the samples of a request side by side.
    """
    return torch.tensor(
        [
            seed_for(seed, "request", request, sample)
            for request in ids
            for sample in range(num_samples)
        ]
    )


class Sampler:
    """Chooses the next token of every row of a batch."""

    def __init__(
        self,
        config: SamplingConfig,
        *,
        stop_ids: Sequence[int],
        suppressed_ids: Sequence[int],
        vocabulary: VocabularySlice | None = None,
        backend: Backend = Backend.REFERENCE,
    ) -> None:
        """Fixes the rules.

        Args:
            config: Temperature and truncation.
            stop_ids: Tokens that end a response.
            suppressed_ids: Tokens that are never chosen (padding and other control symbols).
            vocabulary: This rank's slice; None means that rows hold the whole vocabulary.
            backend: Who chooses where neither penalty nor truncation is asked for.

        Raises:
            KernelError: The backend cannot choose.
            ConfigError: The slice does not start at a group of tokens.
        """
        self._config = config
        self._sample = sample.on(backend)
        self._is_plain = not config.top_k and config.top_p == 1.0 and not self.needs_history
        self._start = vocabulary.start if vocabulary is not None else 0
        # A slice that is all padding keeps one column, which has no mass.
        self._size = max(1, vocabulary.size) if vocabulary is not None else None
        self._group = vocabulary.group if vocabulary is not None else None
        if self._start % GROUP_TOKENS:
            raise ConfigError(
                f"a slice of the vocabulary starts at {self._start}, which is no multiple of "
                f"{GROUP_TOKENS}: pad the vocabulary of every rank to one"
            )
        self._stop_ids = tuple(stop_ids)
        self._suppressed_ids = tuple(suppressed_ids)
        self._rules: dict[tuple[int, torch.device], DrawRules] = {}

    @property
    def needs_history(self) -> bool:
        """Whether `sample` must be told what was said so far."""
        return self._config.repetition_penalty != 1.0

    def sample(
        self, logits: Tensor, *, keys: Tensor, positions: Tensor, history: History | None = None
    ) -> SampledTokens:
        """Chooses one token a row; a collective call of the vocabulary's group.

        Args:
            logits: `[rows, vocab/tp]`, any float dtype.
            keys: `[rows]` int64, the random stream of each row.
            positions: `[rows]` int64, number of response tokens before this one.
            history: What was said so far; needed for a repetition penalty.

        Raises:
            ConfigError: There is a repetition penalty and no history.
        """
        logits = logits[:, : self._size]
        rules = self._rules_for(logits)
        if self._is_plain:
            return self._combine(self._sample(logits, keys, positions, rules))
        scaled = scale(logits, rules.temperature)
        choice = forbid(self._penalize(scaled, history), positions, rules)
        if rules.temperature:
            choice = self._truncate(choice)
        drawn = choose(choice, scaled, keys=keys, positions=positions, rules=rules)
        return self._combine(drawn)

    def _rules_for(self, logits: Tensor) -> DrawRules:
        """The rules over columns of this rank's slice, made once for each width and device."""
        place = logits.shape[1], logits.device
        if place not in self._rules:
            suppressed, stops = (
                torch.tensor(
                    [id - self._start for id in ids if 0 <= id - self._start < place[0]],
                    dtype=torch.int64,
                    device=place[1],
                )
                for ids in (self._suppressed_ids, self._stop_ids)
            )
            self._rules[place] = DrawRules(
                temperature=self._config.temperature,
                suppressed=suppressed,
                stops=stops,
                min_new_tokens=self._config.min_new_tokens,
                first_group=self._start // GROUP_TOKENS,
            )
        return self._rules[place]

    def _penalize(self, scaled: Tensor, history: History | None) -> Tensor:
        """A copy of the logits in which tokens that were said are less likely."""
        penalty = self._config.repetition_penalty
        if not self.needs_history:
            return scaled.clone()
        if history is None:
            raise ConfigError(
                f"repetition_penalty {penalty} needs the tokens so far, and none were given"
            )
        columns = torch.arange(history.tokens.shape[1], device=scaled.device)
        local = history.tokens - self._start
        outside = (local < 0) | (local >= scaled.shape[1])
        outside |= columns >= history.lengths[:, None]
        said = scaled.new_zeros(scaled.shape[0], scaled.shape[1] + 1, dtype=torch.bool)
        said.scatter_(1, local.masked_fill(outside, scaled.shape[1]), True)
        penalized = torch.where(scaled > 0, scaled / penalty, scaled * penalty)
        return torch.where(said[:, :-1], penalized, scaled)

    def _truncate(self, choice: Tensor) -> Tensor:
        """Applies top-k, then top-p; what is cut becomes minus infinity.

        Tokens exactly as likely as the last one that is kept are kept too, so the result does not
        depend on an order among them.
        """
        if self._config.top_k:
            largest = self._largest(choice, self._config.top_k)
            edge = largest[:, -1:]
            if self._config.top_p < 1.0:
                masses = largest.double().softmax(dim=1)
                outside = masses.cumsum(dim=1) - masses >= self._config.top_p
                edge = largest.masked_fill(outside, torch.inf).amin(dim=1, keepdim=True)
        elif self._config.top_p < 1.0:
            edge = self._nucleus_edge(choice)
        else:
            return choice
        return choice.masked_fill_(choice < edge, -torch.inf)

    def _largest(self, choice: Tensor, count: int) -> Tensor:
        """`[rows, count]`, or all, largest logits of the whole vocabulary in falling order."""
        largest = choice.topk(min(count, choice.shape[1]), dim=1).values
        if self._group is None or self._group.size() == 1:
            return largest
        largest = F.pad(largest, (0, count - largest.shape[1]), value=-torch.inf)
        return all_gather_last_dim(largest, self._group).topk(count, dim=1).values

    def _nucleus_edge(self, choice: Tensor) -> Tensor:
        """The smallest logit of each row's nucleus, `[rows, 1]`.

        Finds the largest x for which the tokens with logits of at least x have mass p, digit by
        digit of its binary form: each pass sums the mass by the next digit, over all ranks, among
        the tokens that agree in the digits before. Four histograms of 256 numbers a row are
        exchanged, whatever the vocabulary.
        """
        num_rows, num_columns = choice.shape
        peak = self._over_ranks_max(choice.amax(dim=1, keepdim=True))
        weights = (choice - peak).exp_().double().flatten()
        ordered = _order_preserving(choice).flatten()
        rows = torch.arange(num_rows, device=choice.device).repeat_interleave(num_columns)
        edge = ordered.new_zeros(num_rows)
        above = weights.new_zeros(num_rows, 1)
        wanted = weights.new_full((num_rows, 1), -1.0)
        for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
            histogram = weights.new_zeros(num_rows, 1 << _DIGIT_BITS)
            digits = (ordered >> shift) & ((1 << _DIGIT_BITS) - 1)
            histogram.view(-1).index_add_(0, (rows << _DIGIT_BITS) + digits, weights)
            if self._group is not None:
                all_reduce_sum(histogram, self._group)
            if shift == 32 - _DIGIT_BITS:
                wanted = self._config.top_p * histogram.sum(dim=1, keepdim=True)
            from_top = histogram.flip(1).cumsum(dim=1).flip(1) + above
            # The mass falls with the digit: count the digits that still reach p.
            digit = (from_top >= wanted).sum(dim=1, keepdim=True).sub_(1).clamp_(min=0)
            above = from_top.gather(1, digit) - histogram.gather(1, digit)
            edge |= digit.squeeze(1) << shift
            agreeing = (digits == digit.squeeze(1)[rows]).nonzero().squeeze(1)
            rows, ordered, weights = rows[agreeing], ordered[agreeing], weights[agreeing]
        return _order_restoring(edge)[:, None]

    def _over_ranks_max(self, values: Tensor) -> Tensor:
        """`[rows, 1]` numbers to their largest over the vocabulary's group."""
        if self._group is None:
            return values
        return all_gather_last_dim(values, self._group).amax(dim=1, keepdim=True)

    def _combine(self, drawn: Drawn) -> SampledTokens:
        """The winner over all ranks, from one exchange of four numbers a row."""
        tokens, chosen, total = drawn.columns + self._start, drawn.chosen, drawn.totals
        if self._group is not None and self._group.size() > 1:
            mine = torch.stack([drawn.scores, tokens.double(), chosen.double(), total.double()])
            ranks = all_gather_rows(mine[None], self._group)
            winner = ranks[:, 0].argmax(dim=0, keepdim=True)  # the lowest rank of equal ones
            tokens, chosen = (ranks[:, i].gather(0, winner).squeeze(0) for i in (1, 2))
            total = ranks[:, 3].logsumexp(dim=0)
        return SampledTokens(tokens=tokens.long(), logprobs=(chosen - total).float())


def _order_preserving(x: Tensor) -> Tensor:
    """float32 numbers to int64 in [0, 2**32) in the same order."""
    bits = x.view(torch.int32)
    flipped = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return flipped.long() + (1 << 31)


def _order_restoring(ordered: Tensor) -> Tensor:
    """Inverse of `_order_preserving`."""
    flipped = (ordered - (1 << 31)).int()
    return torch.where(flipped < 0, flipped ^ 0x7FFFFFFF, flipped).view(torch.float32)
