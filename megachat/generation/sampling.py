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

from megachat.errors import ConfigError
from megachat.generation.config import SamplingConfig
from megachat.ops.philox import GROUP_TOKENS
from megachat.ops.registry import Backend
from megachat.ops.sample import DrawRules, History, choices, sample, sample_combine, scale
from megachat.ops.truncation import lowest_kept
from megachat.parallel.collectives import all_gather_rows
from megachat.parallel.rng import seed_for


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
            backend: Who chooses; what top-k and top-p keep over ranks is found in plain torch.

        Raises:
            KernelError: The backend cannot choose.
            ConfigError: The slice does not start at a group of tokens.
        """
        self._config = config
        self._draw, self._combine = sample.on(backend), sample_combine.on(backend)
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
        edges = self._edges(logits, positions=positions, rules=rules, history=history)
        parts = self._draw(
            logits, keys=keys, positions=positions, rules=rules, history=history, edges=edges
        )[None]
        if self._group is not None:
            parts = all_gather_rows(parts, self._group)
        tokens, logprobs = self._combine(parts)
        return SampledTokens(tokens=tokens, logprobs=logprobs)

    def _edges(
        self, logits: Tensor, *, positions: Tensor, rules: DrawRules, history: History | None
    ) -> Tensor | None:
        """What top-k and top-p keep of each row, if the ranks have to find that together.

        They agree on an edge in several exchanges, which a kernel cannot make: this is plain torch
        for every backend.
        """
        if self._group is None or self._group.size() == 1 or not rules.truncates:
            return None
        scaled = scale(logits, rules.temperature)
        choice = choices(scaled, positions=positions, rules=rules, history=history)
        return lowest_kept(choice, top_k=rules.top_k, top_p=rules.top_p, group=self._group)

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
                suppressed=suppressed,
                stops=stops,
                min_new_tokens=self._config.min_new_tokens,
                first_group=self._start // GROUP_TOKENS,
                temperature=self._config.temperature,
                top_k=self._config.top_k,
                top_p=self._config.top_p,
                repetition_penalty=self._config.repetition_penalty,
            )
        return self._rules[place]
