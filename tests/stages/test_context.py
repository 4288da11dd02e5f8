"""What stages share: folders, fingerprints of configurations, process groups."""

import os
from pathlib import Path

import pytest

from megachat.data.config import Stage
from megachat.errors import ConfigError
from megachat.stages.context import (
    RunContext,
    prepare_output,
    stage_fingerprint,
    stage_folder,
    tokenizer_folder,
)
from megachat.telemetry.metrics import METRICS_FILE, NullMetricsWriter
from tests.harness import run_ranks
from tests.stages import tiny_run

BASE = ["launch.processes=2"]


def _fingerprints(*overrides: str) -> dict[str, str]:
    config = tiny_run.config(Path("folder"), [*BASE, *overrides])
    return {stage.value: stage_fingerprint(config, stage) for stage in Stage}


@pytest.mark.parametrize(
    "override",
    [
        "launch.processes=4",
        "launch.threads=3",
        "models.actor.tensor=2",
        "models.actor.sequence_parallel=true",
        "models.reward.pipeline=2",
        "models.reward.recompute=full",
        "models.actor.micro_batch_rows=2",
        "models.actor.logprob_backend=cuda",
        "rlhf.memory.offload_optimizer=true",
        "rlhf.logprob_tolerance.fp32=0.1",
        "data.cache_dir=elsewhere",
        "run.output=elsewhere",
        "run.title=another",
    ],
)
def test_how_the_work_is_cut_and_where_it_lies_changes_no_fingerprint(override: str) -> None:
    assert _fingerprints(override) == _fingerprints()


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("run.seed=4", {"sft", "reward", "prompts"}),
        ("models.actor.precision=bf16", {"sft", "prompts"}),
        ("models.actor.shape.layers=3", {"sft"}),
        ("tokenizer.train.vocab_size=133", {"sft", "reward", "prompts"}),
        ("data.split=[1,1,1]", {"sft", "reward", "prompts"}),
        ("data.max_tokens=39", {"sft", "reward", "prompts"}),
        ("sft.optimizer.learning_rate=0.1", {"sft"}),
        ("sft.batch_rows=9", {"sft"}),
        ("models.reward.precision=bf16", {"reward", "prompts"}),
        ("reward.loss=token-wise", {"reward"}),
        ("reward.center_coef=0.5", {"reward"}),
        ("rlhf.ppo.kl.coefficient=0.5", {"prompts"}),
        ("rlhf.ppo.dual_clip=3.0", {"prompts"}),
        ("rlhf.old_logprobs=recompute", {"prompts"}),
        ("rlhf.sampling.top_k=9", {"prompts"}),
        ("rlhf.critic_optimizer.beta2=0.5", {"prompts"}),
    ],
)
def test_a_setting_counts_for_the_stages_that_read_it(override: str, changed: set[str]) -> None:
    """Those that build on a stage go by the content of its model."""
    before, after = _fingerprints(), _fingerprints(override)
    assert {name for name in before if before[name] != after[name]} == changed


def test_each_stage_has_a_folder_of_its_own_in_the_run_folder(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    prepare_output(config)
    folders = [stage_folder(config, stage) for stage in Stage]
    assert [folder.name for folder in folders] == ["sft", "reward", "rlhf"]
    assert all(folder.is_dir() and not list(folder.iterdir()) for folder in folders)
    assert sorted(path.name for path in config.run.output.iterdir()) == ["reward", "rlhf", "sft"]
    assert tokenizer_folder(config).parent == config.run.output


def test_a_file_in_the_place_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for output in (tmp_path / "taken", tmp_path / "taken" / "below"):
        config = tiny_run.config(tmp_path, [f"run.output={output}"])
        with pytest.raises(ConfigError) as caught:
            prepare_output(config)
        message = str(caught.value)
        assert f"run.output {output}: cannot write there" in message and "\n" not in message
    assert (tmp_path / "taken").read_text() == "a file"


def test_ranks_in_containers_that_share_a_process_id_do_not_meet_in_one_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that did, the second would find nothing to remove and call the folder unwritable."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    config, touch, probes = tiny_run.config(tmp_path), Path.touch, []

    def note(path: Path, *, exist_ok: bool = True) -> None:
        probes.append(path)
        if len(probes) == 1:
            prepare_output(config)  # another rank does the same in between
        touch(path, exist_ok=exist_ok)

    monkeypatch.setattr(Path, "touch", note)
    prepare_output(config)
    assert len(set(probes)) == 2 and not any(probe.exists() for probe in probes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o555)
    with pytest.raises(ConfigError, match="Permission denied"):
        prepare_output(tiny_run.config(tmp_path))


def _share(folder: Path) -> None:
    """Groups are created once per layout, and only rank 0 keeps metrics."""
    settings = tiny_run.config(folder, [*BASE, "models.actor.tensor=2"])
    context: RunContext = tiny_run.context(settings)
    actor, reward = settings.models.actor, settings.models.reward
    assert context.groups(actor) is context.groups(actor)
    assert context.groups(actor) is context.groups(actor.model_copy(update={"precision": "bf16"}))
    assert context.groups(actor).layout.tensor == 2 and context.groups(reward).layout.data == 2
    with context.open_metrics(Stage.REWARD) as metrics:
        metrics.write(0, {"reward/loss": 1.0})
        assert isinstance(metrics, NullMetricsWriter) is (context.worker.rank > 0)
    assert context.model_folder(Stage.SFT) == settings.run.output / "sft" / "model"
    with context.timers().phase("generate"):
        pass


def test_ranks_share_groups_and_rank_zero_writes_metrics(tmp_path: Path) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    run_ranks(2, _share, tmp_path)
    assert (tmp_path / "run" / "reward" / METRICS_FILE).is_file()
