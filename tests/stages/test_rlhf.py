"""Step 3 in a run: its figures, made again from what it left on the disk, and its loop."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megachat.api import unspeakable_ids
from megachat.data.config import Stage
from megachat.data.loaders import PromptLoader
from megachat.data.stage_data import build_stage_data
from megachat.generation.config import SamplingConfig
from megachat.ops.registry import Backend
from megachat.parallel.rng import seed_for
from megachat.records import PromptBatch
from megachat.rlhf.config import PpoConfig
from megachat.rlhf.ppo import PPOTrainer
from megachat.stages.config import RunConfig
from megachat.stages.context import RunContext, stage_folder
from megachat.stages.evaluation import PolicyEvaluation, compare, evaluate_policy
from megachat.stages.loop import held_out_batches
from megachat.stages.rlhf import build_engine, ppo_step
from megachat.telemetry.metrics import read_metrics
from megachat.telemetry.timers import PhaseTimers
from tests.harness import run_ranks
from tests.kernels.emulated import emulated_cuda
from tests.rlhf import tiny
from tests.stages import tiny_run

SAMPLING = SamplingConfig(max_new_tokens=8)


def _trainer(context: RunContext) -> PPOTrainer:
    """A trainer whose actor and reference are the model in the folder of the first stage."""
    config = context.config.rlhf
    return PPOTrainer(
        build_engine(context, num_updates=1),
        config=config.ppo,
        sampling=config.sampling,
        seed=0,
        timers=PhaseTimers(),
    )


def _held_out(context: RunContext) -> list[PromptBatch]:
    data = build_stage_data(context.config.data, stage=Stage.PROMPTS, tokenizer=context.tokenizer)
    return held_out_batches(PromptLoader, data.validation, count=10)


def _judge_again(folder: Path, output: Path) -> tuple[PolicyEvaluation, float]:
    """(evaluation, KL to the supervised model by HuggingFace) of the policy in `output`/sft."""
    settings = tiny_run.config(folder, [f"run.output={output}"])
    context = tiny_run.context(settings)
    trainer, batches = _trainer(context), _held_out(context)
    judged = evaluate_policy(
        trainer, batches, tokenizer=context.tokenizer, judge=None, seed=settings.run.seed
    )
    rollout = trainer.generate(
        batches[0], sampling=SAMPLING, seed=seed_for(settings.run.seed, "evaluation")
    )
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(run / "sft" / "model")
        for run in (output, folder / "run")
    )
    log_ratios = []
    for row, start, end in zip(
        rollout.tokens, rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True
    ):
        with torch.no_grad():
            ahead, before = (
                model(row[None, :end]).logits[0].log_softmax(dim=-1)
                for model in (policy, reference)
            )
        places = range(start, end)
        log_ratios += [(ahead - before)[place - 1, row[place]].item() for place in places]
    return judged, sum(log_ratios) / len(log_ratios)


def _held_out_file(config: RunConfig) -> Mapping[str, Any]:
    folder = stage_folder(config, Stage.PROMPTS)
    found: dict[str, Any] = json.loads((folder / "held_out.json").read_text(encoding="utf-8"))
    return found


def test_the_exported_actor_gives_the_replies_scores_and_kl_of_the_run(
    finished: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    """In the place of the supervised model, the exported actor says the same to the same seed."""
    output = tmp_path / "run"
    shutil.copytree(finished.run.output, output)
    shutil.rmtree(output / "sft" / "model")
    shutil.copytree(output / "rlhf" / "model", output / "sft" / "model")
    judged, kl = run_ranks(1, _judge_again, finished_folder, output)[0]
    after = _held_out_file(finished)["after"]
    assert judged.prompts == after["prompts"] and judged.replies == after["replies"]
    assert judged.scores == pytest.approx(after["scores"], abs=1e-5)
    assert judged.mean_tokens == after["mean_tokens"]
    assert judged.finished_share == after["finished_share"]
    assert kl == pytest.approx(after["kl"], abs=1e-5) and kl != 0
    assert judged.kl == pytest.approx(0.0, abs=1e-6)  # here it is its own reference


def test_the_start_is_the_supervised_model(finished: RunConfig, finished_folder: Path) -> None:
    judged, kl = run_ranks(1, _judge_again, finished_folder, finished.run.output)[0]
    before = _held_out_file(finished)["before"]
    assert judged.replies == before["replies"] and before["kl"] == pytest.approx(0.0, abs=1e-6)
    assert kl == 0.0
    assert judged.scores == pytest.approx(before["scores"], abs=1e-5)


def test_the_figures_compare_both_evaluations(finished: RunConfig) -> None:
    figures = tiny_run.read_result_metrics(finished, Stage.PROMPTS)
    before, after = (PolicyEvaluation(**part) for part in _held_out_file(finished).values())
    expected = compare(before, after, judge=None, seed=finished.run.seed)
    gap = figures.pop("rollout_logprob_gap")
    assert figures == pytest.approx({**expected, "steps": 2, "skipped_steps": 0}, nan_ok=True)
    history = read_metrics(stage_folder(finished, Stage.PROMPTS))
    assert gap == max(value for _, value in history.series("rlhf/rollout_logprob_gap")) < 1e-5
    assert len(before.replies) == len(after.scores) == finished.rlhf.evaluation_rows


def test_the_result_has_replies_and_the_time_of_every_phase(finished: RunConfig) -> None:
    folder = stage_folder(finished, Stage.PROMPTS)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    held_out = _held_out_file(finished)
    assert [reply["before"] for reply in result["replies"]] == held_out["before"]["replies"][:3]
    assert [reply["after"] for reply in result["replies"]] == held_out["after"]["replies"][:3]
    phases = result["phase_seconds"]
    assert {"generate", "score", "train actor", "train critic", "save"} <= set(phases)
    assert 0 < sum(phases.values()) <= result["seconds"]
    reshard = result["reshard"]
    assert (reshard["train"], reshard["generate"]) == ("tp1.pp1.dp1", "tp1.pp1.dp1")
    assert reshard["count"] == 2 and reshard["seconds"] > 0
    assert reshard["received_bytes"] == reshard["redundant_bytes"] == 0  # one rank has it all


def test_every_step_records_the_statistics_of_rollout_and_updates(finished: RunConfig) -> None:
    history = read_metrics(stage_folder(finished, Stage.PROMPTS))
    for name in (
        "rlhf/score",
        "rlhf/kl",
        "rlhf/kl_coefficient",
        "rlhf/explained_variance",
        "ppo/policy_loss",
        "ppo/value_loss",
        "ppo/clip_fraction",
        "ppo/approx_kl",
        "ppo/entropy",
        "ppo/ratio_max",
        "perf/response_tokens_per_second",
        "perf/reshard_seconds",
        "perf/reshard_received_bytes",
        "perf/reshard_redundant_bytes",
    ):
        assert [step for step, _ in history.series(name)] == [0, 1], name
    gaps = [gap for _, gap in history.series("rlhf/rollout_logprob_gap")]
    assert max(gaps) < 1e-5  # generation and training say the same, before and after an update


class _Recorder:
    """A metrics sink that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, Mapping[str, float]]] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, metrics))

    def close(self) -> None:
        """Nothing to end."""


