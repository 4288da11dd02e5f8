"""The two commands that take a person from a file of their own to a trained model."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megachat.cli.main import app
from megachat.config import load_config
from megachat.data.config import Stage
from megachat.stages.config import RunConfig
from megachat.stages.run import run_stages
from tests.data.samples import pair, pairs, sentence, write_jsonl
from tests.harness import run_ranks
from tests.stages import tiny_run


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["init", *(str(argument) for argument in arguments)])


def written(folder: Path) -> RunConfig:
    return load_config(RunConfig, path=folder / "run.toml")


def _train_alone(path: Path) -> None:
    few = [f"{stage}.max_steps=1" for stage in ("sft", "reward", "rlhf")]
    config = load_config(RunConfig, path=path, overrides=few)
    config.check()
    run_stages(tiny_run.worker(), config, list(Stage), "megachat train")


def test_what_init_writes_trains_all_three_stages(tmp_path: Path) -> None:
    """From nothing but the file; with fewer steps than are written down."""
    path = write_jsonl(tmp_path / "my.jsonl", pairs(64))
    assert init(tmp_path / "my", "--data", path).exit_code == 0
    run_ranks(1, _train_alone, tmp_path / "my" / "run.toml")
    run = tmp_path / "my" / "run"
    assert (run / "rlhf" / "model" / "model.safetensors").is_file()
    summary = (run / "summary.txt").read_text()
    assert "rows + held out" in summary and "my.jsonl" in summary
    assert "rows + held out" in (run / "report.html").read_text()
    assert "data for sft: my.jsonl: " in (run / "logs" / "rank_000.log").read_text()
    settings = json.loads((run / "rlhf" / "model" / "tokenizer_config.json").read_text())
    assert "<human>" in settings["chat_template"]


def test_limits_and_batches_fit_the_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "my.jsonl", pairs(64))
    result = init(tmp_path / "my", "--data", path)
    assert result.exit_code == 0, result.output
    assert f"next: megachat train --config {tmp_path}/my/run.toml" in result.stdout
    config = written(tmp_path / "my")
    assert config.data.sources[0].path == path
    # 64 rows by 2:4:4 are 13, 26 and 25; a tenth is held out
    assert (config.sft.batch_rows, config.reward.batch_pairs, config.rlhf.batch_prompts) == (
        2,
        4,
        4,
    )
    assert config.data.max_tokens - config.data.max_prompt_tokens >= 16


def test_plain_questions_get_markers_and_tables_keep_their_columns(tmp_path: Path) -> None:
    lines = [f"{sentence(row)}?,{sentence(row + 5)}." for row in range(50)]
    (tmp_path / "faq.csv").write_text("\n".join(["question,answer", *lines]))
    columns = ("--column", "prompt=question", "--column", "chosen=answer")
    result = init(tmp_path / "my", "--data", tmp_path / "faq.csv", *columns)
    assert result.exit_code == 0, result.output
    assert "these rows can serve sft, prompts only" in result.stdout
    (source,) = written(tmp_path / "my").data.sources
    assert source.columns.names == {"prompt": "question", "chosen": "answer"}
    assert source.render == "chat"


def test_without_a_file_there_is_a_place_for_one(tmp_path: Path) -> None:
    assert init(tmp_path / "my").exit_code == 0
    assert written(tmp_path / "my").data.sources[0].path == tmp_path / "my" / "data.jsonl"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("mine")
    result = init(tmp_path)
    assert result.exit_code == 2 and "exists already" in result.stderr
    assert (tmp_path / "run.toml").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no rows"),
        ('{"a": 1}\n', "unknown format"),
        (json.dumps(pair(1)) + "\n" + json.dumps(pair(2)) + "\n", "too few"),
    ],
)
def test_files_that_cannot_be_trained_on_are_refused_in_one_line(
    tmp_path: Path, content: str, complaint: str
) -> None:
    (tmp_path / "my.jsonl").write_text(content)
    result = init(tmp_path / "my", "--data", tmp_path / "my.jsonl")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert complaint in result.stderr.splitlines()[-1]
    assert not (tmp_path / "my").exists()
