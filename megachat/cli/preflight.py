"""Holds a run against the memory it is to run in, before anything is started.

The planner computes what every rank would hold in each phase of the stages that are to run, from
the run's own models, layouts, batches, lengths and precision. Nothing is downloaded: a model that
is known neither by name nor on this disk is left to the run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megachat.cli.plan import find_architecture
from megachat.data.config import Stage
from megachat.errors import CapacityError
from megachat.model.config import Head, OptConfig, vocab_multiple_for
from megachat.parallel.launch import MemoryCheck, select_device
from megachat.planner.hardware import GB, Allocator, ClusterConfig
from megachat.planner.job import Job, RoleSetup, Workload
from megachat.planner.memory import plan_memory, refusal
from megachat.planner.records import Measure, MemoryPlan, Phase
from megachat.stages.config import FROM_SFT, Precision, RoleSection, RunConfig
from megachat.stages.context import source_folder
from megachat.stages.status import completed_stages
from megachat.telemetry.machine import available_bytes

_PROCESS_BYTES = GB // 2
"""A rank on the CPU before it holds any tensor: Python, torch, megatron-core, DeepSpeed."""

_HOPPER = (9, 0)
"""Compute capability from which on cuBLAS has `_HOPPER_WORKSPACE_MIB` for each stream."""
_HOPPER_WORKSPACE_MIB = 32.0

_PHASES: Mapping[Stage, tuple[Phase, ...]] = {
    Stage.SFT: (Phase.SFT,),
    Stage.REWARD: (Phase.REWARD_TRAINING,),
    Stage.PROMPTS: (Phase.GENERATION, Phase.SCORING, Phase.PPO_TRAINING),
}


def check_memory(config: RunConfig, stages: Sequence[Stage]) -> str | None:
    """Refuses a run that cannot fit, as `launch.memory_check` says.

    Args:
        config: The run.
        stages: What is asked for; completed ones are not started and not looked at.

    Returns:
        A line for the user where the run starts with a warning or unchecked.

    Raises:
        CapacityError: It cannot fit: what is too large, where, and both numbers.
        LayoutError: A layout does not cut a model evenly.
        ConfigError: Rows are longer than a model's position table.
        LaunchError: CUDA is asked for and is not here.
    """
    if config.launch.memory_check is MemoryCheck.OFF:
        return None
    done = completed_stages(config)
    phases = [phase for stage in stages if stage not in done for phase in _PHASES[stage]]
    if not phases:
        return None
    architectures = known_architectures(config)
    if isinstance(architectures, str):
        return (
            f"memory is not checked: the architecture of {architectures} cannot be known before "
            "it is downloaded"
        )
    device = select_device(config.launch.device)
    reason = plan_run(config, architectures, _cluster(config, device), phases).reason
    if reason is None:
        return None
    text = f"this run cannot fit: {reason}"
    if config.launch.memory_check is MemoryCheck.WARN:
        return f"warning: {text}"
    raise CapacityError(f'{text} (launch.memory_check = "warn" starts it anyway)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Architectures:
    """What the roles of a run are."""

    actor: OptConfig
    """Of supervised model, actor and reference."""
    critic: OptConfig
    """Of critic and reward model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    """What a run would need on a cluster."""

    job: Job
    memory: MemoryPlan
    """Of the phases that are to run."""
    reason: str | None
    """Why it does not fit, with both numbers and what to change; None: it fits."""


def plan_run(
    config: RunConfig,
    architectures: Architectures,
    cluster: ClusterConfig,
    phases: Sequence[Phase] = tuple(Phase),
) -> RunPlan:
    """Plans a run as it is configured; nothing is looked at but the arguments.

    Args:
        config: The run.
        architectures: Of its models.
        cluster: Where it is to run. One whose allocator is exact is a CPU: there, nothing is gained
            by moving to the host, and what a cache does not need is never touched.
        phases: What is going to run.

    Raises:
        LayoutError: A layout does not cut a model evenly, does not fill the cluster, or has a
            tensor group that spans nodes.
        ConfigError: Rows are longer than a model's position table.
    """
    on_cpu = cluster.allocator is Allocator.EXACT
    job = _job(config, architectures, graphs=config.rlhf.generation.graphs and not on_cpu)
    cache_bytes = int(config.rlhf.generation.kv_cache_gb * GB)
    if on_cpu:
        needed = plan_memory(job, cluster).cache
        cache_bytes = min(cache_bytes, needed.needed_blocks * needed.block_bytes)
    job = replace(job, cache_bytes=cache_bytes)
    plan = plan_memory(job, cluster, _measures(config, phases, on_cpu=on_cpu))
    memory = plan.during(phases)
    reason = refusal(memory)
    if reason is not None:
        reason += (
            ": lower batches or lengths, raise the degrees of models.* or launch.processes, or see "
            "rlhf.memory"
        )
    elif Phase.GENERATION in phases:
        reason = _too_small_cache(config, plan)
    return RunPlan(job=job, memory=memory, reason=reason)


def _too_small_cache(config: RunConfig, plan: MemoryPlan) -> str | None:
    """Why the cache that is asked for is of no use; None where it is."""
    cache = plan.cache
    if cache.num_blocks >= cache.blocks_per_sequence:
        return None
    tokens = config.data.max_prompt_tokens + config.rlhf.sampling.max_new_tokens
    return (
        f"rlhf.generation.kv_cache_gb {config.rlhf.generation.kv_cache_gb:g} holds "
        f"{cache.num_blocks} blocks of {cache.block_tokens} tokens, but a sequence of "
        f"{tokens} needs {cache.blocks_per_sequence}: raise it above "
        f"{cache.blocks_per_sequence * cache.block_bytes / GB:.3g}"
    )


