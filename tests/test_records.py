from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megachat.records import (
    Batch,
    Experience,
    PreferenceBatch,
    PromptBatch,
    Rollout,
    SftBatch,
    TokenBatch,
)

ROWS, SEQ, RESPONSE = 4, 7, 3
KINDS = (TokenBatch, SftBatch, PreferenceBatch, PromptBatch, Rollout, Experience)


def _filled(kind: type[Batch], rows: int = ROWS) -> Batch:
    """A record in which row r of each field holds numbers of its own."""
    widths = {"tokens": (SEQ,), "loss_mask": (SEQ,)} | dict.fromkeys(
        ("response_mask", "logprobs", "ref_logprobs", "values", "advantages", "returns"),
        (RESPONSE,),
    )
    if kind is PreferenceBatch:
        widths = {"tokens": (2, SEQ), "lengths": (2,)}
    values: dict[str, Tensor] = {}
    for number, field in enumerate(fields(kind)):
        shape = (rows, *widths.get(field.name, ()))
        count = torch.Size(shape).numel()
        values[field.name] = (torch.arange(count) + 1000 * number).view(shape)
    return kind(**values)


@pytest.mark.parametrize("kind", KINDS)
def test_selected_rows_are_the_same_in_every_field(kind: type[Batch]) -> None:
    batch = _filled(kind)
    rows = torch.tensor([2, 0, 2])
    part = batch.select(rows)
    assert type(part) is kind
    assert (batch.num_rows, part.num_rows) == (ROWS, 3)
    for field in fields(kind):
        whole = getattr(batch, field.name)
        assert torch.equal(getattr(part, field.name), whole[[2, 0, 2]]), field.name


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_another_device_keep_kind_and_shapes(kind: type[Batch]) -> None:
    batch = _filled(kind)
    empty = batch.select(torch.empty(0, dtype=torch.int64))
    assert empty.num_rows == 0
    moved = batch.to(torch.device("meta"))
    assert type(moved) is type(empty) is kind
    for field in fields(kind):
        whole, away = getattr(batch, field.name), getattr(moved, field.name)
        assert (away.device.type, away.shape) == ("meta", whole.shape)
        assert getattr(empty, field.name).shape[1:] == whole.shape[1:]


@pytest.mark.parametrize("kind", KINDS)
def test_records_are_frozen_and_documented(kind: type[Batch]) -> None:
    batch = _filled(kind)
    with pytest.raises(FrozenInstanceError):
        batch.tokens = torch.zeros(1)  # type: ignore[attr-defined]
    assert kind.__doc__


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, RESPONSE)), min_size=1, max_size=6))
@settings(deadline=None)
def test_response_mask_counts_the_tokens_after_the_prompt(rows: list[tuple[int, int]]) -> None:
    prompts, answers = (torch.tensor(column) for column in zip(*rows, strict=True))
    rollout = Rollout(
        tokens=torch.zeros(len(rows), 8, dtype=torch.int64),
        lengths=prompts + answers,
        prompt_lengths=prompts,
        logprobs=torch.zeros(len(rows), RESPONSE),
        finished=torch.zeros(len(rows), dtype=torch.bool),
    )
    assert torch.equal(rollout.response_lengths, answers)
    expected = [[column < answer for column in range(RESPONSE)] for _, answer in rows]
    assert rollout.response_mask.tolist() == expected
