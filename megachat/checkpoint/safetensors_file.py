"""Writes a safetensors file tensor by tensor: `SafetensorsFile`.

The library's own writer wants all tensors of a file in memory. The format is plain: 8 bytes of
length, a JSON header with dtype, shape and place of each tensor, then their bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from torch import Tensor

from megachat.checkpoint.digests import tensor_digest
from megachat.checkpoint.reader import SAFETENSORS_DTYPES

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_ALIGNMENT = 8
"""The header ends at a multiple of this, filled with spaces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """One tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A new file that takes its tensors in the order in which they were announced."""

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        """Touches nothing yet; the first tensor creates the file.

        Args:
            path: Must not exist yet.
            entries: All tensors that will be appended, in order.
        """
        self._path = path
        self._entries = tuple(entries)
        self._digests: dict[str, str] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Gives itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the file, finished or not."""
        if self._file is not None:
            self._file.close()

    @property
    def digests(self) -> dict[str, str]:
        """Of the tensors written so far, by name."""
        return dict(self._digests)

    def append(self, name: str, value: Tensor) -> None:
        """Writes the next tensor, which lies on the CPU."""
        expected = self._entries[len(self._digests)]
        found = TensorEntry(name=name, dtype=value.dtype, shape=tuple(value.shape))
        assert found == expected, f"{self._path}: {found} in the place of {expected}"
        value = value.contiguous()
        self._opened().write(value.view(-1).view(torch.uint8).numpy().data)
        self._digests[name] = tensor_digest(value)

    def finish(self) -> None:
        """Closes a file that has all its tensors, when they are on the disk."""
        file, missing = self._opened(), len(self._entries) - len(self._digests)
        assert not missing, f"{self._path}: {missing} tensors were not written"
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def _opened(self) -> BinaryIO:
        """The file, with its header."""
        if self._file is None:
            self._file = open(self._path, "xb")
            self._file.write(_header(self._entries))
        return self._file


def _header(entries: Sequence[TensorEntry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.num_bytes],
        }
        start += entry.num_bytes
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
