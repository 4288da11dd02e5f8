import errno
import fcntl
import io
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from megachat.data import sources as module
from megachat.data.cache import DataCache
from megachat.data.config import SourceConfig
from megachat.data.sources import fetch_source, find_source, open_source
from megachat.errors import DataError
from tests.data.samples import pairs, write_jsonl
from tests.data.test_formats import INSTALLED, RECORDS
from tests.harness import fake_hub
from tests.harness.fake_hub import COMMIT


def opened(tmp_path: Path, name: str = "mine", **options: Any) -> dict[str, list[Any]]:
    """The raw records of each split."""
    source = open_source(SourceConfig(name=name, **options), cache=DataCache(tmp_path / "cache"))
    return {split: [record.value for record in read()] for split, read in source.splits.items()}


def fingerprint(tmp_path: Path, path: Path) -> str:
    source = SourceConfig(name="mine", path=path)
    return open_source(source, cache=DataCache(tmp_path / "cache")).fingerprint


@pytest.mark.parametrize("name", sorted(set(RECORDS) - INSTALLED))
def test_local_copies_of_public_data_sets_keep_their_fields(tmp_path: Path, name: str) -> None:
    """Nested fields survive save_to_disk, Parquet and JSONL alike."""
    record = RECORDS[name][0]
    rows = datasets.Dataset.from_list([record])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    write_jsonl(tmp_path / "rows.jsonl", [record])
    for path in (tmp_path / "saved", tmp_path / "parquet", tmp_path / "rows.jsonl"):
        splits = opened(tmp_path, name, path=path)
        assert splits["train"] == [record]
    assert opened(tmp_path, name, path=tmp_path / "saved")["validation"] == [record]


def test_saved_single_split_is_for_training(tmp_path: Path) -> None:
    datasets.Dataset.from_list(pairs(3)).save_to_disk(tmp_path / "saved")
    assert opened(tmp_path, path=tmp_path / "saved") == {"train": pairs(3)}


def test_folder_of_files_is_grouped_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_jsonl(folder / "train-0.jsonl", pairs(2))
    write_jsonl(folder / "train-1.jsonl", pairs(3))
    write_jsonl(folder / "test.jsonl", pairs(4))
    write_jsonl(folder / "validation.jsonl", pairs(1))
    (folder / "readme.md").write_text("not data")
    assert opened(tmp_path, path=folder) == {
        "train": [*pairs(2), *pairs(3)],
        "validation": pairs(1),
    }


def test_layout_of_the_reference_is_found(tmp_path: Path) -> None:
    """DeepSpeed-Chat's local/jsonfile keeps data/train.json and data/eval.json."""
    (tmp_path / "chat" / "data").mkdir(parents=True)
    for name, count in (("train", 3), ("eval", 2)):
        path = tmp_path / "chat" / "data" / f"{name}.json"
        path.write_text(json.dumps(pairs(count)))
    splits = opened(tmp_path, "local/jsonfile", path=tmp_path / "chat")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 3, "validation": 2}


def test_fingerprint_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    first = fingerprint(tmp_path, write_jsonl(tmp_path / "a" / "rows.jsonl", pairs(3)))
    copy = write_jsonl(tmp_path / "b" / "rows.jsonl", pairs(3))
    assert fingerprint(tmp_path, copy) == first
    assert fingerprint(tmp_path, write_jsonl(copy, pairs(4))) != first


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "holds neither"),
        (lambda path: write_jsonl(path / "test.jsonl", pairs(1)), "nor training rows"),
        (lambda path: write_jsonl(path / "dataset_dict.json", ["{"]), "saved data set"),
    ],
)
def test_missing_or_empty_places_are_one_line(tmp_path: Path, make: Any, complaint: str) -> None:
    make(tmp_path / "mine")
    with pytest.raises(DataError, match=complaint) as caught:
        opened(tmp_path, path=tmp_path / "mine")
    assert "\n" not in str(caught.value)


def test_saved_data_set_without_training_rows_is_refused(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(pairs(1))
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="has no split 'train', only test"):
        opened(tmp_path, path=tmp_path / "saved")


