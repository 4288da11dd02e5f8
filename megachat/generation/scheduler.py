"""The one place that decides what each step of generation computes. Pure and deterministic.

Continuous batching: every running sequence gets one token a step; a finished one leaves at once
and the next prompt enters. Prompts are computed in chunks, a bounded number of tokens a step,
beside the running sequences. When blocks run out, the sequence that entered last gives its blocks
up and is computed again later (preemption by recompute); the first one always goes on, so every
request ends.

`schedule()` says what to do, `complete()` is told what came of it. No tensor is touched here.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megachat.errors import CapacityError, ConfigError
from megachat.generation.blocks import BlockAllocator, BlockCopy


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRequest:
    """A prompt and how many answers it shall get."""

    indices: range
    """Numbers of the answers, one sequence each; unique among all requests."""
    prompt: tuple[int, ...]
    """At least one token."""
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TableEntry:
    """Column `column` of a slot's block table is to become `block`."""

    slot: int
    column: int
    block: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillChunk:
    """Consecutive known tokens of one sequence, to be computed together."""

    sequence: int
    slot: int
    start: int
    """Position of the first token; all before it are in the cache."""
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRow:
    """A sequence that gets its next token in this step."""

    sequence: int
    slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """One step of generation."""

    decode: tuple[SampledRow, ...]
    """Running sequences: the newest token of each is computed and the next one sampled. The same
    object as in the step before when nothing changed."""
    longest: int
    """Tokens that the longest of them attends to, the new one included; 0 without any."""
    chunks: tuple[PrefillChunk, ...]
    """Prompts, after the decode rows."""
    first_tokens: tuple[tuple[int, SampledRow], ...]
    """Sequences whose known tokens end with a chunk, and the number of that chunk. Several answers
    to one prompt name the same chunk."""
    lengths: tuple[tuple[int, int], ...]
    """Slots whose number of cached tokens is to be set, and to what, before this step's decode
    rows are computed and counted."""
    table_entries: tuple[TableEntry, ...]
    copies: tuple[BlockCopy, ...]
    """To be done all at once, before anything is written."""
    preempted: tuple[int, ...]
    """Sequences that lost their slot."""


@dataclass(slots=True, eq=False)
class _Sequence:
    """One answer under construction."""

    index: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    followers: deque["_Sequence"] = field(default_factory=deque)
    """Further answers to the prompt that wait for it to be computed."""
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens in the cache once the scheduled steps are done."""
    generated: int = 0
    decoding: bool = False
    """All known tokens but the newest are in the cache."""

    @property
    def longest(self) -> int:
        """Tokens that it may have in the cache; the last token of an answer is never computed."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def known(self) -> int:
        """Tokens of the prompt and of the answer so far."""
        return len(self.prompt) + self.generated


@dataclass(slots=True)
class _Step:
    """A schedule under construction."""

    longest: int = 0
    chunks: list[PrefillChunk] = field(default_factory=list)
    first_tokens: list[tuple[int, SampledRow]] = field(default_factory=list)
    lengths: list[tuple[int, int]] = field(default_factory=list)
    table_entries: list[TableEntry] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    finishing: list[_Sequence] = field(default_factory=list)
    """In the order of `first_tokens`."""