def _updates(early_stop_kl: float) -> tuple[int, float]:
    """(updates of one step at a high learning rate, approximate KL that was recorded)."""
    optimizer = tiny.OPTIMIZER.model_copy(update={"learning_rate": 0.3})
    config = PpoConfig(reward={"normalization": "none"}, epochs=3, early_stop_kl=early_stop_kl)
    trainer, metrics = tiny.trainer(config, optimizer=optimizer), _Recorder()
    values = ppo_step(trainer, tiny.prompts((3, 5, 2, 7)), step=4, metrics=metrics)
    assert metrics.rows == [(4, values)]
    steps = {trainer.engine.actor.training.steps_done, trainer.engine.critic.steps_done}
    assert len(steps) == 1
    return steps.pop(), values["ppo/approx_kl"]


def test_a_step_stops_early_once_the_policy_has_moved_too_far() -> None:
    assert run_ranks(1, _updates, float("inf"))[0][0] == 6
    updates, approx_kl = run_ranks(1, _updates, 0.01)[0]
    assert updates == 2 and approx_kl > 0.01


def _check_roles(folder: Path) -> None:
    """Reference and actor start alike, critic and reward model too, each under its own layout."""
    settings = tiny_run.config(folder, ["launch.processes=2", "models.actor.tensor=2"])
    context = tiny_run.context(settings)
    engine = build_engine(context, num_updates=3)
    waits_for = engine.actor._resharder._synchronize
    assert isinstance(waits_for, partial) and waits_for.args == (context.worker.device,)
    assert engine.actor.training.groups.layout.tensor == 2
    assert engine.reference.groups is engine.actor.training.groups
    assert engine.reward.groups.layout.data == 2 and engine.critic.groups is engine.reward.groups
    for first, second in (
        (engine.actor.training, engine.reference),
        (engine.critic, engine.reward),
    ):
        weights = second.model.parameters_by_spec()
        for name, parameter in first.model.parameters_by_spec().items():
            rows = min(len(parameter), len(weights[name]))
            assert torch.equal(parameter[:rows], weights[name][:rows]), name
    tokenizer = context.tokenizer
    forbidden = unspeakable_ids(tokenizer, vocab_size=140)
    assert tokenizer.eos_id not in forbidden and tokenizer.pad_id in forbidden
    assert set(range(134, 140)) <= set(forbidden)
    assert tokenizer.token_id("<human>") not in forbidden


def test_the_roles_start_from_the_first_two_stages(finished_folder: Path) -> None:
    run_ranks(2, _check_roles, finished_folder)


def _check_logprob_backend(folder: Path) -> None:
    with emulated_cuda():
        context = tiny_run.context(tiny_run.config(folder, ["models.actor.logprob_backend=cuda"]))
        assert build_engine(context, num_updates=1).logprob_backend is Backend.CUDA


def test_the_backend_of_the_log_probs_is_the_configured_one(finished_folder: Path) -> None:
    run_ranks(1, _check_logprob_backend, finished_folder)


def test_the_exported_actor_is_a_few_small_steps_away_from_its_start(
    finished: RunConfig,
) -> None:
    start, actor = (
        AutoModelForCausalLM.from_pretrained(stage_folder(finished, stage) / "model")
        for stage in (Stage.SFT, Stage.PROMPTS)
    )
    moved = [
        (after - before).abs().max().item()
        for before, after in zip(start.parameters(), actor.parameters(), strict=True)
    ]
    assert 1e-5 < max(moved) < 0.05
