"""Tells the content of weights from their place: a digest for each tensor, and one for a model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from megachat.checkpoint.names import IGNORED, SCORE
from megachat.model.config import OptConfig

_NO_CONTENT = IGNORED - {SCORE}
"""Tensors of files that say nothing of the model: the tied output, a format mark."""


def tensor_digest(value: Tensor) -> str:
    """SHA-256 of a CPU tensor's dtype, shape and values, row by row; equal wherever it lies.

    Dtype and shape count, so that a changed header of a file is found as well.
    """
    digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}\n".encode())
    digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_digest(config: OptConfig, tensors: Mapping[str, str]) -> str:
    """SHA-256 of an architecture and its weights; equal for every form of file (pure).

    Args:
        config: The architecture.
        tensors: Digest of each tensor, by canonical name.
    """
    known = {name: digest for name, digest in tensors.items() if name not in _NO_CONTENT}
    text = json.dumps({"config": asdict(config), "tensors": known}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def covers(tensors: Mapping[str, str], stored: Mapping[str, object]) -> bool:
    """Whether digests are of all tensors of a folder that say something of the model (pure)."""
    return set(stored) - _NO_CONTENT <= set(tensors)
