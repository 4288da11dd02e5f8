"""The one place that computes what every rank holds in every phase. Pure.

Long-lived pools of a model that trains, for n parameters on the rank and data degree d:

| precision | weights | gradients | masters | moments |
|---|---|---|---|---|
| bf16 | 2 n | 4 n | 4 n / d | 8 n / d |
| fp32 | 4 n | 4 n + 4 n / d + two buckets | 4 n / d | 8 n / d |

DeepSpeed's BF16_Optimizer accumulates the whole shard's gradients in fp32 on *every* data rank and
keeps the buffer between steps; its fp32 optimizer holds gradients while a backward pass runs, and
is planned at that moment. Models that only run forward have weights alone. Generation adds the
foreign blocks of the weight arena and the key/value cache, which takes what is left.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from megachat.errors import CapacityError
from megachat.planner.hardware import GB, ClusterConfig
from megachat.planner.job import Job, Role, RoleSetup, Workload
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
from megachat.planner.sizes import generation_elements, stage_elements
from megachat.planner.transients import (
    Transients,
    generation_workspace,
    scoring_transients,
    training_transients,
)

_MASTER_BYTES, _MOMENT_BYTES, _GRADIENT_BYTES = 4, 8, 4
"""Bytes per parameter; always fp32."""

_BUCKET_BYTES = 2**28
"""Gradients that fp32 training reduces in one call."""

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
    job.check_cluster(cluster)
    planner = _Planner(job, cluster, measures)
    kinds = _rank_kinds(job)
    cache = planner.cache(list(kinds))
    ranks = tuple(
        RankMemory(
            ranks=tuple(members),
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
        budget_bytes=cluster.budget_bytes,
        host_budget_bytes=cluster.host_budget_bytes,
        host_bytes=_fullest_host(ranks, cluster),
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
            f"{named})"
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


def trained_bytes(setup: RoleSetup) -> int:
    """Bytes of the long-lived pools of a model that trains, on its fullest stage."""
    return max(
        sum(item.num_bytes for item in _trained(Role.CRITIC, setup, stage))
        for stage in range(setup.layout.pipeline)
    )


class _Planner:
    """Computes phases; holds what all of them need."""

    def __init__(self, job: Job, cluster: ClusterConfig, measures: frozenset[Measure]) -> None:
        self._job = job
        self._measures = measures
        self._budget = cluster.budget_bytes

    def cache(self, kinds: list[tuple[int, int]]) -> CachePlan:
        """The cache that fits beside everything else on the fullest rank."""
        job, config, tokens = self._job, self._job.actor.config, self._job.block_tokens
        values = 2 * config.layers * tokens * config.hidden // job.generation_tensor
        block_bytes = values * job.actor.value_bytes
        # The last token of a response is never computed.
        per_sequence = -(-(job.workload.sequence_tokens - 1) // tokens)
        needed = job.most_at_once * per_sequence
        if job.cache_bytes is not None:
            num_blocks = job.cache_bytes // block_bytes
        else:
            free = min(self._free_for_cache(*kind) for kind in kinds)
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
        )
        generation = PhaseMemory(
            phase=Phase.GENERATION,
            pools=merged(self._generation(actor_stage, critic_stage, cache.num_bytes)),
        )
        return (*_stage_phases(parts), generation, *_step_phases(parts))

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
        for item in _trained(Role.ACTOR, job.actor, actor_stage):
            if item.pool is Pool.GRADIENTS and Measure.REUSE_GRADIENTS in measures:
                lent = min(item.num_bytes, foreign + cache_bytes)
                yield _moved(item, Residence.LENT, lent)
                yield _moved(item, Residence.DEVICE, item.num_bytes - lent)
            elif item.pool in _OPTIMIZER_POOLS and Measure.OFFLOAD_OPTIMIZER in measures:
                yield _moved(item, Residence.HOST, item.num_bytes)
            else:
                yield item
        yield _device(Role.ACTOR, Pool.FOREIGN_BLOCKS, foreign)
        yield _device(Role.ACTOR, Pool.KV_CACHE, cache_bytes)
        yield _device(Role.ACTOR, Pool.WORKSPACE, generation_workspace(job))
        for item in _trained(Role.CRITIC, job.critic, critic_stage):
            offloaded = item.pool in _OPTIMIZER_POOLS and Measure.OFFLOAD_CRITIC in measures
            yield _moved(item, Residence.HOST, item.num_bytes) if offloaded else item
        away = Measure.OFFLOAD_SCORERS in measures
        for role, setup, stage in (
            (Role.REFERENCE, job.actor, actor_stage),
            (Role.REWARD, job.critic, critic_stage),
        ):
            for item in _weights(role, setup, stage):
                yield _moved(item, Residence.HOST, item.num_bytes) if away else item


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


@cache
def _stage_phases(parts: _Parts) -> tuple[PhaseMemory, ...]:
    """The first two stages of a run, one model each."""
    actor, critic, work = parts.actor, parts.critic, parts.workload
    sft = _training(actor, parts.actor_stage, work.sft_rows, work.sft_tokens)
    pairs = _training(critic, parts.critic_stage, work.reward_pairs, work.sft_tokens, answers=2)
    return (
        PhaseMemory(
            phase=Phase.SFT,
            pools=merged(
                (
                    *_trained(Role.ACTOR, actor, parts.actor_stage),
                    *_transient(Role.ACTOR, sft),
                )
            ),
        ),
        PhaseMemory(
            phase=Phase.REWARD_TRAINING,
            pools=merged(
                (
                    *_trained(Role.CRITIC, critic, parts.critic_stage),
                    *_transient(Role.CRITIC, pairs),
                )
            ),
        ),
    )


@cache
def _step_phases(parts: _Parts) -> tuple[PhaseMemory, ...]:
    """Scoring and training of a PPO step; the roles run one after the other."""
    actor, critic, work = parts.actor, parts.critic, parts.workload
    stages = {Role.ACTOR: (actor, parts.actor_stage), Role.CRITIC: (critic, parts.critic_stage)}
    trained = [
        item for role, (setup, stage) in stages.items() for item in _trained(role, setup, stage)
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
        role: _training(setup, stage, work.minibatch_rows, work.sequence_tokens)
        for role, (setup, stage) in stages.items()
    }
    return (
        PhaseMemory(
            phase=Phase.SCORING,
            pools=merged((*trained, *_scorers(parts, Residence.DEVICE), *_largest(scoring))),
        ),
        PhaseMemory(
            phase=Phase.PPO_TRAINING,
            pools=merged(
                (
                    *trained,
                    *_scorers(parts, Residence.HOST if parts.scorers_away else Residence.DEVICE),
                    *_largest(training),
                )
            ),
        ),
    )


def _scorers(parts: _Parts, residence: Residence) -> Iterator[PoolBytes]:
    """Reference and reward model."""
    for role, setup, stage in (
        (Role.REFERENCE, parts.actor, parts.actor_stage),
        (Role.REWARD, parts.critic, parts.critic_stage),
    ):
        for item in _weights(role, setup, stage):
            yield _moved(item, residence, item.num_bytes)


@cache
def _weights(role: Role, setup: RoleSetup, stage: int) -> tuple[PoolBytes, ...]:
    elements = stage_elements(setup, stage=stage)
    return (
        _device(role, Pool.WEIGHTS, elements.layers * setup.value_bytes),
        _device(role, Pool.EMBEDDINGS, elements.embeddings * setup.value_bytes),
    )


@cache
def _trained(role: Role, setup: RoleSetup, stage: int) -> tuple[PoolBytes, ...]:
    """Long-lived pools of a model that trains."""
    elements = stage_elements(setup, stage=stage).total
    share = -(-elements // setup.layout.data)
    gradients = elements * _GRADIENT_BYTES
    if setup.value_bytes == _GRADIENT_BYTES:
        # fp32: the reduced share of the gradients beside the gradients, and two buckets.
        gradients += share * _GRADIENT_BYTES + 2 * min(_BUCKET_BYTES, gradients)
    return (
        *_weights(role, setup, stage),
        _device(role, Pool.GRADIENTS, gradients),
        _device(role, Pool.MASTERS, share * _MASTER_BYTES),
        _device(role, Pool.MOMENTS, share * _MOMENT_BYTES),
    )


def _training(
    setup: RoleSetup, stage: int, rows: int, tokens: int, *, answers: int = 1
) -> Transients:
    """Of a training step on a global batch; a row of pairs holds two answers."""
    return training_transients(
        setup,
        stage=stage,
        rows=answers * setup.rows_at_once(rows),
        tokens=tokens,
        num_micro_batches=setup.num_micro_batches(rows),
    )


def _transient(role: Role, transients: Transients) -> Iterator[PoolBytes]:
    yield _device(role, Pool.ACTIVATIONS, transients.activations)
    yield _device(role, Pool.WORKSPACE, transients.workspace)


def _largest(transients: Mapping[Role, Transients]) -> Iterator[PoolBytes]:
    """The transients of the role that needs most."""
    role = max(transients, key=lambda role: transients[role].total)
    return _transient(role, transients[role])


def _device(role: Role, pool: Pool, num_bytes: int) -> PoolBytes:
    return PoolBytes(role=role, pool=pool, residence=Residence.DEVICE, num_bytes=num_bytes)


def _moved(item: PoolBytes, residence: Residence, num_bytes: int) -> PoolBytes:
    return PoolBytes(role=item.role, pool=item.pool, residence=residence, num_bytes=num_bytes)


def _rank_kinds(job: Job) -> dict[tuple[int, int], list[int]]:
    """(actor stage, critic stage) -> the ranks at both."""
    kinds: dict[tuple[int, int], list[int]] = defaultdict(list)
    for rank in range(job.actor.layout.world_size):
        stages = (
            job.actor.layout.coordinate(rank).pipeline,
            job.critic.layout.coordinate(rank).pipeline,
        )
        kinds[stages].append(rank)
    return kinds


def _fullest_host(ranks: tuple[RankMemory, ...], cluster: ClusterConfig) -> int:
    """Host bytes of the fullest node in the fullest phase."""
    used: dict[tuple[int, Phase], int] = defaultdict(int)
    for memory in ranks:
        for phase in memory.phases:
            total = phase.total(Residence.HOST)
            for rank in memory.ranks:
                used[cluster.node_of(rank), phase.phase] += total
    return max(used.values(), default=0)
