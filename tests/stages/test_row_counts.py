"""Rows of all stages are counted before the first of them starts, and limits say what they cost."""

import logging
from pathlib import Path

import pytest

from megachat.data.config import Stage
from megachat.data.stage_data import build_stage_data
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError
from megachat.stages.config import RunConfig
from megachat.stages.context import stage_folder, tokenizer_folder
from megachat.stages.row_counts import check_rows, left_out_of_evaluation, prepare_all_rows
from tests.harness import run_ranks
from tests.stages import tiny_run


@pytest.mark.parametrize(
    ("stage", "key", "batch"),
    [
        (Stage.SFT, "sft.batch_rows", 8),
        (Stage.REWARD, "reward.batch_pairs", 8),
        (Stage.PROMPTS, "rlhf.batch_prompts", 8),
    ],
)
def test_a_stage_needs_one_batch_and_one_held_out_row(
    tmp_path: Path, stage: Stage, key: str, batch: int
) -> None:
    config = tiny_run.config(tmp_path)
    check_rows(config, stage, train=batch, held_out=1)
    with pytest.raises(DataError, match=f"7 rows to train on do not make one batch of {key} 8"):
        check_rows(config, stage, train=batch - 1, held_out=1)
    with pytest.raises(DataError, match="no held-out rows .*: raise data.validation_share"):
        check_rows(config, stage, train=batch, held_out=0)
    with pytest.raises(DataError, match=r"no rows to train on: raise its share in data\.split"):
        check_rows(config, stage, train=0, held_out=1)


def _refusal_of_a_run(folder: Path) -> str:
    """What the ranks find, which no preflight has looked at before."""
    with pytest.raises(DataError) as caught:
        tiny_run.run(folder, ["rlhf.batch_prompts=150"])
    return str(caught.value)


def test_too_few_prompts_are_found_before_the_supervised_stage(tmp_path: Path) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    [text] = run_ranks(1, _refusal_of_a_run, tmp_path)
    assert text.startswith("data for prompts: 120 rows to train on do not make one batch of ")
    assert "rlhf.batch_prompts 150" in text
    config = tiny_run.config(tmp_path)
    assert list(stage_folder(config, Stage.SFT).iterdir()) == []


def _report_lines(config: RunConfig, stage: Stage) -> list[str]:
    tokenizer = Tokenizer.load(tokenizer_folder(config))
    report = build_stage_data(config.data, stage=stage, tokenizer=tokenizer).report
    return left_out_of_evaluation(config, report)


def test_the_limits_of_evaluation_say_how_many_of_how_many(finished: RunConfig) -> None:
    """400 rows make 80 for the supervised stage; a quarter of them is held out."""
    assert _report_lines(finished, Stage.SFT) == [
        "data for sft: the first 9 of 20 held-out rows are evaluated (sft.evaluation_rows): 11 are "
        "left out"
    ]
    enough = finished.sft.model_copy(update={"evaluation_rows": 20})
    assert _report_lines(finished.model_copy(update={"sft": enough}), Stage.SFT) == []


def test_the_limit_of_held_out_rows_says_what_it_leaves(
    finished: RunConfig, tmp_path: Path
) -> None:
    data = finished.data.model_copy(update={"max_validation_rows": 5, "cache_dir": tmp_path})
    lines = _report_lines(finished.model_copy(update={"data": data}), Stage.SFT)
    assert lines == [
        "data for sft: chats: 5 of 20 rows are held out, the most that data.max_validation_rows 5 "
        "allows"
    ]


def test_the_lines_are_in_the_log(finished: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder(finished))
    with caplog.at_level(logging.INFO, logger="megachat.stages.row_counts"):
        prepare_all_rows(finished, tokenizer, [Stage.PROMPTS])
    assert [record.getMessage() for record in caplog.records] == [
        "data for prompts: the first 10 of 40 held-out rows are evaluated (rlhf.evaluation_rows): "
        "30 are left out"
    ]
