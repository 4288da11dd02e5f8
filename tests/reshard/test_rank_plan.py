"""One rank's part of a plan: buffers and who sends what; the rest is tested on whole plans."""

import pytest
from hypothesis import given, settings

from megachat.errors import LayoutError
from megachat.model.config import OPT_MODELS
from megachat.model.specs import TensorSpec
from megachat.parallel.layout import Axis
from megachat.reshard import ReshardPlan, plan_for_model, plan_rank
from megachat.reshard.records import Exchange
from tests.reshard.plans import generation, layout, plans


@settings(deadline=None, max_examples=60)
@given(plans())
def test_flat_buffers_of_a_rank_do_not_overlap(
    case: tuple[ReshardPlan, tuple[TensorSpec, ...]],
) -> None:
    plan, _ = case
    for rank in range(plan.source.world_size):
        part = plan_rank(plan, rank)
        end = 0
        for flat in part.flats:
            if flat.names:
                assert flat.offset >= end
                assert flat.padded_elements % (2 * plan.source.data) == 0
                end = flat.offset + flat.padded_elements
        assert end <= part.elements


def test_the_tied_embedding_is_not_sent_to_the_stage_that_holds_a_copy() -> None:
    source = layout(2, 4, 1)
    plan = plan_for_model(
        OPT_MODELS["facebook/opt-125m"], source=source, target=generation(source, 2)
    )
    words = [
        len(step.transfers[0].receives)  # type: ignore[union-attr]
        for rank in source.ranks_along(Axis.PIPELINE, 0)
        for step in plan_rank(plan, rank).steps
        if step.block == "embedding.word.weight"
    ]
    assert words == [0, 1, 1, 0]


def test_the_two_holders_of_the_tied_embedding_send_by_turns_to_their_own_node_first() -> None:
    source = layout(1, 8, 1)
    config = OPT_MODELS["facebook/opt-350m"]
    for ranks_per_node, expected in ((8, [3, 3]), (2, [3, 3]), (4, [3, 3]), (6, [5, 1])):
        plan = plan_for_model(
            config, source=source, target=generation(source, 1), ranks_per_node=ranks_per_node
        )
        sent = []
        for rank in (0, 7):
            transfer = plan_rank(plan, rank).steps[0].transfers[0]
            assert isinstance(transfer, Exchange)
            sent.append(len(transfer.sends))
        assert sent == expected, ranks_per_node


def test_a_rank_outside_the_layout_is_refused() -> None:
    source = layout(1, 2, 1)
    plan = plan_for_model(
        OPT_MODELS["facebook/opt-125m"], source=source, target=generation(source, 1)
    )
    with pytest.raises(LayoutError, match="rank 2 is outside layout"):
        plan_rank(plan, 2)
