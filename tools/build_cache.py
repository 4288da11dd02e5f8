"""Keeps what compilers make, outside the tree, under a hash of all that it was made from.

An entry is a folder of files that one build makes together. It is made beside its place and renamed
there under a lock, with a list of what its files hold: an entry that lacks a byte is made anew, and
of several processes that want one, one makes it while the others wait. Entries that nobody has used
for long go, once all of them take more than a limit.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import filelock

_CONTENTS = "contents.json"
_LOCKS = "locks"
_IN_USE_SECONDS = 3600.0
"""An entry that was asked for so lately may still be opened by who asked."""


def digest_of(parts: Iterable[str], files: Iterable[Path] = ()) -> str:
    """A key: a hash of texts, such as flags and a compiler's version, and of files with names."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"text\0" + part.encode() + b"\0")
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"file\0{path.name}\0{content}\0".encode())
    return digest.hexdigest()[:32]


def _user_folder() -> Path:
    return Path.home() / ".cache" / "megachat" / "builds"


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildCache:
    """A folder of finished builds that all trees and processes of a user share."""

    folder: Path = field(default_factory=_user_folder)
    most_bytes: int = 1 << 30
    """What all entries may take together before the oldest go."""

    def folder_of(self, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of an entry, made if it is not there whole.

        Args:
            key: Of everything that the files depend on; see `digest_of`.
            make: Writes the files into the folder that it is given; what it raises passes through
                and leaves nothing.
        """
        entry = self.folder / key
        if not _is_whole(entry):
            locks = self.folder / _LOCKS
            locks.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(locks / f"{key[:2]}.lock"):
                if not _is_whole(entry):
                    self._make(entry, make)
                    self._drop_oldest()
        os.utime(entry)
        return entry

    def _make(self, entry: Path, make: Callable[[Path], None]) -> None:
        unfinished = Path(tempfile.mkdtemp(dir=self.folder, prefix="unfinished-"))
        try:
            make(unfinished)
            contents = {path.name: _hash(path) for path in unfinished.iterdir()}
            (unfinished / _CONTENTS).write_text(
                json.dumps(contents, allow_nan=False), encoding="utf-8"
            )
            if entry.exists():  # torn
                shutil.rmtree(entry)
            unfinished.rename(entry)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def _drop_oldest(self) -> None:
        """Removes what was not used for longest, as far as the limit asks for it."""
        used = {}
        for entry in self.folder.iterdir():
            if entry.name == _LOCKS:
                continue
            try:
                size = sum(path.stat().st_size for path in entry.iterdir())
                used[entry] = (entry.stat().st_mtime, size)
            except OSError:  # another process removes or finishes it right now
                continue
        total = sum(size for _, size in used.values())
        for entry, (when, size) in sorted(used.items(), key=lambda item: item[1][0]):
            if total <= self.most_bytes or when > time.time() - _IN_USE_SECONDS:
                return
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def _is_whole(entry: Path) -> bool:
    """Whether every file that was made is there with all that it held."""
    try:
        contents = json.loads((entry / _CONTENTS).read_text(encoding="utf-8"))
        return all(_hash(entry / name) == found for name, found in contents.items())
    except (OSError, ValueError, AttributeError):
        return False


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
