"""The one place for the on-disk cache of converted and tokenised data.

An entry is a folder named by a hash of everything its content depends on. It is built beside its
place and renamed, so it is either complete or absent; a file lock makes one process build it while
the other ranks wait. Entries are never changed, only added.
"""

import glob
import hashlib
import json
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megachat.errors import DataError
from megachat.locks import Purpose, held

_BLOCK_BYTES = 1 << 22
_WITHOUT_LOCKS = (
    "choose a data.cache_dir on another one (a disk of each node will do), or have this one "
    "mounted with locks"
)


def content_key(parts: Mapping[str, Any]) -> str:
    """A short hash of values that JSON can express; the order of keys does not matter."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class DataCache:
    """A folder of content-addressed entries."""

    def __init__(self, folder: Path) -> None:
        """Creates the folder where it does not exist.

        Raises:
            DataError: The folder cannot be created.
        """
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache_dir {folder}: cannot be created ({error.strerror}): choose another"
            ) from error

    def get_or_build(
        self, kind: str, parts: Mapping[str, Any], build: Callable[[Path], None]
    ) -> Path:
        """The folder of an entry, built by this process where no other did so before.

        Args:
            kind: First part of the folder's name.
            parts: Everything the content depends on.
            build: Fills an empty folder.

        Raises:
            DataError: What `build` raises; nothing is left behind then.
        """
        name = f"{kind}-{content_key(parts)}"
        entry = self._folder / name
        if entry.is_dir():
            return entry
        purpose = Purpose(work="prepare the data there", remedy=_WITHOUT_LOCKS, error=DataError)
        with held(self._folder / f"{name}.lock", purpose):
            if entry.is_dir():
                return entry
            # Nobody else on this node can be building: what lies there is of a killed process.
            # Some shared file systems keep locks within a node, so others' drafts are left alone.
            drafts = f"{name}.building-{socket.gethostname()}-"
            for left_over in self._folder.glob(f"{glob.escape(drafts)}*"):
                shutil.rmtree(left_over, ignore_errors=True)
            self._build(entry, self._folder / f"{drafts}{uuid.uuid4().hex}", build)
        return entry

    def file_digest(self, path: Path) -> str:
        """A hash of a file's content, remembered until the file changes.

        Raises:
            DataError: The file cannot be read.
        """
        try:
            stat = path.stat()
            known = content_key(
                {
                    "path": str(path.resolve()),
                    "stat": (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino),
                }
            )
            note = self._folder / "digests" / known
            if note.is_file() and (digest := note.read_text()):
                return digest
            digest = _hash_file(path)
            note.parent.mkdir(exist_ok=True)
            written = note.with_suffix(f".{uuid.uuid4().hex}")
            written.write_text(digest)
            written.replace(note)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        return digest

    def files_digest(self, paths: Sequence[Path]) -> str:
        """A hash of several files' names and contents, in order."""
        return content_key({"files": [(path.name, self.file_digest(path)) for path in paths]})

    def _build(self, entry: Path, building: Path, build: Callable[[Path], None]) -> None:
        """Builds beside the entry and renames."""
        building.mkdir()
        try:
            build(building)
            building.rename(entry)
        except OSError as error:
            if not entry.is_dir():  # where locks hold on one node only, another can be first
                raise DataError(
                    f"data.cache_dir {self._folder}: cannot be written: {error.strerror or error}"
                ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def _hash_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
