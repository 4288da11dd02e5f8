"""Chooses how the published recipe is run on a cluster: layouts, rows at once, measures, cache.

The planner decides (`megachat.planner.search`), from the architectures and the cluster. Models of
names that it does not know are read from their folder's `config.json`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from megachat.cli.plan import find_architecture
from megachat.errors import CapacityError, ConfigError
from megachat.model.config import OPT_MODELS, OptConfig, Recompute
from megachat.planner.hardware import GB, ClusterConfig
from megachat.planner.job import Job, Workload
from megachat.planner.memory import plan_memory, refusal
from megachat.planner.records import Measure
from megachat.planner.report import plan_lines
from megachat.planner.search import (
    Plan,
    PlanRequest,
    SearchResult,
    fits_somewhere,
    search,
    with_all_ranks,
)

if TYPE_CHECKING:
    from megachat.stages.config import RunConfig

ROWS_PER_RANK = 4
"""Prompts, pairs and half the supervised rows of a global batch, for each rank; and rows of a
micro-batch where they fit. DeepSpeed-Chat's OPT scripts for one node have 4."""
PROMPT_TOKENS, RESPONSE_TOKENS = 256, 256
BLOCK_TOKENS = 16
"""`rlhf.generation.block_size`."""
_CLOSE = 0.1
"""Predicted times that differ by no larger part are taken to be equal: predictions err by more."""
_MOST_NODES = 64
"""Of the clusters that a refusal looks for one in."""
_FROM_SFT = "sft"
"""`megachat.stages.config.FROM_SFT`: the reward model starts from the supervised model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeModels:
    """What a recipe trains."""

    actor: str
    """Hub name or HuggingFace folder."""
    reward: str
    """Likewise, or "sft"."""


def workload(world_size: int) -> Workload:
    """The recipe's batches on so many ranks."""
    rows = ROWS_PER_RANK * world_size
    return Workload(
        prompts=rows,
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=RESPONSE_TOKENS,
        sft_rows=2 * rows,
        sft_tokens=PROMPT_TOKENS + RESPONSE_TOKENS,
        reward_pairs=rows,
    )


def choose(models: RecipeModels, cluster: ClusterConfig) -> Plan:
    """How to run the recipe: of what fits and is predicted to be about as fast, the simplest.

    Raises:
        ConfigError: The architecture of a model cannot be known here.
        CapacityError: Nothing fits; names what came nearest, both numbers, and the smallest cluster
            of such GPUs that would do.
    """
    return _chosen(*_architectures(models), cluster, models)


