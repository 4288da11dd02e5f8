"""Properties of reshard plans, without any process group."""

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings

from megachat.errors import LayoutError
from megachat.model.config import OPT_MODELS, Head, OptConfig
from megachat.model.specs import TensorSpec, parameter_specs
from megachat.parallel.layout import ParallelLayout
from megachat.reshard import (
    HopOrder,
    NodeSpan,
    ReshardPlan,
    build_reshard_plan,
    plan_for_model,
    plan_rank,
)
from megachat.reshard.plan import legal_degrees, total_traffic
from tests.reshard import simulate
from tests.reshard.plans import generation, layout, plans

GIGABYTE = 1e9


@settings(deadline=None, max_examples=60)
@given(plans())
def test_every_element_of_every_generation_shard_arrives_exactly_once(
    case: tuple[ReshardPlan, tuple[TensorSpec, ...]],
) -> None:
    plan, specs = case
    wholes = simulate.whole_tensors(specs)
    for rank, arena in enumerate(simulate.run(plan, specs)):
        traffic, unit = arena.part.traffic, plan.element_bytes
        assert {weight.spec.name for weight in arena.part.weights} == set(wholes)
        in_shard = np.zeros(arena.part.elements, dtype=bool)
        degree = plan.placement.tensor
        for weight in arena.part.weights:
            found = arena.at(weight.view)
            if weight.spec.shard_dim == 1:
                found = np.concatenate(list(found), axis=1)
            own = weight.spec.slices(plan.placement.tensor_rank(rank), tensor=degree)
            np.testing.assert_array_equal(found, wholes[weight.spec.name][own])
            positions = simulate._strided(np.arange(arena.part.elements), weight.view)
            assert not in_shard[positions].any(), "two weights share an element"
            in_shard[positions] = True
        trained = np.zeros(arena.part.elements, dtype=bool)
        for flat in arena.part.flats:
            trained[flat.offset : flat.offset + flat.elements] = True
        np.testing.assert_array_equal(arena.writes, in_shard & ~trained)
        assert traffic.shard == in_shard.sum() * unit
        assert traffic.received == traffic.lower_bound == (in_shard & ~trained).sum() * unit
        assert traffic.redundant == (trained & ~in_shard).sum() * unit


@settings(deadline=None, max_examples=60)
@given(plans())
def test_redundancy_balance_and_staging_are_as_designed(
    case: tuple[ReshardPlan, tuple[TensorSpec, ...]],
) -> None:
    plan, specs = case
    source, unit = plan.source, plan.element_bytes
    parts = [plan_rank(plan, rank) for rank in range(source.world_size)]
    total = total_traffic(plan)
    assert total.sent == total.received
    row_bytes = 48 * unit  # of the widest matrix
    for part in parts:
        assert part.traffic.staged <= max(plan.bucket_bytes, row_bytes)
        if plan.placement.splits == 1:
            assert part.traffic.redundant == part.traffic.staged == 0
        arena = part.elements * unit
        padding = arena - part.traffic.shard - part.traffic.redundant
        assert padding <= len(plan.blocks) * (128 + 2 * 2 * source.data) * unit
    edges = sum(
        area.elements for block in plan.blocks if block.layer is None for area in block.areas
    )
    sent = [part.traffic.sent for part in parts]
    assert max(sent) - min(sent) <= edges * unit * source.pipeline * plan.placement.tiles


def test_redundancy_follows_the_formula_where_generation_is_cut_finer() -> None:
    config = OPT_MODELS["facebook/opt-66b"]
    source = layout(4, 4, 4)
    plan = plan_for_model(config, source=source, target=generation(source, 8), ranks_per_node=8)
    matrices = 2 * 12 * config.hidden**2 * config.layers
    middle = plan_rank(plan, source.ranks_along(axis="pipeline", rank=0)[1]).traffic  # type: ignore[arg-type]
    formula = matrices / 16 - matrices / 32
    assert formula <= middle.redundant <= 1.001 * formula


