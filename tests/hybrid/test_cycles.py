"""Twenty cycles of generation and training against an oracle that keeps two separate models.

Each cycle trains on what it has just generated, so a generation weight that lags or differs shows
in every later loss.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from megachat.generation.blocks import BlockAllocator
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.generator import Generator
from megachat.hybrid.engine import HybridEngine, HybridSettings
from megachat.model.config import Head, ModelOptions, OptConfig, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch, Rollout, SftBatch
from megachat.rlhf.objectives import SftObjective
from megachat.training.engine import TrainEngine
from megachat.training.schedules import OptimizerConfig, ScheduleKind
from tests.harness import run_ranks
from tests.harness.weights import whole_weights

CONFIG = OptConfig(
    vocab_size=150, max_positions=24, hidden=32, ffn=64, layers=2, heads=4, embed_dim=16,
    init_std=0.2, layer_norm_first=False,
)  # fmt: skip
TRAIN, GENERATE = ParallelLayout(tensor=2, pipeline=2), ParallelLayout(tensor=1, data=4)
MULTIPLE = vocab_multiple_for(TRAIN.tensor, GENERATE.tensor)
OPTIMIZER = OptimizerConfig(
    learning_rate=2e-3, schedule=ScheduleKind.CONSTANT, epsilon=1e-3, clip_norm=0.0
)
"""Nothing is clipped: the norm is the one number that depends on how parameters are grouped."""
GENERATION = GenerationConfig(kv_cache_gb=1e-4, block_size=4, max_sequences=8)
SAMPLING = SamplingConfig(max_new_tokens=5)
STOPS = (2, *range(120, 130))
CYCLES = 20


@dataclass
class Audits:
    """What the allocators of a run said when their work was over."""

    leaks: list[int] = field(default_factory=list)
    """Blocks that were not free at the end of each session."""

    def watching(self) -> AbstractContextManager[Any]:
        """Looks on at every audit."""
        original, leaks = BlockAllocator.audit, self.leaks

        def audit(allocator: BlockAllocator, held: Sequence[Sequence[int]]) -> None:
            original(allocator, held)
            leaks.append(allocator.num_blocks - allocator.num_free)

        return patch.object(BlockAllocator, "audit", audit)


def _model(groups: ProcessGroups, *, seed: int | None) -> OptModel:
    return OptModel(
        CONFIG,
        groups=groups,
        head=Head.LANGUAGE_MODEL,
        options=ModelOptions(dtype=torch.float32, vocab_multiple=MULTIPLE),
        seed=seed,
    )


def _prompts(cycle: int) -> PromptBatch:
    random = torch.Generator().manual_seed(cycle)
    return PromptBatch(
        tokens=torch.randint(3, 150, (8, 9), generator=random),
        lengths=torch.randint(1, 10, (8,), generator=random),
        ids=torch.arange(8) + 8 * cycle,
    )


def _train(engine: TrainEngine, rollout: Rollout) -> float:
    """A step on a rollout's responses."""
    columns = torch.arange(rollout.tokens.shape[1])
    inside = columns < rollout.lengths[:, None]
    batch = SftBatch(
        tokens=rollout.tokens,
        lengths=rollout.lengths,
        loss_mask=inside & (columns >= rollout.prompt_lengths[:, None]),
    )
    loss = SftObjective.for_batch(batch, group=engine.groups.tensor, vocab_start=engine.vocab_start)
    report = engine.forward_backward(batch, loss)
    engine.step()
    return report.loss


@dataclass
class Separate:
    """The oracle: a model that trains, and another one that whole parameters are copied into."""

    engine: TrainEngine
    copy: OptModel
    generator: Generator

    @classmethod
    def build(cls, groups: ProcessGroups) -> "Separate":
        copy = _model(ProcessGroups.create(GENERATE), seed=None)
        return cls(
            engine=TrainEngine(
                _model(groups, seed=3),
                micro_batch_rows=4,
                optimizer=OPTIMIZER,
                total_steps=CYCLES,
                seed=0,
            ),
            copy=copy,
            generator=Generator(copy, stop_ids=STOPS, suppressed_ids=(1,), config=GENERATION),
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Puts the whole parameters together from all ranks' shards and copies them."""
        wholes = whole_weights(self.engine.model)
        for name, parameter in self.copy.parameters_by_spec().items():
            parameter.copy_(wholes[name])


def _cycles() -> list[str]:
    """Everything that differs from the oracle or is left over."""
    groups, audits, problems = ProcessGroups.create(TRAIN), Audits(), list[str]()
    hybrid = HybridEngine(
        _model(groups, seed=3),
        HybridSettings(
            generation_tensor=GENERATE.tensor,
            micro_batch_rows=4,
            optimizer=OPTIMIZER,
            total_steps=CYCLES,
            seed=0,
            generation=GENERATION,
        ),
        stop_ids=STOPS,
        suppressed_ids=(1,),
    )
    separate = Separate.build(groups)
    losses = []
    for cycle in range(CYCLES):
        with audits.watching(), hybrid.generation() as generator:
            found = generator.generate(_prompts(cycle), sampling=SAMPLING, seed=cycle)
            used = generator.cache.resident_bytes
        if not used or generator.cache.resident_bytes:
            problems.append(f"{cycle}: {used} cache bytes, {generator.cache.resident_bytes} later")
        separate.refresh()
        expected = separate.generator.generate(_prompts(cycle), sampling=SAMPLING, seed=cycle)
        if not torch.equal(found.tokens, expected.tokens):
            problems.append(f"{cycle}: other answers")
        losses.append(_train(hybrid.training, found))
        oracle = _train(separate.engine, expected)
        if losses[-1] != oracle:
            problems.append(f"{cycle}: loss {losses[-1]}, oracle {oracle}")
    if len(audits.leaks) != CYCLES or any(audits.leaks):
        problems.append(f"blocks not free at the ends of sessions: {audits.leaks}")
    if len(set(losses)) < CYCLES or not min(losses[-5:]) < max(losses[:5]):
        problems.append(f"no training: {losses}")
    return problems


def test_twenty_cycles_equal_two_separate_models_and_leave_no_block() -> None:
    assert run_ranks(TRAIN.world_size, _cycles) == [[]] * TRAIN.world_size
