"""Prepares an export beside its target: a reader sees the old folder, the new one, or none."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megachat.checkpoint.checksums import (
    MARKER_FILE,
    Checksums,
    file_digest,
    marker_content,
)
from megachat.checkpoint.reader import one_line, read_json
from megachat.errors import CapacityError, CheckpointError, MegachatError


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """The folder beside the target; rank 0 starts, finishes and discards it, writers fill it."""

    target: Path
    path: Path

    @classmethod
    def start(cls, target: Path, *, needed: int, extra_files: Mapping[str, Path]) -> "Draft":
        """Checks the target and the disk, makes the folder and copies the extra files.

        Args:
            target: Where the export is to be.
            needed: Bytes of the weights.
            extra_files: Files to copy, by their name in the folder.

        Raises:
            CheckpointError: The target is no earlier export, or cannot be written.
            CapacityError: The disk is too small.
        """
        path = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        draft = cls(target=target, path=path)
        try:
            with writing(target):
                draft._make(needed, extra_files)
        except MegachatError:
            draft.discard()
            raise
        return draft

    def finish(
        self,
        configs: Mapping[str, Mapping[str, Any]],
        *,
        tensors: Mapping[str, Mapping[str, str]],
    ) -> None:
        """Writes the small files and the marker, and puts the folder in its place.

        Args:
            configs: Content of the small files by their names.
            tensors: Digests of what the weight files hold, by file and name in it.

        Raises:
            CheckpointError: The disk refuses.
        """
        with writing(self.target):
            for name, content in configs.items():
                self._write_json(name, content)
            paths = sorted(self.path.iterdir())
            small = {path.name: file_digest(path) for path in paths if path.name not in tensors}
            sizes = {path.name: path.stat().st_size for path in paths}
            checksums = Checksums(files=small, tensors=tensors)
            self._write_json(MARKER_FILE, marker_content(sizes, checksums))
            if self.target.exists():
                previous = self.path.with_suffix(".previous")
                self.target.rename(previous)
                self.path.rename(self.target)
                shutil.rmtree(previous)
            else:
                self.path.rename(self.target)

    def discard(self) -> None:
        """Removes what is left of an unfinished draft."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _make(self, needed: int, extra_files: Mapping[str, Path]) -> None:
        check_target(self.target)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir()
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise CapacityError(
                f"{self.target}: the weights take {needed} bytes, but the disk has {free} free"
            )
        for name, source in extra_files.items():
            if Path(name).name != name or not source.is_file():
                raise CheckpointError(f"{source}: cannot be copied as {name}: no such file")
            shutil.copyfile(source, self.path / name)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
        (self.path / name).write_text(text, encoding="utf-8")


def check_target(target: Path) -> None:
    """Refuses a place where no export can be put: anything but an earlier export is kept.

    Raises:
        CheckpointError: There is a file, or a folder that holds something else.
    """
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: exists and is not a folder")
    if target.is_dir() and not (target / MARKER_FILE).is_file():
        others = sorted(path.name for path in target.iterdir())
        if others:
            raise CheckpointError(
                f"{target}: holds {others[0]} and is no earlier export: "
                "choose another folder or empty it"
            )


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Makes one line of whatever goes wrong in the body.

    Raises:
        CheckpointError: For any error that is not megachat's own.
    """
    try:
        yield
    except MegachatError:
        raise
    except Exception as error:  # anything: an error that only this rank sees hangs the others
        raise CheckpointError(f"{target}: cannot write: {one_line(error)}") from error


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole export of `save_huggingface`: every file with its size."""
    marker = folder / MARKER_FILE
    if not marker.is_file():
        return False
    try:
        sizes = read_json(marker).get("files")
    except CheckpointError:
        return False
    return isinstance(sizes, dict) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )
