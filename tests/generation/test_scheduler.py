"""The scheduler, driven by an executor that follows its orders on lists instead of tensors."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.errors import CapacityError, ConfigError
from megachat.generation.blocks import BlockAllocator
from megachat.generation.scheduler import DecodeRequest, DecodeScheduler, Schedule

STOP = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prompt, and for each of its answers the length at which a stop token comes."""

    prompt: tuple[int, ...]
    stops: tuple[int, ...]


@dataclass
class Executor:
    """Keeps, in place of keys and values, the tokens themselves in blocks."""

    jobs: list[Job]
    scheduler: DecodeScheduler
    block_size: int
    max_new_tokens: int
    blocks: dict[int, dict[int, int]] = field(default_factory=dict)
    tables: dict[int, dict[int, int]] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    prompt_lengths: dict[int, int] = field(default_factory=dict)
    stops: dict[int, int] = field(default_factory=dict)
    ended: list[int] = field(default_factory=list)
    schedules: list[Schedule] = field(default_factory=list)

    def __post_init__(self) -> None:
        index = 0
        for job in self.jobs:
            indices = range(index, index + len(job.stops))
            for number, stop in zip(indices, job.stops, strict=True):
                self.tokens[number] = list(job.prompt)
                self.prompt_lengths[number] = len(job.prompt)
                self.stops[number] = stop
            self.scheduler.add(
                DecodeRequest(
                    indices=indices, prompt=job.prompt, max_new_tokens=self.max_new_tokens
                )
            )
            index = indices.stop

    def run(self) -> None:
        while not self.scheduler.is_done:
            self.step()
            self.scheduler.audit()

    def step(self) -> None:
        schedule = self.scheduler.schedule()
        self.schedules.append(schedule)
        copied = {copy.target: dict(self.blocks[copy.source]) for copy in schedule.copies}
        self.blocks |= copied
        for entry in schedule.table_entries:
            self.tables.setdefault(entry.slot, {})[entry.column] = entry.block
        for slot, length in schedule.lengths:
            self.lengths[slot] = length
        for row in schedule.decode:
            self.write(row.sequence, row.slot, self.lengths[row.slot], 1)
        for chunk in schedule.chunks:
            self.write(chunk.sequence, chunk.slot, chunk.start, chunk.num_tokens)
        # As in a layer of the model: everything is written before anything is read.
        for row in schedule.decode:
            self.lengths[row.slot] += 1
            self.check(row.sequence, row.slot)
        for number, row in schedule.first_tokens:
            last = schedule.chunks[number]
            assert self.lengths[row.slot] == last.start + last.num_tokens
            self.check(row.sequence, row.slot)
        if schedule.decode:
            assert schedule.longest == max(self.lengths[row.slot] for row in schedule.decode)
        self.sample(schedule)

    def write(self, sequence: int, slot: int, start: int, count: int) -> None:
        for position in range(start, start + count):
            block = self.tables[slot][position // self.block_size]
            slots = self.blocks.setdefault(block, {})
            slots[position % self.block_size] = self.tokens[sequence][position]

    def check(self, sequence: int, slot: int) -> None:
        """All known tokens are in the cache, the newest included, and nobody else's."""
        size = self.block_size
        known = self.tokens[sequence]
        assert self.lengths[slot] == len(known)
        cached = [
            self.blocks[self.tables[slot][position // size]][position % size]
            for position in range(len(known))
        ]
        assert cached == known

    def sample(self, schedule: Schedule) -> None:
        rows = [*schedule.decode, *(row for _, row in schedule.first_tokens)]
        assert len({row.slot for row in rows}) == len(rows)
        stopped = []
        for row in rows:
            tokens = self.tokens[row.sequence]
            generated = len(tokens) - self.prompt_lengths[row.sequence] + 1
            stopped.append(generated == self.stops[row.sequence])
            # Answers of one prompt differ, so that sharing too much would show.
            tokens.append(100 + row.sequence if not stopped[-1] else STOP)
        self.ended += self.scheduler.complete(stopped)


def _executor(
    jobs: list[Job],
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_sequences: int = 8,
    prefill_tokens: int = 16,
    max_new_tokens: int = 6,
) -> Executor:
    allocator = BlockAllocator(num_blocks, block_size=block_size)
    return Executor(
        jobs=jobs,
        scheduler=DecodeScheduler(
            allocator, max_sequences=max_sequences, prefill_tokens=prefill_tokens
        ),
        block_size=block_size,
        max_new_tokens=max_new_tokens,
    )


JOBS = st.lists(
    st.builds(
        Job,
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=9).map(tuple),
        stops=st.lists(st.integers(1, 8), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=7,
)


@settings(deadline=None, max_examples=300)
@given(
    jobs=JOBS,
    spare_blocks=st.integers(0, 12),
    block_size=st.integers(1, 5),
    max_sequences=st.integers(1, 6),
    prefill_tokens=st.integers(1, 12),
)
def test_every_answer_ends_once_with_its_own_tokens_and_no_block_is_lost(
    jobs: list[Job], spare_blocks: int, block_size: int, max_sequences: int, prefill_tokens: int
) -> None:
    """From a pool that holds one sequence only to one that holds them all."""
    longest = max(len(job.prompt) for job in jobs) + 5
    executor = _executor(
        jobs,
        num_blocks=-(-longest // block_size) + spare_blocks,
        block_size=block_size,
        max_sequences=max_sequences,
        prefill_tokens=prefill_tokens,
    )
    executor.run()
    assert sorted(executor.ended) == sorted(executor.stops)
    for sequence, stop in executor.stops.items():
        answer = executor.tokens[sequence][executor.prompt_lengths[sequence] :]
        assert len(answer) == min(stop, 6)
        assert (answer[-1] == STOP) is (stop <= 6)
    for schedule in executor.schedules:
        assert sum(chunk.num_tokens for chunk in schedule.chunks) <= prefill_tokens
        assert len(schedule.decode) <= max_sequences
        assert schedule.decode or schedule.chunks or schedule.preempted


def test_the_same_requests_are_scheduled_the_same_way() -> None:
    jobs = [Job(prompt=(1,) * n, stops=(n, 2)) for n in range(1, 8)]
    first, second = (_executor(jobs, num_blocks=9), _executor(jobs, num_blocks=9))
    first.run()
    second.run()
    assert first.schedules == second.schedules


def test_a_finished_sequence_makes_room_for_a_waiting_prompt_in_the_next_step() -> None:
    jobs = [Job(prompt=(1,), stops=(stop,)) for stop in (1, 5, 5)]
    executor = _executor(jobs, max_sequences=2)
    executor.step()
    assert [row.sequence for _, row in executor.schedules[0].first_tokens] == [0, 1]
    assert executor.ended == [0]
    executor.step()
    assert [row.sequence for row in executor.schedules[1].decode] == [1]
    assert [row.sequence for _, row in executor.schedules[1].first_tokens] == [2]


def test_long_prompts_are_computed_in_chunks_beside_the_running_sequences() -> None:
    jobs = [Job(prompt=(1,), stops=(6,)), Job(prompt=(2,) * 10, stops=(6,))]
    executor = _executor(jobs, prefill_tokens=4)
    for _ in range(4):
        executor.step()
    chunks = [
        [(chunk.sequence, chunk.start, chunk.num_tokens) for chunk in schedule.chunks]
        for schedule in executor.schedules
    ]
    assert chunks == [[(0, 0, 1), (1, 0, 3)], [(1, 3, 4)], [(1, 7, 3)], []]
    assert [len(schedule.decode) for schedule in executor.schedules] == [0, 1, 1, 2]


def test_a_pool_that_holds_everyone_lets_everyone_enter_at_once() -> None:
    """What is kept free for growth is what the running sequences can still grow by, not more."""
    jobs = [Job(prompt=(1,) * n, stops=(9,)) for n in range(1, 8)]
    needed = sum(-(-(len(job.prompt) + 5) // 4) for job in jobs)
    executor = _executor(jobs, num_blocks=needed, prefill_tokens=100)
    executor.run()
    assert len(executor.schedules[0].first_tokens) == 7
    assert executor.scheduler.num_preemptions == 0


def test_samples_of_one_prompt_compute_it_once_and_copy_the_block_they_write_to() -> None:
    executor = _executor([Job(prompt=(1, 2, 1, 2, 1, 2), stops=(9, 9, 9))])
    executor.step()
    (first,) = executor.schedules
    assert [chunk.num_tokens for chunk in first.chunks] == [6]
    assert [(chunk, row.sequence) for chunk, row in first.first_tokens] == [(0, 0), (0, 1), (0, 2)]
    executor.step()
    copies = executor.schedules[1].copies
    assert [copy.source for copy in copies] == [1, 1]
    assert [copy.target for copy in copies] == [2, 3]


def test_equal_prompts_share_full_blocks_within_and_across_steps() -> None:
    prompt = (1, 2, 1, 2, 1, 2, 1, 2, 1)
    executor = _executor([Job(prompt=prompt, stops=(9,)) for _ in range(3)], prefill_tokens=10)
    executor.run()
    computed = [chunk.num_tokens for schedule in executor.schedules for chunk in schedule.chunks]
    assert computed == [9, 1, 1]


def test_the_sequence_that_entered_last_is_preempted_and_computed_again() -> None:
    """Two sequences of four blocks in a pool of seven."""
    jobs = [Job(prompt=(1,) * 5, stops=(9,)), Job(prompt=(2,) * 5, stops=(9,))]
    executor = _executor(jobs, num_blocks=7, block_size=2, max_new_tokens=4)
    executor.run()
    preempted = [schedule.preempted for schedule in executor.schedules if schedule.preempted]
    assert preempted == [(1,)]
    assert executor.scheduler.num_preemptions == 1
    again = [
        (chunk.start, chunk.num_tokens)
        for schedule in executor.schedules[2:]
        for chunk in schedule.chunks
    ]
    assert again == [(0, 7)]
    assert executor.ended == [0, 1]


def test_the_decode_rows_are_the_same_object_while_nothing_changes() -> None:
    executor = _executor([Job(prompt=(1,), stops=(6,)), Job(prompt=(2,), stops=(4,))])
    executor.run()
    decodes = [schedule.decode for schedule in executor.schedules]
    assert decodes[1] is decodes[2] is decodes[3]
    assert [len(rows) for rows in decodes] == [0, 2, 2, 2, 1, 1]


def test_cancelling_frees_everything() -> None:
    executor = _executor([Job(prompt=(1,) * 9, stops=(9, 9)) for _ in range(5)], num_blocks=12)
    executor.step()
    executor.step()
    executor.scheduler.cancel()
    executor.scheduler.audit()
    assert executor.scheduler.is_done


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        CapacityError,
        match="prompt of 9 tokens with up to 6 new ones needs 4 blocks of 4 tokens.*3",
    ):
        _executor([Job(prompt=(1,) * 9, stops=(1,))], num_blocks=3)


def test_limits_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_sequences 0 and prefill_tokens 4"):
        DecodeScheduler(BlockAllocator(1, block_size=1), max_sequences=0, prefill_tokens=4)