def settings(plan: Plan) -> dict[str, Any]:
    """What a plan says, as tables of a run's configuration: `models` and `rlhf`."""
    job, cache, measures = plan.job, plan.memory.cache, plan.memory.measures
    roles = {
        name: {
            "precision": "bf16",
            "tensor": setup.layout.tensor,
            "pipeline": setup.layout.pipeline,
            "sequence_parallel": setup.is_sequence_parallel,
            "recompute": setup.recompute.value,
            "micro_batch_rows": setup.micro_batch_rows,
        }
        for name, setup in (("actor", job.actor), ("reward", job.critic))
    }
    roles["actor"]["logprob_backend"] = "cuda"
    return {
        "models": roles,
        "rlhf": {
            "generation_tensor": job.generation_tensor,
            "generation": {
                # Up to the next kB: a block is never lost to the rounding of a decimal.
                "kv_cache_gb": (cache.num_bytes // 1000 + 1) / 1e6,
                "block_size": job.block_tokens,
                "prefill_tokens": job.prefill_tokens,
                "max_sequences": job.most_at_once,
                "backend": "cuda",
            },
            "memory": {measure.value: measure in measures for measure in Measure},
        },
    }


def explanation(plan: Plan, models: RecipeModels) -> list[str]:
    """What was chosen, why, and the command that plans the same; for a dry run."""
    result = _searched(*_architectures(models), plan.cluster)
    fullest = plan.memory.fullest
    fitting, fastest = len(result.plans), result.plans[0]
    return [
        f"Chosen for {_where(plan.cluster)} by `megachat plan`; every number is predicted:",
        *(f"  {line}" for line in plan_lines(plan)),
        f"  Fullest: phase {fullest.peak.phase} on ranks {fullest.ranks[0]}-{fullest.ranks[-1]}.",
        f"Why: {fitting} of {fitting + len(result.refusals)} pairs of layouts fit; the simplest of "
        f"the {len(_alike(result.plans))} that are predicted to take at most {1 + _CLOSE:g} times "
        f"as long as the fastest ({fastest.job.actor.layout}, {fastest.seconds.total:.1f} s).",
        *(f"  {line}" for line in _simpler(plan, result)),
        f"The same plan: {command(plan, models)}",
    ]


def verdict(config: "RunConfig", cluster: ClusterConfig) -> list[str]:
    """Whether a run whose settings were changed still fits a cluster."""
    from megachat.preflight.memory import plan_run
    from megachat.preflight.models import known_architectures

    architectures = known_architectures(config)
    if isinstance(architectures, str):
        return [f"With --set: the architecture of {architectures} cannot be known here."]
    run = plan_run(config, architectures, cluster)
    if run.reason is not None:
        return [f"With --set: does not fit: {run.reason}."]
    return [
        f"With --set: fits, {run.memory.peak_bytes / GB:.1f} of "
        f"{run.memory.budget_bytes / GB:.1f} GB usable in phase {run.memory.fullest.peak.phase}."
    ]


def command(plan: Plan, models: RecipeModels) -> str:
    """The `megachat plan` that gives this plan."""
    job, cluster, work = plan.job, plan.cluster, plan.job.workload
    reward = models.actor if models.reward == _FROM_SFT else models.reward

    def degrees(role: str) -> str:
        layout = {"actor": job.actor, "critic": job.critic}[role].layout
        return f"{layout.tensor},{layout.pipeline},{layout.data}"

    return (
        f"megachat plan --model {models.actor} --critic {reward} --nodes {cluster.nodes} "
        f"--gpus-per-node {cluster.gpus_per_node} --gpu-memory-gb {cluster.gpu_memory_gb:g} "
        f"--train {degrees('actor')} --generate {job.generation_tensor} "
        f"--critic-train {degrees('critic')} --prompts {work.prompts} "
        f"--prompt-tokens {work.prompt_tokens} --response-tokens {work.response_tokens} "
        f"--sft-rows {work.sft_rows} --reward-pairs {work.reward_pairs} "
        f"--micro-batch-rows {job.actor.micro_batch_rows} --block-tokens {job.block_tokens}"
    )


def smallest_cluster(
    actor: OptConfig, critic: OptConfig, cluster: ClusterConfig
) -> ClusterConfig | None:
    """The smallest cluster of such GPUs that the recipe fits on; None: none that is looked at.

    Nodes are as wide as the cluster's, or 8 GPUs where it has one node of fewer; GPUs of one node
    and then nodes are doubled.
    """
    width = cluster.gpus_per_node if cluster.nodes > 1 else max(8, cluster.gpus_per_node)
    return _smallest(actor, critic, _resized(cluster, nodes=1, gpus=width))


@cache
def _smallest(actor: OptConfig, critic: OptConfig, cluster: ClusterConfig) -> ClusterConfig | None:
    """The smallest cluster whose nodes are at most as wide as one of these."""
    for nodes, gpus in _sizes(cluster.gpus_per_node):
        larger = _resized(cluster, nodes=nodes, gpus=gpus)
        if fits_somewhere(_request(actor, critic, larger)):
            return larger
    return None


def _resized(cluster: ClusterConfig, *, nodes: int, gpus: int) -> ClusterConfig:
    return cluster.model_copy(update={"nodes": nodes, "gpus_per_node": gpus})


def _sizes(width: int) -> Iterator[tuple[int, int]]:
    gpus = 1
    while gpus < width:
        yield 1, gpus
        gpus *= 2
    nodes = 1
    while nodes <= _MOST_NODES:
        yield nodes, width
        nodes *= 2


@cache
def _chosen(
    actor: OptConfig, critic: OptConfig, cluster: ClusterConfig, models: RecipeModels
) -> Plan:
    result = _searched(actor, critic, cluster)
    if result.plans:
        return with_all_ranks(_simplest(result.plans))
    enough = smallest_cluster(actor, critic, cluster)
    advice = (
        f"no cluster of up to {_MOST_NODES} nodes of such GPUs would do, for a generation tensor "
        "group stays inside a node"
    )
    if enough is not None:
        advice = f"the smallest cluster of such GPUs that would do is {_where(enough)}"
    what = f"{models.actor} with {models.reward} on {_where(cluster)}"
    raise CapacityError(f"{what}: {result.nearest_refusal}; {advice}")


@cache
def _searched(actor: OptConfig, critic: OptConfig, cluster: ClusterConfig) -> SearchResult:
    return search(_request(actor, critic, cluster))


def _alike(plans: Sequence[Plan]) -> list[Plan]:
    """Plans whose times are too close to the fastest's to tell apart."""
    return [plan for plan in plans if plan.seconds.total <= (1 + _CLOSE) * plans[0].seconds.total]


def _simplest(plans: Sequence[Plan]) -> Plan:
    """Of plans about as fast as the fastest, the one with fewest moving parts."""
    return min(
        _alike(plans),
        key=lambda plan: (
            plan.job.actor.recompute is not Recompute.NONE,
            plan.job.actor.layout.pipeline,
            len(plan.memory.measures),
            plan.job.actor.layout.tensor,
            plan.job.generation_tensor != plan.job.actor.layout.tensor,
            plan.seconds.total,
        ),
    )


@cache
def _request(actor: OptConfig, critic: OptConfig, cluster: ClusterConfig) -> PlanRequest:
    return PlanRequest(
        actor=actor,
        critic=critic,
        cluster=cluster,
        workload=workload(cluster.world_size),
        block_tokens=BLOCK_TOKENS,
        row_choices=(ROWS_PER_RANK, 2, 1),
    )


def _architectures(models: RecipeModels) -> tuple[OptConfig, OptConfig]:
    """Of actor and critic.

    Raises:
        ConfigError: One is neither known by name nor on this disk.
    """
    names = models.actor, models.actor if models.reward == _FROM_SFT else models.reward
    found = []
    for name in names:
        config = find_architecture(name)
        if config is None:
            raise ConfigError(
                f"model {name}: its architecture, by which layouts are chosen, is not on this "
                f"disk: give a folder with a config.json, fetch it first, or take one of "
                f"{', '.join(OPT_MODELS)}"
            )
        found.append(config)
    return found[0], found[1]


def _simpler(plan: Plan, result: SearchResult) -> Iterator[str]:
    """What the next simpler ways of running the recipe lack."""
    flat = [item for item in result.refusals if item.train.pipeline == 1]
    if flat and plan.job.actor.layout.pipeline > 1:
        yield f"Without a pipeline, {flat[0].train}: {flat[0].reason}."
    job, cluster, measures = plan.job, plan.cluster, plan.memory.measures
    if measures:
        dropped = max(measures, key=list(Measure).index)
        memory = plan_memory(job, cluster, measures - {dropped})
        reason = refusal(memory) or (
            f"fits as well, with {memory.cache.waves} waves of generation for "
            f"{plan.memory.cache.waves}"
        )
        yield f"Without {dropped.value}: {reason}."
    if job.actor.micro_batch_rows < ROWS_PER_RANK:
        rows = 2 * job.actor.micro_batch_rows
        wider = replace(
            job,
            actor=replace(job.actor, micro_batch_rows=rows),
            critic=replace(job.critic, micro_batch_rows=rows),
        )
        yield f"With {rows} rows at once: {_refusal_of(wider, cluster)}."
    if job.actor.recompute is Recompute.FULL:
        kept = replace(
            job,
            actor=replace(job.actor, recompute=Recompute.NONE),
            critic=replace(job.critic, recompute=Recompute.NONE),
        )
        yield f"Without recomputation: {_refusal_of(kept, cluster)}."


def _refusal_of(job: Job, cluster: ClusterConfig) -> str:
    """Why a job does not fit whatever is lent or offloaded."""
    return refusal(plan_memory(job, cluster, frozenset(Measure))) or "fits with more measures"


def _where(cluster: ClusterConfig) -> str:
    """A cluster in words."""
    gpus = f"GPU{'s' if cluster.gpus_per_node > 1 else ''} of {cluster.gpu_memory_gb:g} GB"
    return f"{cluster.nodes} x {cluster.gpus_per_node} {gpus}"
