"""Generation weights: views of a model's parameters, and shapes that are checked."""

from dataclasses import replace

import pytest
import torch

from megachat.errors import LayoutError
from megachat.generation.weights import GenerationWeights
from megachat.parallel.layout import ParallelLayout
from tests.generation.reference import CONFIGS
from tests.harness import run_ranks
from tests.model import reference as ref


def _storages(weights: GenerationWeights) -> set[int]:
    """Where all tensors of a record are."""
    records = [weights, *weights.layers]
    fields = [getattr(record, name) for record in records for name in record.__slots__]
    return {value.data_ptr() for value in fields if isinstance(value, torch.Tensor)}


def _check_single() -> None:
    for config in CONFIGS.values():
        model = ref.build_model(config, ParallelLayout(), seed=0)
        weights = GenerationWeights.from_model(model)
        assert _storages(weights) == {value.data_ptr() for value in model.parameters()}
        assert weights.vocab_start == 0
        assert weights.local_vocab == config.vocab_size
        assert (weights.final_norm_weight is not None) is config.layer_norm_first
        layer = weights.layers[1]
        with pytest.raises(LayoutError, match="weights of 3 layers, the model has 4"):
            replace(weights, layers=weights.layers[:3])
        with pytest.raises(
            LayoutError,
            match=r"layers.1.fc2.weight has shape \[1, 32, 24\], the layout needs \[1, 32, 48\]",
        ):
            bad = replace(layer, fc2_weight=layer.fc2_weight[..., :24])
            replace(weights, layers=(weights.layers[0], bad, *weights.layers[2:]))
        with pytest.raises(LayoutError, match="1 ranks hold 100 vocabulary rows each, .* 131"):
            replace(weights, words=weights.words[:100])
        with pytest.raises(LayoutError, match="generation weight positions has shape"):
            replace(weights, positions=weights.positions[1:])


def _check_two() -> tuple[int, int]:
    model = ref.build_model(ref.PRE_LN, ParallelLayout(tensor=2), seed=0)
    weights = GenerationWeights.from_model(model)
    assert weights.layers[0].proj_weight.shape == (1, 32, 16)
    # As after a gather from two training ranks: the same columns as two adjacent tiles.
    tiles = weights.layers[0].proj_weight[0].view(32, 2, 8).transpose(0, 1).contiguous()
    layer = replace(weights.layers[0], proj_weight=tiles)
    replace(weights, layers=(layer, *weights.layers[1:]))
    with pytest.raises(LayoutError, match="2 pipeline stages: use pipeline degree 1"):
        GenerationWeights.from_model(
            ref.build_model(ref.PRE_LN, ParallelLayout(pipeline=2), seed=0)
        )
    return weights.vocab_start, weights.local_vocab


def test_weights_are_views_and_misfits_are_refused() -> None:
    run_ranks(1, _check_single)


def test_ranks_know_their_slice_of_the_vocabulary_and_tiles_fit() -> None:
    assert run_ranks(2, _check_two) == [(0, 128), (128, 3)]
