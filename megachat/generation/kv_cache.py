"""The one place for the memory of keys and values during generation: `PagedKvCache`.

One pool `[layers, 2, blocks, block_size, heads/tp, head_dim]`: layers first, so that a layer's
keys are one tensor that a kernel takes whole; the token before the heads, so that the new keys of a
token are one contiguous row and the pages of a sequence, side by side, are the `[tokens, heads,
head_dim]` that attention reads, without a transposition.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megachat.errors import CapacityError, ConfigError
from megachat.generation.scheduler import Schedule
from megachat.model.config import OptConfig
from megachat.parallel.lifetime import Owner
from megachat.parallel.memory import PhaseMemory, phase_memory


def block_bytes(config: OptConfig, *, tensor: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes on each rank, over all layers."""
    return 2 * config.layers * block_size * config.hidden // tensor * dtype.itemsize


class PagedKvCache(Owner):
    """A pool of blocks, and on the device which blocks each slot uses and how far.

    On the CPU the pool keeps its address for good, and its memory appears as blocks are first
    written; on other devices `acquire` allocates it. It goes with `release`. The tables are on the
    device, so that a recorded step can be replayed for other sequences and positions.
    """

    def __init__(
        self,
        config: OptConfig,
        *,
        tensor: int,
        num_bytes: int,
        block_size: int,
        max_sequences: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Callable[[int], PhaseMemory] | None = None,
    ) -> None:
        """Reserves the pool; takes no memory for it.

        Args:
            config: The model.
            tensor: Degree over which its heads are cut.
            num_bytes: Largest size of the pool on this rank.
            block_size: Tokens in a block.
            max_sequences: Number of slots.
            dtype: Of keys and values.
            device: Where the pool is.
            memory: Makes memory of at least a number of bytes; None chooses by the device.

        Raises:
            ConfigError: The block size is below 1.
            CapacityError: Not one block fits.
        """
        if block_size < 1:
            raise ConfigError(f"block_size is {block_size}: a block needs at least 1 token")
        size = block_bytes(config, tensor=tensor, block_size=block_size, dtype=dtype)
        self.block_size = block_size
        self.block_bytes = size
        self.num_blocks = num_bytes // size
        if self.num_blocks < 1:
            raise CapacityError(
                f"a key-value cache of {num_bytes} bytes cannot hold one block of {block_size} "
                f"tokens, {size} bytes: give it more memory"
            )
        pool_bytes = self.num_blocks * size
        self._memory = phase_memory(pool_bytes, device) if memory is None else memory(pool_bytes)
        shape = (
            config.layers,
            2,
            self.num_blocks,
            block_size,
            config.heads // tensor,
            config.head_dim,
        )
        self._memory.acquire()  # views are made once, while there is memory behind them
        flat = self._memory.tensor()[:pool_bytes].view(dtype)
        self.pool = flat.view(shape)
        self._memory.release()
        columns = -(-config.max_positions // block_size)
        self.tables = torch.zeros(max_sequences, columns, dtype=torch.int32, device=device)
        """[max_sequences, columns] int32, block of each stretch of a slot's sequence."""
        self.lengths = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        """[max_sequences] int64, tokens of each slot's sequence that are in the cache."""

    @property
    def max_sequences(self) -> int:
        """Number of slots."""
        return self.tables.shape[0]

    @property
    def resident_bytes(self) -> int:
        """Bytes of the pool that take physical memory now."""
        return self._memory.resident_bytes()

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each `[blocks, block_size, heads/tp, head_dim]`."""
        return self.pool[number, 0], self.pool[number, 1]

    def acquire(self) -> None:
        """Makes the pool usable; does nothing if it is.

        Raises:
            PhaseError: The cache was closed.
        """
        self.check_open()
        self._memory.acquire()

    def apply(self, schedule: Schedule) -> None:
        """Copies blocks, fills tables and sets lengths as a step's schedule says."""
        device = self.tables.device
        if schedule.copies:
            source = torch.tensor([copy.source for copy in schedule.copies], device=device)
            target = torch.tensor([copy.target for copy in schedule.copies], device=device)
            self.pool.index_copy_(2, target, self.pool.index_select(2, source))
        if schedule.table_entries:
            entries = torch.tensor(
                [(entry.slot, entry.column, entry.block) for entry in schedule.table_entries],
                device=device,
            )
            self.tables[entries[:, 0], entries[:, 1]] = entries[:, 2].int()
        if schedule.lengths:
            lengths = torch.tensor(schedule.lengths, device=device)
            self.lengths[lengths[:, 0]] = lengths[:, 1]

    def positions_of(self, tables: Tensor, positions: Tensor) -> Tensor:
        """Where tokens are in a layer's keys, seen as `[blocks x block_size, heads/tp, head_dim]`.

        Args:
            tables: `[tokens, columns]` int32, the table of each token's sequence.
            positions: `[tokens]` int64 within the sequence.

        Returns:
            `[tokens]` int64.
        """
        columns = (positions // self.block_size)[:, None]
        blocks = tables.gather(1, columns).squeeze(1).long()
        return blocks * self.block_size + positions % self.block_size

    def release(self) -> None:
        """Returns the memory of the pool; every sequence is lost, addresses stay."""
        self._memory.release()
        self.lengths.zero_()

    def _end(self) -> None:
        """Empties pool and tables, then gives memory and addresses back."""
        self.pool = self.pool.new_empty(0)
        self.tables = self.tables.new_empty(0, 0)
        self.lengths = self.lengths.new_empty(0)
        self._memory.close()