def _cluster(config: RunConfig, device: torch.device) -> ClusterConfig:
    """What each rank may use, as the planner takes it.

    On a CPU there are no NCCL buffers, and where the nodes begin does not matter to a rank's
    memory, so the job is taken to be one node.
    """
    launch, host = config.launch, available_bytes(torch.device("cpu"))
    if device.type == "cpu":
        each = host // launch.processes
        return ClusterConfig(
            gpus_per_node=launch.world_size,
            gpu_memory_gb=each / GB,
            reserved_gb=min(_PROCESS_BYTES, each) / GB,
            margin=0.0,
            allocator=Allocator.EXACT,
            host_memory_gb=host * launch.nodes / GB,
        )
    cluster = ClusterConfig(
        nodes=launch.nodes,
        gpus_per_node=launch.processes,
        gpu_memory_gb=available_bytes(device) / GB,
        host_memory_gb=host / GB,
    )
    if torch.cuda.get_device_capability(device) < _HOPPER:
        return cluster
    return cluster.model_copy(update={"matmul_workspace_mib": _HOPPER_WORKSPACE_MIB})


def _measures(config: RunConfig, phases: Sequence[Phase], *, on_cpu: bool) -> frozenset[Measure]:
    """What makes room during generation.

    On the CPU nothing is gained by moving to the host. In fp32 there are no gradients between
    steps, which comes to the same as lending them.
    """
    if Phase.GENERATION not in phases:
        return frozenset()
    chosen = {measure for measure in Measure if getattr(config.rlhf.memory, measure)}
    if on_cpu:
        chosen &= {Measure.REUSE_GRADIENTS}
    if config.models.actor.precision is Precision.FP32:
        chosen |= {Measure.REUSE_GRADIENTS}
    return frozenset(chosen)


def _job(config: RunConfig, architectures: Architectures, *, graphs: bool) -> Job:
    """The run as the planner takes it."""
    models, rlhf = config.models, config.rlhf
    degree = rlhf.generation_degree(models.actor)
    policy = _setup(config, models.actor, architectures.actor, Head.LANGUAGE_MODEL)
    return Job(
        actor=replace(policy, vocab_multiple=vocab_multiple_for(models.actor.tensor, degree)),
        critic=_setup(config, models.reward, architectures.critic, Head.SCALAR),
        generation_tensor=degree,
        workload=Workload(
            prompts=rlhf.batch_prompts,
            prompt_tokens=config.data.max_prompt_tokens,
            response_tokens=rlhf.sampling.max_new_tokens,
            ppo_epochs=rlhf.ppo.epochs,
            minibatches=rlhf.ppo.minibatches,
            sft_rows=config.sft.batch_rows,
            sft_tokens=config.data.max_tokens,
            reward_pairs=config.reward.batch_pairs,
        ),
        block_tokens=rlhf.generation.block_size,
        prefill_tokens=rlhf.generation.prefill_tokens,
        max_sequences=rlhf.generation.max_sequences,
        graphs=graphs,
    )


def _setup(config: RunConfig, role: RoleSection, model: OptConfig, head: Head) -> RoleSetup:
    return RoleSetup(
        config=model,
        head=head,
        layout=role.layout(config.launch.world_size),
        value_bytes=role.precision.dtype.itemsize,
        sequence_parallel=role.sequence_parallel,
        recompute=role.recompute,
        micro_batch_rows=role.micro_batch_rows,
    )


def known_architectures(config: RunConfig) -> Architectures | str:
    """What the models of a run are, or the name of the one that cannot be known yet."""
    models = config.models
    actor = _other_runs(config, Stage.SFT) or _architecture(config, models.actor)
    if actor is None:
        return models.actor.model or "models.actor.shape"
    critic = _other_runs(config, Stage.REWARD)
    if critic is None and models.reward.model == FROM_SFT:
        return Architectures(actor=actor, critic=actor)
    critic = critic or _architecture(config, models.reward)
    if critic is None:
        return models.reward.model or "models.reward.shape"
    return Architectures(actor=actor, critic=critic)


def _other_runs(config: RunConfig, stage: Stage) -> OptConfig | None:
    """Of the model that is taken from another run; None: it is not, or that has left none."""
    folder = source_folder(config, stage)
    if config.run.source_of(stage) is None or not (folder / "config.json").is_file():
        return None
    return find_architecture(str(folder))


def _architecture(config: RunConfig, role: RoleSection) -> OptConfig | None:
    if role.shape is not None:
        vocab_size = _vocab_size(config)
        if vocab_size is None:
            return None
        return role.shape.opt_config(vocab_size=vocab_size, pad_id=0, bos_id=0, eos_id=0)
    assert role.model is not None, "a role has a model or a shape"
    return find_architecture(role.model)


def _vocab_size(config: RunConfig) -> int | None:
    """Of the run's tokenizer; None where that is not on this disk."""
    section = config.tokenizer
    if section.train is not None:
        return section.train.vocab_size
    from megachat.hub import Content, folder_on_disk

    folder = folder_on_disk(section.path or config.models.actor.model or "", Content.TOKENIZER)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [int(entry["id"]) for entry in values.get("added_tokens", ())]
    return max([len(values["model"]["vocab"]), *(number + 1 for number in ids)])
