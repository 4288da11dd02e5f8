"""Activation counts against numbers measured on real and fake tensors.

The dry run itself, which compares whole ranks, is in `test_dry_run.py`.
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.model.config import Head, Recompute
from megachat.model.specs import stage_specs
from megachat.planner.job import Job, Workload
from megachat.planner.transients import (
    generation_workspace,
    reduction_staging,
    scoring_transients,
    training_transients,
)
from megachat.training.buffers import plan_buffers
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


@pytest.mark.parametrize(("size", "data"), [("125m", 2), ("350m", 4), ("1.3b", 8)])
def test_staged_gradients_are_bounded_for_any_order_of_the_buffers(size: str, data: int) -> None:
    """Of the buffers that training plans: the reducer starts one more while 256 MiB are held."""
    setup = role(size, 1, 2, data)
    for stage in (0, 1):
        elements = {
            spec.name: math.prod(spec.local_shape(1))
            for spec in stage_specs(
                setup.config, tensor=1, pipeline=2, stage=stage, head=setup.head
            )
        }
        buffers = plan_buffers(setup.config, head=setup.head, layout=setup.layout, stage=stage)
        received = [
            4 * sum(elements[name] for name in buffer) * (data - 1) // data for buffer in buffers
        ]
        bound = reduction_staging(setup, stage=stage)
        # At worst as much as may be held, and then the largest; never more than there is.
        assert min(sum(received), 256 * MIB + max(received)) <= bound <= sum(received) + 4 * data


def test_one_data_rank_stages_nothing() -> None:
    assert reduction_staging(role("1.3b", 2, 2, 1), stage=0) == 0
