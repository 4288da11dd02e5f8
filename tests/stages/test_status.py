"""What a run says of itself before anything is started; finished runs are in `test_run.py`."""

import json
import math
from pathlib import Path

import pytest

from megachat.cli.presets import tiny_example
from megachat.config import load_config
from megachat.data.config import Stage
from megachat.errors import CheckpointError
from megachat.stages.config import RunConfig
from megachat.stages.context import stage_folder
from megachat.stages.results import RESULT_FILE
from megachat.stages.status import completed_stages, describe_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(RunConfig, path=tiny_example(), overrides=[f"run.output={tmp_path}"])


def test_a_new_run_has_every_stage_before_it(config: RunConfig) -> None:
    assert completed_stages(config) == {}
    text = describe_run(config)
    assert "ranks: 2" in text and "layout of actor: tp2.pp1.dp1" in text
    for stage in Stage:
        assert f"stage {stage}: to run ({stage_folder(config, stage)})" in text
    assert config.rlhf.ppo.dual_clip == math.inf  # a word that JSON does not have

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    tree, end = json.JSONDecoder(parse_constant=refuse).raw_decode(text)
    assert RunConfig.model_validate(tree, strict=False) == config
    assert text[end:].startswith("\nranks: ")


def test_a_result_that_cannot_be_read_is_an_error(config: RunConfig) -> None:
    folder = stage_folder(config, Stage.SFT)
    folder.mkdir()
    (folder / RESULT_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=RESULT_FILE):
        completed_stages(config)
