"""Layouts and random plans of tiny models, shared by the tests of plans."""

from hypothesis import strategies as st

from megachat.model.config import Head, OptConfig, vocab_multiple_for
from megachat.model.specs import TensorSpec, parameter_specs
from megachat.parallel.layout import GenerationPlacement, ParallelLayout
from megachat.reshard import NodeSpan, ReshardPlan, build_reshard_plan


def layout(tensor: int, pipeline: int, data: int) -> ParallelLayout:
    return ParallelLayout(tensor=tensor, pipeline=pipeline, data=data)


def generation(source: ParallelLayout, tensor: int) -> ParallelLayout:
    return ParallelLayout(tensor=tensor, data=source.world_size // tensor)


@st.composite
def plans(draw: st.DrawFn) -> tuple[ReshardPlan, tuple[TensorSpec, ...]]:
    """Plans of tiny models for all kinds of layouts, nodes and buckets."""
    tensor = draw(st.sampled_from([1, 2, 4]))
    pipeline, data = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    source = layout(tensor, pipeline, data)
    degrees = [d for d in GenerationPlacement.legal_degrees(source) if 24 % d == 0]
    degree = draw(st.sampled_from(degrees))
    config = OptConfig(
        vocab_size=draw(st.sampled_from([5, 130])),
        max_positions=draw(st.integers(1, 3)),
        hidden=24,
        ffn=draw(st.sampled_from([24, 48])),
        layers=pipeline * draw(st.integers(1, 2)),
        heads=24,
        embed_dim=draw(st.sampled_from([2, 24])),
        layer_norm_first=draw(st.booleans()),
    )
    specs = parameter_specs(
        config,
        tensor=tensor,
        head=draw(st.sampled_from(Head)),
        vocab_multiple=vocab_multiple_for(tensor, degree),
    )
    plan = build_reshard_plan(
        specs,
        source=source,
        target=generation(source, degree),
        ranks_per_node=draw(st.sampled_from([None, 1, 2, 4, source.world_size])),
        node_span=NodeSpan.ALLOW,
        element_bytes=draw(st.sampled_from([2, 4])),
        bucket_bytes=draw(st.sampled_from([16, 200, 10_000])),
    )
    return plan, specs
