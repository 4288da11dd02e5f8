"""The actor over phases: one set of weights, equal answers, equal training, no growth."""

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megachat.errors import LayoutError, PhaseError
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.hybrid.engine import HybridEngine, HybridSettings
from megachat.hybrid.memory import ActorMemory
from megachat.hybrid.phases import MemoryMeasures, Phase
from megachat.model.config import Head, ModelOptions, OptConfig, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch, SftBatch
from megachat.rlhf.objectives import SftObjective
from megachat.rlhf.scoring import ResponseLogprobs
from megachat.training.engine import TrainEngine
from megachat.training.schedules import OptimizerConfig, ScheduleKind
from tests.harness import RankError, run_ranks
from tests.harness.groups import groups_of

PRE_LN = OptConfig(
    vocab_size=150, max_positions=48, hidden=32, ffn=64, layers=4, heads=4, embed_dim=32,
    init_std=0.2,
)  # fmt: skip
POST_LN = replace(PRE_LN, embed_dim=16, layer_norm_first=False)
OPTIMIZER = OptimizerConfig(learning_rate=5e-3, schedule=ScheduleKind.CONSTANT, epsilon=1e-3)
SAMPLING = SamplingConfig(max_new_tokens=6)
STOPS = (2, *range(120, 130))
FP32_GAP = 1e-5
STEPS = 2

Pair = tuple[ParallelLayout, int]
TWO_RANKS: tuple[Pair, ...] = (
    (ParallelLayout(tensor=2), 1),
    (ParallelLayout(tensor=2), 2),
    (ParallelLayout(pipeline=2), 1),
    (ParallelLayout(data=2), 2),
)
FOUR_RANKS: tuple[Pair, ...] = (
    (ParallelLayout(tensor=2, pipeline=2), 1),
    (ParallelLayout(pipeline=2, data=2), 4),
)
EIGHT_RANKS: tuple[Pair, ...] = ((ParallelLayout(tensor=2, pipeline=2, data=2), 2),)
"""Every kind of move once; `test_agreement` goes through all pairs."""


def prompts() -> PromptBatch:
    lengths = torch.tensor([3, 9, 1, 6, 12, 6])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 150, (6, 12), generator=generator)
    tokens[5] = tokens[3]  # equal prompts share their blocks
    return PromptBatch(tokens=tokens, lengths=lengths, ids=torch.arange(6) + 40)


def sft_batch(step: int) -> SftBatch:
    generator = torch.Generator().manual_seed(100 + step)
    lengths = torch.randint(4, 13, (5,), generator=generator)
    tokens = torch.randint(3, 150, (5, 13), generator=generator)
    columns = torch.arange(13)
    return SftBatch(
        tokens=tokens, lengths=lengths, loss_mask=(columns > 0) & (columns < lengths[:, None])
    )


def build(
    config: OptConfig,
    layout: ParallelLayout,
    generation_tensor: int,
    dtype: torch.dtype,
    *,
    measures: MemoryMeasures | None = None,
    memory: ActorMemory | None = None,
) -> HybridEngine:
    multiple = vocab_multiple_for(layout.tensor, generation_tensor)
    model = OptModel(
        config,
        groups=groups_of(layout),
        head=Head.LANGUAGE_MODEL,
        options=ModelOptions(dtype=dtype, vocab_multiple=multiple),
        seed=3,
    )
    settings = HybridSettings(
        generation_tensor=generation_tensor,
        micro_batch_rows=2,
        optimizer=OPTIMIZER,
        total_steps=100,
        seed=0,
        generation=GenerationConfig(kv_cache_gb=4e-4, block_size=4, max_sequences=6),
        measures=measures or MemoryMeasures(),
    )
    return HybridEngine(model, settings, stop_ids=STOPS, suppressed_ids=(1,), memory=memory)


def train_step(engine: TrainEngine, step: int) -> float:
    batch = sft_batch(step)
    loss = SftObjective.for_batch(batch, group=engine.groups.tensor, vocab_start=engine.vocab_start)
    report = engine.forward_backward(batch, loss)
    engine.step()
    return report.loss


