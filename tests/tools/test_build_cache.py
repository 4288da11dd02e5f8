"""What is kept of builds: made once, whole or not at all, under a key of all that it depends on."""

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.synchronize import Semaphore
from pathlib import Path

import pytest

from tools.build_cache import BuildCache, digest_of


def _maker(content: bytes, notes: Path | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if notes is not None:
            with notes.open("a") as file:
                file.write("made\n")
        (folder / "library").write_bytes(content)
        (folder / "listing").write_bytes(content[::-1])

    return make


def test_an_entry_is_made_once(tmp_path: Path) -> None:
    cache, notes = BuildCache(folder=tmp_path / "cache"), tmp_path / "notes"
    first = cache.folder_of("key", _maker(b"abc", notes))
    assert cache.folder_of("key", _maker(b"other", notes)) == first
    assert ((first / "library").read_bytes(), (first / "listing").read_bytes()) == (b"abc", b"cba")
    assert notes.read_text() == "made\n"
    assert cache.folder_of("key 2", _maker(b"other", notes)) != first


@pytest.mark.parametrize("name", ["library", "listing", "contents.json"])
@pytest.mark.parametrize("damage", [b"", b"ab", b"abd", None], ids=["empty", "cut", "bit", "gone"])
def test_a_torn_entry_is_made_anew(name: str, damage: bytes | None, tmp_path: Path) -> None:
    cache = BuildCache(folder=tmp_path)
    file = cache.folder_of("key", _maker(b"abc")) / name
    file.unlink()
    if damage is not None:
        file.write_bytes(damage)
    again = cache.folder_of("key", _maker(b"xyz"))
    assert (again / "library").read_bytes() == b"xyz"


def test_what_a_build_raises_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "library").write_bytes(b"half")
        raise AssertionError("error: expected ';'")

    cache = BuildCache(folder=tmp_path)
    with pytest.raises(AssertionError, match="expected ';'"):
        cache.folder_of("key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]
    assert (cache.folder_of("key", _maker(b"abc")) / "library").exists()


def _ask(folder: Path, here: Semaphore) -> None:
    """Asks for the one entry; who makes it finishes only once all three have come."""
    here.release()

    def make(target: Path) -> None:
        for _ in range(3):
            here.acquire()
        _maker(b"abc", folder / "notes")(target)

    found = BuildCache(folder=folder / "cache").folder_of("key", make)
    assert (found / "library").read_bytes() == b"abc"


def test_of_processes_that_come_together_one_makes_it_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here = context.Semaphore(0)
    asking = [context.Process(target=_ask, args=(tmp_path, here)) for _ in range(3)]
    for process in asking:
        process.start()
    for process in asking:
        process.join(timeout=60)
    assert [process.exitcode for process in asking] == [0, 0, 0]
    assert (tmp_path / "notes").read_text() == "made\n"


def test_above_the_limit_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    cache = BuildCache(folder=tmp_path, most_bytes=5000)
    now = time.time()
    for age, key in ((5, "old"), (4, "older but used"), (3, "younger")):
        os.utime(cache.folder_of(key, _maker(bytes(1000))), (now, now - age * 86400))
    cache.folder_of("older but used", _maker(b"not asked for"))
    cache.folder_of("new", _maker(bytes(1000)))
    assert {path.name for path in tmp_path.iterdir()} - {"locks"} == {"older but used", "new"}


def test_what_was_just_asked_for_stays_above_the_limit_too(tmp_path: Path) -> None:
    cache = BuildCache(folder=tmp_path, most_bytes=1)
    entries = [cache.folder_of(key, _maker(b"abc")) for key in ("one", "two")]
    assert all((entry / "library").exists() for entry in entries)


def test_a_key_changes_with_flags_compiler_and_the_name_and_content_of_each_file(
    tmp_path: Path,
) -> None:
    source, header = tmp_path / "a.cu", tmp_path / "a.h"
    source.write_text("int a;")
    header.write_text("#pragma once")
    keys = [digest_of(["-O1", "g++ 12.2"], [source, header])]
    assert keys == [digest_of(["-O1", "g++ 12.2"], [source, header])]
    keys.append(digest_of(["-O0", "g++ 12.2"], [source, header]))
    keys.append(digest_of(["-O1", "g++ 13.1"], [source, header]))
    keys.append(digest_of(["-O1g++ 12.2"], [source, header]))
    keys.append(digest_of(["-O1", "g++ 12.2"], [source]))
    header.write_text("#pragma once\n")
    keys.append(digest_of(["-O1", "g++ 12.2"], [source, header]))
    keys.append(digest_of(["-O1", "g++ 12.2"], [source, header.rename(tmp_path / "b.h")]))
    assert len(set(keys)) == len(keys)
