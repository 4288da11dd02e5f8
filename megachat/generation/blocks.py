"""The one place that decides which block of the key-value cache belongs to which sequences. Pure.

A block holds the keys and values of `block_size` consecutive tokens. Sequences with a common
beginning share its blocks, which are counted; a full block never changes, so sharing it is free,
and whoever writes into a shared block that is not full takes a copy first.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megachat.errors import CapacityError, ConfigError

_ROOT = -1
"""Stands for the block before the first one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockCopy:
    """The content of one block is to be copied to another before the next tokens are written."""

    source: int
    target: int


class BlockAllocator:
    """Hands out blocks, lowest number first, and counts who holds them."""

    def __init__(self, num_blocks: int, *, block_size: int) -> None:
        """Starts with all blocks free.

        Args:
            num_blocks: Blocks in the pool.
            block_size: Tokens a block holds.

        Raises:
            ConfigError: One of them is below 1.
        """
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                f"a cache of {num_blocks} blocks of {block_size} tokens cannot hold anything: give "
                "both at least 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Low numbers first: the touched part of the pool stays small. A sorted list is a heap.
        self._free = list(range(num_blocks))
        self._references = [0] * num_blocks
        # Content of published full blocks. A block is named by its tokens and the block before it,
        # which whoever holds the block holds too, so the name is exact while the block is in use.
        self._published: dict[tuple[int, tuple[int, ...]], int] = {}
        self._names: dict[int, tuple[int, tuple[int, ...]]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int = 1) -> list[int]:
        """Takes free blocks.

        Raises:
            CapacityError: There are not so many.
        """
        if count > len(self._free):
            raise CapacityError(
                f"{count} blocks of {self.block_size} tokens are needed, {len(self._free)} of "
                f"{self.num_blocks} are free: enlarge the key-value cache"
            )
        blocks = [heapq.heappop(self._free) for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def fork(self, blocks: Iterable[int]) -> list[int]:
        """The same blocks for one more sequence."""
        shared = list(blocks)
        for block in shared:
            self._references[block] += 1
        return shared

    def release(self, blocks: Iterable[int]) -> None:
        """Ends one sequence's hold on its blocks; blocks that nobody else holds become free."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                heapq.heappush(self._free, block)
                name = self._names.pop(block, None)
                if name is not None:
                    del self._published[name]

    def is_shared(self, block: int) -> bool:
        """Whether more than one sequence holds a block."""
        return self._references[block] > 1

    def make_private(self, block: int) -> BlockCopy:
        """Replaces a shared block by a new one for the sequence that is about to write.

        Raises:
            CapacityError: No block is free.
        """
        (target,) = self.allocate()
        self._references[block] -= 1
        return BlockCopy(source=block, target=target)

    def publish(self, blocks: Sequence[int], tokens: Sequence[int], *, start: int = 0) -> None:
        """Makes a sequence's full blocks known to sequences that begin with the same tokens.

        Args:
            blocks: The sequence's blocks in order.
            tokens: The tokens in them, a last incomplete block's included or not.
            start: Number of its blocks that are known already.
        """
        size = self.block_size
        for index in range(start, min(len(blocks), len(tokens) // size)):
            parent = blocks[index - 1] if index else _ROOT
            name = (parent, tuple(tokens[index * size : (index + 1) * size]))
            if name not in self._published and blocks[index] not in self._names:
                self._published[name] = blocks[index]
                self._names[blocks[index]] = name

    def share_prefix(self, tokens: Sequence[int]) -> list[int]:
        """Takes part in the published blocks that hold the beginning of some tokens.

        At least the last token is left out, because a sequence must compute something to get its
        next token.
        """
        size, found, parent = self.block_size, list[int](), _ROOT
        for index in range((len(tokens) - 1) // size):
            name = (parent, tuple(tokens[index * size : (index + 1) * size]))
            block = self._published.get(name)
            if block is None:
                break
            found.append(block)
            parent = block
        return self.fork(found)

    def audit(self, held: Iterable[Sequence[int]]) -> None:
        """Proves that blocks are neither lost nor held too often.

        Args:
            held: The blocks of every living sequence.

        Raises:
            RuntimeError: The counts and the sequences' blocks differ, which is a bug.
        """
        counted = Counter(block for blocks in held for block in blocks)
        wrong = [b for b in range(self.num_blocks) if counted[b] != self._references[b]]
        used = {b for b in range(self.num_blocks) if self._references[b]}
        free = set(self._free)
        if wrong:
            first = wrong[0]
            raise RuntimeError(
                f"{len(wrong)} blocks are miscounted: block {first} has "
                f"{self._references[first]} references, {counted[first]} sequences hold it"
            )
        if len(free) != len(self._free) or free & used or len(free | used) != self.num_blocks:
            raise RuntimeError(
                f"{len(self._free)} free and {len(used)} used blocks are no partition of "
                f"{self.num_blocks} blocks"
            )
        if not set(self._names) <= used:
            raise RuntimeError(f"free blocks {sorted(set(self._names) - used)} are still published")
