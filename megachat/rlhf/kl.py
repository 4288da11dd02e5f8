"""The one place for estimating the KL divergence from the reference and steering its penalty.

Estimators, with `d = logprob - ref_logprob` of a token sampled from the policy (Schulman,
"Approximating KL divergence", 2020): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. In expectation
over the policy k1 and k3 equal KL(policy || reference); k3 is never negative.

Controllers hold the coefficient of the penalty; the adaptive one is the proportional controller in
log space of Ziegler et al., "Fine-Tuning Language Models from Human Preferences" (2019), sec. 2.2.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from megachat.errors import CheckpointError, DataError
from megachat.rlhf.config import KlConfig, KlControl, KlEstimator

LOG_RATIO_LIMIT = 20.0
"""Largest log-ratio whose exponential is taken: exp(20) = 5e8 is finite in float32 and its square
too, and a policy that far from where it sampled learns nothing from the exact number."""

_SERIES_LIMIT = 0.5
"""Log-ratio up to which `k3` adds up its series."""
_SERIES_POWERS = 15
"""The last power in it: 0.5^16 / 16! is 7e-18 of the value at 0.5."""


def estimate_kl(logprobs: Tensor, *, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimates the KL of the policy from the reference at each sampled token.

    Args:
        logprobs: `[...]` log-probability of the sampled token under the policy that sampled it.
        ref_logprobs: `[...]` the same token under the reference.
        estimator: Which estimate.

    Returns:
        `[...]` nats; 0 where both log-probabilities are equal (masked positions hold 0 and 0).
    """
    log_ratio = logprobs - ref_logprobs
    if estimator is KlEstimator.K1:
        return log_ratio
    if estimator is KlEstimator.K2:
        return 0.5 * log_ratio.square()
    return k3(log_ratio)


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-d) - 1 + d to some units in the last place, without overflow; never negative.

    For small d, `expm1(-d)` and `d` cancel, so the series d^2/2! - d^3/3! + d^4/4! ... stands in:
    at |d| = 1/2, where its use ends, what is left out is below the precision of float64.
    """
    bounded = log_ratio.clamp(min=-LOG_RATIO_LIMIT)
    small = bounded.clamp(-_SERIES_LIMIT, _SERIES_LIMIT)
    series = torch.zeros_like(small)
    for power in range(_SERIES_POWERS, 2, -1):
        series = (1.0 + series) * (-small / power)
    series = 0.5 * small.square() * (1.0 + series)
    is_small = bounded.abs() < _SERIES_LIMIT
    return torch.where(is_small, series, (-bounded).expm1() + bounded).clamp(min=0.0)


class KlController(Protocol):
    """Holds the coefficient of the KL penalty."""

    @property
    def coefficient(self) -> float:
        """Reward per nat of KL."""

    def update(self, observed: float, *, num_samples: int) -> None:
        """Takes notice of one experience.

        Args:
            observed: Its mean KL, nats per response token.
            num_samples: Its number of responses.
        """

    def state_dict(self) -> dict[str, float | int]:
        """What a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`."""


class FixedKlController:
    """A coefficient that never changes."""

    def __init__(self, config: KlConfig) -> None:
        """Takes the coefficient from the configuration."""
        self._coefficient = config.coefficient

    @property
    def coefficient(self) -> float:
        """Reward per nat of KL."""
        return self._coefficient

    def update(self, observed: float, *, num_samples: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float | int]:
        """Nothing to keep: a resumed run takes its coefficient from the configuration."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accepts only the empty state.

        Raises:
            CheckpointError: The state belongs to another kind of controller.
        """
        _check_keys(state, expected=set(), control=KlControl.FIXED)


class AdaptiveKlController:
    """A coefficient that grows while the KL is above its target and shrinks while it is below.

    One update multiplies it by `1 + clip(observed / target - 1, +-error_clip) * n / horizon`.
    """

    def __init__(self, config: KlConfig) -> None:
        """Starts at the configured coefficient."""
        self._config = config
        self._coefficient = config.coefficient
        self._num_updates = 0

    @property
    def coefficient(self) -> float:
        """Reward per nat of KL."""
        return self._coefficient

    def update(self, observed: float, *, num_samples: int) -> None:
        """Moves the coefficient one step.

        Args:
            observed: Mean KL of the experience, nats per response token.
            num_samples: Responses in the experience.

        Raises:
            ConfigError: The step could turn the coefficient to zero.
            DataError: The observed KL is not a finite number.
        """
        if not math.isfinite(observed):
            raise DataError(
                f"the KL from the reference is {observed} at update {self._num_updates}: the "
                "policy has diverged; lower the learning rate and start from an earlier checkpoint"
            )
        config = self._config
        config.check_samples(num_samples)
        self._num_updates += 1
        if self._num_updates <= config.warmup_updates:
            return
        error = observed / config.target - 1.0
        clipped = max(-config.error_clip, min(config.error_clip, error))
        self._coefficient *= 1.0 + clipped * num_samples / config.horizon

    def state_dict(self) -> dict[str, float | int]:
        """The coefficient and the number of updates so far."""
        return {"coefficient": self._coefficient, "num_updates": self._num_updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`.

        Raises:
            CheckpointError: The state belongs to another kind of controller.
        """
        _check_keys(state, expected=set(self.state_dict()), control=KlControl.ADAPTIVE)
        self._coefficient = float(state["coefficient"])
        self._num_updates = int(state["num_updates"])


def create_kl_controller(config: KlConfig) -> KlController:
    """The controller that the configuration names."""
    if config.control is KlControl.FIXED:
        return FixedKlController(config)
    return AdaptiveKlController(config)


def _check_keys(state: Mapping[str, Any], *, expected: set[str], control: KlControl) -> None:
    """Refuses a state of another kind of controller."""
    if set(state) != expected:
        raise CheckpointError(
            f"the state of the KL controller has keys {sorted(state)}, but rlhf.ppo.kl.control "
            f"'{control}' needs {sorted(expected)}: resume with the control it was saved with"
        )
