"""The block allocator against a model of it that keeps, for every sequence, its tokens."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from megachat.errors import CapacityError, ConfigError
from megachat.generation.blocks import BlockAllocator

NUM_BLOCKS, BLOCK_SIZE = 12, 3
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=4 * BLOCK_SIZE)


class Sequence:
    """What a scheduler would keep of one sequence."""

    def __init__(self, blocks: list[int], tokens: list[int]) -> None:
        self.blocks, self.tokens = blocks, tokens


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences come, share, grow, fork and go; the content of every block is tracked."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.alive: list[Sequence] = []
        self.content: dict[int, list[int]] = {}

    def write(self, sequence: Sequence, start: int) -> None:
        """Puts a sequence's tokens from `start` on into its blocks."""
        for position in range(start, len(sequence.tokens)):
            block, offset = sequence.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE
            self.content[block] = [
                *self.content.get(block, [])[:offset],
                sequence.tokens[position],
            ]

    @rule(target=sequences, tokens=TOKENS)
    def enter(self, tokens: list[int]) -> object:
        shared = self.allocator.share_prefix(tokens)
        assert len(shared) * BLOCK_SIZE < len(tokens)
        needed = self.allocator.blocks_for(len(tokens)) - len(shared)
        if needed > self.allocator.num_free:
            with pytest.raises(CapacityError):
                self.allocator.allocate(needed)
            self.allocator.release(shared)
            return multiple()
        sequence = Sequence(shared + self.allocator.allocate(needed), tokens)
        self.write(sequence, len(shared) * BLOCK_SIZE)
        self.allocator.publish(sequence.blocks, tokens, start=len(shared))
        self.alive.append(sequence)
        return sequence

    @rule(target=sequences, parent=sequences)
    def fork(self, parent: Sequence) -> object:
        if parent not in self.alive:
            return multiple()
        child = Sequence(self.allocator.fork(parent.blocks), list(parent.tokens))
        self.alive.append(child)
        return child

    @rule(sequence=sequences, token=st.integers(0, 1))
    def append(self, sequence: Sequence, token: int) -> None:
        if sequence not in self.alive:
            return
        column = len(sequence.tokens) // BLOCK_SIZE
        fresh = column == len(sequence.blocks)
        if not self.allocator.num_free:
            if fresh or self.allocator.is_shared(sequence.blocks[column]):
                return
        elif fresh:
            sequence.blocks += self.allocator.allocate()
        elif self.allocator.is_shared(sequence.blocks[column]):
            copy = self.allocator.make_private(sequence.blocks[column])
            self.content[copy.target] = list(self.content[copy.source])
            sequence.blocks[column] = copy.target
        sequence.tokens.append(token)
        self.write(sequence, len(sequence.tokens) - 1)

    @rule(sequence=consumes(sequences))
    def leave(self, sequence: Sequence) -> None:
        if sequence in self.alive:
            self.alive.remove(sequence)
            self.allocator.release(sequence.blocks)

    @invariant()
    def every_sequence_reads_its_own_tokens(self) -> None:
        for sequence in self.alive:
            read = [token for block in sequence.blocks for token in self.content[block]]
            assert read[: len(sequence.tokens)] == sequence.tokens

    @invariant()
    def no_block_is_lost(self) -> None:
        self.allocator.audit([sequence.blocks for sequence in self.alive])
        used = {block for sequence in self.alive for block in sequence.blocks}
        assert self.allocator.num_free == NUM_BLOCKS - len(used)


AllocatorMachine.TestCase.settings = settings(
    deadline=None, max_examples=60, stateful_step_count=40
)
TestAllocator = AllocatorMachine.TestCase


def test_equal_prompts_share_their_full_blocks_but_for_the_last_token() -> None:
    allocator = BlockAllocator(8, block_size=2)
    first = allocator.allocate(3)
    allocator.publish(first, [5, 6, 7, 8, 9, 9])
    assert allocator.share_prefix([5, 6, 7, 8, 9, 9]) == first[:2]
    assert allocator.share_prefix([5, 6, 7, 8, 9, 9, 4]) == first
    assert allocator.share_prefix([5, 6, 7]) == first[:1]
    assert allocator.share_prefix([5, 6]) == []
    assert allocator.share_prefix([7, 8, 9]) == []
    assert allocator.num_free == 5


def test_a_freed_block_is_no_longer_found() -> None:
    allocator = BlockAllocator(2, block_size=1)
    blocks = allocator.allocate(2)
    allocator.publish(blocks, [3, 4])
    allocator.release(blocks)
    assert allocator.share_prefix([3, 4, 5]) == []
    assert allocator.num_free == 2


def test_incomplete_blocks_are_not_published() -> None:
    allocator = BlockAllocator(4, block_size=4)
    allocator.publish(allocator.allocate(2), [1, 2, 3, 4, 5])
    assert len(allocator.share_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9])) == 1


def test_low_numbers_are_handed_out_first_so_that_little_of_the_pool_is_touched() -> None:
    allocator = BlockAllocator(100, block_size=1)
    blocks = allocator.allocate(10)
    allocator.release(blocks[3:5])
    assert allocator.allocate(3) == [3, 4, 10]


def test_too_many_blocks_are_refused_with_the_numbers() -> None:
    allocator = BlockAllocator(4, block_size=16)
    allocator.allocate(3)
    with pytest.raises(CapacityError, match="2 blocks of 16 tokens are needed, 1 of 4 are free"):
        allocator.allocate(2)
    assert allocator.num_free == 1


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 blocks of 16 tokens"):
        BlockAllocator(0, block_size=16)


def test_the_audit_finds_a_leak_and_a_block_held_twice() -> None:
    allocator = BlockAllocator(4, block_size=1)
    blocks = allocator.allocate(2)
    allocator.audit([blocks])
    with pytest.raises(RuntimeError, match="1 blocks are miscounted: block 1 has 1 references, 0"):
        allocator.audit([blocks[:1]])
    with pytest.raises(RuntimeError, match="block 0 has 1 references, 2 sequences hold it"):
        allocator.audit([blocks, blocks[:1]])
    assert Counter(blocks) == Counter({0: 1, 1: 1})
