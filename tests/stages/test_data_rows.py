from pathlib import Path

from megachat.data.config import Stage
from megachat.data.stage_data import DataReport, SourceReport
from megachat.stages.data_rows import DATA_FILE, read_rows, rows_table
from megachat.stages.results import write_json


def report(**changes: object) -> SourceReport:
    values = {
        "name": "mine",
        "records": 1200,
        "bad": 3,
        "unanswered": 0,
        "train_rows": 1000,
        "validation_rows": 100,
        "tokens": 5000,
        "outcomes": {
            "dropped: prompt longer than max_prompt_tokens": 7,
            "kept: answer truncated": 48,
            "dropped: no rejected answer": 2,
        },
    }
    return SourceReport(**(values | changes))  # type: ignore[arg-type]


def test_the_table_counts_what_was_cut_and_dropped_by_reason() -> None:
    table = rows_table(
        {
            Stage.SFT: DataReport(stage=Stage.SFT, sources=(report(),)),
            Stage.REWARD: DataReport(
                stage=Stage.REWARD,
                sources=(
                    report(bad=0, outcomes={}),
                    report(name="idle", train_rows=0, validation_rows=0, outcomes={}),
                ),
            ),
        }
    )
    assert table is not None
    assert [list(row) for row in table.rows] == [
        [
            "Supervised fine-tuning",
            "mine",
            "1,000 + 100",
            "3",
            "48 answer truncated",
            "7 prompt longer than max_prompt_tokens, 2 no rejected answer",
        ],
        ["Reward model", "mine", "1,000 + 100", "0", "-", "-"],
    ]


def test_without_reports_there_is_no_table(tmp_path: Path) -> None:
    assert rows_table({}) is None
    assert read_rows(tmp_path) is None
    for content in ("[]", "{", '{"stage": "sft", "sources": [{}]}'):
        (tmp_path / DATA_FILE).write_text(content)
        assert read_rows(tmp_path) is None


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    from dataclasses import asdict

    written = DataReport(stage=Stage.SFT, sources=(report(),))
    write_json(tmp_path / DATA_FILE, asdict(written))
    assert read_rows(tmp_path) == written
