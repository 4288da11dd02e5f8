"""The one place that maps model output plus a batch record to `LossTerms`, one class per objective.

Also home of the alignment between sequence positions and response tokens (`response_logprobs`,
`response_values`, and the spans), which scoring and training share: the
position that predicts response token j is `prompt_length + j - 1`; the critic's value of the state
in which that token is chosen stands at the same position; the reward model's score of a response
stands at its last real token (the EOS, when there is one), position `length - 1`. Only there is the
head of a model computed (`response_spans`, `final_spans`).
"""

from typing import Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megachat.ops.registry import Backend
from megachat.ops.token_logprobs import token_logprobs, token_statistics
from megachat.records import Experience, PreferenceBatch, SftBatch
from megachat.rlhf.config import PpoConfig
from megachat.rlhf.losses import (
    BRADLEY_TERRY_METRICS,
    POLICY_MAXIMA,
    POLICY_METRICS,
    TOKEN_METRICS,
    VALUE_METRICS,
    bradley_terry_loss,
    policy_loss,
    token_loss,
    tokenwise_pair_loss,
    value_loss,
)
from megachat.training.loss import LossTerms, ModelOutput


def response_spans(*, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """`[batch, 2]` int64, first and end position whose output belongs to a response token."""
    return torch.stack([prompt_lengths, lengths], dim=1) - 1


def final_spans(lengths: Tensor) -> Tensor:
    """`[rows, 2]` int64, the position of the last real token and the one after it."""
    return torch.stack([lengths - 1, lengths], dim=1)


def response_values(
    output: ModelOutput, *, prompt_lengths: Tensor, response_mask: Tensor
) -> Tensor:
    """Value of the state in which each response token is chosen.

    Args:
        output: Of a scalar head at the `response_spans`.
        prompt_lengths: `[batch]` int64.
        response_mask: `[batch, response_len]` bool.

    Returns:
        `[batch, response_len]` of the dtype of the output, 0 where masked.
    """
    return _response_table(
        output.values, output, prompt_lengths=prompt_lengths, response_mask=response_mask
    )


def response_logprobs(
    output: ModelOutput,
    *,
    tokens: Tensor,
    prompt_lengths: Tensor,
    response_mask: Tensor,
    group: ProcessGroup | None,
    vocab_start: int,
    temperature: float,
    backend: Backend = Backend.REFERENCE,
) -> Tensor:
    """Log-probability of each response token under the sampling distribution.

    Args:
        output: Logits of this rank's slice of the vocabulary at the `response_spans`.
        tokens: `[batch, seq]` int64.
        prompt_lengths: `[batch]` int64.
        response_mask: `[batch, response_len]` bool.
        group: Ranks that share the vocabulary; None when this rank holds all of it.
        vocab_start: First vocabulary id of this rank's slice.
        temperature: The temperature the responses were sampled at.
        backend: Who computes the log-probabilities.

    Returns:
        `[batch, response_len]` float32, 0 where masked.
    """
    logprobs = token_logprobs(
        output.values[None],
        output.following(tokens)[None],
        group=group,
        vocab_start=vocab_start,
        temperature=temperature,
        backend=backend,
    )
    return _response_table(
        logprobs[0], output, prompt_lengths=prompt_lengths, response_mask=response_mask
    )


class SftObjective:
    """Next-token cross entropy, averaged over the target tokens of the global batch."""

    metric_names = TOKEN_METRICS
    maximum_names: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        num_targets: float | Tensor,
        group: ProcessGroup | None,
        vocab_start: int,
        backend: Backend = Backend.REFERENCE,
    ) -> None:
        """Fixes the denominator.

        Args:
            num_targets: Number of target tokens in the global batch.
            group: Ranks that share the vocabulary; None when this rank holds all of it.
            vocab_start: First vocabulary id of this rank's slice of the logits.
            backend: Who computes the log-probabilities.
        """
        self._num_targets = num_targets
        self._group = group
        self._vocab_start = vocab_start
        self._backend = backend

    @classmethod
    def for_batch(
        cls,
        batch: SftBatch,
        *,
        group: ProcessGroup | None = None,
        vocab_start: int = 0,
        backend: Backend = Backend.REFERENCE,
    ) -> Self:
        """The objective whose denominator is the number of targets in this global batch."""
        return cls(
            num_targets=_at_least_one(batch.loss_mask[:, 1:].sum()),
            group=group,
            vocab_start=vocab_start,
            backend=backend,
        )

    def model_input(self, batch: SftBatch) -> Tensor:
        """The rows themselves, `[batch, seq]`."""
        return batch.tokens

    def row_lengths(self, batch: SftBatch) -> Tensor:
        """Real tokens per row, `[batch]`."""
        return batch.lengths

    def output_spans(self, batch: SftBatch) -> None:
        """Targets may be anywhere, so the output is read everywhere."""

    def __call__(self, output: ModelOutput, batch: SftBatch, row_weights: Tensor) -> LossTerms:
        """Loss of the target tokens; the first token of a row is never a target.

        Args:
            output: Logits of all tokens.
            batch: The micro-batch.
            row_weights: `[batch]`, 1 real, 0 filler.
        """
        statistics = token_statistics(
            output.values[None],
            output.following(batch.tokens)[None],
            group=self._group,
            vocab_start=self._vocab_start,
            backend=self._backend,
        )
        row_share = row_weights.float() / self._num_targets
        weights = output.following(batch.loss_mask) * row_share[output.rows]
        return token_loss(
            statistics.logprobs[0], is_greedy=statistics.is_greedy[0], weights=weights
        )