class DecodeScheduler:
    """Continuous batching over a pool of blocks."""

    def __init__(
        self, allocator: BlockAllocator, *, max_sequences: int, prefill_tokens: int
    ) -> None:
        """Starts without requests.

        Args:
            allocator: The pool, not used by anyone else.
            max_sequences: Sequences that run at once, which is the number of slots.
            prefill_tokens: Prompt tokens that one step computes at most.

        Raises:
            ConfigError: A limit is below 1.
        """
        if max_sequences < 1 or prefill_tokens < 1:
            raise ConfigError(
                f"max_sequences {max_sequences} and prefill_tokens {prefill_tokens} must be at "
                "least 1, or nothing can be computed"
            )
        self._allocator = allocator
        self._prefill_tokens = prefill_tokens
        self._slots = list(range(max_sequences))
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        """In the order of entry."""
        self._decode: tuple[SampledRow, ...] = ()
        self._decoding: list[_Sequence] = []
        self._sampled: list[_Sequence] = []
        self.num_preemptions = 0

    @property
    def is_done(self) -> bool:
        """Whether every answer has ended."""
        return not self._waiting and not self._running

    def add(self, request: DecodeRequest) -> None:
        """Queues a request.

        Raises:
            CapacityError: The whole pool cannot hold one of its answers.
        """
        first, *others = (
            _Sequence(index=index, prompt=request.prompt, max_new_tokens=request.max_new_tokens)
            for index in request.indices
        )
        allocator = self._allocator
        needed = allocator.blocks_for(first.longest)
        if needed > allocator.num_blocks:
            raise CapacityError(
                f"a prompt of {len(request.prompt)} tokens with up to {request.max_new_tokens} new "
                f"ones needs {needed} blocks of {allocator.block_size} tokens, the key-value cache "
                f"has {allocator.num_blocks}: enlarge it or shorten the request"
            )
        first.followers.extend(others)
        self._waiting.append(first)

    def schedule(self) -> Schedule:
        """Decides the next step; to be followed by `complete`."""
        step = _Step()
        self._advance(step)
        budget = self._prefill_tokens
        for sequence in self._running.copy():
            if not sequence.decoding and budget:
                budget -= self._chunk(sequence, budget, step)
        # Whoever entered now would take the blocks that another one has just given up.
        while budget and not step.preempted and (entered := self._enter(step)):
            budget -= self._chunk(entered, budget, step)
        self._sampled = [*self._decoding, *step.finishing]
        return Schedule(
            decode=self._decode,
            longest=step.longest,
            chunks=tuple(step.chunks),
            first_tokens=tuple(step.first_tokens),
            lengths=tuple(step.lengths),
            table_entries=tuple(step.table_entries),
            copies=tuple(step.copies),
            preempted=tuple(step.preempted),
        )

    def complete(self, stopped: Sequence[bool]) -> list[int]:
        """Takes note of the sampled tokens.

        Args:
            stopped: Of every sampled sequence, decode rows and then first tokens, whether the token
                ended its answer.

        Returns:
            The sequences that ended, by a stop token or by their length.
        """
        ended = []
        for sequence, stop in zip(self._sampled, stopped, strict=True):
            sequence.generated += 1
            if stop or sequence.generated == sequence.max_new_tokens:
                ended.append(sequence.index)
                self._leave(sequence)
        if ended:
            self._running = [sequence for sequence in self._running if sequence.slot >= 0]
        self._sampled = []
        return ended

    def cancel(self) -> None:
        """Drops all requests and frees their blocks."""
        for sequence in self._running:
            self._leave(sequence)
        self._running, self._sampled, self._decoding = [], [], []
        self._waiting.clear()

    def audit(self) -> None:
        """Proves that no block is lost; see `BlockAllocator.audit`."""
        self._allocator.audit([sequence.blocks for sequence in self._running])

    def _advance(self, step: _Step) -> None:
        """Makes room for one more token of every decoding sequence, the oldest first."""
        decoding = []
        index = 0
        while index < len(self._running):  # preemption shortens the list from behind
            sequence = self._running[index]
            if sequence.decoding and self._make_room(sequence, step):
                sequence.cached += 1
                step.longest = max(step.longest, sequence.cached)
                decoding.append(sequence)
            index += 1
        if decoding != self._decoding:
            self._decoding = decoding
            self._decode = tuple(SampledRow(sequence=s.index, slot=s.slot) for s in decoding)

    def _make_room(self, sequence: _Sequence, step: _Step) -> bool:
        """Gives a sequence a block of its own for its next token.

        Returns:
            False when it had to give up its place.
        """
        allocator = self._allocator
        column = sequence.cached // allocator.block_size
        fresh = column == len(sequence.blocks)
        if not fresh and not allocator.is_shared(sequence.blocks[column]):
            return True
        while not allocator.num_free:
            victim = self._running.pop()
            self._preempt(victim, step)
            if victim is sequence:
                return False
            if not fresh and not allocator.is_shared(sequence.blocks[column]):
                return True
        if fresh:
            sequence.blocks += allocator.allocate()
        else:
            copy = allocator.make_private(sequence.blocks[column])
            sequence.blocks[column] = copy.target
            step.copies.append(copy)
        step.table_entries.append(
            TableEntry(slot=sequence.slot, column=column, block=sequence.blocks[column])
        )
        return True

    def _preempt(self, sequence: _Sequence, step: _Step) -> None:
        """Takes everything from a sequence and queues it first."""
        step.preempted.append(sequence.index)
        self.num_preemptions += 1
        self._leave(sequence)
        self._waiting.appendleft(sequence)

    def _leave(self, sequence: _Sequence) -> None:
        """Frees a sequence's slot and blocks."""
        self._allocator.release(sequence.blocks)
        heapq.heappush(self._slots, sequence.slot)
        sequence.slot, sequence.blocks, sequence.cached = -1, [], 0
        sequence.decoding = False

    def _enter(self, step: _Step) -> _Sequence | None:
        """Lets the first waiting sequence run, if there is a slot and room for its known tokens."""
        if not self._waiting or not self._slots:
            return None
        allocator, sequence = self._allocator, self._waiting[0]
        shared = allocator.share_prefix(sequence.prompt)
        needed = allocator.blocks_for(sequence.known) - len(shared)
        # Entering only to be preempted soon is waste: who may want a block finds one.
        if needed > allocator.num_free - self._num_growing(at_most=allocator.num_free - needed):
            allocator.release(shared)
            return None
        self._waiting.popleft()
        sequence.blocks = shared + allocator.allocate(needed)
        sequence.cached = len(shared) * allocator.block_size
        self._take_slot(sequence, step)
        return sequence

    def _num_growing(self, *, at_most: int) -> int:
        """Running sequences that may yet want a block, or all of them if that is few enough."""
        if len(self._running) <= at_most:
            return len(self._running)
        allocator = self._allocator
        return sum(
            len(sequence.blocks) < allocator.blocks_for(sequence.longest)
            or allocator.is_shared(sequence.blocks[-1])
            for sequence in self._running
        )

    def _take_slot(self, sequence: _Sequence, step: _Step) -> None:
        """Puts a sequence among the running ones and its blocks into a table."""
        sequence.slot = heapq.heappop(self._slots)
        self._running.append(sequence)
        step.table_entries += [
            TableEntry(slot=sequence.slot, column=column, block=block)
            for column, block in enumerate(sequence.blocks)
        ]

    def _chunk(self, sequence: _Sequence, budget: int, step: _Step) -> int:
        """Computes the next known tokens of a sequence, as many as the budget allows."""
        start, count = sequence.cached, min(budget, sequence.known - sequence.cached)
        sequence.cached += count
        chunk = PrefillChunk(
            sequence=sequence.index, slot=sequence.slot, start=start, num_tokens=count
        )
        step.chunks.append(chunk)
        step.lengths.append((sequence.slot, sequence.cached))
        # Whoever enters later in this step may read these blocks: a layer writes before it reads.
        self._allocator.publish(
            sequence.blocks,
            sequence.prompt[: sequence.cached],
            start=start // self._allocator.block_size,
        )
        if sequence.cached == sequence.known:
            self._first_token(sequence, step)
            self._fork(sequence, step)
        return count

    def _first_token(self, sequence: _Sequence, step: _Step) -> None:
        """Samples a sequence from the chunk that was scheduled last."""
        sequence.decoding = True
        row = SampledRow(sequence=sequence.index, slot=sequence.slot)
        step.first_tokens.append((len(step.chunks) - 1, row))
        step.finishing.append(sequence)

    def _fork(self, sequence: _Sequence, step: _Step) -> None:
        """Starts the other answers to a prompt from its blocks; those without a slot wait on."""
        followers = sequence.followers
        while followers and self._slots:
            follower = followers.popleft()
            follower.blocks = self._allocator.fork(sequence.blocks)
            follower.cached = sequence.cached
            self._take_slot(follower, step)
            step.lengths.append((follower.slot, follower.cached))
            self._first_token(follower, step)
        if followers:
            first = followers.popleft()
            first.followers, sequence.followers = followers, deque()
            self._waiting.appendleft(first)
