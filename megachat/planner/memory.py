"""Computes what every rank holds in every phase. Pure.

The long-lived pools of each model are those of `megachat.planner.pools`. Generation adds the
foreign blocks of the weight arena and the key/value cache, which takes what is left. What the
allocator rounds up (`megachat.planner.allocator`) and what recorded decode steps keep are pools
too; memory that is taken beside tensors, and the margin, are not (`megachat.planner.reserved`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from megachat.errors import CapacityError
from megachat.planner.allocator import STRANDED_BYTES, workspace_rounding
from megachat.planner.graphs import graph_bytes
from megachat.planner.hardware import GB, Allocator, ClusterConfig
from megachat.planner.job import Job, Role, RoleSetup, Workload
from megachat.planner.kinds import node_kinds, rank_kinds
from megachat.planner.pools import (
    held_rounding,
    moved,
    on_device,
    trained_pools,
    weight_rounding,
    weights_of,
)
from megachat.planner.records import (
    CachePlan,
    Measure,
    MemoryPlan,
    Phase,
    PhaseMemory,
    Pool,
    PoolBytes,
    RankMemory,
    Residence,
    merged,
    rank_ranges,
)
from megachat.planner.reserved import reserved_memory
from megachat.planner.sizes import generation_elements, stage_tensors
from megachat.planner.transients import (
    Transients,
    generation_workspace,
    reduction_staging,
    scoring_transients,
    training_transients,
)

_GRANULE_BYTES = 2**21
"""Of the driver's memory, from which the weight arena is mapped."""

_TO_HOST = frozenset(Measure) - {Measure.REUSE_GRADIENTS}
"""Measures that take host memory."""

_OPTIMIZER_POOLS = (Pool.MASTERS, Pool.MOMENTS)


def plan_memory(
    job: Job, cluster: ClusterConfig, measures: frozenset[Measure] = frozenset()
) -> MemoryPlan:
    """Bytes of every pool on every rank in every phase.

    Unless the job says how large the cache is, it gets what is left in the generation phase on the
    fullest rank: at most what all sequences need at once, at least what one sequence needs.

    Raises:
        LayoutError: The job does not fill the cluster, or its layouts do not fit each other.
    """
    return _plan(job, cluster, measures, kinds=_rank_kinds(job))


def plan_fullest(
    job: Job, cluster: ClusterConfig, measures: frozenset[Measure] = frozenset()
) -> MemoryPlan:
    """The same of the ranks that can be the fullest, with the same peak, cache and refusal.

    Of the stages between the first and the last, which hold the same otherwise, the first has most
    micro-batches in flight. A search looks at these alone.
    """
    everything = _rank_kinds(job)
    return _plan(
        job,
        cluster,
        measures,
        kinds={
            kind: ranks
            for kind, ranks in everything.items()
            if job.critic.layout.pipeline > 1 or kind == _like(job, *kind)
        },
    )


def _plan(
    job: Job,
    cluster: ClusterConfig,
    measures: frozenset[Measure],
    *,
    kinds: Mapping[tuple[int, int], range],
) -> MemoryPlan:
    """A plan of some kinds of ranks."""
    job.check_cluster(cluster)
    planner = _Planner(job, cluster, measures)
    cache = planner.cache(list(kinds))
    ranks = tuple(
        RankMemory(
            ranks=members,
            actor_stage=actor_stage,
            critic_stage=critic_stage,
            phases=planner.phases(actor_stage, critic_stage, cache),
        )
        for (actor_stage, critic_stage), members in kinds.items()
    )
    return MemoryPlan(
        measures=measures,
        ranks=ranks,
        cache=cache,
        gpu_bytes=cluster.gpu_bytes,
        reserved=planner.reserved,
        host_budget_bytes=cluster.host_budget_bytes,
        host_bytes=planner.fullest_host(cache) if measures & _TO_HOST else 0,
    )


def refusal(plan: MemoryPlan) -> str | None:
    """Why a plan does not fit, in one line with the numbers of both sides; None where it does."""
    fullest = plan.fullest
    peak = fullest.peak
    if peak.total() > plan.budget_bytes:
        parts = sorted(
            (item for item in peak.pools if item.residence is Residence.DEVICE),
            key=lambda item: -item.num_bytes,
        )
        named = ", ".join(
            f"{item.role} {item.pool.value.replace('_', ' ')} {item.num_bytes / GB:.1f}"
            for item in parts[:4]
        )
        return (
            f"phase {peak.phase} needs {peak.total() / GB:.1f} GB on ranks "
            f"{rank_ranges(fullest.ranks)}, {plan.budget_bytes / GB:.1f} GB are usable (largest: "
            f"{named}; of {plan.gpu_bytes / GB:.1f} GB reserved: {plan.reserved})"
        )
    if plan.host_bytes > plan.host_budget_bytes:
        return (
            f"offloading needs {plan.host_bytes / GB:.1f} GB of host memory on a node, "
            f"{plan.host_budget_bytes / GB:.1f} GB are usable"
        )
    return None