class PairwiseObjective:
    """Bradley-Terry loss on the scores at the last token, averaged over the global pairs."""

    metric_names = BRADLEY_TERRY_METRICS
    maximum_names: tuple[str, ...] = ()

    def __init__(self, *, num_pairs: float | Tensor, center_coef: float = 0.0) -> None:
        """Fixes the denominator.

        Args:
            num_pairs: Number of pairs in the global batch.
            center_coef: Weight of the mean square of the scores, which keeps them around zero.
        """
        self._num_pairs = num_pairs
        self._center_coef = center_coef

    @classmethod
    def for_batch(cls, batch: PreferenceBatch, *, center_coef: float = 0.0) -> Self:
        """The objective whose denominator is the number of pairs in this global batch."""
        return cls(num_pairs=batch.num_rows, center_coef=center_coef)

    def model_input(self, batch: PreferenceBatch) -> Tensor:
        """`[2 * pairs, seq]`: chosen and rejected row of each pair next to each other."""
        return batch.tokens.flatten(0, 1)

    def row_lengths(self, batch: PreferenceBatch) -> Tensor:
        """Real tokens per model row, `[2 * pairs]`."""
        return batch.lengths.flatten()

    def output_spans(self, batch: PreferenceBatch) -> Tensor | None:
        """The last token of each row, `[2 * pairs, 2]`."""
        return final_spans(self.row_lengths(batch))

    def __call__(
        self, output: ModelOutput, batch: PreferenceBatch, row_weights: Tensor
    ) -> LossTerms:
        """Loss of the pairs.

        Args:
            output: Scalars at the last tokens.
            batch: The micro-batch.
            row_weights: `[pairs]`, 1 real, 0 filler.
        """
        scores = output.values.view(-1, 2)
        return bradley_terry_loss(
            chosen=scores[:, 0],
            rejected=scores[:, 1],
            weights=row_weights / self._num_pairs,
            center_coef=self._center_coef,
        )


class TokenwisePairwiseObjective(PairwiseObjective):
    """DeepSpeed-Chat's token-wise pair loss without its pads; see `tokenwise_pair_loss`."""

    def output_spans(self, batch: PreferenceBatch) -> None:
        """All tokens are compared, so the output is read everywhere."""

    def __call__(
        self, output: ModelOutput, batch: PreferenceBatch, row_weights: Tensor
    ) -> LossTerms:
        """Loss of the pairs.

        Args:
            output: Scalars of all tokens.
            batch: The micro-batch.
            row_weights: `[pairs]`, 1 real, 0 filler.
        """
        rows = self.model_input(batch)
        values = output.to_columns(output.values, output.positions, like=rows)
        return tokenwise_pair_loss(
            values.view(-1, 2, values.shape[1]),
            tokens=batch.tokens,
            lengths=batch.lengths,
            weights=row_weights / self._num_pairs,
            center_coef=self._center_coef,
        )


class _ExperienceObjective:
    """What the two PPO objectives share: their rows and their denominator."""

    def __init__(self, config: PpoConfig, *, num_tokens: float | Tensor) -> None:
        """Fixes the denominator.

        Args:
            config: Clip ranges and coefficients.
            num_tokens: Number of response tokens in the global mini-batch.
        """
        self._config = config
        self._num_tokens = num_tokens

    def model_input(self, batch: Experience) -> Tensor:
        """Prompt and response, `[batch, seq]`."""
        return batch.tokens

    def row_lengths(self, batch: Experience) -> Tensor:
        """Prompt and response tokens per row, `[batch]`."""
        return batch.lengths

    def output_spans(self, batch: Experience) -> Tensor:
        """Where the response tokens are chosen, `[batch, 2]`."""
        return response_spans(prompt_lengths=batch.prompt_lengths, lengths=batch.lengths)

    def _weights(self, batch: Experience, row_weights: Tensor) -> Tensor:
        """`[batch, response_len]` float32, each token's share of the global loss."""
        return batch.response_mask * (row_weights.float() / self._num_tokens)[:, None]


