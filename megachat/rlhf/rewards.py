"""The one place where scores and KL become one reward per response token."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megachat.errors import CheckpointError, ConfigError, DataError
from megachat.rlhf.config import MissingEos, RewardConfig, RewardNormalization

_SMALLEST_STD = 1e-6
"""A standard deviation of at most this share of the mean's size (of 1, if that is smaller) is
round-off of constant scores, which are divided by 1 instead."""


def shape_rewards(
    *,
    scores: Tensor,
    kl: Tensor,
    response_mask: Tensor,
    finished: Tensor,
    kl_coefficient: float,
    config: RewardConfig,
) -> Tensor:
    """The reward of each response token.

    Every response token costs `kl_coefficient * kl`; the last one (the EOS of a finished response)
    also earns the outcome: the score clipped to +-`config.clip`, then treated for a missing EOS,
    so that a penalty bites whatever the score.

    Args:
        scores: `[batch]` normalised scores.
        kl: `[batch, response_len]` KL estimate per token, nats.
        response_mask: `[batch, response_len]` bool, a prefix of each row; EOS included.
        finished: `[batch]` bool, the response ends in EOS.
        kl_coefficient: Reward per nat.
        config: Clip and missing-EOS rule.

    Returns:
        `[batch, response_len]` float32, 0 beyond each response. A row without response tokens is
        all 0: there is no action to credit with its score.
    """
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    is_last = columns[None] == response_mask.sum(dim=1)[:, None] - 1
    outcome = outcome_scores(scores, finished=finished, config=config)
    penalty = (kl_coefficient * kl.float()).masked_fill(~response_mask, 0.0)
    return torch.where(is_last, outcome[:, None], 0.0) - penalty


def outcome_scores(scores: Tensor, *, finished: Tensor, config: RewardConfig) -> Tensor:
    """Clips the scores and applies the rule for a missing EOS.

    Args:
        scores: `[batch]` normalised scores.
        finished: `[batch]` bool.
        config: Clip and missing-EOS rule.

    Returns:
        `[batch]` float32.
    """
    clipped = scores.float().clamp(-config.clip, config.clip)
    if config.missing_eos is MissingEos.KEEP:
        return clipped
    if config.missing_eos is MissingEos.PENALIZE:
        return torch.where(finished, clipped, clipped + config.missing_eos_value)
    return torch.where(finished, clipped, config.missing_eos_value)


class RewardNormalizer:
    """Standardises scores to mean 0 and standard deviation 1, however the mean is come by.

    Statistics are plain float64 numbers over *global* batches, so they are the same on every rank
    and independent of batch sizes (Welford's update in the pairwise form of Chan et al., 1979).
    """

    def __init__(self, mode: RewardNormalization) -> None:
        """Starts without samples."""
        self._mode = mode
        self._count = 0
        self._mean = 0.0
        self._squares = 0.0  # sum of squared deviations from the mean

    @property
    def needs_calibration(self) -> bool:
        """Whether scores of reference samples have to be passed to `calibrate` first."""
        return self._mode is RewardNormalization.REFERENCE and self._count == 0

    @property
    def mean(self) -> float:
        """What is subtracted from a score; 0 without normalisation."""
        return self._mean

    @property
    def std(self) -> float:
        """What a score is divided by; 1 without normalisation or where all scores are equal."""
        if self._count < 2:
            return 1.0
        std = float((self._squares / (self._count - 1)) ** 0.5)
        return std if std > _SMALLEST_STD * max(1.0, abs(self._mean)) else 1.0

    def calibrate(self, scores: Tensor) -> None:
        """Measures reference samples; may be called batch by batch.

        Args:
            scores: `[samples]` raw scores.

        Raises:
            ConfigError: The mode does not measure reference samples.
            DataError: A score is not a finite number.
        """
        if self._mode is not RewardNormalization.REFERENCE:
            raise ConfigError(
                f"rlhf.ppo.reward.normalization '{self._mode}' measures no reference samples: "
                f"calibrate only with '{RewardNormalization.REFERENCE}'"
            )
        self._absorb(scores)

    def standardize(self, scores: Tensor) -> Tensor:
        """Normalises the scores of one global batch; `running` absorbs them first.

        Args:
            scores: `[batch]` raw scores.

        Returns:
            `[batch]` float32.

        Raises:
            ConfigError: Mode `reference` was not calibrated.
            DataError: A score is not a finite number.
        """
        if self.needs_calibration:
            raise ConfigError(
                "rlhf.ppo.reward.normalization 'reference' has measured 0 samples: score responses "
                "of the reference model and pass them to calibrate before training"
            )
        _require_finite(scores)
        if self._mode is RewardNormalization.RUNNING:
            self._absorb(scores)
        return (scores.float() - self.mean) / self.std

    def state_dict(self) -> dict[str, float | int | str]:
        """What a resumed run needs."""
        return {
            "mode": str(self._mode),
            "count": self._count,
            "mean": self._mean,
            "squares": self._squares,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`.

        Raises:
            CheckpointError: It was saved with another mode.
        """
        if state["mode"] != self._mode:
            raise CheckpointError(
                f"the reward statistics were saved with normalization '{state['mode']}', but "
                f"rlhf.ppo.reward.normalization is '{self._mode}': resume with the former"
            )
        self._count = int(state["count"])
        self._mean = float(state["mean"])
        self._squares = float(state["squares"])

    def _absorb(self, scores: Tensor) -> None:
        """Merges the statistics of a batch into those so far."""
        if scores.numel() == 0:
            return
        _require_finite(scores)
        sample = scores.detach().double()
        count, mean = sample.numel(), float(sample.mean())
        squares = float((sample - mean).square().sum())
        total = self._count + count
        distance = mean - self._mean
        self._squares += squares + distance**2 * self._count * count / total
        self._mean += distance * count / total
        self._count = total


def _require_finite(scores: Tensor) -> None:
    """Refuses scores that would spoil every statistic and every gradient after them."""
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise DataError(
            f"{bad} of {scores.numel()} scores of the reward model are not finite: check the "
            "reward model's checkpoint and dtype"
        )