@pytest.mark.parametrize(
    ("name", "train", "generate", "order", "received", "inter_node"),
    [
        ("66b", (8, 2, 4), 8, HopOrder.DIRECT, 8.15, 8.15),
        ("66b", (8, 2, 4), 4, HopOrder.STAGES_FIRST, 24.46, 8.15),
        ("66b", (4, 4, 4), 8, HopOrder.DIRECT, 12.23, 12.23),
        ("175b", (8, 8, 1), 8, HopOrder.DIRECT, 38.05, 38.05),
        ("175b", (8, 8, 1), 4, HopOrder.STAGES_FIRST, 81.54, 38.05),
        ("13b", (8, 1, 8), 2, HopOrder.DIRECT, 9.44, 0.0),
    ],
)
def test_bytes_of_the_large_models_are_those_of_the_formula(
    name: str,
    train: tuple[int, int, int],
    generate: int,
    order: HopOrder,
    received: float,
    inter_node: float,
) -> None:
    """Matrix products only in the formula: embeddings, biases and norms add up to 2.5 %."""
    source = layout(*train)
    plan = plan_for_model(
        OPT_MODELS[f"facebook/opt-{name}"],
        source=source,
        target=generation(source, generate),
        ranks_per_node=8,
    )
    assert plan.order is order
    for rank in (0, source.world_size // 2, source.world_size - 1):
        traffic = plan_rank(plan, rank).traffic
        assert received <= traffic.received / GIGABYTE <= 1.025 * received
        assert inter_node - 0.01 <= traffic.received_inter_node / GIGABYTE <= 1.025 * inter_node
        assert traffic.received == traffic.lower_bound


def _layouts_of(config: OptConfig, world: int) -> list[tuple[ParallelLayout, int]]:
    """Each kind of reshard once for a model and a world."""
    chosen: dict[str, tuple[ParallelLayout, int]] = {}
    for tensor, pipeline in product((8, 4, 2, 1), (8, 4, 2, 1)):
        if world % (tensor * pipeline) or config.layers % pipeline or config.heads % tensor:
            continue
        source = layout(tensor, pipeline, world // (tensor * pipeline))
        for degree in (8, 4, 2, 1):
            if world % degree or config.heads % degree or config.ffn % degree:
                continue
            kind = "equal" if degree == tensor else "coarser" if degree < tensor else "finer"
            chosen.setdefault(f"{kind} {pipeline > 1}", (source, degree))
    return list(chosen.values())


@pytest.mark.parametrize("world", [8, 64, 512])
@pytest.mark.parametrize("name", OPT_MODELS)
def test_all_sizes_are_legal_and_meet_the_bound(name: str, world: int) -> None:
    config = OPT_MODELS[name]
    layouts = _layouts_of(config, world)
    assert len(layouts) >= 4
    for source, degree in layouts:
        target = generation(source, degree)
        plan = plan_for_model(config, source=source, target=target, ranks_per_node=8)
        for rank in (0, world - 1):
            traffic = plan_rank(plan, rank).traffic
            assert traffic.received == traffic.lower_bound
            assert traffic.staged <= plan.bucket_bytes


def test_one_rank_of_the_largest_model_is_planned_in_less_than_a_second() -> None:
    source = layout(8, 8, 1)
    start = time.process_time()
    plan = plan_for_model(
        OPT_MODELS["facebook/opt-175b"], source=source, target=generation(source, 4)
    )
    plan_rank(plan, 63)
    assert time.process_time() - start < 1.0


def test_a_degree_that_does_not_nest_is_refused_with_the_nearest_legal_ones() -> None:
    source = layout(4, 1, 3)
    with pytest.raises(LayoutError, match=r"degree 3 neither .* tensor degree 4 .*: 2 or 4"):
        plan_for_model(OPT_MODELS["facebook/opt-125m"], source=source, target=generation(source, 3))


def test_a_degree_that_cuts_a_parameter_unevenly_is_refused_with_the_cure() -> None:
    source = layout(1, 1, 4)
    specs = parameter_specs(
        OptConfig(vocab_size=130, hidden=24, ffn=24, layers=1, heads=4, embed_dim=24),
        tensor=1,
        head=Head.LANGUAGE_MODEL,
        vocab_multiple=3 * 128,
    )
    assert legal_degrees(specs, source=source) == (1, 2, 4)
    odd = [spec if spec.name != "layers.0.fc1.bias" else _with_rows(spec, 25) for spec in specs]
    with pytest.raises(LayoutError, match=r"degree 4 does not divide layers.0.fc1.bias of size 25"):
        build_reshard_plan(odd, source=source, target=generation(source, 4))


def _with_rows(spec: TensorSpec, rows: int) -> TensorSpec:
    return TensorSpec(
        name=spec.name,
        shape=(rows,),
        shard_dim=0,
        layer=spec.layer,
        placement=spec.placement,
        init=spec.init,
        decays=spec.decays,
    )


def test_a_generation_group_across_nodes_is_refused_unless_allowed() -> None:
    source, config = layout(2, 2, 2), OPT_MODELS["facebook/opt-125m"]
    with pytest.raises(LayoutError, match=r"degree 4 spans nodes: ranks \(0, 2, 1, 3\) with 2"):
        plan_for_model(config, source=source, target=generation(source, 4), ranks_per_node=2)
    plan_for_model(
        config,
        source=source,
        target=generation(source, 4),
        ranks_per_node=2,
        node_span=NodeSpan.ALLOW,
    )


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (ParallelLayout(tensor=2, pipeline=2, data=2), "has pipeline degree 2"),
        (ParallelLayout(tensor=2, data=2), "has 4 ranks and training layout tp2.pp2.dp2 has 8"),
    ],
)
def test_a_generation_layout_of_another_kind_is_refused(
    target: ParallelLayout, message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        plan_for_model(OPT_MODELS["facebook/opt-125m"], source=layout(2, 2, 2), target=target)
