"""The one place for the on-disk cache of converted and tokenised data.

An entry is a folder named by a hash of everything its content depends on. It is built beside its
place and renamed, so it is either complete or absent; a file lock makes one process build it while
the other ranks wait. Entries are never changed, only added.
"""

import glob
import hashlib
import json
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megachat.digests import FileDigests
from megachat.errors import DataError
from megachat.locks import Purpose, held

DIGESTS_FOLDER = "digests"
"""In the cache: what is known of files by their content."""
_READER_SUFFIX = re.compile(r"(\.\w+)?(\.gz)?$")
"""The part of a name that decides how a file is read."""
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
        self._digests = FileDigests(folder / DIGESTS_FOLDER)
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
        """SHA-256 of a file's content, remembered until the file changes.

        Raises:
            DataError: The file cannot be read.
        """
        try:
            return self._digests.of_file(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    def files_digest(self, paths: Sequence[Path]) -> str:
        """A hash of several files' contents, in order, and of how they are read.

        Names do not count but for their ends: the same rows are the same under another name.
        """
        files = [(_reader_suffix(path.name), self.file_digest(path)) for path in paths]
        return content_key({"files": files})

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


def _reader_suffix(name: str) -> str:
    found = _READER_SUFFIX.search(name)
    return found.group().lower() if found else ""
