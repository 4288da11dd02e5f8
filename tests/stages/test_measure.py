from pathlib import Path

import pytest

from megachat.config import build_config
from megachat.errors import CheckpointError
from megachat.stages.config import RunConfig
from megachat.stages.context import tokenizer_folder
from megachat.stages.measure import measure_of_run, named_measure
from tests.data.samples import pairs, train_tiny, write_jsonl


def run_config(tmp_path: Path, tokenizer: dict[str, object]) -> RunConfig:
    tree = {
        "run": {"output": str(tmp_path / "run")},
        "tokenizer": tokenizer,
        "data": {
            "cache_dir": str(tmp_path / "cache"),
            "sources": [{"path": str(write_jsonl(tmp_path / "my.jsonl", pairs(60)))}],
        },
        "models": {
            "actor": {"shape": {"layers": 2, "hidden": 32, "heads": 2}},
            "reward": {"model": "sft"},
        },
    }
    return build_config(RunConfig, tree, source="test")


def test_a_run_that_will_train_a_vocabulary_is_measured_with_that_one(tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": {"vocab_size": 60}})
    measure = measure_of_run(config, folder=tmp_path / "scratch")
    assert measure.tokenizer is not None and measure.tokenizer.vocab_size == 60
    assert "60 pieces trained on these data" in measure.origin
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_run_that_has_its_tokenizer_is_measured_with_it(tmp_path: Path) -> None:
    config = run_config(tmp_path, {"train": {"vocab_size": 60}})
    made = train_tiny(tokenizer_folder(config))
    measure = measure_of_run(config, folder=tmp_path / "scratch")
    assert measure.tokenizer is not None
    assert measure.tokenizer.fingerprint == made.fingerprint


def test_a_tokenizer_that_is_not_here_leaves_words_and_says_so(tmp_path: Path) -> None:
    config = run_config(tmp_path, {"path": "nobody/has-this"})
    measure = measure_of_run(config, folder=tmp_path / "scratch")
    assert measure.tokenizer is None and "lengths are in words" in measure.origin
    with pytest.raises(CheckpointError):
        named_measure("nobody/has-this")


def test_a_run_that_takes_its_tokenizer_from_another_one_is_measured_with_that(
    tmp_path: Path,
) -> None:
    other = tmp_path / "other"
    made = train_tiny(other / "sft/model")
    config = run_config(tmp_path, {"train": {"vocab_size": 60}})
    run = config.run.model_copy(update={"sft_from": other})
    measure = measure_of_run(config.model_copy(update={"run": run}), folder=tmp_path / "scratch")
    assert measure.tokenizer is not None
    assert measure.tokenizer.fingerprint == made.fingerprint
