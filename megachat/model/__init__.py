"""OPT models, sharded over tensor and pipeline ranks.

Only what is pure is gathered here, so that a plan for a cluster does not wait for torch; the model
itself is `megachat.model.opt.OptModel`.
"""

from megachat.model.config import (
    OPT_MODELS,
    Head,
    ModelOptions,
    NormBackend,
    OptConfig,
    Recompute,
)
from megachat.model.specs import TensorSpec, parameter_specs, stage_specs

__all__ = [
    "OPT_MODELS",
    "Head",
    "ModelOptions",
    "NormBackend",
    "OptConfig",
    "Recompute",
    "TensorSpec",
    "parameter_specs",
    "stage_specs",
]
