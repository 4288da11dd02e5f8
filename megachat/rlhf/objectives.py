"""The one place that maps model output plus a batch record to `LossTerms`, one class per objective.

Also home of the alignment between sequence positions and response tokens (`response_positions`,
`response_logprobs`, `response_values`, `final_scores`), which scoring and training share: the
position that predicts response token j is `prompt_length + j - 1`; the critic's value of the state
in which that token is chosen stands at the same position; the reward model's score of a response
stands at its last real token (the EOS, when there is one), position `length - 1`.
"""

from typing import Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

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
from megachat.training.loss import LossTerms


def response_positions(prompt_lengths: Tensor, *, response_len: int) -> Tensor:
    """Sequence positions whose output belongs to each response token.

    Args:
        prompt_lengths: `[batch]` int64.
        response_len: Number of response columns.

    Returns:
        `[batch, response_len]` int64, `prompt_length + j - 1`. Columns beyond a response lead past
        the row's end; callers clamp them and mask the result.
    """
    columns = torch.arange(response_len, device=prompt_lengths.device)
    return prompt_lengths[:, None] + columns[None] - 1


def response_values(values: Tensor, *, prompt_lengths: Tensor, response_mask: Tensor) -> Tensor:
    """Value of the state in which each response token is chosen.

    Args:
        values: `[batch, seq]`, the output of a scalar head.
        prompt_lengths: `[batch]` int64.
        response_mask: `[batch, response_len]` bool.

    Returns:
        `[batch, response_len]` of the dtype of `values`, 0 where masked.
    """
    return _gather_response(values, prompt_lengths=prompt_lengths, response_mask=response_mask)


def response_logprobs(
    logits: Tensor,
    *,
    tokens: Tensor,
    prompt_lengths: Tensor,
    response_mask: Tensor,
    group: ProcessGroup | None,
    vocab_start: int,
    temperature: float,
) -> Tensor:
    """Log-probability of each response token under the sampling distribution.

    Args:
        logits: `[batch, seq, vocab/tp]`, this rank's slice of the vocabulary.
        tokens: `[batch, tokens_seq]` int64; wider or narrower than `logits` by padding only.
        prompt_lengths: `[batch]` int64.
        response_mask: `[batch, response_len]` bool.
        group: Ranks that share the vocabulary; None when this rank holds all of it.
        vocab_start: First vocabulary id of this rank's slice.
        temperature: The temperature the responses were sampled at.

    Returns:
        `[batch, response_len]` float32, 0 where masked.
    """
    logprobs = token_logprobs(
        logits,
        _next_tokens(tokens, seq=logits.shape[1]),
        group=group,
        vocab_start=vocab_start,
        temperature=temperature,
    )
    return _gather_response(logprobs, prompt_lengths=prompt_lengths, response_mask=response_mask)


def final_scores(values: Tensor, *, lengths: Tensor) -> Tensor:
    """The scalar head's output at the last real token of each row.

    Args:
        values: `[rows, seq]`.
        lengths: `[rows]` int64, at least 1.

    Returns:
        `[rows]` of the dtype of `values`.
    """
    return values.gather(1, (lengths - 1).clamp(min=0)[:, None]).squeeze(1)


class SftObjective:
    """Next-token cross entropy, averaged over the target tokens of the global batch."""

    metric_names = TOKEN_METRICS
    maximum_names: tuple[str, ...] = ()

    def __init__(
        self, *, num_targets: float | Tensor, group: ProcessGroup | None, vocab_start: int
    ) -> None:
        """Fixes the denominator.

        Args:
            num_targets: Number of target tokens in the global batch.
            group: Ranks that share the vocabulary; None when this rank holds all of it.
            vocab_start: First vocabulary id of this rank's slice of the logits.
        """
        self._num_targets = num_targets
        self._group = group
        self._vocab_start = vocab_start

    @classmethod
    def for_batch(
        cls, batch: SftBatch, *, group: ProcessGroup | None = None, vocab_start: int = 0
    ) -> Self:
        """The objective whose denominator is the number of targets in this global batch."""
        num_targets = _at_least_one(batch.loss_mask[:, 1:].sum())
        return cls(num_targets=num_targets, group=group, vocab_start=vocab_start)

    def model_input(self, batch: SftBatch) -> Tensor:
        """The rows themselves, `[batch, seq]`."""
        return batch.tokens

    def row_lengths(self, batch: SftBatch) -> Tensor:
        """Real tokens per row, `[batch]`."""
        return batch.lengths

    def __call__(self, output: Tensor, batch: SftBatch, row_weights: Tensor) -> LossTerms:
        """Loss of the target tokens; the first token of a row is never a target.

        Args:
            output: `[batch, seq, vocab/tp]` logits.
            batch: The micro-batch.
            row_weights: `[batch]`, 1 real, 0 filler.
        """
        seq = output.shape[1]
        statistics = token_statistics(
            output,
            _next_tokens(batch.tokens, seq=seq),
            group=self._group,
            vocab_start=self._vocab_start,
        )
        mask = _next_tokens(batch.loss_mask, seq=seq)
        weights = _token_weights(mask, row_weights=row_weights, denominator=self._num_targets)
        return token_loss(statistics.logprobs, is_greedy=statistics.is_greedy, weights=weights)


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

    def __call__(self, output: Tensor, batch: PreferenceBatch, row_weights: Tensor) -> LossTerms:
        """Loss of the pairs.

        Args:
            output: `[2 * pairs, seq]` scalars.
            batch: The micro-batch.
            row_weights: `[pairs]`, 1 real, 0 filler.
        """
        scores = final_scores(output, lengths=self.row_lengths(batch)).view(-1, 2)
        return bradley_terry_loss(
            chosen=scores[:, 0],
            rejected=scores[:, 1],
            weights=row_weights / self._num_pairs,
            center_coef=self._center_coef,
        )


