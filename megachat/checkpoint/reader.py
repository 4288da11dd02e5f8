"""Opens HuggingFace weight files, which may come from anywhere: lists and reads tensors.

Nothing in a file is executed: `.bin` files are listed with torch's weights-only loader, and an
index may name files of its own folder only. Listing reads headers. A tensor is then read at once,
from its first byte to its last: a parallel file system serves that, and not single pages, fast.
"""

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megachat.checkpoint.names import canonical_name
from megachat.errors import CheckpointError

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_FILE = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in a safetensors header."""


_PIECE_BYTES = 2**24
"""Size of the pieces of a tensor that is not kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where one tensor lies in the files of a folder; ranks send it to each other."""

    name: str
    """As the file has it."""
    file: str
    """Within the folder, which may have another path on another node."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements; a `.bin` file may hold a transposed tensor."""
    offset: int
    """Bytes from the start of the file to the first element."""
    digest: str | None = None
    """Of what was written there (`megachat.checkpoint.checksums`), where that is known."""

    @property
    def num_bytes(self) -> int:
        """Bytes from the first to the last element, all of which are read."""
        if 0 in self.shape:
            return 0
        sizes = zip(self.shape, self.strides, strict=True)
        last = sum((size - 1) * stride for size, stride in sizes)
        return (last + 1) * self.dtype.itemsize


def read_tensor(folder: Path, stored: StoredTensor) -> Tensor:
    """Reads a whole tensor, on the CPU.

    Raises:
        CheckpointError: The file cannot be read, or ends before the tensor does.
    """
    path = folder / stored.file
    raw = torch.empty(stored.num_bytes, dtype=torch.uint8)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(stored.offset)
            read = read_into(cast(BinaryIO, file), raw.numpy().data)
    except OSError as error:
        raise CheckpointError(f"{path}: {stored.name}: {one_line(error)}") from error
    if read < stored.num_bytes:
        raise CheckpointError(
            f"{path}: {stored.name}: the file ends after {read} of {stored.num_bytes} bytes: copy "
            "it again"
        )
    return raw.view(stored.dtype).as_strided(stored.shape, stored.strides)


def read_rows(folder: Path, stored: StoredTensor) -> Iterator[Tensor]:
    """Reads a tensor in pieces of consecutive rows that together are the whole.

    A tensor that does not lie row after row comes in one piece.

    Raises:
        CheckpointError: As `read_tensor`.
    """
    if not stored.shape or stored.strides != _contiguous_strides(list(stored.shape)):
        yield read_tensor(folder, stored)
        return
    rows, row_bytes = stored.shape[0], stored.strides[0] * stored.dtype.itemsize
    step = max(1, _PIECE_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        shape = (min(step, rows - start), *stored.shape[1:])
        piece = replace(stored, shape=shape, offset=stored.offset + start * row_bytes)
        yield read_tensor(folder, piece)


def read_into(file: BinaryIO, target: memoryview) -> int:
    """Fills `target` from where the file stands; returns how many bytes there were."""
    done = 0
    while done < len(target):
        # Linux reads 2 GiB at a time at most.
        count = file.readinto(target[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def list_weights(folder: Path) -> dict[str, StoredTensor]:
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
    """Lists a safetensors file; the library checks that header and length fit together."""
    try:
        with safe_open(path, framework="pt"):
            pass
        header, start = _safetensors_header(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: corrupt, truncated or not a safetensors file: {one_line(error)}"
        ) from error
    unknown = [name for name, entry in header.items() if entry["dtype"] not in SAFETENSORS_DTYPES]
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]} holds {header[unknown[0]]['dtype']}: expected one of "
            f"{', '.join(SAFETENSORS_DTYPES)}"
        )
    return {
        name: StoredTensor(
            name=name,
            file=path.name,
            dtype=SAFETENSORS_DTYPES[entry["dtype"]],
            shape=tuple(entry["shape"]),
            strides=_contiguous_strides(entry["shape"]),
            offset=start + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """(entry by tensor name, where the data starts): 8 bytes of length, then JSON, then data."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _contiguous_strides(shape: list[int]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _open_torch(path: Path) -> dict[str, StoredTensor]:
    """Lists a `.bin` file: under fake tensors torch reads no data and says where it lies."""
    try:
        with FakeTensorMode():
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
            name=name,
            file=path.name,
            dtype=value.dtype,
            shape=tuple(value.shape),
            strides=tuple(value.stride()),
            offset=vars(value.untyped_storage())["_checkpoint_offset"]
            + value.storage_offset() * value.dtype.itemsize,
        )
        for name, value in content.items()
    }
