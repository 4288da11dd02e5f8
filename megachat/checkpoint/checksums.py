"""Holds what is read of an export against the digests that its writer left.

A digest belongs to one tensor, or to one small file. So whoever reads a tensor checks just that,
and nobody reads a file to check it. Folders that megachat did not write have no digests.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megachat.checkpoint.digests import tensor_digest
from megachat.checkpoint.names import canonical_name
from megachat.checkpoint.reader import StoredTensor, read_json
from megachat.errors import CheckpointError

MARKER_FILE = "megachat_export.json"
"""Written last; lists every other file with its size, so that a partial copy is told apart, and the
digests of what they hold."""
MARKER_FORMAT = 2
"""1 had no digests."""

_ADVICE = "copy the folder again or write it anew; to take it as it is, delete its " + MARKER_FILE
_SHOWN = 12
"""Digits of a digest in a message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checksums:
    """What the writer of a folder put into it."""

    files: Mapping[str, str]
    """SHA-256 of each small file."""
    tensors: Mapping[str, Mapping[str, str]]
    """By weight file and name in it; `digests.tensor_digest`."""

    @property
    def by_canonical_name(self) -> dict[str, str]:
        """Digests of all tensors."""
        return {
            canonical_name(name): digest
            for tensors in self.tensors.values()
            for name, digest in tensors.items()
        }


def file_digest(path: Path) -> str:
    """SHA-256 of a small file.

    Raises:
        OSError: It cannot be read.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def marker_content(sizes: Mapping[str, int], checksums: Checksums) -> dict[str, Any]:
    """What the marker file of an export holds (pure)."""
    return {
        "format": MARKER_FORMAT,
        "files": dict(sizes),
        "sha256": dict(checksums.files),
        "tensors": {file: dict(tensors) for file, tensors in checksums.tensors.items()},
    }


def read_checksums(folder: Path) -> Checksums | None:
    """The digests of an export; None where a folder has none.

    Raises:
        CheckpointError: The marker is broken, or of a later version.
    """
    path = folder / MARKER_FILE
    if not path.is_file():
        return None
    content = read_json(path)
    if content.get("format") == 1:
        return None
    files, tensors = content.get("sha256"), content.get("tensors")
    if content.get("format") != MARKER_FORMAT or not _maps_text(files) or not _maps_maps(tensors):
        raise CheckpointError(f"{path}: not the checksums of an export: {_ADVICE}")
    assert isinstance(files, dict) and isinstance(tensors, dict)
    return Checksums(files=files, tensors=tensors)


def check_file(folder: Path, name: str) -> None:
    """Holds a small file of an export against its digest, where it has one.

    Raises:
        CheckpointError: It is another file than the one that was written.
    """
    checksums = read_checksums(folder)
    if checksums is not None and name in checksums.files:
        _check(folder, name, checksums)


def check_small_files(folder: Path) -> None:
    """Does so for all small files of a folder: configuration and tokenizer.

    Raises:
        CheckpointError: One is another file than the one that was written.
    """
    checksums = read_checksums(folder)
    if checksums is None:
        return
    for name in checksums.files:
        _check(folder, name, checksums)


def _check(folder: Path, name: str, checksums: Checksums) -> None:
    try:
        found = file_digest(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot read: {error.strerror}") from error
    if found != checksums.files[name]:
        raise CheckpointError(f"{folder / name}: {_difference(found, checksums.files[name])}")


def with_digests(folder: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a folder with what their bytes should be, where that is known.

    Raises:
        CheckpointError: The checksums are broken, or know nothing of a tensor that is there.
    """
    checksums = read_checksums(folder)
    if checksums is None:
        return dict(stored)
    expected = {}
    for name, tensor in stored.items():
        digest = checksums.tensors.get(tensor.file, {}).get(tensor.name)
        if digest is None:
            raise CheckpointError(
                f"{folder / tensor.file}: {tensor.name} is not among the checksums of the export: "
                f"{_ADVICE}"
            )
        expected[name] = replace(tensor, digest=digest)
    return expected


def checked_digest(folder: Path, stored: StoredTensor, value: Tensor) -> str:
    """The digest of a tensor that was read.

    Raises:
        CheckpointError: It is known to have been another one when it was written.
    """
    found = tensor_digest(value)
    if stored.digest is not None and found != stored.digest:
        raise CheckpointError(
            f"{folder / stored.file}: {stored.name}: {_difference(found, stored.digest)}"
        )
    return found


def _difference(found: str, written: str) -> str:
    return (
        f"has changed since it was written (sha256 {written[:_SHOWN]}, now {found[:_SHOWN]}): "
        f"{_ADVICE}"
    )


def _maps_text(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _maps_maps(value: object) -> bool:
    return isinstance(value, dict) and all(_maps_text(each) for each in value.values())
