from dataclasses import fields

import pytest
import torch
from torch import Tensor

from megachat.records import TokenBatch
from megachat.training.loss import LossFunction, LossTerms


class MeanOfOutputs:
    """The smallest loss: mean output over the tokens of the global batch."""

    metric_names = ("square",)
    maximum_names = ("largest",)

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def model_input(self, batch: TokenBatch) -> Tensor:
        return batch.tokens

    def row_lengths(self, batch: TokenBatch) -> Tensor:
        return batch.lengths

    def __call__(self, output: Tensor, batch: TokenBatch, row_weights: Tensor) -> LossTerms:
        real = torch.arange(output.shape[1]) < batch.lengths[:, None]
        weights = real * row_weights[:, None] / self._num_tokens
        return LossTerms(
            loss=(output * weights).sum(),
            metrics={"square": (output.square() * weights).sum().detach()},
            maxima={"largest": output.masked_fill(weights == 0, -torch.inf).max().detach()},
        )


def test_terms_of_the_micro_batches_add_up_to_those_of_the_batch() -> None:
    batch = TokenBatch(tokens=torch.arange(15).view(5, 3), lengths=torch.tensor([3, 1, 2, 3, 1]))
    loss: LossFunction[TokenBatch] = MeanOfOutputs(num_tokens=10)

    def terms(rows: list[int], weights: list[float]) -> LossTerms:
        part = batch.select(torch.tensor(rows))
        return loss(loss.model_input(part).double(), part, torch.tensor(weights))

    whole = terms([0, 1, 2, 3, 4], [1.0] * 5)
    parts = [terms([0, 3], [1, 1]), terms([2, 1], [1, 1]), terms([4, 4], [1, 0])]
    assert whole.loss.item() == pytest.approx(6.1)
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item())
    assert sum(part.metrics["square"].item() for part in parts) == pytest.approx(
        whole.metrics["square"].item()
    )
    assert max(part.maxima["largest"].item() for part in parts) == whole.maxima["largest"].item()


def test_terms_without_metrics_do_not_share_a_dictionary() -> None:
    first, second = (LossTerms(loss=torch.zeros(())) for _ in range(2))
    assert (first.metrics, first.maxima) == ({}, {})
    assert first.metrics is not second.metrics
    assert [field.name for field in fields(first)] == ["loss", "metrics", "maxima"]
