from collections import Counter
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.model import OPT_MODELS, Head, OptConfig, parameter_specs, stage_specs
from megachat.model.specs import WORD_EMBEDDING, Init, initial_value, stage_of
from tests.model.reference import POST_LN, PRE_LN


@pytest.mark.parametrize("name", OPT_MODELS)
@pytest.mark.parametrize("tensor", [1, 8])
def test_table_of_every_size_holds_its_parameters(name: str, tensor: int) -> None:
    config = OPT_MODELS[name]
    specs = parameter_specs(config, tensor=tensor, head=Head.LANGUAGE_MODEL)
    assert sum(spec.num_elements for spec in specs) == config.num_parameters
    assert len({spec.name for spec in specs}) == len(specs)


def test_scalar_head_adds_one_vector_of_the_width_of_the_embedding() -> None:
    for config in (PRE_LN, POST_LN):
        base = {spec.name for spec in parameter_specs(config, tensor=1, head=Head.LANGUAGE_MODEL)}
        more = parameter_specs(config, tensor=1, head=Head.SCALAR)
        added = [spec for spec in more if spec.name not in base]
        assert [(spec.name, spec.shape) for spec in added] == [
            ("head.score.weight", (1, config.embed_dim))
        ]


@pytest.mark.parametrize("config", [PRE_LN, POST_LN])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_shards_cover_every_element_once(config: OptConfig, tensor: int) -> None:
    for spec in parameter_specs(config, tensor=tensor, head=Head.SCALAR):
        seen = torch.zeros(spec.shape, dtype=torch.int)
        for rank in range(tensor):
            part = seen[spec.slices(rank, tensor=tensor)]
            assert tuple(part.shape) == spec.local_shape(tensor)
            part += 1
        assert (seen == (tensor if spec.shard_dim is None else 1)).all(), spec.name


@settings(deadline=None)
@given(
    config=st.sampled_from([PRE_LN, POST_LN]),
    tensor=st.sampled_from([1, 2, 4]),
    pipeline=st.sampled_from([1, 2, 4]),
    head=st.sampled_from(list(Head)),
)
def test_stages_hold_every_parameter_once_and_the_tied_embedding_at_both_ends(
    config: OptConfig, tensor: int, pipeline: int, head: Head
) -> None:
    stages = [
        stage_specs(config, tensor=tensor, pipeline=pipeline, stage=stage, head=head)
        for stage in range(pipeline)
    ]
    held = Counter(spec.name for stage in stages for spec in stage)
    specs = parameter_specs(config, tensor=tensor, head=head)
    tied = head is Head.LANGUAGE_MODEL and pipeline > 1
    assert held == Counter(spec.name for spec in specs) + Counter([WORD_EMBEDDING] * tied)
    for spec in specs:
        assert spec in stages[stage_of(spec, config, pipeline=pipeline)]


def test_weight_decay_spares_biases_and_norms() -> None:
    for spec in parameter_specs(POST_LN, tensor=1, head=Head.SCALAR):
        assert spec.decays == (len(spec.shape) == 2), spec.name


@pytest.mark.parametrize("config", [PRE_LN, POST_LN])
def test_initial_values_do_not_depend_on_the_tensor_degree(config: OptConfig) -> None:
    for one, four in zip(
        parameter_specs(config, tensor=1, head=Head.SCALAR),
        parameter_specs(config, tensor=4, head=Head.SCALAR),
        strict=True,
    ):
        values = [initial_value(spec, seed=7, std=config.init_std) for spec in (one, four)]
        rows = one.unpadded_shape[0]
        assert torch.equal(values[0][:rows], values[1][:rows])
        assert all(not value[rows:].any() for value in values)


def test_initial_values_have_the_distribution_of_opt() -> None:
    config = OptConfig(hidden=128, ffn=512, layers=1, heads=2, embed_dim=128)
    seen = []
    for spec in parameter_specs(config, tensor=1, head=Head.SCALAR):
        value = initial_value(spec, seed=0, std=config.init_std)
        if spec.init is Init.NORMAL:
            bound = 5 * config.init_std / prod(spec.unpadded_shape) ** 0.5
            assert abs(value[: spec.unpadded_shape[0]].mean()) < bound
            seen.append(value[: spec.unpadded_shape[0]].flatten()[:128])
        else:
            assert (value == (1.0 if spec.init is Init.ONES else 0.0)).all()
    assert torch.cat(seen).std().item() == pytest.approx(0.006, rel=0.15)
    assert len({tuple(part[:4].tolist()) for part in seen}) == len(seen)


def test_another_seed_gives_other_values() -> None:
    spec = parameter_specs(PRE_LN, tensor=1, head=Head.SCALAR)[0]
    assert not torch.equal(
        initial_value(spec, seed=0, std=1.0), initial_value(spec, seed=1, std=1.0)
    )
