"""The one place for the batches that travel between packages, a shape under every field.

Conventions that every record keeps:
* rows are right-padded; `lengths` says how many tokens of a row are real. No mask is ever inferred
  from a token id, because OPT uses one id for BOS and EOS;
* a response starts directly after its prompt, so a row is `prompt | response | padding`;
* response tensors are aligned to response tokens: column j belongs to response token j, which
  stands at sequence position `prompt_lengths + j` and is predicted at position
  `prompt_lengths + j - 1`;
* batches are *global* and live on the CPU: every rank holds the same record, and an engine moves
  the rows of its data-parallel coordinate to its device.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Base of the records that can be cut along their first dimension."""

    @property
    def num_rows(self) -> int:
        """Size of the first dimension of every field."""
        first: Tensor = getattr(self, fields(self)[0].name)
        return first.shape[0]

    def select(self, rows: Tensor) -> Self:
        """The record that holds only `rows`, int64 indices of shape `[num_selected]`."""
        return type(self)(
            **{
                field.name: getattr(self, field.name).index_select(0, rows)
                for field in fields(self)
            }
        )

    def to(self, device: torch.device) -> Self:
        """The same record on another device."""
        return type(self)(
            **{field.name: getattr(self, field.name).to(device) for field in fields(self)}
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch(Batch):
    """Right-padded token rows."""

    tokens: Tensor
    """[batch, seq] int64, padding to the right."""
    lengths: Tensor
    """[batch] int64, number of real tokens of each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SftBatch(TokenBatch):
    """Rows for next-token training."""

    loss_mask: Tensor
    """[batch, seq] bool, True where the token is a training target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceBatch(Batch):
    """Pairs of answers to one prompt, the preferred one first."""

    tokens: Tensor
    """[pairs, 2, seq] int64, index 0 of dim 1 is the chosen row, 1 the rejected one."""
    lengths: Tensor
    """[pairs, 2] int64."""
    prompt_lengths: Tensor
    """[pairs] int64, length of the prompt both rows start with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch(TokenBatch):
    """Prompts to answer; `tokens` and `lengths` hold the prompt alone."""

    ids: Tensor
    """[batch] int64, identity of each prompt in its data set; seeds the sampling of its answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout(TokenBatch):
    """Prompts with the answers sampled for them; `lengths` counts prompt and response together."""

    prompt_lengths: Tensor
    """[batch] int64."""
    logprobs: Tensor
    """[batch, response_len] float32, log-prob of each sampled token under the untruncated,
    temperature-scaled distribution; 0 beyond the response."""
    finished: Tensor
    """[batch] bool, True where the response ends in a stop token (which is part of it)."""

    @property
    def response_lengths(self) -> Tensor:
        """[batch] int64, number of response tokens, a final stop token included."""
        return self.lengths - self.prompt_lengths

    @property
    def response_mask(self) -> Tensor:
        """[batch, response_len] bool, True on response tokens, a final stop token included."""
        columns = torch.arange(self.logprobs.shape[1], device=self.lengths.device)
        return columns[None] < self.response_lengths[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience(Batch):
    """One generation phase scored by the four roles: everything PPO trains on.

    Trajectory: tokens, lengths, prompt_lengths, response_mask. Policy: logprobs, ref_logprobs.
    Value: values, advantages, returns. Outcome: scores, finished.
    """

    tokens: Tensor
    """[batch, seq] int64, prompt | response | padding."""
    lengths: Tensor
    """[batch] int64, prompt and response together."""
    prompt_lengths: Tensor
    """[batch] int64."""
    response_mask: Tensor
    """[batch, response_len] bool."""
    logprobs: Tensor
    """[batch, response_len] float32, actor before the update; 0 where masked."""
    ref_logprobs: Tensor
    """[batch, response_len] float32, reference model; 0 where masked."""
    values: Tensor
    """[batch, response_len] float32, critic before the update, value of the state in which each
    response token is chosen; 0 where masked."""
    advantages: Tensor
    """[batch, response_len] float32; 0 where masked."""
    returns: Tensor
    """[batch, response_len] float32; 0 where masked."""
    scores: Tensor
    """[batch] float32, raw score of the reward model for each response."""
    finished: Tensor
    """[batch] bool, the response ends in a stop token."""
