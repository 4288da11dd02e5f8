"""The one place for what the four roles say about a rollout, as functions that engines run."""

from torch import Tensor
from torch.distributed import ProcessGroup

from megachat.ops.registry import Backend
from megachat.records import Rollout
from megachat.rlhf.objectives import (
    final_spans,
    response_logprobs,
    response_spans,
    response_values,
)
from megachat.training.loss import ModelOutput


class _RolloutScore:
    """What the score functions of rollouts share: their rows."""

    def model_input(self, batch: Rollout) -> Tensor:
        """Prompt and response, `[batch, seq]`."""
        return batch.tokens

    def row_lengths(self, batch: Rollout) -> Tensor:
        """Prompt and response tokens per row, `[batch]`."""
        return batch.lengths

    def output_spans(self, batch: Rollout) -> Tensor:
        """Where the response tokens are chosen, `[batch, 2]`."""
        return response_spans(prompt_lengths=batch.prompt_lengths, lengths=batch.lengths)


class ResponseLogprobs(_RolloutScore):
    """Log-probability of each response token: actor and reference."""

    def __init__(
        self,
        *,
        response_len: int,
        temperature: float,
        group: ProcessGroup,
        vocab_start: int,
        backend: Backend = Backend.REFERENCE,
    ) -> None:
        """Fixes where this rank's vocabulary slice lies.

        Args:
            response_len: Response columns of the rollout.
            temperature: The temperature the responses were sampled at.
            group: Ranks that share the vocabulary.
            vocab_start: First vocabulary id of this rank's slice of the logits.
            backend: Who computes the log-probabilities.
        """
        self.columns = response_len
        self._temperature = temperature
        self._group = group
        self._vocab_start = vocab_start
        self._backend = backend

    def __call__(self, output: ModelOutput, batch: Rollout) -> Tensor:
        """`[batch, response_len]` float32, 0 beyond the response."""
        return response_logprobs(
            output,
            tokens=batch.tokens,
            prompt_lengths=batch.prompt_lengths,
            response_mask=batch.response_mask,
            group=self._group,
            vocab_start=self._vocab_start,
            temperature=self._temperature,
            backend=self._backend,
        )


class ResponseValues(_RolloutScore):
    """The critic's raw output for the state in which each response token is chosen."""

    def __init__(self, *, response_len: int) -> None:
        """Fixes the number of response columns."""
        self.columns = response_len

    def __call__(self, output: ModelOutput, batch: Rollout) -> Tensor:
        """`[batch, response_len]` float32, 0 beyond the response."""
        return response_values(
            output, prompt_lengths=batch.prompt_lengths, response_mask=batch.response_mask
        )


class FinalScores(_RolloutScore):
    """The reward model's score of the whole row, at its last real token."""

    columns = 1

    def output_spans(self, batch: Rollout) -> Tensor:
        """The last token of each row, `[batch, 2]`."""
        return final_spans(batch.lengths)

    def __call__(self, output: ModelOutput, batch: Rollout) -> Tensor:
        """`[batch, 1]` float32."""
        return output.values[:, None]
