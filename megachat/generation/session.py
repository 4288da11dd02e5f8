"""The one place where the parts of the generation engine meet: `DecodeSession`, one replica's loop.

schedule (pure) -> cache tables -> packed forward pass -> sampler -> tokens, until every answer has
ended. All ranks of a tensor group run the same session in step.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megachat.generation.blocks import BlockAllocator
from megachat.generation.kv_cache import PagedKvCache
from megachat.generation.packed import DecodeRows, PackedStep, PrefillRows
from megachat.generation.runner import ModelRunner
from megachat.generation.sampling import Sampler
from megachat.generation.scheduler import (
    DecodeRequest,
    DecodeScheduler,
    PrefillChunk,
    SampledRow,
    Schedule,
)
from megachat.ops.sample import History
from megachat.records import PromptBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """Answers to a replica's prompts, the samples of a prompt side by side."""

    tokens: Tensor
    """[answers, max_new_tokens] int64."""
    logprobs: Tensor
    """[answers, max_new_tokens] float32."""
    lengths: Tensor
    """[answers] int64."""
    finished: Tensor
    """[answers] bool, the answer ends in a stop token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NewTokens:
    """What one step added."""

    answers: Tensor
    """[rows] int64, which answers got a token."""
    tokens: Tensor
    """[rows] int64."""
    logprobs: Tensor
    """[rows] float32."""
    ended: frozenset[int]
    """Answers that are complete."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionStatistics:
    """How the work of a session went."""

    steps: int
    prefill_tokens: int
    """Prompt tokens computed, recomputation included and shared prefixes left out."""
    decode_tokens: int
    preemptions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """Sequences on the device."""

    answers: Tensor
    """[rows] int64."""
    slots: Tensor
    """[rows] int64."""

    @classmethod
    def of(cls, rows: tuple[SampledRow, ...], device: torch.device) -> "_Rows":
        pairs = torch.tensor(
            [(row.sequence, row.slot) for row in rows], dtype=torch.int64, device=device
        )
        pairs = pairs.view(-1, 2).t().contiguous()
        return cls(answers=pairs[0], slots=pairs[1])

    def __add__(self, other: "_Rows") -> "_Rows":
        return _Rows(
            answers=torch.cat([self.answers, other.answers]),
            slots=torch.cat([self.slots, other.slots]),
        )


