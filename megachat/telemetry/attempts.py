"""Keeps the files of earlier attempts aside, so that a folder holds those of one attempt alone."""

from collections.abc import Iterable
from pathlib import Path

ATTEMPTS_FOLDER = "attempts"
"""In a folder that is written anew by each attempt: what earlier ones left, by number from 1."""


def set_aside(folder: Path, entries: Iterable[Path]) -> Path | None:
    """Moves what an earlier attempt left in a folder into `attempts/N` of that folder.

    Args:
        folder: What is written anew; the place of its `attempts`.
        entries: Files and folders in it.

    Returns:
        Where they are now; None where there were none.

    Raises:
        OSError: The folder cannot be written.
    """
    moved = list(entries)
    if not moved:
        return None
    attempts = folder / ATTEMPTS_FOLDER
    attempts.mkdir(exist_ok=True)
    known = [int(path.name) for path in attempts.iterdir() if path.name.isdecimal()]
    place = attempts / str(max(known, default=0) + 1)
    place.mkdir()
    for path in moved:
        path.rename(place / path.name)
    return place


def is_set_aside(path: Path, *, below: Path) -> bool:
    """Whether a file below a folder belongs to an earlier attempt (pure)."""
    return ATTEMPTS_FOLDER in path.relative_to(below).parts
