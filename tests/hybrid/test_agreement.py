"""The flagship: what paged decode says about a token is what training says about it.

For every pair of layouts, over ragged prompts, responses that end early, equal prompts that share
their blocks, two samples of each prompt, and a cache so small that sequences are preempted and
computed again. In fp32 the tokens themselves are those of one rank with room for everything; the
CPU kernels, and the CUDA kernels on their emulator, answer with the tokens of plain torch. With
kernels of CUDA, a tensor group sums through memory that its ranks have mapped.
"""

import contextlib

import pytest
import torch

from megachat.ops.registry import Backend
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.harness.pairwise import pairwise
from tests.hybrid.tasks import (
    FP32_GAP,
    MOST_REPLICAS,
    OF_A_GPU,
    SAMPLES,
    SMALL,
    Case,
    Outcome,
    Task,
    answers_of,
    bf16_deviation,
    build,
    few_blocks,
    outcome_of,
    prompts_of,
    reference_of,
)
from tests.kernels.emulated import KernelCalls, emulated_cuda

PAIRS: dict[int, tuple[tuple[ParallelLayout, int], ...]] = {
    2: ((ParallelLayout(tensor=2), 1), (ParallelLayout(tensor=2), 2)),
    4: (
        (ParallelLayout(tensor=2, pipeline=2), 2),
        (ParallelLayout(tensor=2, pipeline=2), 4),
        (ParallelLayout(pipeline=2, data=2), 4),
        (ParallelLayout(data=4), 1),
    ),
    8: (
        (ParallelLayout(tensor=4, pipeline=2), 2),
        (ParallelLayout(tensor=2, pipeline=2, data=2), 2),
        (ParallelLayout(tensor=2, pipeline=2, data=2), 1),
        (ParallelLayout(tensor=4, data=2), 2),
    ),
}
TASKS = {Backend.REFERENCE: SMALL, Backend.CPU: SMALL, Backend.CUDA: OF_A_GPU}


def _cases(world_size: int) -> list[Case]:
    """Every pair of layouts with both norm orders and both dtypes, half of each with half."""
    dtypes = (torch.float32, torch.bfloat16)
    rows = pairwise(PAIRS[world_size], range(len(SMALL.configs)), dtypes)
    return [(number, pair, dtype) for pair, number, dtype in rows]


def _outcomes(world_size: int, backend: Backend) -> list[Outcome]:
    """All cases, with little memory."""
    task, outcomes = TASKS[backend], []
    with emulated_cuda() if backend is Backend.CUDA else contextlib.nullcontext():
        for case in _cases(world_size):
            layout, degree = case[1]
            replicas = layout.world_size // degree
            prompts = prompts_of(task, replicas)
            few = few_blocks(task, prompts, replicas)
            hybrid = build(task, case, num_blocks=few, backend=backend)
            if backend is not Backend.CUDA:
                outcomes.append(outcome_of(hybrid, prompts))
                continue
            with KernelCalls() as calls:
                outcomes.append(outcome_of(hybrid, prompts))
            assert (calls.counts["all_reduce"] > 0) is (degree > 1), case
    return outcomes


@pytest.mark.parametrize(
    ("world_size", "backend"),
    [
        *((size, Backend.REFERENCE) for size in PAIRS),
        (2, Backend.CPU),
        (4, Backend.CPU),
        (2, Backend.CUDA),
    ],
)
def test_paged_decode_says_what_training_recomputes_for_every_pair_of_layouts(
    world_size: int, backend: Backend
) -> None:
    single, configs = reference_of(TASKS[backend]), TASKS[backend].configs
    ranks = run_ranks(world_size, _outcomes, world_size, backend)
    for (number, pair, dtype), *outcomes in zip(_cases(world_size), *ranks, strict=True):
        reference, title = single[number], (configs[number].layer_norm_first, dtype, pair)
        deviation = bf16_deviation(configs[number], reference.largest_logit)
        assert sum(o.statistics.preemptions for o in outcomes if o.statistics) > 0, title
        for outcome in outcomes:
            largest, mean = outcome.gaps.max().item(), outcome.gaps.mean().item()
            if dtype is torch.bfloat16:  # some hundred tokens: five deviations hold them all
                assert largest <= 5 * deviation and mean <= deviation, title
                continue
            assert largest <= FP32_GAP, title
            rows = outcome.rollout.num_rows
            assert answers_of(outcome.rollout) == answers_of(reference.rollout)[:rows], title


@pytest.mark.parametrize("task", [SMALL, OF_A_GPU], ids=["small", "of a GPU"])
def test_the_cases_are_ragged_shared_and_end_early(task: Task) -> None:
    """What the reference run shows of the prompts that the layouts answer."""
    lengths = prompts_of(task, MOST_REPLICAS).lengths
    shared = MOST_REPLICAS * ((task.equal - 1) // task.block_size * task.block_size)
    for outcome in reference_of(task):
        statistics, rollout = outcome.statistics, outcome.rollout
        assert statistics is not None and statistics.preemptions == 0
        assert statistics.prefill_tokens == int(lengths.sum()) - shared
        assert outcome.gaps.max().item() <= FP32_GAP
        few = rollout.select(torch.arange(SAMPLES * (len(task.ragged) + 2)))  # of a single replica
        assert {True, False} == set(few.finished.tolist())
        assert len(few.response_lengths.unique()) >= 4
        answers = answers_of(few)
        assert all(a != b for a, b in zip(answers[::2], answers[1::2], strict=True))
