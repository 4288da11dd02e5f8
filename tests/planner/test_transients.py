"""Activation counts against numbers measured on real and fake tensors.

The dry run itself, which compares whole ranks, is in `test_dry_run.py`.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.model.config import Head, Recompute
from megachat.planner.job import Job, Workload
from megachat.planner.transients import (
    generation_workspace,
    scoring_transients,
    training_transients,
)
from tests.planner.jobs import job, jobs, role

MIB = 2**20


@pytest.mark.parametrize(
    ("how", "measured"),
    [
        ({"sequence_parallel": False}, 1_510_646_786),
        ({"sequence_parallel": True}, 453_586_950),
        ({"sequence_parallel": False, "recompute": Recompute.FULL}, 302_007_302),
    ],
)
def test_what_a_micro_batch_of_opt_175b_keeps_is_what_was_measured(
    how: dict[str, object], measured: int
) -> None:
    """A middle stage of TP8 x PP8 with 2 rows of 512 tokens; measured on fake tensors."""
    setup = role("175b", 8, 8, 1, **how)
    one, two = (
        training_transients(setup, stage=3, rows=2, tokens=512, num_micro_batches=count)
        for count in (1, 2)
    )
    assert two.activations - one.activations == pytest.approx(measured, rel=1e-3)


def test_as_many_micro_batches_are_in_flight_as_stages_follow() -> None:
    setup = role("175b", 8, 8, 1)
    kept = [
        training_transients(
            setup, stage=stage, rows=2, tokens=512, num_micro_batches=100
        ).activations
        for stage in range(1, 7)
    ]
    assert [value / kept[-1] for value in kept] == pytest.approx([3.5, 3.0, 2.5, 2.0, 1.5, 1.0])


def test_fewer_micro_batches_than_stages_are_all_in_flight() -> None:
    setup = role("13b", 1, 4, 1)
    two, four = (
        training_transients(setup, stage=0, rows=1, tokens=64, num_micro_batches=count)
        for count in (2, 4)
    )
    assert four.activations == 2 * two.activations


@settings(deadline=None, max_examples=60)
@given(jobs(), st.integers(1, 4))
def test_longer_rows_never_need_less(job: Job, num_micro_batches: int) -> None:
    for stage in range(job.actor.layout.pipeline):
        short, long = (
            training_transients(
                job.actor,
                stage=stage,
                rows=2,
                tokens=tokens,
                num_micro_batches=num_micro_batches,
            )
            for tokens in (128, 256)
        )
        assert 0 < short.activations < long.activations
        assert short.total <= long.total
        assert short.workspace > 0


@pytest.mark.parametrize("head", list(Head))
def test_scoring_keeps_nothing_and_needs_less_than_training(head: Head) -> None:
    setup = role("1.3b", 2, 2, 1, head=head, sequence_parallel=False)
    for stage in (0, 1):
        scoring = scoring_transients(setup, stage=stage, rows=2, tokens=512)
        training = training_transients(setup, stage=stage, rows=2, tokens=512, num_micro_batches=2)
        assert scoring.activations == 0
        assert 0 < scoring.workspace < training.total


def test_generation_needs_more_for_more_sequences_and_less_on_more_ranks() -> None:
    few = generation_workspace(job("13b", 2, 1, 4, generate=2, workload=Workload(prompts=64)))
    many = generation_workspace(job("13b", 2, 1, 4, generate=2))
    cut = generation_workspace(job("13b", 2, 1, 4, generate=1, workload=Workload(prompts=512)))
    assert 0 < few < many < cut
    assert many < 2048 * MIB