class PolicyObjective(_ExperienceObjective):
    """PPO's clipped surrogate for the actor, averaged over the global response tokens."""

    metric_names = POLICY_METRICS
    maximum_names = POLICY_MAXIMA

    def __init__(
        self,
        config: PpoConfig,
        *,
        num_tokens: float | Tensor,
        temperature: float,
        group: ProcessGroup | None,
        vocab_start: int,
        backend: Backend = Backend.REFERENCE,
    ) -> None:
        """Fixes the denominator and where this rank's vocabulary slice starts.

        Args:
            config: Clip ranges and coefficients.
            num_tokens: Number of response tokens in the global mini-batch.
            temperature: The temperature the responses were sampled at.
            group: Ranks that share the vocabulary; None when this rank holds all of it.
            vocab_start: First vocabulary id of this rank's slice of the logits.
            backend: Who computes log-probabilities and entropies.
        """
        super().__init__(config, num_tokens=num_tokens)
        self._temperature = temperature
        self._group = group
        self._vocab_start = vocab_start
        self._backend = backend

    @classmethod
    def for_batch(
        cls,
        batch: Experience,
        config: PpoConfig,
        *,
        temperature: float,
        group: ProcessGroup | None = None,
        vocab_start: int = 0,
        backend: Backend = Backend.REFERENCE,
    ) -> Self:
        """The objective whose denominator is the number of response tokens in this mini-batch."""
        return cls(
            config,
            num_tokens=_at_least_one(batch.response_mask.sum()),
            temperature=temperature,
            group=group,
            vocab_start=vocab_start,
            backend=backend,
        )

    def __call__(self, output: ModelOutput, batch: Experience, row_weights: Tensor) -> LossTerms:
        """Policy loss of the response tokens.

        Args:
            output: Logits where they are chosen.
            batch: The micro-batch.
            row_weights: `[batch]`, 1 real, 0 filler.
        """
        statistics = token_statistics(
            output.values[None],
            output.following(batch.tokens)[None],
            group=self._group,
            vocab_start=self._vocab_start,
            temperature=self._temperature,
            backend=self._backend,
        )
        logprobs, entropy = (
            _response_table(
                values[0],
                output,
                prompt_lengths=batch.prompt_lengths,
                response_mask=batch.response_mask,
            )
            for values in (statistics.logprobs, statistics.entropy)
        )
        return policy_loss(
            logprobs,
            old_logprobs=batch.logprobs,
            advantages=batch.advantages,
            entropy=entropy,
            weights=self._weights(batch, row_weights),
            clip_range=self._config.clip_range,
            dual_clip=self._config.dual_clip,
            entropy_coef=self._config.entropy_coef,
        )


class ValueObjective(_ExperienceObjective):
    """PPO's clipped squared error for the critic, averaged over the global response tokens."""

    metric_names = VALUE_METRICS
    maximum_names: tuple[str, ...] = ()

    @classmethod
    def for_batch(cls, batch: Experience, config: PpoConfig) -> Self:
        """The objective whose denominator is the number of response tokens in this mini-batch."""
        return cls(config, num_tokens=_at_least_one(batch.response_mask.sum()))

    def __call__(self, output: ModelOutput, batch: Experience, row_weights: Tensor) -> LossTerms:
        """Value loss of the states in which the response tokens were chosen.

        Args:
            output: Scalars of those states.
            batch: The micro-batch.
            row_weights: `[batch]`, 1 real, 0 filler.
        """
        values = response_values(
            output, prompt_lengths=batch.prompt_lengths, response_mask=batch.response_mask
        )
        return value_loss(
            values,
            old_values=batch.values,
            returns=batch.returns,
            weights=self._weights(batch, row_weights),
            clip_range=self._config.value_clip_range,
        )


def _response_table(
    values: Tensor, output: ModelOutput, *, prompt_lengths: Tensor, response_mask: Tensor
) -> Tensor:
    """`[places]` -> `[batch, response_len]`, exactly 0 (value and gradient) where masked."""
    columns = output.positions - prompt_lengths[output.rows] + 1
    table = output.to_columns(values, columns, like=response_mask)
    return table.masked_fill(~response_mask, 0.0)


def _at_least_one(count: Tensor) -> Tensor:
    """A count that may be divided by: a batch without any token has loss 0, not NaN."""
    return count.clamp(min=1).float()
