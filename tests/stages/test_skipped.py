"""Runs whose gradients stop being finite: what they say, where they end, what they leave."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megachat.checkpoint.huggingface import is_complete
from megachat.data.config import Stage
from megachat.errors import DivergenceError
from megachat.model import Head
from megachat.stages.context import stage_folder
from megachat.stages.results import RESULT_FILE
from megachat.telemetry.metrics import read_metrics
from megachat.training.engine import LossReport, TrainEngine
from megachat.training.loss import LossTerms, ModelOutput
from tests.harness import run_ranks
from tests.stages import tiny_run


class _Steep:
    """A loss whose value is finite and whose gradient is not, as where squares of it overflow."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loss, name)

    def __call__(self, output: ModelOutput, *others: Any) -> LossTerms:
        output.values.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
        terms: LossTerms = self._loss(output, *others)
        return terms


def _make_steep(head: Head, *, from_step: int) -> None:
    """From a step on, the losses of models with a head have no gradient that is finite."""
    original = TrainEngine.forward_backward

    def forward_backward(engine: TrainEngine, batch: Any, loss: Any) -> LossReport:
        is_steep = engine.model.head is head and engine.steps_done >= from_step
        return original(engine, batch, _Steep(loss) if is_steep else loss)

    TrainEngine.forward_backward = forward_backward  # type: ignore[method-assign,assignment]


def _run_until_it_ends(
    folder: Path, overrides: list[str], stage: Stage, head: Head, from_step: int
) -> tuple[str, list[str]]:
    """The error, and the warnings before it."""
    _make_steep(head, from_step=from_step)
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    logging.getLogger("megachat.stages.skipped").addHandler(Collector())
    with pytest.raises(DivergenceError) as ended:
        tiny_run.run(folder, overrides, [stage])
    return str(ended.value), warnings


def test_too_many_skipped_steps_in_a_row_end_the_run_on_all_ranks_with_finite_weights_kept(
    tmp_path: Path,
) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    overrides = ["launch.max_skipped_steps=3"]
    arguments = (tmp_path, overrides, Stage.SFT, Head.LANGUAGE_MODEL, 1)
    results = run_ranks(2, _run_until_it_ends, *arguments)
    assert results[0] == results[1]
    message, warnings = results[0]
    folder = stage_folder(tiny_run.config(tmp_path), Stage.SFT)
    kept = folder / "last_good" / "actor"
    history = read_metrics(folder)
    counts = [count for _, count in history.series("sft/skipped_steps")]
    last = len(counts) - 1
    assert counts == [0, 1, 2, 3]
    assert message.startswith(f"sft step {last}: the last 3 updates of the actor were skipped")
    assert re.search(r"norm (inf|nan)", message) and "launch.max_skipped_steps is 3" in message
    assert str(folder / "last_good") in message and "\n" not in message
    assert [f"step {last - 2 + index}:" in line for index, line in enumerate(warnings)] == [
        True
    ] * 3
    assert is_complete(kept)
    weights = load_file(kept / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert (kept / "tokenizer.json").is_file()
    assert not (folder / RESULT_FILE).exists() and not (folder / "model").exists()


def test_ppo_ends_within_an_iteration_and_keeps_both_roles(
    finished_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "rlhf")
    overrides = [
        f"run.output={tmp_path / 'run'}",
        "rlhf.ppo.minibatches=4",
        "launch.max_skipped_steps=2",
    ]
    arguments = (finished_folder, overrides, Stage.PROMPTS, Head.SCALAR, 0)
    ((message, warnings),) = run_ranks(1, _run_until_it_ends, *arguments)
    folder = stage_folder(tiny_run.config(tmp_path), Stage.PROMPTS)
    assert message.startswith("prompts step 0: the last 2 updates of the critic were skipped")
    assert len(warnings) == 2
    history = read_metrics(folder)
    assert history.series("ppo/critic_skipped_steps") == [(0, 2.0)]
    assert history.series("ppo/actor_skipped_steps") == [(0, 0.0)]
    for role in ("actor", "critic"):
        assert is_complete(folder / "last_good" / role)
    assert not (folder / RESULT_FILE).exists()


def test_a_stage_of_which_every_step_was_skipped_is_not_done(tmp_path: Path) -> None:
    """Fewer steps than the limit: the weights are those it began with."""
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    arguments = (tmp_path, ["sft.max_steps=2"], Stage.SFT, Head.LANGUAGE_MODEL, 0)
    ((message, warnings),) = run_ranks(1, _run_until_it_ends, *arguments)
    assert message.startswith("sft after training: all 2 updates of the actor were skipped")
    assert len(warnings) == 2 and "\n" not in message
    folder = stage_folder(tiny_run.config(tmp_path), Stage.SFT)
    assert not (folder / RESULT_FILE).exists() and not (folder / "model").exists()
