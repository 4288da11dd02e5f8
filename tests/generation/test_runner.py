"""The runner: prefill and decode give the logits of the model's own forward pass."""

import pytest
import torch

from megachat.errors import LayoutError
from megachat.generation.runner import ModelRunner
from megachat.parallel.layout import ParallelLayout
from tests.generation.reference import CONFIGS
from tests.harness import run_ranks
from tests.model import reference as ref


@torch.no_grad()
def _largest_gap() -> float:
    """Between the logits of prefill and decode and those of HuggingFace, ragged rows."""
    gaps = []
    for config in CONFIGS.values():
        oracle = ref.huggingface_model(config)
        runner = ModelRunner(ref.build_model(config, ParallelLayout(tensor=2), reference=oracle))
        tokens = torch.randint(0, 131, (3, 14), generator=torch.Generator().manual_seed(2))
        lengths = torch.tensor([9, 1, 4])
        expected = oracle(tokens).logits
        state, logits = runner.prefill(tokens[:, :9], lengths, capacity=14)
        for step in range(5):
            for row, length in enumerate(lengths.tolist()):
                gap = logits[row] - expected[row, length + step - 1]
                gaps.append(gap.abs().max().item())
            following = tokens.gather(1, (lengths + step)[:, None])[:, 0]
            logits = runner.decode(state, following)
    return max(gaps)


def _refuse_pipeline() -> None:
    with pytest.raises(LayoutError, match="2 pipeline stages: use pipeline degree 1"):
        ModelRunner(ref.build_model(ref.PRE_LN, ParallelLayout(pipeline=2), seed=0))


def test_prefill_and_decode_give_the_logits_of_huggingface() -> None:
    assert max(run_ranks(2, _largest_gap)) < 1e-5


def test_a_model_in_pipeline_stages_is_refused() -> None:
    run_ranks(2, _refuse_pipeline)
