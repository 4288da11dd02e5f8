"""Where models and tokenizer come from: named, left by this run, or by another one."""

from pathlib import Path

import pytest

from megachat.data.config import Stage
from megachat.stages.starts import source_folder, start_models, tokenizer_source
from tests.stages import tiny_run


def test_every_stage_says_which_models_it_reads(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, ["run.output=runs/b", "run.sft_from=runs/a"])
    found = {
        stage: [(start.role, start.name, start.stage) for start in start_models(config, stage)]
        for stage in Stage
    }
    assert found == {
        Stage.SFT: [],
        Stage.REWARD: [("reward", "runs/a/sft/model", Stage.SFT)],
        Stage.PROMPTS: [
            ("actor", "runs/a/sft/model", Stage.SFT),
            ("reward", "runs/b/reward/model", Stage.REWARD),
        ],
    }


def test_a_named_model_is_no_output_of_a_stage(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path, ["models.reward.model=opts/b"])
    [start] = start_models(config, Stage.REWARD)
    assert (start.role, start.name, start.stage) == ("reward", "opts/b", None)
    assert source_folder(config, Stage.REWARD) == tmp_path / "run/reward/model"


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        ([], None),
        (["run.sft_from=runs/a"], "runs/a/sft/model"),
        (["run.reward_from=runs/a"], "runs/a/reward/model"),
        (["run.sft_from=runs/a", "run.reward_from=runs/b"], "runs/a/sft/model"),
        (["run.sft_from=runs/a", "tokenizer={path = 'mine'}"], "mine"),
    ],
    ids=str,
)
def test_a_tokenizer_comes_from_where_the_models_do(
    tmp_path: Path, overrides: list[str], source: str | None
) -> None:
    assert tokenizer_source(tiny_run.config(tmp_path, overrides)) == source