def rows_file(count: int) -> bytes:
    """A Parquet file of pairs."""
    written = io.BytesIO()
    datasets.Dataset.from_list(pairs(count)).to_parquet(written)
    return written.getvalue()


def test_a_data_set_that_was_fetched_is_read_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what the library itself left when it loaded from a hub on loopback."""
    source = SourceConfig(name="Dahoas/rm-static")
    with fake_hub.serve() as hub:
        fake_hub.use(hub, tmp_path, monkeypatch)
        hub.repositories["datasets/Dahoas/rm-static"] = {
            "README.md": b"rows",
            "data/train-00000-of-00001.parquet": rows_file(5),
            "data/test-00000-of-00001.parquet": rows_file(2),
        }
        assert find_source(source) is None
        with pytest.raises(DataError, match="no copy is cached here.*megachat fetch") as caught:
            opened(tmp_path, source.name)
        assert hub.requests == [] and "\n" not in str(caught.value)
        folder = fetch_source(source)
        asked = len(hub.requests)
        assert fetch_source(source) == folder and len(hub.requests) == asked
    assert find_source(source) == folder
    assert opened(tmp_path, source.name) == {"train": pairs(5), "validation": pairs(2)}
    pinned = source.model_copy(update={"revision": "f" * 40})
    with pytest.raises(DataError, match=f"cached copy is of commit {COMMIT}, but revision is fff"):
        open_source(pinned, cache=DataCache(tmp_path / "rows"))
    same = source.model_copy(update={"revision": COMMIT})
    assert find_source(same) == folder


def test_a_library_cache_without_file_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceConfig(name="Dahoas/rm-static")

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with fake_hub.serve() as hub, monkeypatch.context() as patch:
        fake_hub.use(hub, tmp_path, monkeypatch)
        hub.repositories["datasets/Dahoas/rm-static"] = {"data/train.parquet": rows_file(3)}
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(DataError, match="no file locks.*set HF_HOME") as caught:
            fetch_source(source)
        assert "\n" not in str(caught.value)
        patch.undo()
        fetch_source(source)
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(DataError, match="no file locks.*set HF_HOME"):
            opened(tmp_path, source.name)


def test_hub_name_is_downloaded_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load(path: str, **options: Any) -> None:
        calls.append((path, options))

    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = SourceConfig(name="mkqa-Japanese", subset="mkqa", revision="refs/convert/parquet")
    with pytest.raises(DataError, match="no copy is cached here"):
        fetch_source(source)
    assert calls == [("apple/mkqa", {"name": "mkqa", "revision": "refs/convert/parquet"})]


def test_a_fetched_data_set_that_was_damaged_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SourceConfig(name="Dahoas/rm-static")
    with fake_hub.serve() as hub:
        fake_hub.use(hub, tmp_path, monkeypatch)
        hub.repositories["datasets/Dahoas/rm-static"] = {"data/train.parquet": rows_file(3)}
        folder = fetch_source(source)
    for path in folder.glob("*.arrow"):
        path.unlink()
    with pytest.raises(DataError, match="delete the folder and run megachat fetch") as caught:
        opened(tmp_path, source.name)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_places_on_this_machine_need_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "hub_is_reachable", lambda: pytest.fail("asked for a network"))
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(1))
    assert fetch_source(SourceConfig(name="mine", path=path)) == path
    assert fetch_source(SourceConfig(name="chitchat")).name == "dataset.json"
    with pytest.raises(DataError, match="data set mine: .*none: no such file or folder"):
        fetch_source(SourceConfig(name="mine", path=tmp_path / "none"))


def test_data_set_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have no content to key the cache with, and a size that only memory bounds."""
    datasets.Dataset.from_list(pairs(2)).save_to_disk(tmp_path / "saved")
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs(2))})
    monkeypatch.setattr(datasets, "load_from_disk", lambda *_, **__: rows)
    with pytest.raises(DataError, match="is held in memory"):
        opened(tmp_path, path=tmp_path / "saved")


def test_data_set_with_a_script_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Dataset scripts are no longer supported, but found mkqa.py\nmore")

    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match='set revision = "refs/convert/parquet"') as caught:
        fetch_source(SourceConfig(name="mkqa-Japanese"))
    assert "\n" not in str(caught.value)
