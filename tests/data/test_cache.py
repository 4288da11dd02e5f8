import multiprocessing
import threading
import time
from pathlib import Path

import filelock
import pytest

from megachat.data.cache import DataCache, content_key
from megachat.errors import DataError


def write_number(folder: Path) -> None:
    (folder / "number").write_text("7")


def build_slowly_and_log(cache: Path, log: Path) -> None:
    """A rank that wants the entry `a` and notes it when it has to build it."""

    def build(folder: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)  # long enough for the other processes to arrive; no order is assumed
        write_number(folder)

    entry = DataCache(cache).get_or_build("a", {"x": 1}, build)
    assert (entry / "number").read_text() == "7"


def test_key_depends_on_values_and_not_on_order() -> None:
    assert content_key({"a": 1, "b": [1.5, None]}) == content_key({"b": [1.5, None], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})


def test_entry_is_built_once_per_key(tmp_path: Path) -> None:
    cache, built = DataCache(tmp_path), []

    def build(folder: Path) -> None:
        built.append(folder)
        write_number(folder)

    first = cache.get_or_build("a", {"x": 1}, build)
    assert cache.get_or_build("a", {"x": 1}, build) == first
    assert cache.get_or_build("a", {"x": 2}, build) != first
    assert len(built) == 2
    assert (first / "number").read_text() == "7"


def test_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    cache = DataCache(tmp_path)

    def fail(folder: Path) -> None:
        write_number(folder)
        raise DataError("broken row")

    with pytest.raises(DataError, match="broken row"):
        cache.get_or_build("a", {}, fail)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert (cache.get_or_build("a", {}, write_number) / "number").is_file()


def test_left_over_of_a_killed_build_is_swept_and_never_used(tmp_path: Path) -> None:
    left_over = tmp_path / f"a-{content_key({})}.building-1-x"
    left_over.mkdir()
    (left_over / "half").write_text("")
    entry = DataCache(tmp_path).get_or_build("a", {}, write_number)
    assert not left_over.exists()
    assert [path.name for path in entry.iterdir()] == ["number"]


def test_only_one_of_several_processes_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache", tmp_path / "log")
    ranks = [context.Process(target=build_slowly_and_log, args=arguments) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"


def test_build_that_loses_a_race_without_locks_uses_the_winner(tmp_path: Path) -> None:
    """On a file system without locks two ranks build; the second rename finds the entry."""
    cache = DataCache(tmp_path)
    other_done = threading.Event()

    def build(folder: Path) -> None:
        winner = tmp_path / folder.name.partition(".building")[0]
        winner.mkdir()
        (winner / "number").write_text("first")
        other_done.set()
        write_number(folder)

    entry = cache.get_or_build("a", {}, build)
    assert other_done.is_set()
    assert (entry / "number").read_text() == "first"


def test_file_system_without_locks_still_gives_whole_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what another rank is building at the same time is left alone."""

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    other = tmp_path / f"a-{content_key({})}.building-1-x"
    other.mkdir()
    entry = DataCache(tmp_path).get_or_build("a", {}, write_number)
    assert (entry / "number").read_text() == "7"
    assert other.is_dir()


def test_file_digest_follows_the_content(tmp_path: Path) -> None:
    cache, path = DataCache(tmp_path / "cache"), tmp_path / "a"
    path.write_text("one")
    first = cache.file_digest(path)
    assert cache.file_digest(path) == first
    copy = tmp_path / "b"
    copy.write_text("one")
    assert cache.file_digest(copy) == first
    path.write_text("other")
    assert cache.file_digest(path) != first


def test_digest_of_files_depends_on_names_and_order(tmp_path: Path) -> None:
    cache = DataCache(tmp_path / "cache")
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    one, two = tmp_path / "a", tmp_path / "b"
    assert cache.files_digest([one, two]) != cache.files_digest([two, one])


def test_unreadable_places_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        DataCache(tmp_path).file_digest(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir .* cannot be created"):
        DataCache(tmp_path / "file" / "cache")
