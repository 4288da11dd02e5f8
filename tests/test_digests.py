"""Files are told apart by content, and one that has not changed is not read again."""

import hashlib
import os
from pathlib import Path

import pytest

from megachat import digests
from megachat.digests import FileDigests, FilesState

LONG_AGO = 1_600_000_000


def _write(path: Path, text: str, *, when: int | None = LONG_AGO) -> Path:
    path.write_text(text)
    if when is not None:
        os.utime(path, (when, when))
    return path


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are hashed."""
    read, original = [], digests._hash_file

    def hash_file(path: Path) -> str:
        read.append(path)
        return original(path)

    monkeypatch.setattr(digests, "_hash_file", hash_file)
    # A file's ctime is now, whatever a test says of its mtime; all below is settled.
    monkeypatch.setattr(digests, "_RECENT_NS", -(10**9))
    return read


def test_a_file_is_read_once_until_it_changes(tmp_path: Path, reads: list[Path]) -> None:
    known, path = FileDigests(tmp_path / "known"), _write(tmp_path / "a", "one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert [known.of_file(path) for _ in range(3)] == [expected] * 3
    assert FileDigests(tmp_path / "known").of_file(path) == expected  # another process
    assert reads == [path]
    _write(path, "two")  # of the same size and time
    assert known.of_file(path) == hashlib.sha256(b"two").hexdigest()
    assert reads == [path, path]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    """It could change once more, and its size and times would stay."""
    known, path = FileDigests(tmp_path / "known"), _write(tmp_path / "a", "one", when=None)
    known.of_file(path)
    assert not (tmp_path / "known").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    path, original = _write(tmp_path / "a", "one"), digests._hash_file

    def change(path: Path) -> str:
        digest = original(path)
        _write(path, "longer")
        return digest

    monkeypatch.setattr(digests, "_hash_file", change)
    FileDigests(tmp_path / "known").of_file(path)
    assert not (tmp_path / "known").exists()


@pytest.mark.parametrize("text", ["", "abc", "g" * 64, "a" * 63])
def test_a_broken_note_counts_for_nothing(text: str, tmp_path: Path, reads: list[Path]) -> None:
    known, path = FileDigests(tmp_path / "known"), _write(tmp_path / "a", "one")
    known.of_file(path)
    [note] = (tmp_path / "known").iterdir()
    note.write_text(text)
    assert known.of_file(path) == hashlib.sha256(b"one").hexdigest()


def test_a_place_that_cannot_be_written_costs_reading_again(
    tmp_path: Path, reads: list[Path]
) -> None:
    path = _write(tmp_path / "a", "one")
    known = FileDigests(path / "known")
    assert known.of_file(path) == known.of_file(path)
    assert reads == [path, path]


def test_the_state_of_files_is_of_their_kind_order_and_place(tmp_path: Path) -> None:
    one, two = _write(tmp_path / "a", "x"), _write(tmp_path / "b", "x")
    key = FilesState.of([one, two], kind="k").key
    assert FilesState.of([one, two], kind="k").key == key
    others = [
        FilesState.of(paths, kind=kind).key
        for paths, kind in (([two, one], "k"), ([one], "k"), ([one, two], "l"))
    ]
    assert len({key, *others}) == 4
    with pytest.raises(FileNotFoundError):
        FilesState.of([tmp_path / "absent"], kind="k")
