"""What the started ranks of the failure tests do.

Rank 1 fails in the middle of something that the other rank goes on with and would wait in for ever.
"""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megachat.errors import CapacityError
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.hybrid.engine import HybridEngine, HybridSettings
from megachat.model.config import Head, ModelOptions, OptConfig, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.parallel.groups import GenerationGroups, ProcessGroups
from megachat.parallel.launch import Worker
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch, SftBatch
from megachat.reshard.execute import Resharder
from megachat.rlhf.objectives import SftObjective
from megachat.training.loss import LossTerms, ModelOutput
from megachat.training.schedules import OptimizerConfig

CONFIG = OptConfig(
    vocab_size=150, max_positions=24, hidden=32, ffn=64, layers=4, heads=4, embed_dim=32
)
CAPACITY = "a sequence of 9 tokens needs 3 blocks, 2 are free: raise kv_cache_gb above 0.5"
ROWS, SEQ = 8, 9


def in_generation(worker: Worker, folder: Path) -> None:
    """A MegachatError after three tokens; both ranks share every layer of the model."""
    with _actor(ParallelLayout(tensor=2), generate=2).generation() as generator:
        prompts = PromptBatch(
            tokens=torch.full((ROWS, SEQ), 5),
            lengths=torch.arange(1, ROWS + 1),
            ids=torch.arange(ROWS),
        )
        sampling = SamplingConfig(max_new_tokens=12)
        for count, _ in enumerate(generator.stream(prompts, sampling=sampling, seed=0)):
            if worker.rank == 1 and count == 3:
                _note(folder)
                raise CapacityError(CAPACITY)
    raise AssertionError("half a model cannot answer")


def in_reshard(worker: Worker, folder: Path) -> None:
    """A kill after two of the blocks of a gather; the other rank waits for the third."""
    actor = _actor(ParallelLayout(pipeline=2), generate=1)
    groups = GenerationGroups.create(actor.arena.plan.placement, training=actor.training.groups)
    for count, _ in enumerate(Resharder(actor.arena, groups).stream()):
        if worker.rank == 1 and count == 1:
            _note(folder)
            os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    raise AssertionError("half of the weights are missing")


class _Breaking:
    """A loss that breaks at the third micro-batch."""

    def __init__(self, loss: SftObjective, folder: Path) -> None:
        self._loss, self._folder, self._calls = loss, folder, 0
        self.metric_names, self.maximum_names = loss.metric_names, loss.maximum_names
        self.model_input, self.row_lengths = loss.model_input, loss.row_lengths
        self.output_spans = loss.output_spans

    def __call__(self, output: ModelOutput, batch: SftBatch, row_weights: Tensor) -> LossTerms:
        self._calls += 1
        if self._calls == 3:
            _note(self._folder)
            raise KeyError("the third micro-batch")
        return self._loss(output, batch, row_weights)


def in_training(worker: Worker, folder: Path) -> None:
    """An unexpected error in the loss of the last stage, in the middle of 1F1B."""
    engine = _actor(ParallelLayout(pipeline=2), generate=1).training
    batch = SftBatch(
        tokens=torch.full((ROWS, SEQ), 5),
        lengths=torch.full((ROWS,), SEQ),
        loss_mask=torch.arange(SEQ).expand(ROWS, SEQ) > 0,
    )
    loss = SftObjective.for_batch(batch, group=engine.groups.tensor, vocab_start=engine.vocab_start)
    engine.forward_backward(batch, _Breaking(loss, folder))
    raise AssertionError("the first stage cannot finish without the last")


def _actor(layout: ParallelLayout, *, generate: int) -> HybridEngine:
    multiple = vocab_multiple_for(layout.tensor, generate)
    model = OptModel(
        CONFIG,
        groups=ProcessGroups.create(layout),
        head=Head.LANGUAGE_MODEL,
        options=ModelOptions(dtype=torch.float32, vocab_multiple=multiple),
        seed=1,
    )
    settings = HybridSettings(
        generation_tensor=generate,
        micro_batch_rows=1,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        total_steps=1,
        seed=0,
        generation=GenerationConfig(kv_cache_gb=1e-3, block_size=4),
    )
    return HybridEngine(model, settings, stop_ids=(2,))


def _note(folder: Path) -> None:
    """Leaves the time of the failure."""
    (folder / "failed").write_text(str(time.time()))
