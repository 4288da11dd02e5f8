from math import prod

import pytest

from megachat.model.config import OPT_MODELS, Head, vocab_multiple_for
from megachat.model.specs import stage_specs
from megachat.planner.sizes import (
    generation_elements,
    mlp_elements,
    stage_elements,
    word_elements,
)
from tests.planner.jobs import SIZES, role

LAYOUTS = [(1, 1, 1), (2, 1, 2), (4, 2, 1), (1, 4, 2), (2, 2, 2)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head", list(Head))
def test_elements_of_every_stage_are_those_of_its_parameter_table(
    size: str, layout: tuple[int, int, int], head: Head
) -> None:
    setup = role(size, *layout, head=head)
    for stage in range(setup.layout.pipeline):
        specs = stage_specs(
            setup.config,
            tensor=setup.layout.tensor,
            pipeline=setup.layout.pipeline,
            stage=stage,
            head=head,
        )
        local = {spec: prod(spec.local_shape(setup.layout.tensor)) for spec in specs}
        elements = stage_elements(setup, stage=stage)
        assert elements.total == sum(local.values())
        assert elements.layers == sum(n for spec, n in local.items() if spec.layer is not None)
        in_layers = [
            n for spec, n in local.items() if spec.layer is not None and len(spec.shape) == 2
        ]
        assert mlp_elements(setup) == max(in_layers)


@pytest.mark.parametrize("size", SIZES)
def test_one_rank_holds_every_parameter_and_the_padding(size: str) -> None:
    setup = role(size, 1, 1, 1)
    padding = setup.padded_vocab - setup.config.vocab_size
    expected = setup.config.num_parameters + padding * setup.config.embed_dim
    assert stage_elements(setup, stage=0).total == expected
    assert word_elements(setup) == setup.padded_vocab * setup.config.embed_dim


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("layout", "generate"), [((4, 2, 1), 2), ((2, 2, 1), 4), ((2, 4, 1), 2)])
def test_a_generation_shard_is_a_model_of_the_generation_layout(
    size: str, layout: tuple[int, int, int], generate: int
) -> None:
    multiple = vocab_multiple_for(layout[0], generate)
    setup = role(size, *layout, vocab_multiple=multiple)
    whole = role(size, generate, 1, 1, vocab_multiple=multiple)
    for stage in range(layout[1]):
        elements = generation_elements(setup, tensor=generate, stage=stage)
        assert elements.shard == stage_elements(whole, stage=0).total
        own = stage_elements(setup, stage=stage).total
        assert elements.kept + elements.redundant == own
        assert (elements.redundant > 0) == (generate > layout[0])
        assert elements.foreign + elements.kept == elements.shard


def test_opt_175b_has_the_published_number_of_parameters() -> None:
    assert OPT_MODELS["facebook/opt-175b"].num_parameters == pytest.approx(175e9, rel=0.01)