def check_plan(plan: MemoryPlan) -> None:
    """Refuses a plan that does not fit.

    Raises:
        CapacityError: A peak exceeds its budget; names the phase and the numbers.
    """
    reason = refusal(plan)
    if reason is not None:
        raise CapacityError(f"{reason}: use more GPUs, higher degrees, smaller batches")


class _Planner:
    """Computes phases; holds what all of them need."""

    def __init__(self, job: Job, cluster: ClusterConfig, measures: frozenset[Measure]) -> None:
        self._job = job
        self._measures = measures
        self._graphs = graph_bytes(job)
        self._cluster, self._allocator = cluster, cluster.allocator
        self._generations: dict[tuple[int, int], PhaseMemory] = {}
        self.reserved = reserved_memory(job, cluster)
        """What is taken beside tensors."""
        self._budget = cluster.gpu_bytes - self.reserved.num_bytes

    def cache(self, kinds: list[tuple[int, int]]) -> CachePlan:
        """The cache that fits beside everything else on the fullest rank."""
        job, config, tokens = self._job, self._job.actor.config, self._job.block_tokens
        values = 2 * config.layers * tokens * config.hidden // job.generation_tensor
        block_bytes = values * job.actor.value_bytes
        per_sequence = job.blocks_per_sequence
        needed = job.most_at_once * per_sequence
        if job.cache_bytes is not None:
            num_blocks = job.cache_bytes // block_bytes
        else:
            free = min(
                self._free_for_cache(*kind) for kind in {_like(job, *kind) for kind in kinds}
            )
            num_blocks = min(needed, max(per_sequence, free // block_bytes))
        return CachePlan(
            block_tokens=tokens,
            block_bytes=block_bytes,
            num_blocks=num_blocks,
            needed_blocks=needed,
            blocks_per_sequence=per_sequence,
            sequences=job.sequences,
            most_at_once=job.most_at_once,
        )

    def phases(
        self, actor_stage: int, critic_stage: int, cache: CachePlan
    ) -> tuple[PhaseMemory, ...]:
        """All phases of one kind of rank."""
        job = self._job
        parts = _Parts(
            actor=job.actor,
            critic=job.critic,
            workload=job.workload,
            actor_stage=actor_stage,
            critic_stage=critic_stage,
            scorers_away=Measure.OFFLOAD_SCORERS in self._measures,
            graphs=self._graphs,
            arena=self._arena_rounding(actor_stage),
            allocator=self._allocator,
        )
        like = _like(job, actor_stage, critic_stage)
        if like not in self._generations:
            self._generations[like] = PhaseMemory(
                phase=Phase.GENERATION, pools=merged(self._generation(*like, cache.num_bytes))
            )
        return (*_stage_phases(parts), self._generations[like], *_step_phases(parts))

    def fullest_host(self, cache: CachePlan) -> int:
        """Host bytes of the fullest node in the fullest phase."""
        totals: dict[tuple[int, int], list[int]] = {}
        used = []
        for members in node_kinds(
            self._job.actor.layout, self._job.critic.layout, self._cluster.gpus_per_node
        ):
            by_phase = [0] * len(Phase)
            for kind, count in members:
                like = _like(self._job, *kind)
                if like not in totals:
                    phases = self.phases(*like, cache)
                    totals[like] = [phase.total(Residence.HOST) for phase in phases]
                by_phase = [
                    used_bytes + count * total
                    for used_bytes, total in zip(by_phase, totals[like], strict=True)
                ]
            used += by_phase
        return max(used)

    def _free_for_cache(self, actor_stage: int, critic_stage: int) -> int:
        """Bytes that the generation phase leaves on one kind of rank."""
        without = merged(self._generation(actor_stage, critic_stage, 0))
        used = sum(item.num_bytes for item in without if item.residence is Residence.DEVICE)
        if Measure.REUSE_GRADIENTS in self._measures:
            # What the foreign blocks leave of the lent memory is counted as used.
            used -= sum(
                item.num_bytes
                for item in without
                if item.pool is Pool.GRADIENTS and item.role is Role.ACTOR
                and item.residence is Residence.DEVICE
            )  # fmt: skip
        return max(0, self._budget - used)

    def _generation(
        self, actor_stage: int, critic_stage: int, cache_bytes: int
    ) -> Iterator[PoolBytes]:
        job, measures = self._job, self._measures
        shard = generation_elements(job.actor, tensor=job.generation_tensor, stage=actor_stage)
        foreign = shard.foreign * job.actor.value_bytes
        for item in trained_pools(Role.ACTOR, job.actor, actor_stage):
            if item.pool is Pool.GRADIENTS and Measure.REUSE_GRADIENTS in measures:
                lent = min(item.num_bytes, foreign + cache_bytes)
                yield moved(item, Residence.LENT, lent)
                yield moved(item, Residence.DEVICE, item.num_bytes - lent)
            elif item.pool in _OPTIMIZER_POOLS and Measure.OFFLOAD_OPTIMIZER in measures:
                yield moved(item, Residence.HOST, item.num_bytes)
            else:
                yield item
        yield on_device(Role.ACTOR, Pool.FOREIGN_BLOCKS, foreign)
        yield on_device(Role.ACTOR, Pool.KV_CACHE, cache_bytes)
        yield on_device(Role.ACTOR, Pool.WORKSPACE, generation_workspace(job))
        yield on_device(Role.ACTOR, Pool.GRAPHS, self._graphs)
        if self._allocator is Allocator.CACHING:
            own = held_rounding(job.actor, actor_stage) + workspace_rounding()
            yield on_device(Role.ACTOR, Pool.ROUNDING, own + STRANDED_BYTES)
            yield on_device(Role.CRITIC, Pool.ROUNDING, held_rounding(job.critic, critic_stage))
        for item in trained_pools(Role.CRITIC, job.critic, critic_stage):
            offloaded = item.pool in _OPTIMIZER_POOLS and Measure.OFFLOAD_CRITIC in measures
            yield moved(item, Residence.HOST, item.num_bytes) if offloaded else item
        away = Measure.OFFLOAD_SCORERS in measures
        for role, setup, stage in (
            (Role.REFERENCE, job.actor, actor_stage),
            (Role.REWARD, job.critic, critic_stage),
        ):
            for item in weights_of(role, setup, stage):
                yield moved(item, Residence.HOST, item.num_bytes) if away else item
            if self._allocator is Allocator.CACHING and not away:
                yield on_device(role, Pool.ROUNDING, weight_rounding(setup, stage))

    def _arena_rounding(self, actor_stage: int) -> int:
        """What granules of the arena hold of other ranks' weights while the actor trains.

        Each parameter of a layer has a slot between those of others; the granule at either end
        stays.
        """
        actor, degree = self._job.actor, self._job.generation_tensor
        if not generation_elements(actor, tensor=degree, stage=actor_stage).foreign:
            return 0
        tensors = stage_tensors(actor, stage=actor_stage)
        slots = tensors.num_layers * len(tensors.layer) + len(tensors.edges)
        return 2 * _GRANULE_BYTES * slots


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """What the phases without a generation layout depend on."""

    actor: RoleSetup
    critic: RoleSetup
    workload: Workload
    actor_stage: int
    critic_stage: int
    scorers_away: bool
    """Whether reference and reward model are in host memory except while scoring."""
    graphs: int
    """Bytes of recorded decode steps, which stay from one generation phase to the next."""
    arena: int
    """Bytes that the weight arena holds beyond the rank's own weights."""
    allocator: Allocator


@lru_cache(maxsize=4096)
def _stage_phases(parts: _Parts) -> tuple[PhaseMemory, ...]:
    """The first two stages of a run, one model each."""
    actor, critic, work = parts.actor, parts.critic, parts.workload
    sft = _training(parts, Role.ACTOR, work.sft_rows, work.sft_tokens)
    pairs = _training(parts, Role.CRITIC, work.reward_pairs, work.sft_tokens, answers=2)
    return (
        PhaseMemory(
            phase=Phase.SFT,
            pools=merged(
                (
                    *trained_pools(Role.ACTOR, actor, parts.actor_stage),
                    *_transient(Role.ACTOR, sft),
                    *_rounded(Role.ACTOR, parts, transient=sft.rounding),
                )
            ),
        ),
        PhaseMemory(
            phase=Phase.REWARD_TRAINING,
            pools=merged(
                (
                    *trained_pools(Role.CRITIC, critic, parts.critic_stage),
                    *_transient(Role.CRITIC, pairs),
                    *_rounded(Role.CRITIC, parts, transient=pairs.rounding),
                )
            ),
        ),
    )


@lru_cache(maxsize=4096)
def _step_phases(parts: _Parts) -> tuple[PhaseMemory, ...]:
    """Scoring and training of a PPO step; the roles run one after the other."""
    actor, critic, work = parts.actor, parts.critic, parts.workload
    stages = {Role.ACTOR: (actor, parts.actor_stage), Role.CRITIC: (critic, parts.critic_stage)}
    trained = [
        item
        for role, (setup, stage) in stages.items()
        for item in trained_pools(role, setup, stage)
    ]
    scoring = {
        role: scoring_transients(
            setup,
            stage=stage,
            rows=setup.rows_at_once(work.prompts),
            tokens=work.sequence_tokens,
        )
        for role, (setup, stage) in stages.items()
    }
    training = {
        role: _training(parts, role, work.minibatch_rows, work.sequence_tokens) for role in stages
    }
    return (
        PhaseMemory(
            phase=Phase.SCORING,
            pools=merged(
                (
                    *trained,
                    *_scorers(parts, Residence.DEVICE),
                    *_largest(scoring),
                    *_step_overheads(parts, scoring, scorers_are_here=True),
                )
            ),
        ),
        PhaseMemory(
            phase=Phase.PPO_TRAINING,
            pools=merged(
                (
                    *trained,
                    *_scorers(parts, Residence.HOST if parts.scorers_away else Residence.DEVICE),
                    *_largest(training),
                    *_step_overheads(parts, training, scorers_are_here=not parts.scorers_away),
                )
            ),
        ),
    )


def _step_overheads(
    parts: _Parts, transients: Mapping[Role, Transients], *, scorers_are_here: bool
) -> Iterator[PoolBytes]:
    """Recorded steps, and what the allocator takes beyond tensors, in a phase of a PPO step."""
    yield on_device(Role.ACTOR, Pool.GRAPHS, parts.graphs)
    fullest = max(item.rounding for item in transients.values())
    yield from _rounded(Role.ACTOR, parts, transient=fullest + parts.arena)
    yield from _rounded(Role.CRITIC, parts, transient=0)
    if scorers_are_here and parts.allocator is Allocator.CACHING:
        for role, setup, stage in (
            (Role.REFERENCE, parts.actor, parts.actor_stage),
            (Role.REWARD, parts.critic, parts.critic_stage),
        ):
            yield on_device(role, Pool.ROUNDING, weight_rounding(setup, stage))


def _rounded(role: Role, parts: _Parts, *, transient: int) -> Iterator[PoolBytes]:
    """What the allocator takes beyond the tensors of a role that trains."""
    if parts.allocator is Allocator.CACHING:
        setup, stage = _trained(parts, role)
        yield on_device(role, Pool.ROUNDING, held_rounding(setup, stage) + transient)


def _trained(parts: _Parts, role: Role) -> tuple[RoleSetup, int]:
    """A role that trains, and its stage."""
    if role is Role.ACTOR:
        return parts.actor, parts.actor_stage
    return parts.critic, parts.critic_stage


def _scorers(parts: _Parts, residence: Residence) -> Iterator[PoolBytes]:
    """Reference and reward model."""
    for role, setup, stage in (
        (Role.REFERENCE, parts.actor, parts.actor_stage),
        (Role.REWARD, parts.critic, parts.critic_stage),
    ):
        for item in weights_of(role, setup, stage):
            yield moved(item, residence, item.num_bytes)


def _training(parts: _Parts, role: Role, rows: int, tokens: int, *, answers: int = 1) -> Transients:
    """Of a training step on a global batch; a row of pairs holds two answers."""
    setup, stage = _trained(parts, role)
    transients = training_transients(
        setup,
        stage=stage,
        rows=answers * setup.rows_at_once(rows),
        tokens=tokens,
        num_micro_batches=setup.num_micro_batches(rows),
    )
    if parts.allocator is Allocator.CACHING:
        return transients  # NCCL reduces gradients and gathers weights in place
    staged = reduction_staging(setup, stage=stage)
    return replace(transients, workspace=transients.workspace + staged)


def _transient(role: Role, transients: Transients) -> Iterator[PoolBytes]:
    yield on_device(role, Pool.ACTIVATIONS, transients.activations)
    yield on_device(role, Pool.WORKSPACE, transients.workspace)


def _largest(transients: Mapping[Role, Transients]) -> Iterator[PoolBytes]:
    """The transients of the role that needs most."""
    role = max(transients, key=lambda role: transients[role].total)
    return _transient(role, transients[role])


def _rank_kinds(job: Job) -> Mapping[tuple[int, int], range]:
    """(actor stage, critic stage) -> the ranks at both."""
    return rank_kinds(job.actor.layout, job.critic.layout)


def _like(job: Job, actor_stage: int, critic_stage: int) -> tuple[int, int]:
    """Stages that hold the same but for micro-batches in flight: those between first and last."""
    pairs = ((actor_stage, job.actor), (critic_stage, job.critic))
    first, second = (
        stage if stage == setup.layout.pipeline - 1 else min(stage, 1) for stage, setup in pairs
    )
    return first, second
