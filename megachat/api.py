"""Builds the engine of PPO from two model folders: what a program of one's own imports.

A program launches a function on its ranks; each rank makes the engine with `create_engine`, gives
it to a `PPOTrainer`, loops, and saves with `save_actor`. README.md has a whole program. The PPO
stage of `megachat train` builds its engine here as well.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from megachat.checkpoint.huggingface import (
    MissingHead,
    load_together,
    read_config,
    save_huggingface,
)
from megachat.data.prompts import encode_prompts
from megachat.data.tokenizer import Tokenizer
from megachat.errors import ConfigError
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.hub import local_folder
from megachat.hybrid.engine import HybridEngine, HybridSettings
from megachat.hybrid.phases import MemoryMeasures
from megachat.model.config import Head, ModelOptions, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.handover import on_first_rank
from megachat.parallel.launch import LaunchConfig, Worker, launch
from megachat.parallel.layout import ParallelLayout
from megachat.rlhf.config import PpoConfig
from megachat.rlhf.engine import RLHFEngine
from megachat.rlhf.ppo import PPOTrainer
from megachat.training.engine import ForwardEngine, TrainEngine
from megachat.training.schedules import OptimizerConfig

__all__ = [
    "EngineSettings",
    "GenerationConfig",
    "LaunchConfig",
    "ModelOptions",
    "OptimizerConfig",
    "PPOTrainer",
    "PpoConfig",
    "RLHFEngine",
    "RoleSettings",
    "SamplingConfig",
    "Tokenizer",
    "Worker",
    "create_engine",
    "encode_prompts",
    "launch",
    "load_models",
    "save_actor",
    "unspeakable_ids",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleSettings:
    """Two models with one start: the one that trains, and the one that stays as it was.

    Of the policy these are actor and reference, of the reward model critic and reward model.
    """

    model: str | Path
    """A HuggingFace folder, or a hub name that is on this machine; the reward model has a scalar
    head (`megachat reward` makes one)."""
    tensor: int = 1
    """Tensor-parallel degree."""
    pipeline: int = 1
    """Pipeline-parallel degree; the data degree is what remains of the ranks."""
    options: ModelOptions = ModelOptions()  # noqa: RUF009 - frozen
    """Precision, recomputation and the like."""
    micro_batch_rows: int = 8
    """Rows that go through a model at once."""
    optimizer: OptimizerConfig = OptimizerConfig()  # noqa: RUF009 - frozen
    """Of the one that trains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How the roles work together; the defaults do for one node."""

    generation_tensor: int | None = None
    """Tensor degree the actor generates with; None is the one it trains with."""
    generation: GenerationConfig = GenerationConfig()  # noqa: RUF009 - frozen
    measures: MemoryMeasures = MemoryMeasures()  # noqa: RUF009 - frozen
    """What leaves the device when it is not in use."""
    logprob_backend: Backend = Backend.REFERENCE
    """Who computes log-probabilities and entropies from logits."""
    ranks_per_node: int | None = None
    """Neighbouring ranks that share a node; None: all of them."""
    seed: int = 1234
    """Start of the dropout streams."""


def create_engine(
    worker: Worker,
    *,
    actor: RoleSettings,
    reward: RoleSettings,
    tokenizer: Tokenizer,
    total_steps: int,
    settings: EngineSettings = EngineSettings(),  # noqa: B008 - frozen
) -> RLHFEngine:
    """The four models of PPO, each weight read once; a collective call of all ranks.

    Args:
        worker: This rank.
        actor: Actor and reference.
        reward: Critic and reward model.
        tokenizer: What both were trained with. Its end of sequence ends a response, and its other
            control tokens are never sampled.
        total_steps: Optimizer steps of the run, where the learning-rate schedules end: iterations
            times `PpoConfig.num_updates`.
        settings: How the roles work together.

    Returns:
        An engine that owns its models and communicators; close it, or use it in a `with` block.

    Raises:
        CheckpointError: A folder is not there or not a complete OPT.
        ConfigError: The tokenizer does not fit a model, or a model cannot be run as asked for.
        LayoutError: A layout does not fit a model or the number of ranks.
    """
    multiple = vocab_multiple_for(actor.tensor, settings.generation_tensor or actor.tensor)
    with ExitStack() as parts:  # what was built before a part that fails ends with it
        groups = [
            ProcessGroups.create(
                ParallelLayout.for_world(
                    worker.world_size, tensor=role.tensor, pipeline=role.pipeline
                )
            )
            for role in (actor, reward)
        ]
        load = partial(load_models, tokenizer=tokenizer, device=worker.device)
        policy, reference = load(
            local_folder(str(actor.model)),
            groups=groups[0],
            head=Head.LANGUAGE_MODEL,
            options=(replace(actor.options, vocab_multiple=multiple), actor.options),
        ).models
        critic, scorer = load(
            local_folder(str(reward.model)),
            groups=groups[1],
            head=Head.SCALAR,
            options=(reward.options,) * 2,
        ).models
        how = _hybrid_settings(actor, settings, total_steps=total_steps)
        hybrid = HybridEngine(
            policy,
            how,
            stop_ids=(tokenizer.eos_id,),
            suppressed_ids=unspeakable_ids(tokenizer, vocab_size=policy.config.vocab_size),
            synchronize=partial(_synchronize, worker.device),
        )
        trained_critic = TrainEngine(
            critic,
            micro_batch_rows=reward.micro_batch_rows,
            optimizer=reward.optimizer,
            total_steps=total_steps,
            seed=settings.seed,
        )
        engine = RLHFEngine(
            actor=parts.enter_context(hybrid),
            critic=parts.enter_context(trained_critic),
            reference=ForwardEngine(reference, micro_batch_rows=actor.micro_batch_rows),
            reward=ForwardEngine(scorer, micro_batch_rows=reward.micro_batch_rows),
            measures=settings.measures,
            logprob_backend=settings.logprob_backend,
            groups=tuple(groups),
        )
        parts.pop_all()
    return engine


def _hybrid_settings(
    actor: RoleSettings, settings: EngineSettings, *, total_steps: int
) -> HybridSettings:
    """How the actor trains and generates."""
    return HybridSettings(
        generation_tensor=settings.generation_tensor or actor.tensor,
        micro_batch_rows=actor.micro_batch_rows,
        optimizer=actor.optimizer,
        total_steps=total_steps,
        seed=settings.seed,
        generation=settings.generation,
        measures=settings.measures,
        ranks_per_node=settings.ranks_per_node,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModels:
    """Models that were filled from one folder."""

    models: list[OptModel]
    digest: str | None
    """On the first rank, of the weights that were read, where that was all there is."""


def load_models(
    folder: Path,
    *,
    groups: ProcessGroups,
    head: Head,
    options: Sequence[ModelOptions],
    tokenizer: Tokenizer,
    device: torch.device,
    missing_head: MissingHead = MissingHead.REFUSE,
    seed: int = 0,
) -> LoadedModels:
    """Several models with the same weights, which are read from the disk once; a collective call.

    Args:
        folder: A HuggingFace folder of a language model or a scored one.
        groups: Of the layout that they are cut for.
        head: What the models compute.
        options: How each of them runs.
        tokenizer: What is going to be fed to them.
        device: Where they go.
        missing_head: Whether a scalar head that the folder lacks starts at random.
        seed: Of that start.

    Raises:
        CheckpointError: The folder is not a complete OPT.
        ConfigError: The tokenizer has ids that the model has no embedding for.
    """
    config = on_first_rank(lambda: read_config(folder), task=f"reading {folder}")
    if config.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{folder}: vocab_size is {config.vocab_size}, but the run's tokenizer has "
            f"{tokenizer.vocab_size} ids: use the tokenizer that the model was trained with"
        )
    models = [
        OptModel(config, groups=groups, head=head, options=each, seed=None).to(device)
        for each in options
    ]
    digest = load_together(models, folder, missing_head=missing_head, seed=seed)
    return LoadedModels(models=models, digest=digest)


def save_actor(engine: RLHFEngine, folder: str | Path, *, tokenizer: Tokenizer) -> None:
    """Leaves the trained policy and its tokenizer as a HuggingFace folder; a collective call.

    Args:
        engine: Whose actor is saved.
        folder: The target, under the same path on all ranks; an earlier export there is replaced
            in one step.
        tokenizer: What goes into the folder beside the weights.

    Raises:
        CheckpointError: The folder cannot be written or holds something else than an export.
    """
    with tempfile.TemporaryDirectory() as beside:
        tokenizer.save(Path(beside))
        save_huggingface(
            engine.actor.training.model,
            Path(folder),
            extra_files={path.name: path for path in sorted(Path(beside).iterdir())},
        )


def unspeakable_ids(tokenizer: Tokenizer, *, vocab_size: int) -> list[int]:
    """Ids that no reply may hold: control tokens but the end, and rows without a token (OPT: 7)."""
    controls = [control for control in tokenizer.special_ids if control != tokenizer.eos_id]
    return controls + list(range(tokenizer.vocab_size, vocab_size))


def _synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was told; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
