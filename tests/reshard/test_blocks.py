"""How parameters are grouped."""

from collections import Counter

import pytest
from hypothesis import given, settings

from megachat.errors import LayoutError
from megachat.model.config import OPT_MODELS, Head
from megachat.model.specs import TensorSpec, parameter_specs
from megachat.reshard import ReshardPlan, build_reshard_plan
from megachat.reshard.blocks import build_blocks, padded_elements
from tests.reshard.plans import generation, layout, plans


@settings(deadline=None, max_examples=60)
@given(plans())
def test_every_parameter_is_in_one_block_and_a_block_decays_or_does_not(
    case: tuple[ReshardPlan, tuple[TensorSpec, ...]],
) -> None:
    plan, specs = case
    counted = Counter(
        spec.name for block in plan.blocks for area in block.areas for spec in area.specs
    )
    assert counted == Counter(spec.name for spec in specs)
    assert len({block.name for block in plan.blocks}) == len(plan.blocks)
    for block in plan.blocks:
        kinds = {(s.decays, s.shard_dim is None) for area in block.areas for s in area.specs}
        assert kinds == {(block.decays, not block.sharded)}
        for stage in range(plan.source.pipeline):
            holding = [area for area in block.areas if stage in area.holders]
            assert len(holding) <= 1
            assert block.held_by(stage) == (holding[0] if holding else None)


def test_the_blocks_of_a_large_model_are_few() -> None:
    """Six sharded parameters for each of 12 layers of a stage, and four blocks beside them."""
    specs = parameter_specs(OPT_MODELS["facebook/opt-175b"], tensor=8, head=Head.LANGUAGE_MODEL)
    blocks = build_blocks(specs, layout=layout(8, 8, 1))
    outside = [block.name for block in blocks if block.layer is None]
    assert outside == ["embedding.word.weight", "edges.matrices", "edges.vectors", "layers.vectors"]
    assert len(blocks) == 4 + 6 * 12


@pytest.mark.parametrize(("elements", "data", "padded"), [(1, 1, 2), (8, 4, 8), (9, 4, 16)])
def test_flat_buffers_are_padded_as_deepspeed_pads_them(
    elements: int, data: int, padded: int
) -> None:
    assert padded_elements(elements, layout(1, 1, data)) == padded


def test_layers_that_stages_cannot_share_are_refused() -> None:
    source = layout(1, 5, 1)
    specs = parameter_specs(OPT_MODELS["facebook/opt-125m"], tensor=1, head=Head.LANGUAGE_MODEL)
    with pytest.raises(LayoutError, match="12 layers are not a multiple of pipeline degree 5"):
        build_reshard_plan(specs, source=source, target=generation(source, 1))
