"""The one place that chooses: layouts, recomputation and what is lent or offloaded. Pure.

A candidate is a training layout and a generation degree. For each, sets of measures are tried from
none to all; where none fits, with fewer rows at once if the request offers them, and only then with
full recomputation. Of those that fit, the one with the least predicted time is taken, and of equal
ones the one with fewest measures.
Candidates are ranked by predicted time of a PPO step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megachat.errors import CapacityError, LayoutError
from megachat.model.config import Head, OptConfig, Recompute, vocab_multiple_for
from megachat.parallel.layout import GenerationPlacement, ParallelLayout, divisors
from megachat.planner.hardware import ClusterConfig
from megachat.planner.job import Job, RoleSetup, Workload
from megachat.planner.memory import plan_fullest, plan_memory, refusal
from megachat.planner.pools import trained_bytes
from megachat.planner.records import Measure, MemoryPlan, Phase
from megachat.planner.time import StepSeconds, predict_seconds

_LADDER: tuple[frozenset[Measure], ...] = (
    frozenset(),
    frozenset({Measure.REUSE_GRADIENTS}),
    frozenset({Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER}),
    frozenset({Measure.REUSE_GRADIENTS, Measure.OFFLOAD_OPTIMIZER, Measure.OFFLOAD_SCORERS}),
    frozenset(Measure),
)
"""Sets of measures, each making more room than the one before: what is free comes first, then what
frees most."""

MOST_GPUS = 16_000
"""Beyond this a search of all layouts takes longer than one wants to wait for it."""

_CRITIC_SHARE = 0.25
"""The critic gets the smallest tensor degree at which its long-lived pools take at most this part
of a GPU's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleOptions:
    """How a role runs; None leaves a choice to the search."""

    layout: ParallelLayout | None = None
    value_bytes: int = 2
    """Of a parameter and of an activation: 2 is bf16, 4 is fp32."""
    sequence_parallel: bool = True
    recompute: Recompute | None = None
    """None recomputes only where it must."""
    micro_batch_rows: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """What to plan."""

    actor: OptConfig
    critic: OptConfig
    cluster: ClusterConfig
    workload: Workload = Workload()
    actor_options: RoleOptions = RoleOptions()
    critic_options: RoleOptions = RoleOptions()
    generation_tensor: int | None = None
    """None leaves it to the search."""
    block_tokens: int = 32
    """Tokens of one block of the key/value cache."""
    prefill_tokens: int = 4096
    """Prompt tokens that one step of generation computes at most."""
    max_sequences: int | None = None
    """Sequences that one replica has in work at once; None: as many as the cache holds."""
    graphs: bool = True
    """Whether decode steps are recorded as CUDA graphs."""
    row_choices: tuple[int, ...] = ()
    """Rows of a micro-batch of both roles to choose from, the preferred first; none: as the roles'
    options say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A job that fits, with the choices made and what they cost."""

    job: Job
    cluster: ClusterConfig
    memory: MemoryPlan
    """Of all ranks in the plan that a search found best; in the others of those ranks that can be
    the fullest (`with_all_ranks` adds the rest)."""
    seconds: StepSeconds
    """Of one PPO step; predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A pair of layouts that cannot be used."""

    train: ParallelLayout
    generation_tensor: int | None
    """None: no generation degree could change it."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """All candidates."""

    plans: tuple[Plan, ...]
    """Fastest first."""
    refusals: tuple[Refusal, ...]

    @property
    def best(self) -> Plan:
        """The fastest plan.

        Raises:
            CapacityError: No candidate fits; names the reason of the one that came closest, or the
                only one.
        """
        if self.plans:
            return self.plans[0]
        raise CapacityError(f"{self.nearest_refusal}: use more GPUs or smaller batches")

    @property
    def nearest_refusal(self) -> str:
        """Why the layouts that came closest do not fit."""
        count = len(self.refusals)
        if not count:
            return "no layout divides this model over this cluster, change its size"
        first = self.refusals[0]
        shown = f"{first.train}" + (
            f" -> tp{first.generation_tensor}" if first.generation_tensor else ""
        )
        others = f" ({count - 1} other layouts are refused too)" if count > 1 else ""
        return f"{shown}: {first.reason}{others}"


def search(request: PlanRequest) -> SearchResult:
    """Tries every legal pair of layouts.

    Raises:
        LayoutError: A fixed layout does not fit the model or the cluster.
        CapacityError: The cluster has more than `MOST_GPUS`, and the layouts are not fixed.
    """
    _check_size(request)
    plans: list[Plan] = []
    refused: list[_Refused] = []
    for train in _training_layouts(request):
        for tensor in _generation_degrees(request, train):
            outcome = _choose(request, train, tensor)
            if isinstance(outcome, Plan):
                plans.append(outcome)
                continue
            refused.append(outcome)
            if outcome.refusal.generation_tensor is None:
                break
    plans.sort(key=lambda plan: plan.seconds.total)
    plans[:1] = [with_all_ranks(plan) for plan in plans[:1]]
    refused.sort(key=lambda item: item.excess_bytes)
    return SearchResult(plans=tuple(plans), refusals=tuple(item.refusal for item in refused))


def _check_size(request: PlanRequest) -> None:
    cluster = request.cluster
    if cluster.world_size > MOST_GPUS and request.actor_options.layout is None:
        raise CapacityError(
            f"{cluster.nodes} nodes x {cluster.gpus_per_node} GPUs = {cluster.world_size}: layouts "
            f"are searched on up to {MOST_GPUS} GPUs: fix the actor's, or plan fewer GPUs"
        )


def with_all_ranks(plan: Plan) -> Plan:
    """The same plan with the memory of all ranks, where a search looked at the fullest alone."""
    return replace(plan, memory=plan_memory(plan.job, plan.cluster, plan.memory.measures))


def fits_somewhere(request: PlanRequest) -> bool:
    """Whether any pair of layouts fits; stops at the first, and predicts no time."""
    for train in _training_layouts(request):
        for tensor in _generation_degrees(request, train):
            job = _ways(request, train, tensor)[-1]
            roomiest = plan_fullest(job, request.cluster, _LADDER[-1])
            if _fits_gpu(roomiest):
                if any(plan_fullest(job, request.cluster, rung).fits for rung in _LADDER):
                    return True
            elif roomiest.fullest.peak.phase is not Phase.GENERATION:
                break  # no generation degree could change it
    return False


def check_fits(request: PlanRequest) -> Plan:
    """How a run can be made to fit, before it starts.

    Args:
        request: The run, its layouts and generation degree fixed.

    Raises:
        CapacityError: It cannot fit whatever is lent or offloaded; one line with the numbers.
        LayoutError: A layout does not fit the model, the cluster or another layout.
    """
    return search(request).best


@dataclass(frozen=True, kw_only=True, slots=True)
class _Refused:
    """A refusal and how far it is from fitting."""

    refusal: Refusal
    excess_bytes: int


def _choose(request: PlanRequest, train: ParallelLayout, tensor: int) -> Plan | _Refused:
    """The fastest way to run one pair of layouts, or why there is none."""
    ways = _ways(request, train, tensor)
    roomiest = plan_fullest(ways[-1], request.cluster, _LADDER[-1])
    for job in ways if _fits_gpu(roomiest) else ():
        if not _fits_gpu(plan_fullest(job, request.cluster, _LADDER[-1])):
            continue
        plans = []
        for rung in _LADDER:
            memory = plan_fullest(job, request.cluster, rung)
            if memory.fits:
                plans.append(_timed(job, request.cluster, memory))
                if memory.cache.num_blocks >= memory.cache.needed_blocks:
                    break  # more room would save no time, and offloading costs some
        if plans:
            return min(plans, key=lambda plan: (plan.seconds.total, len(plan.memory.measures)))
    reason = refusal(roomiest)
    assert reason is not None
    generates = roomiest.fullest.peak.phase is Phase.GENERATION
    return _Refused(
        refusal=Refusal(
            train=train, generation_tensor=tensor if generates else None, reason=reason
        ),
        excess_bytes=roomiest.peak_bytes - roomiest.budget_bytes,
    )


def _ways(request: PlanRequest, train: ParallelLayout, tensor: int) -> list[Job]:
    """The jobs of a pair of layouts, each needing less memory than the one before.

    Fewer rows at once come first, then recomputation.
    """
    return [
        _job(request, train, tensor, mode, rows)
        for mode in Recompute
        for rows in request.row_choices or (None,)
    ]


def _fits_gpu(memory: MemoryPlan) -> bool:
    """Whether the GPUs have room; what offloading needs of the host is another question."""
    return memory.peak_bytes <= memory.budget_bytes


def _timed(job: Job, cluster: ClusterConfig, memory: MemoryPlan) -> Plan:
    return Plan(
        job=job,
        cluster=cluster,
        memory=memory,
        seconds=predict_seconds(job, cluster, memory),
    )


def _training_layouts(request: PlanRequest) -> Iterator[ParallelLayout]:
    """Layouts that fill the cluster, cut the model evenly and keep tensor groups inside nodes."""
    config, cluster, fixed = request.actor, request.cluster, request.actor_options.layout
    if fixed is not None:
        cluster.check_world(fixed.world_size, what=f"actor layout {fixed}")
        yield fixed
        return
    for tensor in divisors(cluster.gpus_per_node):
        for pipeline in divisors(cluster.world_size // tensor):
            layout = ParallelLayout.for_world(cluster.world_size, tensor=tensor, pipeline=pipeline)
            if _fits_evenly(config, layout):
                yield layout


def _generation_degrees(request: PlanRequest, train: ParallelLayout) -> Iterator[int]:
    """Degrees that a training layout can be resharded to, inside nodes."""
    if request.generation_tensor is not None:
        yield request.generation_tensor
        return
    for tensor in GenerationPlacement.legal_degrees(train):
        world = train.world_size
        layout = ParallelLayout.for_world(world, tensor=tensor)
        spans = tensor > request.cluster.gpus_per_node or _spans_nodes(request, train, tensor)
        if not spans and _fits_evenly(request.actor, layout):
            yield tensor


def _spans_nodes(request: PlanRequest, train: ParallelLayout, tensor: int) -> bool:
    placement = GenerationPlacement(source=train, tensor=tensor)
    node = request.cluster.node_of
    # From there on the groups lie over the nodes as they did from rank 0 on.
    repeats = math.lcm(placement.period, request.cluster.gpus_per_node)
    ranks = range(min(train.world_size, repeats))
    groups = (placement.tensor_group(rank) for rank in ranks)
    return any(node(group[0]) != node(group[-1]) for group in groups)


def _fits_evenly(config: OptConfig, layout: ParallelLayout) -> bool:
    try:
        config.validate_layout(layout)
    except LayoutError:
        return False
    return True


def _job(
    request: PlanRequest, train: ParallelLayout, tensor: int, mode: Recompute, rows: int | None
) -> Job:
    """The job that a candidate stands for.

    Args:
        request: What is planned.
        train: The actor's training layout.
        tensor: Generation degree.
        mode: Recomputation, where the request leaves it open.
        rows: Rows of a micro-batch of both roles; None: as the request says.
    """
    if rows is not None:
        request = replace(
            request,
            actor_options=replace(request.actor_options, micro_batch_rows=rows),
            critic_options=replace(request.critic_options, micro_batch_rows=rows),
        )
    actor = _setup(request.actor, Head.LANGUAGE_MODEL, train, request.actor_options, mode)
    return Job(
        actor=replace(actor, vocab_multiple=vocab_multiple_for(train.tensor, tensor)),
        critic=_critic(request, mode),
        generation_tensor=tensor,
        workload=request.workload,
        block_tokens=request.block_tokens,
        prefill_tokens=request.prefill_tokens,
        max_sequences=request.max_sequences,
        graphs=request.graphs,
    )


def _setup(
    config: OptConfig, head: Head, layout: ParallelLayout, options: RoleOptions, mode: Recompute
) -> RoleSetup:
    return RoleSetup(
        config=config,
        head=head,
        layout=layout,
        value_bytes=options.value_bytes,
        sequence_parallel=options.sequence_parallel,
        recompute=options.recompute or mode,
        micro_batch_rows=options.micro_batch_rows,
    )


def _critic(request: PlanRequest, mode: Recompute) -> RoleSetup:
    """The critic at its fixed layout, or at the smallest tensor degree that leaves room."""
    options = request.critic_options
    layout = options.layout or ParallelLayout(data=request.cluster.world_size)
    setup = _setup(request.critic, Head.SCALAR, layout, options, mode)
    if options.layout is not None:
        return setup
    allowed = _CRITIC_SHARE * request.cluster.gpu_bytes
    for tensor in divisors(request.cluster.gpus_per_node):
        layout = ParallelLayout.for_world(request.cluster.world_size, tensor=tensor)
        if _fits_evenly(request.critic, layout):
            setup = replace(setup, layout=layout)
            if trained_bytes(setup) <= allowed:
                break
    return setup