class DecodeSession:
    """Answers prompts with continuous batching over a paged cache."""

    def __init__(
        self,
        runner: ModelRunner,
        cache: PagedKvCache,
        sampler: Sampler,
        *,
        prefill_tokens: int,
        stop_ids: tuple[int, ...],
        max_new_tokens: int,
    ) -> None:
        """Starts without prompts.

        Args:
            runner: Computes logits.
            cache: Used by nobody else meanwhile.
            sampler: Chooses tokens.
            prefill_tokens: Prompt tokens that one step computes at most.
            stop_ids: Tokens that end an answer and are part of it.
            max_new_tokens: Length at which an answer ends anyway.
        """
        self._runner = runner
        self._cache = cache
        self._sampler = sampler
        self._device = cache.tables.device
        self._max_new_tokens = max_new_tokens
        self._stops = torch.tensor(stop_ids, dtype=torch.int64, device=self._device)
        self._prefill_tokens = prefill_tokens
        self._scheduler = self._new_scheduler(cache.num_blocks)
        self._decode: tuple[tuple[SampledRow, ...], _Rows] = ((), _Rows.of((), self._device))
        self._counts = {field.name: 0 for field in fields(SessionStatistics)}

    def run(self, prompts: PromptBatch, *, keys: Tensor) -> Iterator[NewTokens]:
        """Answers prompts, step by step; the answers so far are in `answers`.

        Whoever stops iterating early loses the rest and leaves nothing behind.

        Args:
            prompts: At least one; each has at least one token.
            keys: `[num_prompts * num_samples]` int64, the random stream of each answer.

        Raises:
            CapacityError: The whole cache cannot hold one of the sequences.
        """
        num_samples = len(keys) // prompts.num_rows
        self._keys = keys.to(self._device)
        self._prompt_lengths = prompts.lengths.to(self._device).repeat_interleave(num_samples)
        longest = int(prompts.lengths.max())
        # Prompt and answer of each sequence: what a step reads its input tokens from.
        self._tokens = torch.nn.functional.pad(
            prompts.tokens[:, :longest].to(self._device).repeat_interleave(num_samples, dim=0),
            (0, self._max_new_tokens),
        )
        self._logprobs = torch.zeros(len(keys), self._max_new_tokens, device=self._device)
        self._generated = torch.zeros_like(self._prompt_lengths)
        self._stopped = torch.zeros(len(keys), dtype=torch.bool, device=self._device)
        # No more blocks than could ever be used, so that the touched part of the pool stays small.
        ceilings = self._prompt_lengths + self._max_new_tokens - 1 + self._cache.block_size - 1
        needed = int((ceilings // self._cache.block_size).sum())
        self._scheduler = self._new_scheduler(max(1, min(needed, self._cache.num_blocks)))
        rows = zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True)
        for number, (tokens, length) in enumerate(rows):
            self._scheduler.add(
                DecodeRequest(
                    indices=range(number * num_samples, (number + 1) * num_samples),
                    prompt=tuple(tokens[:length]),
                    max_new_tokens=self._max_new_tokens,
                )
            )
        self._cache.acquire()
        try:
            while not self._scheduler.is_done:
                yield self._step()
        finally:
            self._scheduler.cancel()
            self._scheduler.audit()

    @property
    def answers(self) -> Answers:
        """What the prompts of the latest run were answered."""
        columns = torch.arange(self._max_new_tokens, device=self._device)
        inside = columns < self._generated[:, None]
        source = (self._prompt_lengths[:, None] + columns).clamp(max=self._tokens.shape[1] - 1)
        return Answers(
            tokens=self._tokens.gather(1, source).masked_fill(~inside, 0),
            logprobs=self._logprobs,
            lengths=self._generated,
            finished=self._stopped,
        )

    @property
    def statistics(self) -> SessionStatistics:
        """Of all runs."""
        return SessionStatistics(**self._counts)

    def _new_scheduler(self, num_blocks: int) -> DecodeScheduler:
        return DecodeScheduler(
            BlockAllocator(num_blocks, block_size=self._cache.block_size),
            max_sequences=self._cache.max_sequences,
            prefill_tokens=self._prefill_tokens,
        )

    def _step(self) -> NewTokens:
        """Computes what the scheduler says and tells it what came of it."""
        schedule = self._scheduler.schedule()
        self._cache.apply(schedule)
        if schedule.decode is not self._decode[0]:
            self._decode = (schedule.decode, _Rows.of(schedule.decode, self._device))
        decode = self._decode[1]
        logits = self._runner.forward(self._pack(schedule, decode))
        self._cache.lengths[decode.slots] += 1
        rows = decode
        if schedule.first_tokens:
            rows = decode + _Rows.of(tuple(row for _, row in schedule.first_tokens), self._device)
        known = self._cache.lengths[rows.slots]
        history = None
        if self._sampler.needs_history:
            history = History(tokens=self._tokens[rows.answers], lengths=known)
        positions = known - self._prompt_lengths[rows.answers]
        sampled = self._sampler.sample(
            logits, keys=self._keys[rows.answers], positions=positions, history=history
        )
        stopped = torch.isin(sampled.tokens, self._stops)
        self._tokens[rows.answers, known] = sampled.tokens
        self._logprobs[rows.answers, positions] = sampled.logprobs
        self._generated[rows.answers] = positions + 1
        self._stopped[rows.answers] = stopped
        ended = self._scheduler.complete(stopped.tolist())
        self._count(schedule)
        return NewTokens(
            answers=rows.answers,
            tokens=sampled.tokens,
            logprobs=sampled.logprobs,
            ended=frozenset(ended),
        )

    def _pack(self, schedule: Schedule, decode: _Rows) -> PackedStep:
        """The step's tokens, decode rows first, and what attention must know about them."""
        step = self._pack_decode(schedule, decode)
        if not schedule.chunks:
            return step
        prefill = self._pack_chunks(schedule.chunks)
        assert prefill.prefill is not None
        ends = prefill.prefill.offsets[1:] + len(step.tokens) - 1
        numbers = torch.tensor(
            [chunk for chunk, _ in schedule.first_tokens], dtype=torch.int64, device=self._device
        )
        rows = torch.arange(len(step.tokens), device=self._device)
        return PackedStep(
            tokens=torch.cat([step.tokens, prefill.tokens]),
            positions=torch.cat([step.positions, prefill.positions]),
            slots=torch.cat([step.slots, prefill.slots]),
            decode=step.decode if len(rows) else None,
            prefill=prefill.prefill,
            outputs=torch.cat([rows, ends[numbers]]),
        )

    def _pack_decode(self, schedule: Schedule, rows: _Rows) -> PackedStep:
        """The newest token of every running sequence."""
        positions = self._cache.lengths[rows.slots]
        columns = -(-schedule.longest // self._cache.block_size)
        tables = self._cache.tables[rows.slots, : max(1, columns)]
        return PackedStep(
            tokens=self._tokens[rows.answers, positions],
            positions=positions,
            slots=self._cache.positions_of(tables, positions),
            decode=DecodeRows(tables=tables, lengths=positions + 1),
            prefill=None,
            outputs=None,
        )

    def _pack_chunks(self, chunks: tuple[PrefillChunk, ...]) -> PackedStep:
        """The tokens of the prompts' chunks, one chunk after the other."""
        numbers = torch.tensor(
            [(chunk.sequence, chunk.slot, chunk.start, chunk.num_tokens) for chunk in chunks],
            device=self._device,
        )
        answers, slots, starts, counts = numbers.t().contiguous()
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        chunk = torch.arange(len(chunks), device=self._device).repeat_interleave(counts)
        inside = torch.arange(len(chunk), device=self._device) - offsets[chunk]
        positions = starts[chunk] + inside
        tables = self._cache.tables[slots]
        return PackedStep(
            tokens=self._tokens[answers[chunk], positions],
            positions=positions,
            slots=self._cache.positions_of(tables[chunk], positions),
            decode=None,
            prefill=PrefillRows(tables=tables, starts=starts, offsets=offsets),
            outputs=None,
        )

    def _count(self, schedule: Schedule) -> None:
        self._counts["steps"] += 1
        self._counts["prefill_tokens"] += sum(chunk.num_tokens for chunk in schedule.chunks)
        self._counts["decode_tokens"] += len(schedule.decode)
        self._counts["preemptions"] += len(schedule.preempted)
