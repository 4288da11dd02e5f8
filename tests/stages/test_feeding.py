"""Stages need exactly what they read, and a finished run feeds later ones."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from megachat.checkpoint import read_config, save_huggingface
from megachat.data.config import SentencePieceConfig, Stage
from megachat.data.tokenizer import Tokenizer, train_sentencepiece
from megachat.errors import ConfigError, MegachatError
from megachat.model import Head, ModelOptions
from megachat.model.opt import OptModel
from megachat.parallel.layout import ParallelLayout
from megachat.stages.config import RunConfig
from megachat.stages.context import (
    stage_folder,
    tokenizer_folder,
)
from megachat.stages.origin import stages_before
from megachat.stages.status import completed_stages, describe_run
from tests.harness import run_ranks
from tests.harness.groups import groups_of
from tests.stages import tiny_run


def _refusal(folder: Path, overrides: Sequence[str], stages: Sequence[Stage]) -> str:
    """What a run on this rank is refused with; empty where it went through."""
    try:
        tiny_run.run(folder, overrides, stages)
    except MegachatError as error:
        return str(error)
    return ""


def _run(folder: Path, overrides: Sequence[str], *stages: Stage) -> str:
    [said] = run_ranks(1, _refusal, folder, overrides, stages)
    assert "\n" not in said
    return said


def test_a_reward_model_from_a_folder_needs_no_supervised_stage(
    finished: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    overrides = [
        f"run.output={tmp_path}/run",
        f"models.reward.model={stage_folder(finished, Stage.SFT) / 'model'}",
        f"tokenizer={{path='{tokenizer_folder(finished)}'}}",
        "reward.max_steps=1",
    ]
    assert _run(finished_folder, overrides, Stage.REWARD) == ""
    config = tiny_run.config(finished_folder, overrides)
    assert set(completed_stages(config)) == {Stage.REWARD}
    later = tiny_run.config(finished_folder, [*overrides, "sft.batch_rows=9"])
    assert set(completed_stages(later)) == {Stage.REWARD}


@pytest.mark.parametrize(("model", "before"), [("facebook/opt-350m", ()), ("sft", (Stage.SFT,))])
def test_a_reward_model_depends_on_the_supervised_stage_where_it_starts_from_it(
    finished_folder: Path, model: str, before: tuple[Stage, ...]
) -> None:
    config = tiny_run.config(finished_folder, [f"models.reward.model={model}"])
    assert stages_before(config, Stage.REWARD) == before


def test_a_finished_run_feeds_another_one(
    finished: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    """The same start, prompts and seed: what is measured before PPO is what it was there."""
    source = finished.run.output
    overrides = [
        f"run.output={tmp_path}/run",
        f"run.sft_from={source}",
        f"run.reward_from={source}",
        "rlhf.max_steps=1",
    ]
    assert _run(finished_folder, overrides, *Stage) == ""
    config = tiny_run.config(finished_folder, overrides)
    assert set(completed_stages(config)) == {Stage.PROMPTS}
    here, there = (tiny_run.read_result_metrics(each, Stage.PROMPTS) for each in (config, finished))
    assert here["score_before"] == there["score_before"] and here["steps"] == 1
    lines = describe_run(config).splitlines()
    assert f"stage sft: taken from another run ({source / 'sft' / 'model'})" in lines
    copied = Tokenizer.load(tokenizer_folder(config)).fingerprint
    assert copied == Tokenizer.load(tokenizer_folder(finished)).fingerprint


def _export(folder: Path, tokenizer: Path) -> None:
    """Replaces a reward model by a random one with another tokenizer."""
    model = OptModel(
        read_config(folder),
        groups=groups_of(ParallelLayout()),
        head=Head.SCALAR,
        options=ModelOptions(),
        seed=1,
    )
    files = {path.name: path for path in sorted(tokenizer.iterdir())}
    save_huggingface(model, folder, extra_files=files)


def test_two_runs_with_different_tokenizers_cannot_feed_one(
    finished: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished.run.output, other)
    texts = (finished_folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    train_sentencepiece(texts, SentencePieceConfig(vocab_size=120), tmp_path / "tokenizer")
    run_ranks(1, _export, other / "reward" / "model", tmp_path / "tokenizer")
    overrides = [
        f"run.output={tmp_path}/run",
        f"run.sft_from={finished.run.output}",
        f"run.reward_from={other}",
    ]
    said = _run(finished_folder, overrides, Stage.PROMPTS)
    assert f"run.reward_from: the model in {other}/reward/model was made with another" in said
    assert "(120 ids)" in said and f"({finished.run.output}/sft/model, 134 ids)" in said


@pytest.mark.parametrize("broken", ["result.json", "model/model.safetensors"])
def test_a_run_that_has_not_finished_feeds_nobody(
    broken: str, finished: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished.run.output, other)
    (other / "sft" / broken).unlink()
    overrides = [f"run.output={tmp_path}/run", f"run.sft_from={other}"]
    said = _run(finished_folder, overrides, Stage.REWARD)
    assert f"run.sft_from {other}: {other}/sft/model is missing or incomplete" in said


def test_a_run_that_takes_everything_from_others_is_refused(finished_folder: Path) -> None:
    config = tiny_run.config(finished_folder, ["run.sft_from=runs/a"])
    with pytest.raises(ConfigError, match="run.sft_from runs/a: nothing is left to run"):
        config.own_stages([Stage.SFT])
    assert config.own_stages(list(Stage)) == [Stage.REWARD, Stage.PROMPTS]
    with pytest.raises(ConfigError, match="run: run.sft_from runs/a is run.output, this run"):
        tiny_run.config(finished_folder, ["run.sft_from=runs/a", "run.output=runs/a"])
