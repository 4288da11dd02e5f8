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
from typing import Self

import torch
from torch import Tensor

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
        """Creates the file and writes its header.

        Args:
            path: Must not exist yet.
            entries: All tensors that will be appended, in order.
        """
        self._path = path
        self._waiting = list(entries)
        self._file = open(path, "xb")  # noqa: SIM115 (closed by `close`)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": _NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.num_bytes],
            }
            start += entry.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._file.write(len(text).to_bytes(8, "little") + text)

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
        self._file.close()

    def append(self, name: str, value: Tensor) -> None:
        """Writes the next tensor, which lies on the CPU."""
        entry = self._waiting.pop(0)
        found = TensorEntry(name=name, dtype=value.dtype, shape=tuple(value.shape))
        assert found == entry, f"{self._path}: {found} in the place of {entry}"
        raw = value.contiguous().view(-1).view(torch.uint8)
        self._file.write(memoryview(raw.numpy()))

    def finish(self) -> None:
        """Closes a file that has all its tensors, when they are on the disk."""
        assert not self._waiting, f"{self._path}: {len(self._waiting)} tensors were not written"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
