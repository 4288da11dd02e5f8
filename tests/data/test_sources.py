import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from megachat.data import sources as module
from megachat.data.cache import DataCache
from megachat.data.config import SourceConfig
from megachat.data.sources import open_source
from megachat.errors import DataError
from tests.data.samples import pairs, write_jsonl
from tests.data.test_formats import INSTALLED, RECORDS


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


def test_hub_name_is_taken_from_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache an earlier download leaves, written here by the library itself."""
    write_jsonl(tmp_path / "rm-static" / "train.jsonl", pairs(5))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(module, "hub_is_reachable", lambda: False)
    with pytest.raises(DataError, match="no copy is cached"):
        opened(tmp_path, "Dahoas/rm-static")
    built = datasets.load_dataset(
        "json",
        data_files={"train": str(tmp_path / "rm-static" / "train.jsonl")},
        cache_dir=str(tmp_path / "built"),
    )
    source = Path(built["train"].cache_files[0]["filename"]).parent
    target = tmp_path / "hub" / "Dahoas___rm-static" / "default" / "0.0.0" / "abc"
    target.mkdir(parents=True)
    (target / "rm-static-train.arrow").write_bytes((source / "json-train.arrow").read_bytes())
    info = json.loads((source / "dataset_info.json").read_text())
    info |= {"builder_name": "json", "dataset_name": "rm-static", "config_name": "default"}
    (target / "dataset_info.json").write_text(json.dumps(info))
    assert opened(tmp_path, "Dahoas/rm-static") == {"train": pairs(5)}


def test_hub_name_is_downloaded_with_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    saved = str(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs(2))}).save_to_disk(saved)

    def load(path: str, **options: Any) -> Any:
        calls.append((path, options))
        return datasets.load_from_disk(saved)

    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    splits = opened(tmp_path, "mkqa-Japanese", subset="mkqa", revision="refs/convert/parquet")
    assert splits == {"train": pairs(2)}
    assert calls == [("apple/mkqa", {"name": "mkqa", "revision": "refs/convert/parquet"})]


def test_data_set_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have no content to key the cache with, and a size that only memory bounds."""
    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs(2))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(DataError, match="is held in memory"):
        opened(tmp_path, "Dahoas/rm-static")


def test_data_set_with_a_script_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Dataset scripts are no longer supported, but found mkqa.py\nmore")

    monkeypatch.setattr(module, "hub_is_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match='set revision = "refs/convert/parquet"') as caught:
        opened(tmp_path, "mkqa-Japanese")
    assert "\n" not in str(caught.value)
