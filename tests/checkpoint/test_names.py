from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megachat.checkpoint.names import (
    canonical_name,
    huggingface_names,
    huggingface_shape,
    place_part,
    take_part,
)
from megachat.model import Head, OptConfig, parameter_specs
from tests.checkpoint import folders
from tests.model.reference import POST_LN, PRE_LN


@pytest.mark.parametrize("config", [PRE_LN, POST_LN])
@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize("tensor", [1, 4])
def test_names_and_shapes_are_those_of_transformers(
    config: OptConfig, head: Head, tensor: int
) -> None:
    found = {
        name: huggingface_shape(spec)
        for spec in parameter_specs(config, tensor=tensor, head=head)
        for name in huggingface_names(spec)
    }
    assert found == {
        name: tuple(value.shape) for name, value in folders.state(config, head).items()
    }


def _fuse(parts: Sequence[Tensor], head_dim: int) -> Tensor:
    fused = torch.full((len(parts) * len(parts[0]), *parts[0].shape[1:]), torch.nan)
    for number, part in enumerate(parts):
        place_part(fused, part, number=number, parts=len(parts), head_dim=head_dim)
    return fused


def test_fused_rows_go_by_head_and_within_a_head_query_key_value() -> None:
    query, key, value = (torch.arange(4).float() + 10 * part for part in range(3))
    fused = _fuse((query, key, value), head_dim=2)
    assert fused.tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]


def test_parts_are_taken_out_of_where_they_were_placed() -> None:
    parts = [torch.randn(12, 5) for _ in range(3)]
    fused = _fuse(parts, head_dim=3)
    for number, part in enumerate(parts):
        assert torch.equal(take_part(fused, number=number, parts=3, head_dim=3), part)


def test_names_without_the_prefix_are_completed() -> None:
    assert canonical_name("decoder.layers.0.fc1.bias") == "model.decoder.layers.0.fc1.bias"
    assert canonical_name("model.decoder.layers.0.fc1.bias") == "model.decoder.layers.0.fc1.bias"
    assert canonical_name("score.weight") == "score.weight"
