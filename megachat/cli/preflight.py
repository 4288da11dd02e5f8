"""The one place that holds a run against the memory it is to run in, before anything is started.

The planner computes what every rank would hold in each phase of the stages that are to run, from
the run's own models, layouts, batches, lengths and precision. Nothing is downloaded: a model that
is known neither by name nor on this disk is left to the run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from megachat.cli.plan import architecture
from megachat.data.config import Stage
from megachat.errors import CapacityError
from megachat.hub import Content, folder_on_disk
from megachat.model.config import OPT_MODELS, Head, OptConfig, vocab_multiple_for
from megachat.parallel.launch import MemoryCheck, select_device
from megachat.planner.hardware import GB, ClusterConfig
from megachat.planner.job import Job, RoleSetup, Workload
from megachat.planner.memory import plan_memory, refusal
from megachat.planner.records import Measure, Phase
from megachat.stages.config import FROM_SFT, Precision, RoleSection, RunConfig
from megachat.stages.run import completed_stages
from megachat.telemetry.machine import available_bytes

_PROCESS_BYTES = GB // 2
"""A rank on the CPU before it holds any tensor: Python, torch, megatron-core, DeepSpeed."""

_CUDA_RESERVED_BYTES = int(ClusterConfig().reserved_gb * GB)
"""CUDA context, NCCL buffers, workspace of kernels, fragments."""

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
    actor, critic = _architectures(config)
    if actor is None or critic is None:
        role = config.models.actor if actor is None else config.models.reward
        return (
            f"memory is not checked: the architecture of {role.model or 'models.actor.shape'} "
            "cannot be known before it is downloaded"
        )
    device = select_device(config.launch.device)
    job = _job(config, actor, critic)
    reason = _reason(config, job, device, phases)
    if reason is None:
        return None
    text = f"this run cannot fit: {reason}"
    if config.launch.memory_check is MemoryCheck.WARN:
        return f"warning: {text}"
    raise CapacityError(f'{text} (launch.memory_check = "warn" starts it anyway)')


def _reason(
    config: RunConfig, job: Job, device: torch.device, phases: Sequence[Phase]
) -> str | None:
    """Why a job does not fit on this machine; None where it does."""
    cluster = _cluster(config, device)
    cache_bytes = int(config.rlhf.generation.kv_cache_gb * GB)
    if device.type == "cpu":  # what is not needed is never touched
        needed = plan_memory(job, cluster).cache
        cache_bytes = min(cache_bytes, needed.needed_blocks * needed.block_bytes)
    job = replace(job, cache_bytes=cache_bytes)
    plan = plan_memory(job, cluster, _measures(config, device, phases))
    reason = refusal(plan.during(phases))
    if reason is not None:
        return (
            f"{reason}: lower batches or lengths, raise the degrees of models.* or "
            "launch.processes, or see rlhf.memory"
        )
    cache = plan.cache
    if Phase.GENERATION not in phases or cache.num_blocks >= cache.blocks_per_sequence:
        return None
    return (
        f"rlhf.generation.kv_cache_gb {config.rlhf.generation.kv_cache_gb:g} holds "
        f"{cache.num_blocks} blocks of {cache.block_tokens} tokens, but a sequence of "
        f"{job.workload.sequence_tokens} needs {cache.blocks_per_sequence}: raise it above "
        f"{cache.blocks_per_sequence * cache.block_bytes / GB:.3g}"
    )


def _cluster(config: RunConfig, device: torch.device) -> ClusterConfig:
    """What each rank may use, as the planner takes it.

    Where the nodes begin does not matter to a rank's memory, so the job is taken to be one node.
    """
    launch = config.launch
    each, reserved = available_bytes(device), _CUDA_RESERVED_BYTES
    if device.type == "cpu":
        each, reserved = each // launch.processes, _PROCESS_BYTES
    return ClusterConfig(
        gpus_per_node=launch.world_size,
        gpu_memory_gb=each / GB,
        reserved_gb=min(reserved, each) / GB,
        host_memory_gb=available_bytes(torch.device("cpu")) * launch.nodes / GB,
    )


def _measures(
    config: RunConfig, device: torch.device, phases: Sequence[Phase]
) -> frozenset[Measure]:
    """What makes room during generation.

    On the CPU nothing is gained by moving to the host. In fp32 there are no gradients between
    steps, which comes to the same as lending them.
    """
    if Phase.GENERATION not in phases:
        return frozenset()
    chosen = {measure for measure in Measure if getattr(config.rlhf.memory, measure)}
    if device.type == "cpu":
        chosen &= {Measure.REUSE_GRADIENTS}
    if config.models.actor.precision is Precision.FP32:
        chosen |= {Measure.REUSE_GRADIENTS}
    return frozenset(chosen)


def _job(config: RunConfig, actor: OptConfig, critic: OptConfig) -> Job:
    """The run as the planner takes it."""
    models, rlhf = config.models, config.rlhf
    degree = rlhf.generation_degree(models.actor)
    policy = _setup(config, models.actor, actor, Head.LANGUAGE_MODEL)
    return Job(
        actor=replace(policy, vocab_multiple=vocab_multiple_for(models.actor.tensor, degree)),
        critic=_setup(config, models.reward, critic, Head.SCALAR),
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


def _architectures(config: RunConfig) -> tuple[OptConfig | None, OptConfig | None]:
    """Of actor and reward model; None where it cannot be known yet."""
    actor = _architecture(config, config.models.actor)
    if config.models.reward.model == FROM_SFT:
        return actor, actor
    return actor, _architecture(config, config.models.reward)


def _architecture(config: RunConfig, role: RoleSection) -> OptConfig | None:
    if role.shape is not None:
        vocab_size = _vocab_size(config)
        if vocab_size is None:
            return None
        return role.shape.opt_config(vocab_size=vocab_size, pad_id=0, bos_id=0, eos_id=0)
    assert role.model is not None, "a role has a model or a shape"
    if role.model in OPT_MODELS:
        return OPT_MODELS[role.model]
    folder = folder_on_disk(role.model)
    return None if folder is None else architecture(str(folder))


def _vocab_size(config: RunConfig) -> int | None:
    """Of the run's tokenizer; None where that is not on this disk."""
    section = config.tokenizer
    if section.train is not None:
        return section.train.vocab_size
    folder = folder_on_disk(section.path or config.models.actor.model or "", Content.TOKENIZER)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    values = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [int(entry["id"]) for entry in values.get("added_tokens", ())]
    return max([len(values["model"]["vocab"]), *(number + 1 for number in ids)])
