"""Tiny roles for PPO under any layouts, and a reward model whose taste is known."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.hybrid.engine import HybridEngine, HybridSettings
from megachat.hybrid.phases import MemoryMeasures
from megachat.model import Head, ModelOptions, OptConfig
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.records import Batch, PromptBatch
from megachat.rlhf.config import PpoConfig
from megachat.rlhf.engine import RLHFEngine
from megachat.rlhf.ppo import PPOTrainer
from megachat.telemetry.timers import PhaseTimers
from megachat.training.engine import ForwardEngine, TrainEngine
from megachat.training.schedules import OptimizerConfig, ScheduleKind
from tests.harness.groups import groups_of

PAD, EOS = 1, 2
TINY = OptConfig(
    vocab_size=150,
    max_positions=32,
    hidden=16,
    ffn=32,
    layers=2,
    heads=2,
    embed_dim=16,
    init_std=0.25,
)

"""More than 128 tokens, so that both ranks of two hold real vocabulary."""
STOPS = (EOS, *range(130, 145))
"""A tenth of the vocabulary, so that some responses end early and others are cut off."""
SAMPLING = SamplingConfig(max_new_tokens=6)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule=ScheduleKind.CONSTANT, epsilon=1e-3)
"""An epsilon far above round-off: equal gradients up to rounding give equal steps."""
SEED = 5


def prompts(
    lengths: Sequence[int], *, width: int | None = None, first_id: int = 100
) -> PromptBatch:
    """Random prompts without meaning; control ids occur in them like any other."""
    width = width or max(lengths)
    rows = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(first_id + row)
        rows[row, :length] = torch.randint(0, TINY.vocab_size, (length,), generator=generator)
    return PromptBatch(
        tokens=rows,
        lengths=torch.tensor(lengths),
        ids=torch.arange(first_id, first_id + len(lengths)),
    )


def opt_model(
    groups: ProcessGroups, head: Head, *, seed: int = SEED, dtype: torch.dtype = torch.float32
) -> OptModel:
    """A model with the same random weights under every layout."""
    options = ModelOptions(dtype=dtype)
    return OptModel(TINY, groups=groups, head=head, options=options, seed=seed)


def trainer(
    config: PpoConfig,
    *,
    actor: ParallelLayout | None = None,
    reward: ParallelLayout | None = None,
    reference_seed: int = SEED,
    sampling: SamplingConfig = SAMPLING,
    dtype: torch.dtype = torch.float32,
    optimizer: OptimizerConfig = OPTIMIZER,
    seed: int = 7,
    rows: int = 3,
    generation_tensor: int | None = None,
    timers: PhaseTimers | None = None,
    measures: MemoryMeasures | None = None,
    logprob_backend: Backend = Backend.REFERENCE,
) -> PPOTrainer:
    """All four roles on this world; `actor` is also the reference's layout, `reward` the critic's.

    Args:
        config: PPO's constants.
        actor: None is a single rank.
        reward: None is a single rank.
        reference_seed: Another one than the actor's makes the KL differ from zero.
        sampling: How responses are sampled.
        dtype: Of all roles.
        optimizer: Of actor and critic.
        seed: Of sampling and shuffling.
        rows: Rows of a micro-batch.
        generation_tensor: Tensor degree the actor generates with; None is its training degree.
        timers: Where the phases are measured; None makes new ones.
        measures: What leaves the device for generation; None is nothing.
        logprob_backend: Who computes the log-probabilities.
    """
    layouts = {actor or ParallelLayout(), reward or ParallelLayout()}
    groups = {layout: groups_of(layout) for layout in sorted(layouts, key=str)}
    policy_groups = groups[actor or ParallelLayout()]
    score_groups = groups[reward or ParallelLayout()]
    policy = opt_model(policy_groups, Head.LANGUAGE_MODEL, dtype=dtype)

    def train_engine(model: OptModel) -> TrainEngine:
        return TrainEngine(
            model, micro_batch_rows=rows, optimizer=optimizer, total_steps=100, seed=seed
        )

    def forward_engine(model: OptModel) -> ForwardEngine:
        return ForwardEngine(model, micro_batch_rows=rows)

    engine = RLHFEngine(
        actor=HybridEngine(
            policy,
            HybridSettings(
                generation_tensor=generation_tensor or policy_groups.layout.tensor,
                micro_batch_rows=rows,
                optimizer=optimizer,
                total_steps=100,
                seed=seed,
                generation=GenerationConfig(kv_cache_gb=0.01, block_size=8),
                measures=measures or MemoryMeasures(),
            ),
            stop_ids=STOPS,
            suppressed_ids=(PAD,),
        ),
        critic=train_engine(opt_model(score_groups, Head.SCALAR, dtype=dtype)),
        reference=forward_engine(
            opt_model(policy_groups, Head.LANGUAGE_MODEL, seed=reference_seed, dtype=dtype)
        ),
        reward=forward_engine(opt_model(score_groups, Head.SCALAR, dtype=dtype)),
        measures=measures or MemoryMeasures(),
        logprob_backend=logprob_backend,
    )
    return PPOTrainer(
        engine, config=config, sampling=sampling, seed=seed, timers=timers or PhaseTimers()
    )


@torch.no_grad()
def prefer(model: OptModel, tokens: Sequence[int]) -> None:
    """Makes a reward model like rows in proportion to the share of some tokens in them.

    Every head attends to all positions alike and hands the mean embedding on; the MLPs do nothing;
    good tokens have one embedding and all others its opposite. What the positions add, at right
    angles to both, keeps the final norm from turning the share into its sign.
    """
    parameters: Mapping[str, Tensor] = model.parameters_by_spec()
    hidden, heads, head_dim = TINY.hidden, TINY.heads, TINY.head_dim
    taste = torch.cat([torch.ones(hidden // 2), -torch.ones(hidden // 2)])
    for name, parameter in parameters.items():
        if "norm" not in name:
            parameter.zero_()
    parameters["embedding.position.weight"][:] = 3 * torch.tensor([1.0, -1.0]).repeat(hidden // 2)
    words = -taste.repeat(parameters["embedding.word.weight"].shape[0], 1)
    words[list(tokens)] = taste
    parameters["embedding.word.weight"].copy_(words)
    for layer in range(TINY.layers):
        qkv = parameters[f"layers.{layer}.qkv.weight"].view(heads, 3, head_dim, hidden)
        qkv[:, 2].copy_(torch.eye(hidden).view(heads, head_dim, hidden))
        parameters[f"layers.{layer}.proj.weight"].copy_(4 * torch.eye(hidden))
    parameters["head.score.weight"].copy_(taste[None] / hidden)


def own_weights(model: OptModel) -> dict[str, tuple[tuple[slice, ...], Tensor]]:
    """Where this rank's parameters lie in the whole model, and what they are."""
    specs = model.local_specs()
    return {
        specs[name].name: (model.local_slices(specs[name]), parameter.detach().clone())
        for name, parameter in model.named_parameters()
    }


def fields_of(record: Batch) -> dict[str, Tensor]:
    """The tensors of a batch record by name."""
    return {field.name: getattr(record, field.name) for field in fields(record)}
