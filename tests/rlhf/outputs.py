"""Hands objectives the part of a dense output that they ask for, as an engine does."""

from typing import Any

import torch
from torch import Tensor

from megachat.records import Experience
from megachat.rlhf.objectives import response_logprobs, response_spans
from megachat.training.loss import ModelOutput


def read(values: Tensor, spans: Tensor) -> ModelOutput:
    """`[rows, seq, ...]` at the places of the spans, found by looking at every position."""
    columns = torch.arange(values.shape[1])
    wanted = (columns >= spans[:, :1]) & (columns < spans[:, 1:])
    rows, positions = wanted.nonzero().unbind(dim=1)
    if not len(rows):  # an engine hands over one place, of the last real token
        rows, positions = torch.tensor([len(values) - 1]), spans[-1, 1:]
    return ModelOutput(values=values[rows, positions], rows=rows, positions=positions)


def asked_for(objective: Any, values: Tensor, batch: Any) -> ModelOutput:
    """What an objective or score function reads of a dense output for a micro-batch."""
    lengths = objective.row_lengths(batch)
    spans = objective.output_spans(batch)
    if spans is None:
        spans = torch.stack([torch.zeros_like(lengths), lengths], dim=1)
    return read(values, spans)


def sampled_logprobs(logits: Tensor, batch: Experience, *, temperature: float) -> Tensor:
    """`[batch, response_len]`, of the responses of an experience."""
    spans = response_spans(prompt_lengths=batch.prompt_lengths, lengths=batch.lengths)
    return response_logprobs(
        read(logits, spans),
        tokens=batch.tokens,
        prompt_lengths=batch.prompt_lengths,
        response_mask=batch.response_mask,
        group=None,
        vocab_start=0,
        temperature=temperature,
    )
