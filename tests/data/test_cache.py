import errno
import fcntl
import multiprocessing
import os
import shutil
import socket
import threading
import time
from pathlib import Path

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
    """Another node's draft may be in work: some shared file systems lock within a node only."""
    draft = f"a-{content_key({})}.building"
    left_over = tmp_path / f"{draft}-{socket.gethostname()}-{'0' * 32}"
    elsewhere = tmp_path / f"{draft}-another.node-{'0' * 32}"
    for folder in (left_over, elsewhere):
        folder.mkdir()
        (folder / "half").write_text("")
    entry = DataCache(tmp_path).get_or_build("a", {}, write_number)
    assert not left_over.exists() and elsewhere.is_dir()
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
    """Where locks hold within a node only, two ranks build; the second rename finds the entry."""
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


def test_file_system_without_locks_is_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 ranks that each prepare all the data are no way on; what is there is used."""
    kept = DataCache(tmp_path).get_or_build("b", {}, write_number)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(
        DataError, match=r"no file locks \(No locks av.*choose a data.cache_dir"
    ) as e:
        DataCache(tmp_path).get_or_build("a", {}, write_number)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
    assert DataCache(tmp_path).get_or_build("b", {}, write_number) == kept


def test_names_of_drafts_differ_though_containers_share_process_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)
    drafts = []
    for key in ({"x": 1}, {"x": 1}):
        DataCache(tmp_path).get_or_build("a", key, drafts.append)
        shutil.rmtree(next(tmp_path.glob(f"a-{content_key(key)}")))
    assert len(set(drafts)) == 2
    assert not any("-7-" in draft.name or draft.name.endswith("-7") for draft in drafts)


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


def test_digest_of_files_depends_on_content_order_and_the_way_they_are_read(tmp_path: Path) -> None:
    cache = DataCache(tmp_path / "cache")

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    one, two = write("a.jsonl", "one"), write("b.jsonl", "two")
    assert cache.files_digest([one, two]) != cache.files_digest([two, one])
    assert cache.files_digest([one]) == cache.files_digest([write("v1.other.jsonl", "one")])
    ends = ("a.json", "a", "a.jsonl.gz", "a.json.gz")
    digests = {cache.files_digest([write(name, "one")]) for name in ends}
    assert len(digests | {cache.files_digest([one])}) == 1 + len(ends)


def test_unreadable_places_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        DataCache(tmp_path).file_digest(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir .* cannot be created"):
        DataCache(tmp_path / "file" / "cache")
