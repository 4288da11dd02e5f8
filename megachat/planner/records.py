"""The one place for what a memory plan says: pools, where they are in each phase, and the cache."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from megachat.planner.job import Role
from megachat.planner.reserved import Reserved


class Phase(StrEnum):
    """A stretch of a run in which the same pools are resident."""

    SFT = "sft"
    """Supervised fine-tuning: the actor's architecture alone."""
    REWARD_TRAINING = "reward_training"
    """The critic's architecture alone."""
    GENERATION = "generation"
    """PPO: the actor samples responses in the generation layout."""
    SCORING = "scoring"
    """PPO: all four roles run forward, one after the other."""
    PPO_TRAINING = "ppo_training"
    """PPO: actor and critic train, one after the other."""


class Pool(StrEnum):
    """What bytes are for."""

    WEIGHTS = "weights"
    """Layers of the rank's training shard."""
    EMBEDDINGS = "embeddings"
    """Weights outside the layers: embeddings, projections, final norm, head."""
    GRADIENTS = "gradients"
    """fp32, of the whole training shard on every data rank (DeepSpeed's BF16_Optimizer)."""
    MASTERS = "masters"
    """fp32 weights, cut over the data ranks."""
    MOMENTS = "moments"
    """Adam's two, fp32, cut over the data ranks."""
    FOREIGN_BLOCKS = "foreign_blocks"
    """The part of the generation shard that other ranks train."""
    KV_CACHE = "kv_cache"
    ACTIVATIONS = "activations"
    """Kept for backward passes, all micro-batches in flight."""
    WORKSPACE = "workspace"
    """Temporaries at the fullest moment."""
    GRAPHS = "graphs"
    """Recorded decode steps."""
    ROUNDING = "rounding"
    """What the allocator takes beyond the tensors' own bytes."""


class Residence(StrEnum):
    """Where the bytes of a pool are."""

    DEVICE = "device"
    HOST = "host"
    """In pinned host memory."""
    LENT = "lent"
    """Their memory serves another pool, which is counted there; the content is dead."""


class Measure(StrEnum):
    """What a plan may do to make room during generation."""

    REUSE_GRADIENTS = "reuse_gradients"
    """The actor's fp32 gradients lend their memory to foreign blocks and the cache."""
    OFFLOAD_OPTIMIZER = "offload_optimizer"
    """The actor's fp32 weights and moments are in host memory during generation."""
    OFFLOAD_SCORERS = "offload_scorers"
    """Reference and reward model are in host memory except while scoring."""
    OFFLOAD_CRITIC = "offload_critic"
    """The critic's fp32 weights and moments are in host memory during generation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolBytes:
    """One pool of one role on one rank in one phase."""

    role: Role
    pool: Pool
    residence: Residence
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseMemory:
    """One rank's memory at the fullest moment of a phase."""

    phase: Phase
    pools: tuple[PoolBytes, ...]

    def total(self, residence: Residence = Residence.DEVICE) -> int:
        """Bytes in one kind of memory."""
        return sum(item.num_bytes for item in self.pools if item.residence is residence)

    def bytes_of(
        self, pool: Pool, *, role: Role | None = None, residence: Residence = Residence.DEVICE
    ) -> int:
        """Bytes of one pool, of one role or of all of them."""
        return sum(
            item.num_bytes
            for item in self.pools
            if item.pool is pool
            and item.residence is residence
            and (role is None or item.role is role)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Ranks that hold the same, and what they hold in each phase."""

    ranks: range
    actor_stage: int
    critic_stage: int
    phases: tuple[PhaseMemory, ...]

    @property
    def peak(self) -> PhaseMemory:
        """The fullest phase."""
        return max(self.phases, key=PhaseMemory.total)

    def phase(self, phase: Phase) -> PhaseMemory:
        """What the ranks hold in one phase."""
        return next(memory for memory in self.phases if memory.phase is phase)


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePlan:
    """The key/value cache of each rank, equal on all of them."""

    block_tokens: int
    block_bytes: int
    num_blocks: int
    needed_blocks: int
    """For `most_at_once` sequences at their longest."""
    blocks_per_sequence: int
    sequences: int
    """Of one replica in one PPO step."""
    most_at_once: int
    """Sequences that a replica may have in work at once."""

    @property
    def num_bytes(self) -> int:
        """Size of the pool."""
        return self.num_blocks * self.block_bytes

    @property
    def concurrent(self) -> int:
        """Sequences of the longest kind that fit at once."""
        return min(self.most_at_once, self.num_blocks // self.blocks_per_sequence)

    @property
    def waves(self) -> int:
        """Rounds that the sequences of a replica take if all of them are of the longest kind."""
        return -(-self.sequences // max(1, self.concurrent))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Memory of every rank in every phase."""

    measures: frozenset[Measure]
    ranks: tuple[RankMemory, ...]
    cache: CachePlan
    gpu_bytes: int
    """Memory of one GPU."""
    reserved: Reserved
    """What tensors cannot have of it."""
    host_budget_bytes: int
    """Of one node."""
    host_bytes: int
    """Of the fullest node in the fullest phase."""

    @property
    def budget_bytes(self) -> int:
        """Bytes of one GPU that tensors may take."""
        return self.gpu_bytes - self.reserved.num_bytes

    def during(self, phases: Collection[Phase]) -> "MemoryPlan":
        """The device memory of some phases alone."""
        ranks = tuple(
            replace(memory, phases=tuple(found for found in memory.phases if found.phase in phases))
            for memory in self.ranks
        )
        return replace(self, ranks=ranks)

    @property
    def fullest(self) -> RankMemory:
        """The ranks with the highest peak."""
        return max(self.ranks, key=lambda memory: memory.peak.total())

    @property
    def peak_bytes(self) -> int:
        """The highest peak of any rank in any phase."""
        return self.fullest.peak.total()

    @property
    def fits(self) -> bool:
        """Whether every peak is within its budget."""
        return self.peak_bytes <= self.budget_bytes and self.host_bytes <= self.host_budget_bytes


def merged(pools: Iterable[PoolBytes]) -> tuple[PoolBytes, ...]:
    """Without the empty ones."""
    return tuple(item for item in pools if item.num_bytes)


def rank_ranges(ranks: Sequence[int]) -> str:
    """Ascending ranks in short: `0-7, 16-23`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(f"{first}-{last}" if first < last else str(first) for first, last in parts)
