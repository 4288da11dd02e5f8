"""The one place for what the last pipeline stage computes from the decoder's output."""

import torch
from torch import Tensor, nn

from megachat.model import layers
from megachat.model.config import Head, OptConfig
from megachat.model.packing import take_rows
from megachat.parallel.groups import ProcessGroups


class OutputHead(nn.Module):
    """Base of the heads: `project_out` where the embedding is narrower than the model."""

    def __init__(
        self, config: OptConfig, *, groups: ProcessGroups, dtype: torch.dtype, sequence: bool
    ) -> None:
        """Creates uninitialised parameters.

        Args:
            config: The architecture.
            groups: Of the model.
            dtype: Of the parameters.
            sequence: Whether the decoder's output is cut along the sequence.
        """
        super().__init__()
        self._tensor = groups.tensor
        self._sequence = sequence
        self.project_out: nn.Parameter | None = None
        if config.has_projection:
            self.project_out = layers.empty_parameter(config.embed_dim, config.hidden, dtype=dtype)
            layers.mark_sequence_parallel(self.project_out, enabled=sequence)

    def select(self, x: Tensor, outputs: Tensor | None) -> Tensor:
        """`[tokens, 1, ...]` to `[outputs, ...]`, the packed tokens whose output is read."""
        x = x.squeeze(1)
        return x if outputs is None else take_rows(x, outputs)

    def project(self, x: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., embed_dim]`."""
        return x if self.project_out is None else nn.functional.linear(x, self.project_out)


class LanguageModelHead(OutputHead):
    """Logits with the tied word embedding, over this rank's part of the vocabulary."""

    def __init__(
        self,
        config: OptConfig,
        *,
        rows: int,
        groups: ProcessGroups,
        dtype: torch.dtype,
        sequence: bool,
    ) -> None:
        """Creates a copy of the word embedding where the first stage is another rank.

        Args:
            config: The architecture.
            rows: Of this rank's part of the word embedding.
            groups: Of the model.
            dtype: Of the parameters.
            sequence: Whether the decoder's output is cut along the sequence.
        """
        super().__init__(config, groups=groups, dtype=dtype, sequence=sequence)
        self.word_embedding: nn.Parameter | None = None
        if not groups.is_first_stage:
            self.word_embedding = layers.empty_parameter(rows, config.embed_dim, dtype=dtype)
        first_row = groups.coordinate.tensor * rows
        self._real_rows = min(max(config.vocab_size - first_row, 0), rows)

    def forward(
        self, x: Tensor, *, embedding: nn.Parameter | None, outputs: Tensor | None
    ) -> Tensor:
        """Computes logits.

        Args:
            x: `[tokens, 1, hidden]` (sequence shard where sequence parallel).
            embedding: The first stage's `[padded_vocab/tp, embed_dim]`, where it is on this rank.
            outputs: `[outputs]` packed tokens whose logits are read; None: all.

        Returns:
            `[outputs, padded_vocab/tp]`; padding columns hold the dtype's lowest number.
        """
        weight = embedding if self.word_embedding is None else self.word_embedding
        assert weight is not None
        if self._sequence:
            x = layers.gather_sequence(self.project(x), self._tensor, sum_gradients=True)
            x = self.select(x, outputs)
        else:
            x = self.project(self.select(x, outputs))
        logits = layers.column_parallel_product(
            x, weight, self._tensor, reduce_gradient=not self._sequence
        )
        # Behind autograd's back: a softmax gives these columns probability and gradient zero, and
        # an in-place write that it sees would copy the gradient of all logits.
        logits.detach()[..., self._real_rows :].fill_(torch.finfo(logits.dtype).min)
        return logits


class ScalarHead(OutputHead):
    """One fp32 number per position, as `OPTForSequenceClassification` computes its score."""

    def __init__(
        self, config: OptConfig, *, groups: ProcessGroups, dtype: torch.dtype, sequence: bool
    ) -> None:
        """Creates the score vector."""
        super().__init__(config, groups=groups, dtype=dtype, sequence=sequence)
        self.score = layers.empty_parameter(1, config.embed_dim, dtype=dtype)
        layers.mark_sequence_parallel(self.score, enabled=sequence)

    def forward(
        self, x: Tensor, *, embedding: nn.Parameter | None, outputs: Tensor | None
    ) -> Tensor:
        """Computes scores.

        Args:
            x: `[tokens, 1, hidden]` (sequence shard where sequence parallel).
            embedding: Not used.
            outputs: `[outputs]` packed tokens whose score is read; None: all.

        Returns:
            `[outputs]` float32.
        """
        if not self._sequence:
            return self._score(self.select(x, outputs))
        scores = layers.gather_sequence(self._score(x), self._tensor, sum_gradients=False)
        return self.select(scores, outputs)

    def _score(self, x: Tensor) -> Tensor:
        """`[..., hidden]` to `[...]` float32."""
        return nn.functional.linear(self.project(x).float(), self.score.float()).squeeze(-1)


def build_head(
    head: Head,
    config: OptConfig,
    *,
    rows: int,
    groups: ProcessGroups,
    dtype: torch.dtype,
    sequence: bool,
) -> OutputHead:
    """The output module for a kind of head; see `LanguageModelHead` for the arguments."""
    if head is Head.LANGUAGE_MODEL:
        return LanguageModelHead(config, rows=rows, groups=groups, dtype=dtype, sequence=sequence)
    return ScalarHead(config, groups=groups, dtype=dtype, sequence=sequence)
