"""The whole program on two ranks: tokenizer, supervised tuning, reward model, PPO, report."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from megachat.data.config import Stage
from megachat.model.config import Head
from megachat.stages.config import RunConfig
from megachat.stages.roles import load_model
from megachat.telemetry.metrics import read_metrics
from tests.harness import run_ranks
from tests.model.reference import whole_logits
from tests.stages import tiny_run

TP2 = ("launch.processes=2", "models.actor.tensor=2")
"""Training and generation cut every layer; reward model and critic run data-parallel."""
DP2 = ("launch.processes=2",)
STAGES = ("sft", "reward", "rlhf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data and the runs lie."""
    folder = tmp_path_factory.mktemp("train")
    tiny_run.write_rows(folder / "rows.jsonl")
    return folder


def _finished(folder: Path, name: str, overrides: tuple[str, ...]) -> RunConfig:
    items = [*overrides, f"run.output={folder / name}"]
    run_ranks(2, tiny_run.run, folder, items)
    return tiny_run.config(folder, items)


@pytest.fixture(scope="module")
def tp2(folder: Path) -> RunConfig:
    """A completed run with tensor parallelism."""
    return _finished(folder, "tp2", TP2)


@pytest.fixture(scope="module")
def dp2(folder: Path) -> RunConfig:
    """The same run with data parallelism alone."""
    return _finished(folder, "dp2", DP2)


def _figures(config: RunConfig) -> dict[str, dict[str, float]]:
    return {stage: tiny_run.read_result_metrics(config, stage) for stage in Stage}


def test_a_run_leaves_models_metrics_results_and_a_report(tp2: RunConfig) -> None:
    output = tp2.run.output
    for stage in STAGES:
        for name in ("result.json", "metrics.jsonl", "model/config.json", "model/tokenizer.json"):
            assert (output / stage / name).is_file(), (stage, name)
        assert list((output / stage / "tensorboard").iterdir())
    for name in ("report.html", "summary.txt", "config.json", "logs/rank_001.log"):
        assert (output / name).is_file(), name
    leftovers = [path.name for path in output.rglob("*") if "draft" in path.name]
    assert not leftovers
    losses = [value for _, value in read_metrics(output / "sft").series("sft/loss")]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_the_stages_learn(tp2: RunConfig) -> None:
    figures = _figures(tp2)
    sft, reward, rlhf = figures[Stage.SFT], figures[Stage.REWARD], figures[Stage.PROMPTS]
    assert sft["perplexity_after"] < 0.5 * sft["perplexity_before"]
    assert sft["perplexity_before"] == pytest.approx(134, rel=0.1)  # knows nothing of 134 tokens
    assert reward["accuracy"] > 0.8 and reward["margin"] > 0.5
    assert 0 < abs(rlhf["kl"]) < 0.5 and math.isfinite(rlhf["score_gain_in_std"])


def test_the_figures_do_not_depend_on_how_the_ranks_are_used(
    tp2: RunConfig, dp2: RunConfig
) -> None:
    """Same seed, fp32: the same batches, the same sampled tokens, the same updates."""
    for stage, figures in _figures(tp2).items():
        assert figures == pytest.approx(_figures(dp2)[stage], rel=1e-4, abs=1e-4), stage
    replies = [
        json.loads((config.run.output / "rlhf" / "held_out.json").read_text())["before"]["replies"]
        for config in (tp2, dp2)
    ]
    assert replies[0] == replies[1]


def test_the_report_has_the_figures_the_command_and_the_curves(tp2: RunConfig) -> None:
    html = (tp2.run.output / "report.html").read_text(encoding="utf-8")
    figures = _figures(tp2)
    sft, reward, rlhf = figures[Stage.SFT], figures[Stage.REWARD], figures[Stage.PROMPTS]
    for text in (
        f"{sft['perplexity_after']:.1f}",
        f"{reward['accuracy']:.1%}",
        f"{rlhf['score_gain_in_std']:+.2f} SD",
        f"{rlhf['kl']:.3f}",
        "megachat train --config tiny.toml",
        "A very small run",
    ):
        assert text in html, text


def test_a_second_run_skips_all_stages(tp2: RunConfig, folder: Path) -> None:
    def state() -> dict[Path, int]:
        return {
            path: path.stat().st_mtime_ns
            for stage in STAGES
            for path in (tp2.run.output / stage).rglob("*")
        }

    before = state()
    _finished(folder, "tp2", TP2)
    assert state() == before


def _our_outputs(
    folder: Path, overrides: tuple[str, ...], tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the supervised model and of the actor, and scores, from the exported folders."""
    context = tiny_run.context(tiny_run.config(folder, overrides))
    models = context.config.models
    outputs = []
    for stage in (Stage.SFT, Stage.PROMPTS):
        model = load_model(
            context,
            models.actor,
            context.model_folder(stage),
            head=Head.LANGUAGE_MODEL,
            options=models.actor.options(),
        ).eval()
        with torch.no_grad():
            outputs.append(whole_logits(model, model(tokens)))
    scorer = load_model(
        context,
        models.reward,
        context.model_folder(Stage.REWARD),
        head=Head.SCALAR,
        options=models.reward.options(),
    ).eval()
    with torch.no_grad():
        return outputs[0], outputs[1], scorer(tokens)


@pytest.mark.parametrize(("name", "overrides"), [("tp2", TP2), ("dp2", DP2)])
@torch.no_grad()
def test_transformers_loads_the_exports_with_equal_outputs(
    name: str, overrides: tuple[str, ...], folder: Path, request: pytest.FixtureRequest
) -> None:
    config: RunConfig = request.getfixturevalue(name)
    output = config.run.output
    tokenizer = AutoTokenizer.from_pretrained(output / "rlhf" / "model")
    tokens = torch.tensor([tokenizer.encode("<human> what about the boma ?<bot> i love it")])
    items = (*overrides, f"run.output={output}")
    policy, actor = (
        AutoModelForCausalLM.from_pretrained(output / stage / "model") for stage in ("sft", "rlhf")
    )
    scorer = AutoModelForSequenceClassification.from_pretrained(output / "reward" / "model")
    expected = (
        policy(tokens).logits,
        actor(tokens).logits,
        scorer.score(scorer.model(tokens).last_hidden_state)[..., 0],
    )
    assert not torch.equal(expected[0], expected[1])
    for ours in run_ranks(2, _our_outputs, folder, items, tokens):
        for found, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
