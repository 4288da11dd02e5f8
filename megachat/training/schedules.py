"""The one place for optimizer settings and learning-rate schedules (pure)."""

import math
from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from megachat.config import ConfigModel


class ScheduleKind(StrEnum):
    """How the learning rate goes on after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class OptimizerConfig(ConfigModel):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = Field(
        default=1e-5, gt=0, allow_inf_nan=False, description="Peak learning rate."
    )
    schedule: ScheduleKind = Field(default=ScheduleKind.COSINE, strict=False)
    warmup_steps: int = Field(
        default=0, ge=0, description="Optimizer steps of linear warm-up from lr / warmup_steps."
    )
    final_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Learning rate over its peak where the decay ends, just after the last step.",
    )
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Applied to matrices, not to biases and norms.",
    )
    clip_norm: float = Field(
        default=1.0, ge=0, description="Largest global gradient norm; 0 does not clip."
    )

    @model_validator(mode="after")
    def _constant_has_no_end(self) -> Self:
        if self.schedule is ScheduleKind.CONSTANT and self.final_share not in (0.0, 1.0):
            raise ValueError(
                f"schedule constant never decays, but final_share is {self.final_share}: "
                "leave it out, or choose linear or cosine"
            )
        return self


def learning_rate(config: OptimizerConfig, *, step: int, total_steps: int) -> float:
    """Learning rate of one optimizer step.

    With t steps done of N, w of them warm-up: the decay has gone `(t - w) / (N - w)` of its way, as
    in the schedules of torch and transformers. It arrives just after the last step, so that every
    step of a run moves the weights, also the only one. A warm-up of N steps or more never reaches
    the peak.

    Args:
        config: Peak, warm-up, shape and end of the schedule.
        step: Number of steps done before this one.
        total_steps: Length of the run.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule is ScheduleKind.CONSTANT:
        return config.learning_rate
    decay_steps = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    if config.schedule is ScheduleKind.LINEAR:
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    share = config.final_share + (1.0 - config.final_share) * remaining
    return config.learning_rate * share
