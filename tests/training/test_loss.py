from dataclasses import fields

import pytest
import torch
from torch import Tensor

from megachat.records import TokenBatch
from megachat.training.loss import LossFunction, LossTerms, ModelOutput


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

    def output_spans(self, _batch: TokenBatch) -> None:
        """Everywhere."""

    def __call__(self, output: ModelOutput, batch: TokenBatch, row_weights: Tensor) -> LossTerms:
        values, weights = output.values, row_weights[output.rows] / self._num_tokens
        return LossTerms(
            loss=(values * weights).sum(),
            metrics={"square": (values.square() * weights).sum().detach()},
            maxima={"largest": values.masked_fill(weights == 0, -torch.inf).max().detach()},
        )


def _places(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and positions of all real tokens."""
    pairs = [(row, at) for row, length in enumerate(lengths.tolist()) for at in range(length)]
    rows, positions = torch.tensor(pairs).unbind(dim=1)
    return rows, positions


def test_terms_of_the_micro_batches_add_up_to_those_of_the_batch() -> None:
    batch = TokenBatch(tokens=torch.arange(15).view(5, 3), lengths=torch.tensor([3, 1, 2, 3, 1]))
    loss: LossFunction[TokenBatch] = MeanOfOutputs(num_tokens=10)

    def terms(rows: list[int], weights: list[float]) -> LossTerms:
        part = batch.select(torch.tensor(rows))
        rows, positions = _places(loss.row_lengths(part))
        values = loss.model_input(part).double()[rows, positions]
        output = ModelOutput(values=values, rows=rows, positions=positions)
        return loss(output, part, torch.tensor(weights))

    whole = terms([0, 1, 2, 3, 4], [1.0] * 5)
    parts = [terms([0, 3], [1, 1]), terms([2, 1], [1, 1]), terms([4, 4], [1, 0])]
    assert whole.loss.item() == pytest.approx(6.1)
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item())
    assert sum(part.metrics["square"].item() for part in parts) == pytest.approx(
        whole.metrics["square"].item()
    )
    assert max(part.maxima["largest"].item() for part in parts) == whole.maxima["largest"].item()


def test_an_output_knows_what_follows_its_places_and_fills_a_table() -> None:
    rows, positions = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 0, 2])
    values = torch.tensor([5.0, 6.0, 7.0, 8.0], requires_grad=True)
    output = ModelOutput(values=values, rows=rows, positions=positions)
    tokens = torch.arange(10, 19).view(3, 3)
    assert output.following(tokens).tolist() == [12, 0, 14, 0]
    assert output.following(tokens > 12).tolist() == [False, False, True, False]
    table = output.to_columns(values, torch.tensor([0, 1, 0, 1]), like=tokens[:, :2])
    assert table.tolist() == [[5.0, 6.0], [7.0, 0.0], [0.0, 8.0]]
    (table * torch.tensor([1.0, 2.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 2.0, 1.0, 2.0]


def test_terms_without_metrics_do_not_share_a_dictionary() -> None:
    first, second = (LossTerms(loss=torch.zeros(())) for _ in range(2))
    assert (first.metrics, first.maxima) == ({}, {})
    assert first.metrics is not second.metrics
    assert [field.name for field in fields(first)] == ["loss", "metrics", "maxima"]
