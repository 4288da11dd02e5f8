"""Hashes files by content, and remembers the digest of a file until the file changes.

What is remembered is small and lies in a folder of its own; deleting it costs another reading. A
file counts as unchanged where path, size, times and inode are as they were. One that changed a
moment ago is not remembered: within the resolution of its times it could change again unseen.
"""

import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_BLOCK_BYTES = 1 << 22
_RECENT_NS = 2 * 10**9
"""Some file systems keep times in whole seconds."""
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilesState:
    """How some files stood at one moment."""

    key: str
    """Equal as long as none of them changes."""
    is_settled: bool
    """Whether none had changed just before."""

    @classmethod
    def of(cls, paths: Sequence[Path], *, kind: str) -> Self:
        """The present state.

        Args:
            paths: The files, in order.
            kind: What is made of them; part of the key.

        Raises:
            OSError: One is not there.
        """
        now = time.time_ns()
        states = [(path.resolve(), path.stat()) for path in paths]
        text = json.dumps(
            [
                kind,
                *(
                    (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
                    for path, stat in states
                ),
            ],
            allow_nan=False,
        )
        newest = max((max(stat.st_mtime_ns, stat.st_ctime_ns) for _, stat in states), default=0)
        return cls(
            key=hashlib.sha256(text.encode()).hexdigest(), is_settled=newest < now - _RECENT_NS
        )


class FileDigests:
    """Digests of files, some of which are remembered in a folder."""

    def __init__(self, folder: Path) -> None:
        """Touches nothing yet.

        Args:
            folder: Made when there is something to remember.
        """
        self._folder = folder

    def of_file(self, path: Path) -> str:
        """SHA-256 of a file's content.

        Raises:
            OSError: It cannot be read.
        """
        state = FilesState.of([path], kind="sha256")
        digest = self.recall(state)
        if digest is None:
            digest = _hash_file(path)
            if FilesState.of([path], kind="sha256") == state:
                self.keep(state, digest)
        return digest

    def recall(self, state: FilesState) -> str | None:
        """What was kept for files in this state; None where nothing was."""
        try:
            digest = (self._folder / state.key).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None
        return digest if _DIGEST.fullmatch(digest) else None

    def keep(self, state: FilesState, digest: str) -> None:
        """Remembers a digest, if it is safe to; where it cannot be written, it is not remembered.

        Args:
            state: Of the files before they were read.
            digest: 64 hexadecimal digits.
        """
        if not state.is_settled:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = self._folder / f".{state.key}.{uuid.uuid4().hex}"
            draft.write_text(digest, encoding="utf-8")
            draft.replace(self._folder / state.key)


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
