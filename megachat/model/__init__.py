"""OPT models, sharded over tensor and pipeline ranks."""

from megachat.model.config import (
    OPT_MODELS,
    Head,
    ModelOptions,
    NormBackend,
    OptConfig,
    Recompute,
)
from megachat.model.opt import EmbeddingWeights, LayerWeights, OptModel, OutputWeights
from megachat.model.specs import TensorSpec, parameter_specs, stage_specs

__all__ = [
    "OPT_MODELS",
    "EmbeddingWeights",
    "Head",
    "LayerWeights",
    "ModelOptions",
    "NormBackend",
    "OptConfig",
    "OptModel",
    "OutputWeights",
    "Recompute",
    "TensorSpec",
    "parameter_specs",
    "stage_specs",
]