def cycle(config: OptConfig, pair: Pair, dtype: torch.dtype) -> dict[str, Any]:
    """Generate, train, and all of it again: answers, losses and the gap between the two paths."""
    layout, generation_tensor = pair
    hybrid = build(config, layout, generation_tensor, dtype)
    answers, losses, gaps, received = [], [], [], []
    for step in range(STEPS):
        with hybrid.generation() as generator:
            rollout = generator.generate(prompts(), sampling=SAMPLING, seed=step)
        score = ResponseLogprobs(
            response_len=rollout.logprobs.shape[1],
            temperature=1.0,
            group=hybrid.training.groups.tensor,
            vocab_start=hybrid.training.vocab_start,
        )
        recomputed = hybrid.training.score(rollout, score)
        gaps.append(float((recomputed - rollout.logprobs).abs().max()))
        answers.append(rollout.tokens.tolist())
        losses.append(train_step(hybrid.training, step))
        assert hybrid.last_reshard is not None
        received.append(hybrid.last_reshard.received_bytes)
    traffic = hybrid.arena.part.traffic
    return {
        "answers": answers,
        "losses": losses,
        "gap": max(gaps),
        "received": received,
        "bound": traffic.lower_bound,
        "redundant": traffic.redundant,
    }


def cycles(pairs: tuple[Pair, ...]) -> list[dict[str, Any]]:
    return [cycle(config, pair, torch.float32) for config in (PRE_LN, POST_LN) for pair in pairs]


def check(results: list[list[dict[str, Any]]], pairs: tuple[Pair, ...]) -> None:
    """Every layout pair gives the single rank's answers and losses, at the bound of bytes."""
    [single] = run_ranks(1, cycles, ((ParallelLayout(), 1),))
    expected = iter(reference for reference in single for _ in pairs)
    for index, (reference, *outcomes) in enumerate(zip(expected, *results, strict=True)):
        for outcome in outcomes:
            assert outcome["answers"] == reference["answers"], index
            assert outcome["losses"] == pytest.approx(reference["losses"], abs=2e-6)
            assert outcome["gap"] <= FP32_GAP
            assert outcome["received"] == [outcome["bound"]] * STEPS
            if pairs[index % len(pairs)][1] <= pairs[index % len(pairs)][0].tensor:
                assert outcome["redundant"] == 0


@pytest.mark.parametrize("pairs", [TWO_RANKS, FOUR_RANKS, EIGHT_RANKS], ids=["2", "4", "8"])
def test_answers_and_training_are_the_single_ranks(pairs: tuple[Pair, ...]) -> None:
    """Over phases in which the weights change."""
    world_size = pairs[0][0].world_size
    check(run_ranks(world_size, cycles, pairs), pairs)


def phases() -> None:
    hybrid = build(PRE_LN, ParallelLayout(tensor=2), 1, torch.float32)
    with pytest.raises(PhaseError, match="training"):
        _ = hybrid.generator
    hybrid.eval()
    generator = hybrid.generator
    first = hybrid.last_reshard
    assert first is not None and first.received_bytes > 0
    assert hybrid.eval().last_reshard is first, "nothing changed, nothing is gathered again"
    assert hybrid.train().phase is Phase.TRAINING
    train_step(hybrid.training, 0)
    hybrid.eval()
    assert hybrid.generator is generator
    generator.generate(prompts(), sampling=SAMPLING, seed=0)
    hybrid.train()
    assert generator.cache.resident_bytes == 0
    hybrid.eval()
    train_step(hybrid.training, 1)  # weights change while laid out for generation
    with pytest.raises(PhaseError, match="gather them again"):
        hybrid.arena.weights()


def test_phases_change_on_demand_and_stale_weights_are_refused() -> None:
    run_ranks(2, phases)


def many_cycles() -> list[int]:
    """Resident bytes of this process after each of 50 cycles, on a model large enough to see."""
    config = replace(PRE_LN, layers=1, hidden=128, ffn=512, embed_dim=128, vocab_size=4000)
    hybrid = build(config, ParallelLayout(tensor=2), 1, torch.float32)
    resident = []
    for step in range(50):
        with hybrid.generation() as generator:
            generator.generate(prompts(), sampling=SamplingConfig(max_new_tokens=2), seed=step)
        train_step(hybrid.training, 0)
        ctypes.CDLL(None).malloc_trim(0)  # what the C library merely keeps is no growth
        with open("/proc/self/statm", encoding="ascii") as file:
            resident.append(int(file.read().split()[1]) * 4096)
    dist.barrier()
    return resident


def test_fifty_cycles_do_not_grow() -> None:
    for resident in run_ranks(2, many_cycles):
        settled = resident[10:]
        assert max(settled) <= 1.01 * min(settled), [value >> 20 for value in resident]


def bad_degree() -> None:
    build(PRE_LN, ParallelLayout(tensor=2, data=2), 3, torch.float32)


def test_generation_degree_that_does_not_nest_is_refused_with_the_nearest() -> None:
    with pytest.raises(RankError, match=LayoutError.__name__ + ".*nearest"):
        run_ranks(4, bad_degree)
