"""Step 2 in a run: its figures recomputed from what it left on the disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megachat.data.config import Stage
from megachat.data.loaders import PreferenceLoader
from megachat.data.stage_data import TokenSet, build_stage_data
from megachat.data.tokenizer import Tokenizer
from megachat.model.config import Head
from megachat.stages.config import PairLoss, RunConfig
from megachat.stages.context import stage_folder, tokenizer_folder
from megachat.stages.loop import held_out_batches
from megachat.stages.reward import pair_metrics
from megachat.stages.roles import load_model
from megachat.telemetry.metrics import read_metrics
from megachat.training.engine import ForwardEngine
from tests.harness import run_ranks
from tests.stages import tiny_run


def _held_out(config: RunConfig) -> TokenSet:
    tokenizer = Tokenizer.load(tokenizer_folder(config))
    return build_stage_data(config.data, stage=Stage.REWARD, tokenizer=tokenizer).validation


@torch.no_grad()
def _final_scores(config: RunConfig) -> Tensor:
    """`[pairs, 2]` HuggingFace's scores at the last token, one unpadded row at a time."""
    folder = stage_folder(config, Stage.REWARD) / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    pairs = [
        [
            model.score(model.model(torch.tensor([row[name]])).last_hidden_state)[0, -1, 0]
            for name in ("chosen_tokens", "rejected_tokens")
        ]
        for row in _held_out(config).table.select(range(config.reward.evaluation_rows))
    ]
    return torch.tensor(pairs, dtype=torch.float64)


def test_the_figures_are_those_of_the_exported_model_on_the_held_out_pairs(
    finished: RunConfig,
) -> None:
    chosen, rejected = _final_scores(finished).unbind(dim=1)
    margin = chosen - rejected
    expected = {
        "loss": -torch.nn.functional.logsigmoid(margin).mean().item(),
        "accuracy": (margin > 0).double().mean().item(),
        "margin": margin.mean().item(),
        "chosen_score": chosen.mean().item(),
        "rejected_score": rejected.mean().item(),
        "score_square": (chosen.square() + rejected.square()).mean().item() / 2,
        "steps": 5,
        "skipped_steps": 0,
    }
    figures = tiny_run.read_result_metrics(finished, Stage.REWARD)
    assert figures == pytest.approx(expected, rel=1e-5)
    assert figures["accuracy"] > 0.8


def test_the_steps_are_recorded_and_the_margin_grows(finished: RunConfig) -> None:
    history = read_metrics(stage_folder(finished, Stage.REWARD))
    margins = [value for _, value in history.series("reward/margin")]
    assert len(margins) == finished.reward.max_steps == 5
    assert margins[-1] > margins[0] + 0.5
    figures = tiny_run.read_result_metrics(finished, Stage.REWARD)
    assert history.last("reward/held_out_accuracy") == figures["accuracy"]


def _pair_metrics(folder: Path) -> list[dict[str, float]]:
    """Held-out figures under both losses, with rows spread over two data ranks."""
    settings = tiny_run.config(folder, ["launch.processes=2"])
    context, role = tiny_run.context(settings), settings.models.reward
    source = context.model_folder(Stage.REWARD)
    model = load_model(context, role, source, head=Head.SCALAR, options=role.options())
    engine = ForwardEngine(model, micro_batch_rows=4)
    batches = held_out_batches(PreferenceLoader, _held_out(settings), count=11)
    return [
        pair_metrics(engine, batches, settings.reward.model_copy(update={"loss": loss}))
        for loss in PairLoss
    ]


def test_the_figures_do_not_depend_on_the_ranks_and_the_loss_is_the_configured_one(
    finished_folder: Path, finished: RunConfig
) -> None:
    figures = tiny_run.read_result_metrics(finished, Stage.REWARD)
    for bradley_terry, token_wise in run_ranks(2, _pair_metrics, finished_folder):
        assert {**bradley_terry, "steps": 5, "skipped_steps": 0} == pytest.approx(figures, rel=1e-5)
        same = {"accuracy", "margin", "chosen_score", "rejected_score"}
        assert {name: token_wise[name] for name in same} == pytest.approx(
            {name: bradley_terry[name] for name in same}
        )
        assert token_wise["loss"] != pytest.approx(bradley_terry["loss"], rel=1e-3)


def test_the_reward_model_starts_from_the_supervised_trunk(finished: RunConfig) -> None:
    """A few small steps away, and much closer than another random start would be."""
    policy = AutoModelForCausalLM.from_pretrained(stage_folder(finished, Stage.SFT) / "model")
    scorer = AutoModelForSequenceClassification.from_pretrained(
        stage_folder(finished, Stage.REWARD) / "model"
    )
    weights = dict(scorer.named_parameters())
    for name, before in policy.named_parameters():
        if before.ndim == 2:
            moved = (weights[name] - before).norm() / before.norm()
            assert 0 < moved < 0.5, name
