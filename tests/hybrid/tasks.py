"""What the tests of agreement generate, on CPUs and on a GPU: models, prompts, memory, outcomes.

Ragged prompts, responses that end early, equal prompts that share their blocks, two samples of each
prompt, and a cache so small that sequences are preempted and computed again.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.kv_cache import block_bytes
from megachat.generation.session import SessionStatistics
from megachat.hybrid.engine import HybridEngine, HybridSettings
from megachat.hybrid.phases import MemoryMeasures
from megachat.model.config import Head, ModelOptions, OptConfig, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch, Rollout
from megachat.rlhf.scoring import ResponseLogprobs
from megachat.training.schedules import OptimizerConfig
from tests.harness import run_ranks
from tests.harness.groups import groups_of

PRE_LN = OptConfig(
    vocab_size=150, max_positions=24, hidden=32, ffn=64, layers=2, heads=4, embed_dim=32,
    init_std=0.2,
)  # fmt: skip
POST_LN = replace(PRE_LN, embed_dim=16, layer_norm_first=False)
SINGLE = (ParallelLayout(), 1)
NEW_TOKENS, SAMPLES, MOST_REPLICAS = 8, 2, 8
LARGE = 1000
"""Blocks of a cache that holds everything."""
STOPS = (2, *range(120, 130))
"""A fourteenth of the vocabulary, so that some responses end early."""
KEEP_ALL = MemoryMeasures()
FP32_GAP = 1e-5
BF16_ROUNDING = 2.0**-9
"""Largest relative error of rounding to bf16."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Models and prompts."""

    configs: tuple[OptConfig, ...]
    block_size: int
    ragged: tuple[int, ...]
    """Lengths of the prompts that are all different."""
    equal: int
    """Length of those that are all one."""
    smallest: int
    """Blocks that the longest prompt and its answer fill."""
    blocks_each: int
    """For every sequence, in a cache with little memory: too few for all at once."""


SMALL = Task(
    configs=(PRE_LN, POST_LN),
    block_size=2,
    ragged=(3, 12, 1, 6, 11),
    equal=9,
    smallest=10,
    blocks_each=3,
)
OF_A_GPU = Task(
    configs=tuple(
        replace(config, hidden=128, heads=2, max_positions=48, embed_dim=embed_dim, init_std=0.1)
        for config, embed_dim in ((PRE_LN, 128), (POST_LN, 32))
    ),
    block_size=16,
    ragged=(14, 38, 1, 30, 15),
    equal=31,
    smallest=3,
    blocks_each=1,
)
"""Heads and blocks of sizes for which there are CUDA kernels; with weights that are smaller by the
root of how much wider they are, so that logits are as large and roundings of them as small."""


Case = tuple[int, tuple[ParallelLayout, int], torch.dtype]
"""Architecture, pair of layouts, dtype."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One generation phase, and what the training layout makes of its tokens."""

    rollout: Rollout
    gaps: Tensor
    """[tokens], absolute differences of the log-probs of all response tokens."""
    statistics: SessionStatistics | None
    """Of this rank's share."""
    largest_logit: float = 0.0
    """Of the single rank alone."""


def prompts_of(task: Task, replicas: int) -> PromptBatch:
    """Ragged prompts, and equal ones so many that some replica is dealt two of them."""
    ragged = task.ragged
    lengths = torch.tensor([*ragged, *[task.equal] * (replicas + 1)])
    generator = torch.Generator().manual_seed(0)
    shape = len(ragged) + MOST_REPLICAS + 1, max(ragged)
    tokens = torch.randint(3, 150, shape, generator=generator)[: len(lengths)]
    tokens[len(ragged) :] = tokens[len(ragged)]
    return PromptBatch(tokens=tokens, lengths=lengths, ids=torch.arange(len(lengths)) + 40)


def few_blocks(task: Task, prompts: PromptBatch, replicas: int) -> int:
    """A cache with too little room for all samples of a replica's prompts at once."""
    sequences = SAMPLES * prompts.num_rows // replicas
    return max(task.smallest, task.blocks_each * sequences)


def build(
    task: Task,
    case: Case,
    *,
    num_blocks: int,
    backend: Backend = Backend.REFERENCE,
    graphs: bool = True,
    measures: MemoryMeasures = KEEP_ALL,
) -> HybridEngine:
    number, (layout, degree), dtype = case
    config = task.configs[number]
    model = OptModel(
        config,
        groups=groups_of(layout),
        head=Head.LANGUAGE_MODEL,
        options=ModelOptions(dtype=dtype, vocab_multiple=vocab_multiple_for(layout.tensor, degree)),
        seed=3,
    )
    size = block_bytes(config, tensor=degree, block_size=task.block_size, dtype=dtype)
    settings = HybridSettings(
        generation_tensor=degree,
        micro_batch_rows=8,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        total_steps=1,
        seed=0,
        measures=measures,
        generation=GenerationConfig(
            kv_cache_gb=(num_blocks + 0.5) * size / 1e9,
            block_size=task.block_size,
            max_sequences=32,
            backend=backend,
            graphs=graphs,
        ),
    )
    return HybridEngine(model, settings, stop_ids=STOPS, suppressed_ids=(1,))


def outcome_of(hybrid: HybridEngine, prompts: PromptBatch) -> Outcome:
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
    with hybrid.generation() as generator:
        rollout = generator.generate(prompts, sampling=sampling, seed=5, num_samples=SAMPLES)
        statistics = generator.statistics
    score = ResponseLogprobs(
        response_len=rollout.logprobs.shape[1],
        temperature=1.0,
        group=hybrid.training.groups.tensor,
        vocab_start=hybrid.training.vocab_start,
    )
    gaps = (hybrid.training.score(rollout, score) - rollout.logprobs).abs()
    return Outcome(rollout=rollout, gaps=gaps[rollout.response_mask], statistics=statistics)


@torch.no_grad()
def _single(task: Task) -> list[Outcome]:
    """Both architectures in fp32 on one rank, all prompts at once in a cache that holds them."""
    outcomes = []
    for number, config in enumerate(task.configs):
        hybrid = build(task, (number, SINGLE, torch.float32), num_blocks=LARGE)
        outcome = outcome_of(hybrid, prompts_of(task, MOST_REPLICAS))
        logits = hybrid.training.model.eval()(outcome.rollout.tokens)[..., : config.vocab_size]
        outcomes.append(replace(outcome, largest_logit=logits.abs().max().item()))
    return outcomes


@functools.cache
def reference_of(task: Task) -> list[Outcome]:
    """What one rank makes of a task with plain torch, by architecture."""
    outcomes: list[Outcome] = run_ranks(1, _single, task)[0]
    return outcomes


def answers_of(rollout: Rollout) -> list[list[int]]:
    ends = zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths, strict=True)
    return [row[start:end].tolist() for row, start, end in ends]


def bf16_deviation(config: OptConfig, largest_logit: float) -> float:
    """Standard deviation of the difference of two bf16 evaluations of one log-prob, from above.

    A layer rounds nine times (two norms, query-key-value, attention, projection, two products of
    the MLP, the residual stream twice), the head twice. A rounding is uniform within a relative
    2^-9, of standard deviation 2^-9 / sqrt(3); independent ones add in squares, and move a logit by
    that share of the largest one. Two paths, and a logit against its normaliser: twice sqrt(2).
    """
    roundings = 9 * config.layers + 2
    return 2 * largest_logit * BF16_ROUNDING / math.sqrt(3) * math.sqrt(roundings)
