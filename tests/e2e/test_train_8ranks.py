"""The example on eight processes: its own configuration, with fewer steps and the tests' data."""

from pathlib import Path

import pytest

from megachat.config import load_config
from megachat.data.config import Stage
from megachat.model.config import vocab_multiple_for
from megachat.parallel.layout import ParallelLayout
from megachat.reshard.plan import plan_for_model, plan_rank
from megachat.stages.config import RunConfig
from megachat.stages.context import stage_folder
from megachat.stages.results import StageResult, read_result
from megachat.stages.run import run_stages
from megachat.telemetry.metrics import read_metrics
from tests.harness import run_ranks
from tests.stages import tiny_run

EXAMPLE = Path(__file__).parents[2] / "examples/tiny_cpu_8ranks/run.toml"
TRAIN = ParallelLayout(tensor=2, pipeline=2, data=2)
GENERATE = ParallelLayout(tensor=2, data=4)
STEPS = 3


def _config(folder: Path) -> RunConfig:
    """The example's file; no layout and no algorithm is changed."""
    return load_config(
        RunConfig,
        path=EXAMPLE,
        overrides=[
            f"run.output={folder / 'run'}",
            f'data.sources=[{{name = "chats", path = "{folder / "rows.jsonl"}"}}]',
            f"data.cache_dir={folder / 'cache'}",
            "data.split=[2, 4, 4]",
            "data.max_answer_tokens=32",
            "data.max_tokens=56",
            "tokenizer.train.vocab_size=134",
            "models.actor.shape.hidden=32",
            "sft.max_steps=4",
            "sft.evaluation_rows=16",
            "reward.max_steps=4",
            "reward.evaluation_rows=16",
            f"rlhf.max_steps={STEPS}",
            "rlhf.batch_prompts=16",
            "rlhf.evaluation_rows=16",
            "rlhf.judge=none",
            "rlhf.ppo.reward.normalization_samples=16",
            "rlhf.sampling.max_new_tokens=8",
        ],
    )


def _run(folder: Path) -> None:
    run_stages(tiny_run.worker(), _config(folder), tuple(Stage), "megachat train")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The configuration of a completed run."""
    folder = tmp_path_factory.mktemp("eight")
    tiny_run.write_rows(folder / "rows.jsonl")
    run_ranks(TRAIN.world_size, _run, folder)
    return _config(folder)


def _result(config: RunConfig) -> StageResult:
    result = read_result(stage_folder(config, Stage.PROMPTS))
    assert result is not None
    return result


def test_eight_ranks_train_under_three_axes_and_generate_under_one(finished: RunConfig) -> None:
    world_size = finished.launch.world_size
    assert finished.models.actor.layout(world_size) == TRAIN
    assert finished.rlhf.generation_degree(finished.models.actor) == GENERATE.tensor
    reshard = _result(finished).reshard
    assert reshard is not None
    assert (reshard.train, reshard.generate) == (str(TRAIN), str(GENERATE))
    gaps = read_metrics(stage_folder(finished, Stage.PROMPTS)).series("rlhf/rollout_logprob_gap")
    assert len(gaps) == STEPS and max(gap for _, gap in gaps) <= 1e-5


def test_every_phase_change_moves_the_planned_bytes_and_keeps_nothing_twice(
    finished: RunConfig,
) -> None:
    shape = finished.models.actor.shape
    assert shape is not None
    plan = plan_for_model(
        shape.opt_config(vocab_size=134, pad_id=0, bos_id=1, eos_id=2),
        source=TRAIN,
        target=GENERATE,
        element_bytes=finished.models.actor.precision.dtype.itemsize,
    )
    assert vocab_multiple_for(TRAIN.tensor, GENERATE.tensor) == 256
    bound = max(plan_rank(plan, rank).traffic.lower_bound for rank in range(TRAIN.world_size))
    history = read_metrics(stage_folder(finished, Stage.PROMPTS))
    received = [value for _, value in history.series("perf/reshard_received_bytes")]
    redundant = [value for _, value in history.series("perf/reshard_redundant_bytes")]
    assert received == [bound] * STEPS and bound > 0
    assert redundant == [0.0] * STEPS
    text = (finished.run.output / "summary.txt").read_text(encoding="utf-8")
    lines = [line.split() for line in text.splitlines()]
    assert f"bytes received {bound:,}".split() in lines
    assert "bytes held twice 0".split() in lines
    assert f"Reshard of the actor, {TRAIN} -> {GENERATE}, mean of {STEPS}" in text
