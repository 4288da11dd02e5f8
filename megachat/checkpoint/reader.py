"""The one place that opens HuggingFace weight files, which may come from anywhere.

Nothing in a file is executed: `.bin` files are read with torch's weights-only loader, and an index
may name files of its own folder only. Only the slices that are asked for are read from the disk.
"""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megachat.checkpoint.names import canonical_name
from megachat.errors import CheckpointError

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

Slices = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    name: str
    """As the file has it."""
    path: Path
    shape: tuple[int, ...]
    load: Callable[[Slices], Tensor]

    def read(self, slices: Slices) -> Tensor:
        """Reads a part, on the CPU.

        Raises:
            CheckpointError: The file cannot be read, or the tensor does not hold numbers.
        """
        try:
            part = self.load(slices)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: {self.name}: {one_line(error)}") from error
        if not part.is_floating_point():
            raise CheckpointError(
                f"{self.path}: {self.name} holds {part.dtype}: expected floating-point numbers"
            )
        return part


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Everything a folder's weight files hold, by canonical name.

    Looks for, in this order: model.safetensors, its sharded form, pytorch_model.bin, its sharded
    form.

    Raises:
        CheckpointError: No such file, or one that is unreadable, incomplete or not what it claims.
    """
    for name, is_index in (
        (SAFETENSORS_FILE, False),
        (SAFETENSORS_INDEX, True),
        (TORCH_FILE, False),
        (TORCH_INDEX, True),
    ):
        path = folder / name
        if path.is_file():
            return _canonical(_open_index(path) if is_index else _open_file(path))
    raise CheckpointError(
        f"{folder}: no weights found: expected {SAFETENSORS_FILE}, {TORCH_FILE} or their sharded "
        "forms with an index"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: The file is missing, unreadable or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}: expected a JSON object")
    return value


def one_line(error: BaseException) -> str:
    """An error's first sentence without line breaks."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _canonical(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {canonical_name(name): tensor for name, tensor in tensors.items()}


def _open_index(path: Path) -> dict[str, StoredTensor]:
    """Opens all files that an index names and checks that they hold what it promises."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: no weight_map: not an index of weight files")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted({str(file) for file in weight_map.values()}):
        if Path(name).name != name:
            raise CheckpointError(f"{path}: names {name!r}: expected a file of the same folder")
        if not (path.parent / name).is_file():
            raise CheckpointError(f"{path.parent / name}: missing, but {path.name} names it")
        tensors |= _open_file(path.parent / name)
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{path}: promises {missing[0]} in {weight_map[missing[0]]}, which does not hold it "
            f"({len(missing)} of {len(weight_map)} tensors are missing)"
        )
    return tensors


def _open_file(path: Path) -> dict[str, StoredTensor]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)


def _open_safetensors(path: Path) -> dict[str, StoredTensor]:
    try:
        handle: Any = safe_open(path, framework="pt")
        parts = {name: handle.get_slice(name) for name in handle.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: corrupt, truncated or not a safetensors file: {one_line(error)}"
        ) from error
    return {
        name: StoredTensor(
            name=name, path=path, shape=tuple(part.get_shape()), load=part.__getitem__
        )
        for name, part in parts.items()
    }


def _open_torch(path: Path) -> dict[str, StoredTensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because it holds more than tensors and loading it could run code"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path}: corrupt, truncated or written before torch 1.6: {one_line(error)}"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path}: not a state dict of named tensors")
    return {
        name: StoredTensor(
            name=name, path=path, shape=tuple(value.shape), load=value.detach().__getitem__
        )
        for name, value in content.items()
    }
