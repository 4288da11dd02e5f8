"""The one place for HuggingFace model folders: load into any layout, save from any layout.

Loading involves no communication: every rank checks the names and shapes of the whole folder, so
that all refuse a bad one alike, and then reads its own slices only.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from megachat.checkpoint.names import IGNORED, SCORE, fuse, huggingface_names, huggingface_shape
from megachat.checkpoint.reader import CONFIG_FILE, StoredTensor, open_weights, read_json
from megachat.checkpoint.writer import is_complete, save_huggingface
from megachat.errors import CheckpointError, ConfigError
from megachat.model.config import OPT_MODELS, OptConfig
from megachat.model.opt import OptModel
from megachat.model.specs import TensorSpec

__all__ = ["MissingHead", "is_complete", "load_huggingface", "read_config", "save_huggingface"]


class MissingHead(StrEnum):
    """What to do about a scalar head that the folder does not hold."""

    REFUSE = "refuse"
    INITIALISE = "initialise"
    """Draw it at random: a reward model that starts from a language model."""


def read_config(source: Path | str) -> OptConfig:
    """The architecture of a model folder, or of a published size by its hub name.

    Raises:
        CheckpointError: No readable config.json.
        ConfigError: It describes something else than an OPT that megachat implements.
    """
    if str(source) in OPT_MODELS:
        return OPT_MODELS[str(source)]
    path = Path(source) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; known sizes are {', '.join(OPT_MODELS)}")
    try:
        return OptConfig.from_huggingface(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def load_huggingface(
    model: OptModel,
    folder: Path,
    *,
    missing_head: MissingHead = MissingHead.REFUSE,
    seed: int = 0,
) -> None:
    """Fills this rank's shard from a folder of safetensors or torch weight files.

    Args:
        model: Receives the weights, in its own dtype.
        folder: config.json and the weights of the same architecture, of a language model or a
            scalar head.
        missing_head: Whether a scalar head may be absent.
        seed: Of the head's random start, where it is absent.

    Raises:
        CheckpointError: The folder is unreadable, corrupt, incomplete, or holds another
            architecture; names the file, the tensor and both shapes.
        ConfigError: config.json describes a variant that megachat does not implement.
    """
    _check_architecture(model.config, folder)
    stored = open_weights(folder)
    specs = model.global_specs()
    absent: set[str] = set()
    if missing_head is MissingHead.INITIALISE and SCORE not in stored:
        absent = {spec.name for spec in specs if huggingface_names(spec) == (SCORE,)}
    _check_tensors([spec for spec in specs if spec.name not in absent], stored, folder)
    _copy_weights(model, stored, absent)
    if absent:
        model.initialise(seed, names=sorted(absent))


def _check_architecture(config: OptConfig, folder: Path) -> None:
    """Compares what shapes alone do not tell (heads, place of the norms), and the rest too."""
    found = read_config(folder)
    for name, here, there in (
        ("vocab_size", config.vocab_size, found.vocab_size),
        ("max_positions", config.max_positions, found.max_positions),
        ("hidden", config.hidden, found.hidden),
        ("ffn", config.ffn, found.ffn),
        ("layers", config.layers, found.layers),
        ("heads", config.heads, found.heads),
        ("embed_dim", config.embed_dim, found.embed_dim),
        ("layer_norm_first", config.layer_norm_first, found.layer_norm_first),
    ):
        if here != there:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: {name} is {there}, but the model to load into has {here}"
            )


def _check_tensors(
    specs: list[TensorSpec], stored: Mapping[str, StoredTensor], folder: Path
) -> None:
    """Checks that each expected tensor is there in its shape, and that nothing else is."""
    expected = {name: huggingface_shape(spec) for spec in specs for name in huggingface_names(spec)}
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(
            f"{folder}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are)"
        )
    for name, shape in expected.items():
        tensor = stored[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} has shape {list(tensor.shape)}, but the model needs "
                f"{list(shape)}"
            )
    surplus = [name for name in stored if name not in expected and name not in IGNORED]
    if surplus:
        raise CheckpointError(
            f"{stored[surplus[0]].path}: {stored[surplus[0]].name} is no tensor of this model "
            f"({len(surplus)} such tensors): not a plain OPT checkpoint"
        )


@torch.no_grad()
def _copy_weights(model: OptModel, stored: Mapping[str, StoredTensor], absent: set[str]) -> None:
    parameters = dict(model.named_parameters())
    for name, spec in model.local_specs().items():
        if spec.name not in absent:
            _copy_parameter(model, parameters[name], spec, stored)


def _copy_parameter(
    model: OptModel, target: Tensor, spec: TensorSpec, stored: Mapping[str, StoredTensor]
) -> None:
    """Reads the slices of one local parameter; rows beyond the stored ones become zero."""
    names = huggingface_names(spec)
    rows, *others = model.local_slices(spec)
    num_rows = huggingface_shape(spec)[0]
    wanted = slice(min(rows.start // len(names), num_rows), min(rows.stop // len(names), num_rows))
    parts = [stored[name].read((wanted, *others)) for name in names]
    value = fuse(parts, head_dim=model.config.head_dim) if len(parts) > 1 else parts[0]
    target[: value.shape[0]].copy_(value)
    target[value.shape[0] :].zero_()
