"""Memory that leaves training for a generation phase: bit-equal results, bytes as planned."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from megachat.errors import PhaseError
from megachat.hybrid.engine import HybridEngine
from megachat.hybrid.phases import MemoryMeasures, Phase
from megachat.parallel.layout import ParallelLayout
from megachat.records import SftBatch
from megachat.rlhf.objectives import SftObjective
from megachat.rlhf.scoring import ResponseLogprobs
from tests.harness import run_ranks
from tests.hybrid.test_engine import (
    POST_LN,
    PRE_LN,
    SAMPLING,
    build,
    prompts,
    sft_batch,
    train_step,
)

ALL = MemoryMeasures(
    offload_optimizer=True, reuse_gradients=True, offload_critic=True, offload_scorers=True
)
NONE = MemoryMeasures()
DTYPES = (torch.float32, torch.bfloat16)

Pair = tuple[ParallelLayout, int]
PAIRS: dict[int, tuple[Pair, ...]] = {
    1: ((ParallelLayout(), 1),),
    2: ((ParallelLayout(tensor=2), 1), (ParallelLayout(data=2), 2)),
    4: ((ParallelLayout(tensor=2, pipeline=2), 1),),
}


def _cycles(pair: Pair, dtype: torch.dtype, measures: MemoryMeasures) -> list[Any]:
    """Two rounds of generation and training: all tokens, losses and final weights."""
    hybrid = build(POST_LN, *pair, dtype, measures=measures)
    seen: list[Any] = []
    for step in range(2):
        with hybrid.generation() as generator:
            seen.append(generator.generate(prompts(), sampling=SAMPLING, seed=step).tokens)
        seen.append(torch.tensor(train_step(hybrid.training, step), dtype=torch.float64))
    return [*seen, *(weight.detach().clone() for weight in hybrid.training.model.parameters())]


def _same_with_and_without(pairs: tuple[Pair, ...]) -> None:
    for pair in pairs:
        for dtype in DTYPES:
            plain, moved = (_cycles(pair, dtype, measures) for measures in (NONE, ALL))
            assert all(map(torch.equal, plain, moved)), (pair, dtype)


@pytest.mark.parametrize("world_size", PAIRS)
def test_training_is_bitwise_the_same_whatever_leaves_the_device(world_size: int) -> None:
    run_ranks(world_size, _same_with_and_without, PAIRS[world_size])


def _bytes_of_phases(layout: ParallelLayout, dtype: torch.dtype) -> dict[str, int]:
    """What a generation phase frees before and after the first step, and the shard's elements."""
    hybrid = build(PRE_LN, layout, layout.tensor, dtype, measures=ALL)
    found = {"elements": sum(p.numel() for p in hybrid.training.model.parameters())}
    for name in ("before", "after"):
        hybrid.eval()
        found[f"{name} offloaded"] = hybrid.last_pause.offloaded_bytes
        found[f"{name} lent"] = hybrid.last_pause.lent_bytes
        hybrid.train()
        train_step(hybrid.training, 0)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("data", [1, 2])
def test_what_leaves_is_the_fp32_state_and_the_gradients_of_bf16_training(
    data: int, dtype: torch.dtype
) -> None:
    """4 bytes an element for masters, 8 for moments, over the data ranks; 4 for gradients.

    Flat buffers are padded to two elements for each data rank, and there are 38 of them.
    """
    for found in run_ranks(data, _bytes_of_phases, ParallelLayout(data=data), dtype):
        elements, padding = found["elements"], 38 * 2 * data
        share = elements / data
        assert share * 4 <= found["before offloaded"] <= (share + padding) * 4
        assert share * 12 <= found["after offloaded"] <= (share + padding) * 12
        for name in ("before lent", "after lent"):
            if dtype is torch.bfloat16:
                assert elements * 4 <= found[name] <= (elements + padding) * 4
            else:
                assert found[name] == 0


def _refusal(action: Callable[[], Any]) -> str:
    with pytest.raises(PhaseError) as caught:
        action()
    return str(caught.value)


def _faults() -> list[str]:
    """Training while its memory is away, a phase change in the middle of a step, a failed phase."""
    hybrid = build(PRE_LN, ParallelLayout(data=2), 1, torch.bfloat16, measures=ALL)
    train_step(hybrid.training, 0)
    hybrid.eval()
    messages = [_refusal(partial(train_step, hybrid.training, 1))]
    hybrid.train()
    _backward(hybrid, sft_batch(1))
    messages.append(_refusal(hybrid.eval))
    hybrid.training.step()
    assert hybrid.phase is Phase.TRAINING
    with pytest.raises(RuntimeError, match="in the middle"), hybrid.generation():
        raise RuntimeError("in the middle")
    losses = [train_step(hybrid.training, step) for step in (2, 3)]
    undisturbed = build(PRE_LN, ParallelLayout(data=2), 1, torch.bfloat16)
    assert losses == [train_step(undisturbed.training, step) for step in range(4)][2:]
    return messages


def _backward(hybrid: HybridEngine, batch: SftBatch) -> None:
    engine = hybrid.training
    loss = SftObjective.for_batch(batch, group=engine.groups.tensor, vocab_start=engine.vocab_start)
    engine.forward_backward(batch, loss)


def test_training_is_refused_while_its_memory_is_away_and_survives_a_failed_phase() -> None:
    for messages in run_ranks(2, _faults):
        assert "call train() first" in messages[0]
        assert "call step() before" in messages[1]


def _scores_during_generation() -> None:
    """Scoring needs weights alone: it goes on while the optimizer's memory is away."""
    hybrid = build(replace(PRE_LN, layers=2), ParallelLayout(tensor=2), 1, DTYPES[1], measures=ALL)
    with hybrid.generation() as generator:
        rollout = generator.generate(prompts(), sampling=SAMPLING, seed=0)
        score = ResponseLogprobs(
            response_len=rollout.logprobs.shape[1],
            temperature=1.0,
            group=hybrid.training.groups.tensor,
            vocab_start=hybrid.training.vocab_start,
        )
        inside = hybrid.training.score(rollout, score)
    assert torch.equal(inside, hybrid.training.score(rollout, score))


def test_the_actor_scores_while_the_optimizers_memory_is_away() -> None:
    run_ranks(2, _scores_during_generation)
