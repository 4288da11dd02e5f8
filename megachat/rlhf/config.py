"""The one place for the constants of PPO: `PpoConfig` with its tables `kl` and `reward`.

Floats that switch something off do so at `inf`, which TOML can write.
"""

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from megachat.config import ConfigModel
from megachat.errors import ConfigError


class Recipe(StrEnum):
    """Named sets of defaults; a key that is given wins over its recipe."""

    MEGACHAT = "megachat"
    """The defaults documented at each field."""
    DEEPSPEED_CHAT = "deepspeed-chat"
    """The constants that DeepSpeed-Chat hard-codes (commit 83757d9c): fixed KL coefficient 0.1 on
    the k1 estimate, scores clipped to +-5 without normalisation, no whitening, one update per
    experience. Only constants: the EOS step stays inside the mask, sampling stays at temperature
    1, denominators stay global."""


class KlEstimator(StrEnum):
    """Per-token estimates of KL(policy || reference) from tokens of the policy; see `rlhf.kl`."""

    K1 = "k1"
    """The log-ratio: unbiased, high variance, may be negative."""
    K2 = "k2"
    """Half the squared log-ratio: biased, low variance."""
    K3 = "k3"
    """exp(-log-ratio) - 1 + log-ratio: unbiased and never negative."""


class KlControl(StrEnum):
    """Who sets the coefficient of the KL penalty."""

    FIXED = "fixed"
    """It stays what it is."""
    ADAPTIVE = "adaptive"
    """It follows the distance of the observed KL from a target."""


class RewardNormalization(StrEnum):
    """Where the mean and standard deviation that standardise the scores come from."""

    NONE = "none"
    """Raw scores."""
    REFERENCE = "reference"
    """Measured once, on responses that the reference model samples before training."""
    RUNNING = "running"
    """Of all scores seen so far, the current batch included."""


class MissingEos(StrEnum):
    """What happens to the score of a response that was cut off instead of ending in EOS."""

    KEEP = "keep"
    """Nothing."""
    PENALIZE = "penalize"
    """`missing_eos_value` is added to it."""
    REPLACE = "replace"
    """`missing_eos_value` takes its place."""


class Whitening(StrEnum):
    """How the advantages of a global batch are standardised."""

    NONE = "none"
    """Not at all."""
    SCALE = "scale"
    """Divided by the standard deviation, the mean with the rest: signs stay as they are."""
    FULL = "full"
    """Mean 0 and standard deviation 1."""


class OldLogprobs(StrEnum):
    """Where the log-probs of the policy that sampled come from."""

    RECOMPUTE = "recompute"
    """A forward pass of the actor on its training path over each rollout."""
    ROLLOUT = "rollout"
    """Decoding noted them down. How far they are from the training path's is measured by the first
    update on each experience, which starts from the policy that sampled."""


class LogprobTolerance(ConfigModel):
    """How far decoding and training may disagree about the same policy, by the actor's precision.

    The mean absolute difference of the log-probs of response tokens, in nats per token. It does not
    grow with the number of tokens, as the largest difference of round-off does.
    """

    fp32: float = Field(default=1e-4, gt=0.0, allow_inf_nan=False)
    """Ten times the largest difference of a single token in the tests of all layouts."""
    bf16: float = Field(default=0.05, gt=0.0, allow_inf_nan=False)
    """A quarter of the default `clip_range`: beyond it, round-off alone would work the clip."""

    def of(self, dtype: torch.dtype) -> float:
        """The tolerance of a model with parameters of `dtype`."""
        return {torch.float32: self.fp32, torch.bfloat16: self.bf16}[dtype]


class KlConfig(ConfigModel):
    """Penalty on the divergence of the actor from the reference model."""

    estimator: Annotated[KlEstimator, Field(strict=False)] = KlEstimator.K1
    """Estimate that enters the reward of every response token."""
    control: Annotated[KlControl, Field(strict=False)] = KlControl.ADAPTIVE
    """Fixed or adaptive coefficient."""
    coefficient: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    """Reward per nat, at the start where it adapts."""
    target: float = Field(default=0.1, gt=0.0, allow_inf_nan=False)
    """KL that the adaptive controller steers towards, nats per response token."""
    horizon: int = Field(default=10_000, ge=1)
    """An update on n samples changes the coefficient by the clipped relative error x n / horizon.
    A change of at most 10 % an iteration whatever the batch size is `horizon` = 10 x batch with
    `error_clip` = 1."""
    error_clip: float = Field(default=0.2, gt=0.0, le=1.0)
    """Bound on the relative error that one update acts on."""
    warmup_updates: int = Field(default=0, ge=0)
    """Updates that leave the coefficient alone, while the first KL is near zero by construction."""

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        """Refuses a coefficient that an adaptive controller could never move."""
        if self.control is KlControl.ADAPTIVE and self.coefficient == 0.0:
            raise ValueError(
                "coefficient 0 with control 'adaptive' stays 0, since it is only ever multiplied: "
                "give a coefficient above 0, or control = 'fixed'"
            )
        return self

    def check_samples(self, num_samples: int) -> None:
        """Checks that an update on `num_samples` responses leaves the coefficient above zero.

        Raises:
            ConfigError: The largest step would reach zero.
        """
        if self.error_clip * num_samples >= self.horizon:
            raise ConfigError(
                f"rlhf.ppo.kl.horizon: {self.horizon} samples with error_clip {self.error_clip} x "
                f"{num_samples} samples an update = {self.error_clip * num_samples:g} could turn "
                "the coefficient to 0: raise horizon or lower error_clip"
            )


