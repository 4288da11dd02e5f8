"""The first look counts what the conversion and the split give, up to what length limits drop."""

from pathlib import Path

import pytest

from megachat.data.chat import ChatConfig
from megachat.data.config import SourceConfig, Stage
from megachat.data.first_look import SourceLook
from megachat.data.stage_data import build_stage_data
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError
from tests.data.samples import data_config, pairs, write_jsonl


def source(folder: Path, count: int, **settings: object) -> SourceConfig:
    path = write_jsonl(folder / "rows.jsonl", pairs(count))
    return SourceConfig.model_validate({"name": "mine", "path": str(path), **settings})


@pytest.mark.parametrize("stage", list(Stage))
@pytest.mark.parametrize(
    "settings", [{}, {"weight": 1.7}, {"max_rows": 41}, {"split": [1, 0.3, 5]}]
)
def test_a_source_that_is_read_to_its_end_has_the_rows_that_the_stage_gets(
    tmp_path: Path, tokenizer: Tokenizer, stage: Stage, settings: dict[str, object]
) -> None:
    mine = source(tmp_path, 75, **settings)
    config = data_config(tmp_path, mine, validation_share=0.15, max_validation_rows=4)
    look = SourceLook(mine, chat=ChatConfig())
    while not look.is_complete:
        look.read(20)
    counts = look.counts(config, stage)
    data = build_stage_data(config, stage=stage, tokenizer=tokenizer)
    assert counts.train == sum(part.rows_per_epoch for part in data.train.parts)
    assert counts.held_out == len(data.validation)


def test_a_folder_with_held_out_rows_of_its_own_is_counted_so(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = tmp_path / "set"
    write_jsonl(folder / "train.jsonl", pairs(60))
    write_jsonl(folder / "test.jsonl", pairs(30))
    mine = SourceConfig(name="mine", path=folder)
    config = data_config(tmp_path, mine)
    look = SourceLook(mine, chat=ChatConfig())
    look.read(1000)
    data = build_stage_data(config, stage=Stage.REWARD, tokenizer=tokenizer)
    counts = look.counts(config, Stage.REWARD)
    assert (counts.train, counts.held_out) == (len(data.train), len(data.validation))


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    look = SourceLook(source(tmp_path, 50), chat=ChatConfig())
    config = data_config(tmp_path, look.source)
    assert not look.is_complete and look.counts(config, Stage.SFT).train == 0
    look.read(50)
    assert not look.is_complete  # nothing has said that there is no more
    look.read(1)
    assert look.is_complete


def test_a_source_is_judged_as_the_conversion_judges_it(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ["{", *pairs(3)])
    look = SourceLook(SourceConfig(name="mine", path=path), chat=ChatConfig())
    look.read(2)
    look.check(max_bad_share=0.0)  # it goes on
    look.read(9)
    with pytest.raises(DataError, match="1 of 4 records are unusable"):
        look.check(max_bad_share=0.2)
    look.check(max_bad_share=0.25)
    assert look.unusable == 0


def test_what_is_not_local_or_not_there_cannot_be_looked_at(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only a source with a path is local"):
        SourceLook(SourceConfig(name="Dahoas/rm-static"), chat=ChatConfig())
    with pytest.raises(DataError, match="no such file or folder"):
        SourceLook(SourceConfig(name="mine", path=tmp_path / "none"), chat=ChatConfig())
