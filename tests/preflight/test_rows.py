"""Data that is missing, unreadable or too little, found without reading more than is needed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megachat.data import sources
from megachat.data.config import Stage
from megachat.data.own_formats import LOOKED_AT
from megachat.data.records_io import RawRecord, read_file
from megachat.errors import DataError
from megachat.hub import constants
from megachat.preflight.rows import check_data
from megachat.stages.config import RunConfig
from tests.data.samples import pair, pairs, write_jsonl
from tests.preflight.case import config

ALL = frozenset(Stage)


def refusals(settings: RunConfig, stages: frozenset[Stage] = ALL) -> list[str]:
    problems = list(check_data(settings, stages))
    assert all(type(each) is DataError and "\n" not in str(each) for each in problems)
    return [str(each) for each in problems]


def with_rows(folder: Path, rows: list[Any], *overrides: str) -> RunConfig:
    """The run on rows of its own; its model is not looked at."""
    write_jsonl(folder / "rows.jsonl", rows)
    return config(folder, *overrides)


def test_enough_rows_pass(case: Path) -> None:
    assert refusals(config(case)) == []
    assert refusals(config(case, "data.validation_share=0"), frozenset()) == []


def test_no_held_out_rows_are_refused_with_the_key_to_raise(case: Path) -> None:
    found = refusals(config(case, "data.validation_share=0"), frozenset({Stage.SFT}))
    assert found == [
        "data for sft: no held-out rows to evaluate on (data.validation_share is 0): raise "
        "data.validation_share"
    ]


@pytest.mark.parametrize(
    ("key", "stage", "train"),
    [
        ("sft.batch_rows", Stage.SFT, 12),
        ("reward.batch_pairs", Stage.REWARD, 23),
        ("rlhf.batch_prompts", Stage.PROMPTS, 23),
    ],
)
def test_a_batch_of_one_row_more_than_there_are_is_refused_by_its_key(
    case: Path, key: str, stage: Stage, train: int
) -> None:
    """64 rows make 13, 25 and 26; a tenth of them, rounded, is held out."""
    [text] = refusals(config(case, f"{key}={train + 1}"), frozenset({stage}))
    assert text.startswith(f"data for {stage}: {train} rows to train on do not make one batch of ")
    assert f"{key} {train + 1}: lower it" in text
    assert refusals(config(case, f"{key}={train}"), frozenset({stage})) == []


def test_a_stage_that_gets_no_share_is_refused(case: Path) -> None:
    [text] = refusals(config(case, "data.split=[1,1,0]"))
    assert text.startswith("data for prompts: no rows to train on: raise its share in data.split")


def test_rows_without_a_rejected_answer_make_no_pairs(tmp_path: Path) -> None:
    single = [{key: row[key] for key in ("prompt", "chosen")} for row in pairs(64)]
    [text] = refusals(with_rows(tmp_path, single))
    assert text.startswith("data for reward: no rows to train on")
    assert refusals(with_rows(tmp_path, single), ALL - {Stage.REWARD}) == []


def test_weights_and_several_sources_count(case: Path, tmp_path: Path) -> None:
    both = {"sources": [
        {"name": "mine", "path": str(case / "rows.jsonl"), "weight": 2.0},
        {"name": "more", "path": str(write_jsonl(tmp_path / "more.jsonl", pairs(10)))},
    ]}  # fmt: skip
    section = config(case).data.model_dump() | both
    base = config(case, "sft.batch_rows=26")
    settings = base.model_copy(update={"data": type(base.data).model_validate(section)})
    assert refusals(settings, frozenset({Stage.SFT})) != []  # 2 x 12 + 1
    section["sources"][1]["weight"] = 2.0
    settings = base.model_copy(update={"data": type(base.data).model_validate(section)})
    assert refusals(settings, frozenset({Stage.SFT})) == []


@pytest.mark.parametrize(
    ("name", "content", "needle"),
    [
        ("rows.txt", "x", "cannot read '.txt' files"),
        ("rows.jsonl", "", "no rows: 0 records"),
        ("rows.jsonl", "{not json\n" * 5, "5 of 5 records are unusable"),
        ("rows.json", "[1, 2", "not a JSON array"),
        ("rows.parquet", "x", "not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, name: str, content: str, needle: str
) -> None:
    (tmp_path / name).write_text(content)
    values = f'[{{name="mine", path="{tmp_path}/{name}"}}]'
    [text] = refusals(config(tmp_path, f"data.sources={values}"))
    assert needle in text and name in text


def test_a_source_that_is_not_there_or_not_readable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [text] = refusals(config(tmp_path))
    assert "rows.jsonl: no such file or folder" in text
    settings = with_rows(tmp_path, pairs(64))

    def denied(path: Path) -> Iterator[RawRecord]:
        raise DataError(f"{path}: cannot be read: Permission denied")
        yield

    monkeypatch.setattr(sources, "read_file", denied)
    assert "Permission denied" in refusals(settings)[0]


def test_too_many_bad_records_are_told_in_place_of_too_few_rows(tmp_path: Path) -> None:
    rows: list[Any] = [*pairs(4), *[{"question": "?"}] * 60]
    [text] = refusals(with_rows(tmp_path, rows))
    assert "60 of 64 records are unusable, more than max_bad_share 0.05 allows" in text
    assert "rows.jsonl row 5" in text
    assert "data for sft" in refusals(with_rows(tmp_path, rows, "data.max_bad_share=1"))[0]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Row numbers of all records that are read from now on."""
    seen: list[int] = []

    def reading(path: Path) -> Iterator[RawRecord]:
        for record in read_file(path):
            seen.append(record.row)
            yield record

    monkeypatch.setattr(sources, "read_file", reading)
    return seen


def test_of_a_large_file_no_more_is_read_than_the_batches_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", map(pair, range(20_000)))
    seen = counted(monkeypatch)
    assert refusals(config(tmp_path)) == []
    assert len(seen) == LOOKED_AT + 256
    assert refusals(config(tmp_path, "sft.batch_rows=500")) == []
    assert 500 / 0.18 < len(seen) - 2 * LOOKED_AT - 256 < 8000
    seen.clear()
    assert "3600 rows to train on" in refusals(config(tmp_path, "sft.batch_rows=4000"))[0]
    assert len(seen) == LOOKED_AT + 20_000


def test_a_large_file_of_nothing_usable_is_left_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "?"}) + "\n")
    line = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(line * 40_000)
    seen = counted(monkeypatch)
    source = f'data.sources=[{{path="{tmp_path}/rows.jsonl", format="common"}}]'
    assert refusals(config(tmp_path, source)) == []
    assert 10_000 < len(seen) < 40_000


def test_data_of_the_hub_is_refused_only_where_nobody_can_fetch_it(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(case, 'data.sources=[{name="Dahoas/rm-static"}]')
    [text] = refusals(settings)
    assert text.startswith("data set Dahoas/rm-static: no copy is cached here, and the hub cannot")
    assert "megachat fetch" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    assert refusals(settings) == []
    mixed = f'data.sources=[{{name="Dahoas/rm-static"}}, {{name="mine", path="{case}/rows.jsonl"}}]'
    assert refusals(config(case, mixed, "sft.batch_rows=4000")) == []  # the hub's may be many