class RewardConfig(ConfigModel):
    """From a raw score to the reward on the last response token."""

    normalization: Annotated[RewardNormalization, Field(strict=False)] = (
        RewardNormalization.REFERENCE
    )
    """Standardisation of the scores, which makes `clip` and `missing_eos_value` comparable."""
    normalization_samples: int = Field(default=512, ge=2)
    """Responses of the reference model that mode `reference` measures."""
    clip: float = Field(default=5.0, gt=0.0, allow_inf_nan=True)
    """Normalised scores are clipped to +-clip; `inf` does not clip."""
    missing_eos: Annotated[MissingEos, Field(strict=False)] = MissingEos.PENALIZE
    """Treatment of responses that were cut off."""
    missing_eos_value: float = Field(default=-1.0, allow_inf_nan=False)
    """Added to, or put in place of, the clipped score of a response without EOS."""

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        """Refuses a penalty that would reward being cut off."""
        if self.missing_eos is MissingEos.PENALIZE and self.missing_eos_value > 0.0:
            raise ValueError(
                f"missing_eos_value {self.missing_eos_value} is above 0, so missing_eos 'penalize' "
                "would reward cut-off responses: give a value of at most 0"
            )
        return self


class PpoConfig(ConfigModel):
    """Proximal policy optimisation on one experience at a time."""

    recipe: Annotated[Recipe, Field(strict=False)] = Recipe.MEGACHAT
    """Defaults of the keys that are not given."""
    gamma: float = Field(default=1.0, gt=0.0, le=1.0)
    """Discount per token."""
    lam: float = Field(default=0.95, ge=0.0, le=1.0)
    """Decay of the generalised advantage estimate."""
    clip_range: float = Field(default=0.2, gt=0.0, lt=1.0)
    """The probability ratio gains nothing outside 1 +- clip_range."""
    dual_clip: float = Field(default=math.inf, gt=1.0, allow_inf_nan=True)
    """Bound on the ratio where the advantage is negative; `inf` switches it off."""
    value_clip_range: float = Field(default=0.2, gt=0.0, allow_inf_nan=True)
    """A value gains nothing further than this from its old value; `inf` does not clip."""
    entropy_coef: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Bonus per nat of policy entropy."""
    whitening: Annotated[Whitening, Field(strict=False)] = Whitening.FULL
    """Standardisation of the advantages over the whole experience."""
    epochs: int = Field(default=2, ge=1)
    """Passes over each experience."""
    minibatches: int = Field(default=2, ge=1)
    """Optimizer steps a pass; the experience is cut into this many mini-batches of rows."""
    early_stop_kl: float = Field(default=math.inf, gt=0.0, allow_inf_nan=True)
    """No further mini-batch of an experience once the estimate of KL(sampling policy || updated
    policy) exceeds this, nats per token; `inf` never stops."""
    kl: KlConfig = KlConfig()
    """KL penalty."""
    reward: RewardConfig = RewardConfig()
    """Score shaping."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recipe(cls, data: Any) -> Any:
        """Puts the recipe's values below the given ones."""
        if not isinstance(data, Mapping) or data.get("recipe") not in list(Recipe):
            return data
        return _merged(_RECIPES[Recipe(data["recipe"])], data)

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        """Refuses keys that are fine alone but leave another key without effect."""
        if self.num_updates == 1 and not math.isinf(self.early_stop_kl):
            raise ValueError(
                f"early_stop_kl {self.early_stop_kl} never acts with epochs 1 x minibatches 1 = 1 "
                "update per experience: raise epochs or minibatches, or leave early_stop_kl out"
            )
        return self

    @property
    def num_updates(self) -> int:
        """Optimizer steps on each experience, unless `early_stop_kl` ends them."""
        return self.epochs * self.minibatches

    def check_rows(self, num_rows: int) -> None:
        """Checks the constants against the number of responses per experience.

        Raises:
            ConfigError: The rows cannot be cut into equal mini-batches, or one KL update could
                turn the coefficient to zero or below.
        """
        if num_rows % self.minibatches:
            raise ConfigError(
                f"rlhf.ppo.minibatches: {num_rows} rows an experience cannot be cut into "
                f"{self.minibatches} equal mini-batches: choose a divisor of {num_rows}"
            )
        if self.kl.control is KlControl.ADAPTIVE:
            self.kl.check_samples(num_rows)

    def minibatch_rows(self, num_rows: int) -> int:
        """Rows of each mini-batch of an experience with `num_rows` rows.

        Raises:
            ConfigError: See `check_rows`.
        """
        self.check_rows(num_rows)
        return num_rows // self.minibatches


_RECIPES: dict[Recipe, dict[str, Any]] = {
    Recipe.MEGACHAT: {},
    Recipe.DEEPSPEED_CHAT: {
        "gamma": 1.0,
        "lam": 0.95,
        "clip_range": 0.2,
        "value_clip_range": 0.2,
        "whitening": Whitening.NONE,
        "epochs": 1,
        "minibatches": 1,
        "kl": {"estimator": KlEstimator.K1, "control": KlControl.FIXED, "coefficient": 0.1},
        "reward": {
            "normalization": RewardNormalization.NONE,
            "clip": 5.0,
            "missing_eos": MissingEos.KEEP,
        },
    },
}


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `given` on top, table by table."""
    result = dict(base)
    for key, value in given.items():
        below = base.get(key)
        if isinstance(value, ConfigModel):
            value = value.model_dump(exclude_unset=True)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merged(below, value)
        result[key] = value
    return result
