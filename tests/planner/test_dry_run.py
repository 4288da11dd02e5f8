"""The plan against the production classes, instantiated for any rank of a large job.

Rehearsals run in processes of their own: each joins a world of its own that does not exist.
"""

import contextlib
import multiprocessing as mp
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace

import pytest

from megachat.model.config import Head, OptConfig, Recompute, vocab_multiple_for
from megachat.parallel.layout import ParallelLayout
from megachat.planner.hardware import cluster_config
from megachat.planner.job import Job, Workload
from megachat.planner.sizes import stage_elements
from megachat.planner.transients import training_transients
from tests.planner.jobs import job, role
from tools.dry_run import Comparison, RehearsedBytes, compare, rehearse, rehearse_critic

ALLOWED = 0.01
"""Largest difference between a planned and a rehearsed pool, as a part of it."""

LARGE = {
    (layout, rank): count
    for layout, ranks in (((8, 8, 1), (0, 27, 63)), ((8, 4, 2), (0, 27, 63)))
    for rank, count in zip(ranks, (1, 3 if layout == (8, 8, 1) else 1, 1), strict=True)
}
"""(Layout, rank) of OPT-175B on 64 ranks -> micro-batches to run: first, middle and last stage."""

TOY = OptConfig(
    vocab_size=5000, max_positions=300, hidden=256, ffn=1024, layers=4, heads=8, embed_dim=256
)


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    with ProcessPoolExecutor(max_workers=2, mp_context=context) as executor:
        yield executor


@pytest.fixture(scope="module")
def large(
    pool: ProcessPoolExecutor,
) -> dict[tuple[tuple[int, int, int], int], Future[list[Comparison]]]:
    """All rehearsals of OPT-175B, under way."""
    cluster = cluster_config(nodes=8)
    return {
        (layout, rank): pool.submit(
            compare, sft_job("175b", layout, generate=8, count=count), cluster, rank=rank
        )
        for (layout, rank), count in LARGE.items()
    }


def sft_job(
    size: str, layout: tuple[int, int, int], *, generate: int, count: int, **how: object
) -> Job:
    """A job whose fine-tuning has a number of micro-batches of 2 x 512 tokens."""
    work = Workload(sft_rows=2 * count * layout[2], sft_tokens=512)
    return job(size, *layout, generate=generate, workload=work, **how)


def toy_job(layout: ParallelLayout, *, generate: int, count: int, **how: object) -> Job:
    """The same of a small model."""
    base = sft_job("125m", (1, layout.pipeline, layout.data), generate=1, count=count, **how)
    actor = replace(
        base.actor,
        config=TOY,
        layout=layout,
        vocab_multiple=vocab_multiple_for(layout.tensor, generate),
    )
    critic = replace(
        base.critic,
        config=TOY,
        layout=ParallelLayout(data=layout.world_size),
    )
    work = replace(base.workload, sft_tokens=64, prompt_tokens=32, response_tokens=32, prompts=16)
    return replace(base, actor=actor, critic=critic, generation_tensor=generate, workload=work)


@pytest.mark.parametrize(("layout", "rank"), list(LARGE))
def test_every_pool_of_opt_175b_is_as_planned(
    large: dict[tuple[tuple[int, int, int], int], Future[list[Comparison]]],
    layout: tuple[int, int, int],
    rank: int,
) -> None:
    rows = large[layout, rank].result(timeout=500)
    assert {"parameters", "arena", "kv cache", "gradients", "masters", "moments"} < {
        row.pool for row in rows
    }
    for row in rows:
        assert abs(row.difference) <= ALLOWED, row


@pytest.mark.parametrize(
    ("layout", "generate", "rank", "how"),
    [
        (ParallelLayout(tensor=2, pipeline=2, data=2), 2, 0, {}),
        (ParallelLayout(tensor=2, pipeline=2, data=2), 4, 7, {"sequence_parallel": False}),
        (ParallelLayout(tensor=4, pipeline=1, data=2), 2, 3, {"recompute": Recompute.FULL}),
        (ParallelLayout(tensor=1, pipeline=4, data=1), 1, 1, {"recompute": Recompute.FULL}),
        (ParallelLayout(tensor=1, pipeline=1, data=8), 4, 5, {}),
    ],
    ids=str,
)
def test_other_layouts_and_options_are_as_planned(
    pool: ProcessPoolExecutor,
    layout: ParallelLayout,
    generate: int,
    rank: int,
    how: dict[str, object],
) -> None:
    small = toy_job(layout, generate=generate, count=5, **how)
    cluster = cluster_config(gpus_per_node=layout.world_size)
    for row in pool.submit(compare, small, cluster, rank=rank).result(timeout=200):
        assert abs(row.difference) <= 0.01, row


def test_fake_and_real_tensors_count_the_same(pool: ProcessPoolExecutor) -> None:
    small = toy_job(ParallelLayout(tensor=2, pipeline=2, data=2), generate=2, count=3)
    fake = pool.submit(rehearse, small, rank=0)
    real = pool.submit(rehearse, small, rank=0, tensors=contextlib.nullcontext)
    assert fake.result(timeout=200) == real.result(timeout=200)


def test_a_skipped_step_would_be_noticed(pool: ProcessPoolExecutor) -> None:
    """Moments exist once a step was taken: the answers given for missing values allow it."""
    small = toy_job(ParallelLayout(data=2), generate=1, count=1)
    rehearsed: RehearsedBytes = pool.submit(rehearse, small, rank=1).result(timeout=200)
    assert rehearsed.moments > 0
    assert 0 < len(rehearsed.reads) <= 4


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_critic_is_as_planned(pool: ProcessPoolExecutor, pipeline: int) -> None:
    """OPT-350M's shape with few layers: post-LN, projections, a scalar head, pairs."""
    setup = role("350m", 2, pipeline, 2, head=Head.SCALAR)
    setup = replace(setup, config=replace(setup.config, layers=4))
    pairs, tokens = 4 * 3, 256
    future = pool.submit(rehearse_critic, setup, rank=0, pairs=pairs, tokens=tokens)
    elements = stage_elements(setup, stage=0).total
    planned = training_transients(
        setup,
        stage=0,
        rows=2 * setup.rows_at_once(pairs),
        tokens=tokens,
        num_micro_batches=setup.num_micro_batches(pairs),
    )
    found = future.result(timeout=200)
    assert found.parameters == 2 * elements
    assert found.gradients == pytest.approx(4 * elements, rel=ALLOWED)
    assert found.moments == pytest.approx(4 * elements, rel=ALLOWED)
    assert found.transient_peak == pytest.approx(planned.total, rel=ALLOWED)