class TokenwisePairwiseObjective(PairwiseObjective):
    """DeepSpeed-Chat's token-wise pair loss without its pads; see `tokenwise_pair_loss`."""

    def __call__(self, output: Tensor, batch: PreferenceBatch, row_weights: Tensor) -> LossTerms:
        """Loss of the pairs.

        Args:
            output: `[2 * pairs, seq]` scalars.
            batch: The micro-batch.
            row_weights: `[pairs]`, 1 real, 0 filler.
        """
        return tokenwise_pair_loss(
            output.view(-1, 2, output.shape[1]),
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

    def _weights(self, batch: Experience, row_weights: Tensor) -> Tensor:
        return _token_weights(
            batch.response_mask, row_weights=row_weights, denominator=self._num_tokens
        )


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
    ) -> None:
        """Fixes the denominator and where this rank's vocabulary slice starts.

        Args:
            config: Clip ranges and coefficients.
            num_tokens: Number of response tokens in the global mini-batch.
            temperature: The temperature the responses were sampled at.
            group: Ranks that share the vocabulary; None when this rank holds all of it.
            vocab_start: First vocabulary id of this rank's slice of the logits.
        """
        super().__init__(config, num_tokens=num_tokens)
        self._temperature = temperature
        self._group = group
        self._vocab_start = vocab_start

    @classmethod
    def for_batch(
        cls,
        batch: Experience,
        config: PpoConfig,
        *,
        temperature: float,
        group: ProcessGroup | None = None,
        vocab_start: int = 0,
    ) -> Self:
        """The objective whose denominator is the number of response tokens in this mini-batch."""
        return cls(
            config,
            num_tokens=_at_least_one(batch.response_mask.sum()),
            temperature=temperature,
            group=group,
            vocab_start=vocab_start,
        )

    def __call__(self, output: Tensor, batch: Experience, row_weights: Tensor) -> LossTerms:
        """Policy loss of the response tokens.

        Args:
            output: `[batch, seq, vocab/tp]` logits.
            batch: The micro-batch.
            row_weights: `[batch]`, 1 real, 0 filler.
        """
        statistics = token_statistics(
            output,
            _next_tokens(batch.tokens, seq=output.shape[1]),
            group=self._group,
            vocab_start=self._vocab_start,
            temperature=self._temperature,
        )
        logprobs, entropy = (
            _gather_response(
                values, prompt_lengths=batch.prompt_lengths, response_mask=batch.response_mask
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

    def __call__(self, output: Tensor, batch: Experience, row_weights: Tensor) -> LossTerms:
        """Value loss of the states in which the response tokens were chosen.

        Args:
            output: `[batch, seq]` scalars.
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


def _next_tokens(tokens: Tensor, *, seq: int) -> Tensor:
    """`[rows, seq]`: column p holds column p + 1 of `tokens`, 0 (or False) past its end."""
    following = tokens[:, 1 : seq + 1]
    return torch.nn.functional.pad(following, (0, seq - following.shape[1]))


def _gather_response(values: Tensor, *, prompt_lengths: Tensor, response_mask: Tensor) -> Tensor:
    """`[batch, seq]` -> `[batch, response_len]`, exactly 0 (value and gradient) where masked."""
    positions = response_positions(prompt_lengths, response_len=response_mask.shape[1])
    gathered = values.gather(1, positions.clamp(0, values.shape[1] - 1))
    return gathered.masked_fill(~response_mask, 0.0)


def _token_weights(mask: Tensor, *, row_weights: Tensor, denominator: float | Tensor) -> Tensor:
    """`[rows, columns]` float32, each token's share of the global loss."""
    return mask * (row_weights.float() / denominator)[:, None]


def _at_least_one(count: Tensor) -> Tensor:
    """A count that may be divided by: a batch without any token has loss 0, not NaN."""
    return count.clamp(min=1).float()
