"""The run as a whole: what is skipped, what is done again, and what is refused up front."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from megachat.data.config import Stage
from megachat.errors import CheckpointError, MegachatError
from megachat.stages.config import RunConfig
from megachat.stages.context import TOKENIZER_RECORD, stage_folder, tokenizer_folder
from megachat.stages.origin import ORIGIN_FILE
from megachat.stages.results import RESULT_FILE
from megachat.stages.status import completed_stages, describe_run
from megachat.telemetry.metrics import METRICS_FILE
from tests.harness import run_ranks
from tests.stages import tiny_run


@pytest.fixture
def copy(finished: RunConfig, finished_folder: Path, tmp_path: Path) -> RunConfig:
    """A copy of the completed run that a test may change, over the same data."""
    output = tmp_path / "run"
    shutil.copytree(finished.run.output, output)
    return tiny_run.config(finished_folder, [f"run.output={output}"])


def _state(folder: Path) -> dict[str, int]:
    """When each file of a run was written, logs and reports left out."""
    kept = ("sft", "reward", "rlhf", "tokenizer", "config.json")
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for name in kept
        for path in [folder / name, *(folder / name).rglob("*")]
        if path.is_file()
    }


def _run_anyhow(
    folder: Path, overrides: Sequence[str], stages: Sequence[Stage]
) -> tuple[str, str] | None:
    """(type, message) of the refusal of a run on this rank; None where it went through."""
    try:
        tiny_run.run(folder, overrides, stages)
    except MegachatError as error:
        return type(error).__name__, str(error)
    return None


def _run(copy: RunConfig, folder: Path, *overrides: str, stages: Sequence[Stage]) -> object:
    items = [f"run.output={copy.run.output}", *overrides]
    return run_ranks(1, _run_anyhow, folder, items, stages)[0]


def test_a_second_run_skips_every_stage(copy: RunConfig, finished_folder: Path) -> None:
    before = _state(copy.run.output)
    assert _run(copy, finished_folder, stages=list(Stage)) is None
    after = _state(copy.run.output)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"config.json"} and set(after) == set(before)
    log = (copy.run.output / "logs" / "rank_000.log").read_text(encoding="utf-8")
    for number, title in enumerate(("Supervised fine-tuning", "Reward model", "PPO"), start=1):
        assert log.count(f"[{number}/3] {title}: complete in") == 1


def test_another_number_of_ranks_or_another_place_of_the_cache_is_no_other_run(
    copy: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    overrides = [
        "launch.processes=4",
        "models.actor.tensor=2",
        f"data.cache_dir={tmp_path}",
        f"run.output={copy.run.output}",
    ]
    assert set(completed_stages(tiny_run.config(finished_folder, overrides))) == set(Stage)


@pytest.mark.parametrize(
    ("override", "stage"),
    [("sft.batch_rows=9", "sft"), ("reward.center_coef=0.1", "reward"), ("run.seed=4", "sft")],
)
def test_a_changed_configuration_is_refused_before_anything_is_written(
    override: str, stage: str, copy: RunConfig, finished_folder: Path
) -> None:
    before = _state(copy.run.output)
    refusal = _run(copy, finished_folder, override, stages=list(Stage))
    assert refusal is not None
    kind, message = refusal
    assert kind == "ConfigError" and "\n" not in message
    key, value = override.split("=")
    assert f"{copy.run.output / stage}: completed under another configuration: {key} was" in message
    assert f", is {value}: " in message
    assert _state(copy.run.output) == before


def test_a_stage_that_is_not_asked_for_must_fit_the_configuration_too(
    copy: RunConfig, finished_folder: Path
) -> None:
    """Its figures would stand in the same report."""
    refusal = _run(copy, finished_folder, "rlhf.batch_prompts=4", stages=[Stage.SFT])
    assert refusal is not None and f"{copy.run.output / 'rlhf'}: completed under" in refusal[1]


@pytest.mark.parametrize("key", ["models.actor.logprob_backend", "rlhf.generation.backend"])
def test_kernels_that_cannot_be_had_are_refused_before_the_first_stage(
    tmp_path: Path, key: str
) -> None:
    overrides = [f"run.output={tmp_path}/run", f"{key}=cuda"]
    refusal = run_ranks(1, _run_anyhow, tmp_path, overrides, list(Stage))[0]
    assert refusal is not None and refusal[0] == "KernelError"
    assert "needs a model on an NVIDIA GPU, and this one is on the cpu" in refusal[1]
    assert not any((tmp_path / "run" / "sft").iterdir())


@pytest.mark.parametrize(
    ("stage", "missing"), [(Stage.REWARD, Stage.SFT), (Stage.PROMPTS, Stage.REWARD)]
)
def test_a_stage_whose_input_is_missing_is_refused(
    stage: Stage, missing: Stage, copy: RunConfig, finished_folder: Path
) -> None:
    for later in list(Stage)[list(Stage).index(missing) :]:
        shutil.rmtree(stage_folder(copy, later))
    refusal = _run(copy, finished_folder, stages=[stage])
    assert refusal is not None
    kind, message = refusal
    assert kind == "CheckpointError" and "\n" not in message
    assert f"the output of stage '{missing}' is missing or incomplete" in message
    assert f"stage '{stage}' needs it: run that stage first" in message


def test_a_stage_counts_as_done_only_with_its_whole_model(copy: RunConfig) -> None:
    weights = stage_folder(copy, Stage.REWARD) / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert set(completed_stages(copy)) == {Stage.SFT}  # and no stage without those before it
    (stage_folder(copy, Stage.SFT) / RESULT_FILE).unlink()
    assert completed_stages(copy) == {}


def test_a_stage_done_again_to_the_same_model_leaves_the_later_ones_complete(
    copy: RunConfig, finished_folder: Path
) -> None:
    (stage_folder(copy, Stage.SFT) / RESULT_FILE).unlink()
    before = _state(copy.run.output)
    assert _run(copy, finished_folder, stages=list(Stage)) is None
    after = _state(copy.run.output)
    assert after["sft/model/model.safetensors"] != before["sft/model/model.safetensors"]
    later = [name for name in after if name.startswith(("reward/", "rlhf/"))]
    assert later and all(after[name] == before[name] for name in later)
    assert set(completed_stages(copy)) == set(Stage)


def test_a_stage_done_again_to_another_model_takes_the_later_ones_along(
    copy: RunConfig, finished_folder: Path
) -> None:
    """Those that are asked for run again; those that are not leave the report."""
    shutil.rmtree(stage_folder(copy, Stage.SFT))
    change = ["sft.max_steps=1", f"run.output={copy.run.output}"]
    stages = [Stage.SFT, Stage.REWARD]
    assert _run(copy, finished_folder, change[0], stages=stages) is None
    assert set(completed_stages(tiny_run.config(finished_folder, change))) == set(stages)
    log = (copy.run.output / "logs" / "rank_000.log").read_text(encoding="utf-8")
    assert "[2/2] Reward model: runs again" in log
    earlier = stage_folder(copy, Stage.REWARD) / "attempts" / "1"
    assert {RESULT_FILE, ORIGIN_FILE, METRICS_FILE} <= {path.name for path in earlier.iterdir()}
    summary = (copy.run.output / "summary.txt").read_text(encoding="utf-8")
    assert "Reward model" in summary and "after PPO" not in summary


def test_the_same_rows_under_another_path_are_the_same_run(
    copy: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(finished_folder / "rows.jsonl", tmp_path / "rows.jsonl")
    config = tiny_run.config(tmp_path, [f"run.output={copy.run.output}"])
    assert config.data.sources != copy.data.sources
    assert set(completed_stages(config)) == set(Stage)


def test_changed_rows_under_the_same_path_are_refused_by_file(
    copy: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    text = (finished_folder / "rows.jsonl").read_text()
    rows.write_text(text.replace("love", "like", 1))
    before = _state(copy.run.output)
    refusal = _run(copy, tmp_path, stages=list(Stage))
    assert refusal is not None and refusal[0] == "ConfigError" and "\n" not in refusal[1]
    old, new = (hashlib.sha256(each.encode()).hexdigest() for each in (text, rows.read_text()))
    assert (
        f"{copy.run.output / 'sft'}: made from other files: data.sources.0 {rows} had"
        in (refusal[1])
    )
    assert f"sha256 {old[:12]}" in refusal[1] and f"now {new[:12]}" in refusal[1]
    assert _state(copy.run.output) == before
    rows.unlink()  # nothing to compare with, and nothing that needs it
    config = tiny_run.config(tmp_path, [f"run.output={copy.run.output}"])
    assert set(completed_stages(config)) == set(Stage)


def test_a_run_of_a_version_without_records_is_one_line(
    copy: RunConfig, finished_folder: Path
) -> None:
    (stage_folder(copy, Stage.SFT) / ORIGIN_FILE).unlink()
    refusal = _run(copy, finished_folder, stages=list(Stage))
    assert refusal is not None and refusal[0] == "ConfigError" and "\n" not in refusal[1]
    assert "completed by a version of megachat that kept no record" in refusal[1]


def test_a_tokenizer_that_was_changed_is_refused(copy: RunConfig, finished_folder: Path) -> None:
    for stage in Stage:
        shutil.rmtree(stage_folder(copy, stage))
    file = tokenizer_folder(copy) / "tokenizer.json"
    file.write_text(file.read_text().replace('"<human>"', '"<woman>"'))
    refusal = _run(copy, finished_folder, stages=[Stage.SFT])
    assert refusal is not None and refusal[0] == "ConfigError"
    assert f"{tokenizer_folder(copy)}: not the tokenizer that this run made there" in refusal[1]


def test_a_corrupt_result_is_refused(copy: RunConfig, finished_folder: Path) -> None:
    (stage_folder(copy, Stage.SFT) / RESULT_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="not a stage result"):
        completed_stages(copy)
    with pytest.raises(CheckpointError, match="not a stage result"):
        describe_run(copy)


def test_the_last_stage_done_again_gives_the_same_figures(
    copy: RunConfig, finished: RunConfig, finished_folder: Path
) -> None:
    """From the models on the disk, with the same seed."""
    shutil.rmtree(stage_folder(copy, Stage.PROMPTS))
    assert _run(copy, finished_folder, stages=[Stage.PROMPTS]) is None
    again, first = (
        tiny_run.read_result_metrics(config, Stage.PROMPTS) for config in (copy, finished)
    )
    assert again == first


def test_a_tokenizer_of_another_configuration_is_refused(
    copy: RunConfig, finished_folder: Path
) -> None:
    for stage in Stage:
        shutil.rmtree(stage_folder(copy, stage))
    before = _state(copy.run.output)
    change = "tokenizer.train.vocab_size=133"
    refusal = _run(copy, finished_folder, change, stages=[Stage.SFT])
    assert refusal is not None
    kind, message = refusal
    assert kind == "ConfigError" and "\n" not in message
    assert f"{tokenizer_folder(copy)}: completed under another configuration" in message
    assert "tokenizer.train.vocab_size was 134, is 133: " in message
    assert {**before, "config.json": 0} == {**_state(copy.run.output), "config.json": 0}
    shutil.rmtree(tokenizer_folder(copy))
    assert _run(copy, finished_folder, change, "sft.max_steps=1", stages=[Stage.SFT]) is None
    vocabulary = json.loads((tokenizer_folder(copy) / "tokenizer.json").read_text())["model"]
    assert len(vocabulary["vocab"]) == 133


def test_an_unwritable_output_is_refused(finished_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    overrides = [f"run.output={tmp_path / 'taken'}"]
    for refusal in run_ranks(2, _run_anyhow, finished_folder, overrides, list(Stage)):
        assert refusal is not None and refusal[0] == "ConfigError"
        assert "cannot write there" in refusal[1]


def test_a_dry_run_shows_configuration_layouts_and_what_is_done(
    copy: RunConfig, finished_folder: Path
) -> None:
    shutil.rmtree(stage_folder(copy, Stage.PROMPTS))
    overrides = ["launch.processes=4", "models.actor.tensor=2", "models.reward.pipeline=2"]
    config = tiny_run.config(finished_folder, [*overrides, f"run.output={copy.run.output}"])
    text = describe_run(config)
    assert '"max_steps": 6' in text and "ranks: 4" in text
    assert "layout of actor: tp2.pp1.dp2" in text and "layout of reward: tp1.pp2.dp2" in text
    states = [line.split(" (")[0] for line in text.splitlines() if line.startswith("stage ")]
    assert states == ["stage sft: complete", "stage reward: complete", "stage prompts: to run"]


def _make_tokenizer_without_collectives(folder: Path) -> int:
    """A collective here would wait for as long as the training takes."""
    settings = tiny_run.config(folder, ["launch.processes=2"])
    record = settings.run.output / TOKENIZER_RECORD

    def checked(collective: Callable[..., None], *args: object, **options: object) -> None:
        assert record.is_file(), "a collective waits for the first rank's work"
        collective(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("barrier", "broadcast", "broadcast_object_list", "all_gather_object"):
            collective = getattr(torch.distributed, name)
            patch.setattr(torch.distributed, name, partial(checked, collective))
        return tiny_run.context(settings).tokenizer.vocab_size


def test_nobody_waits_in_a_collective_while_the_tokenizer_is_trained(tmp_path: Path) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    assert run_ranks(2, _make_tokenizer_without_collectives, tmp_path) == [134, 134]
