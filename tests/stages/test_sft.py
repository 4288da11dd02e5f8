"""Step 1 in a run: its figures recomputed from what it left on the disk."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megachat.data.config import Stage
from megachat.data.stage_data import build_stage_data
from megachat.data.tokenizer import Tokenizer
from megachat.stages.config import RunConfig
from megachat.stages.context import stage_folder, tokenizer_folder
from megachat.telemetry.metrics import read_metrics
from tests.stages import tiny_run


@torch.no_grad()
def test_the_perplexity_is_that_of_the_exported_model_on_the_held_out_answers(
    finished: RunConfig,
) -> None:
    """Exp of the mean over all answer tokens of all rows, one unpadded row at a time."""
    tokenizer = Tokenizer.load(tokenizer_folder(finished))
    data = build_stage_data(finished.data, stage=Stage.SFT, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(stage_folder(finished, Stage.SFT) / "model")
    losses = []
    for row in data.validation.table.select(range(finished.sft.evaluation_rows)):
        tokens = torch.tensor(row["tokens"])
        assert tokens[-1] == tokenizer.eos_id
        logprobs = model(tokens[None]).logits[0].log_softmax(dim=-1)
        targets = range(row["prompt_length"], len(tokens))
        losses += [-logprobs[place - 1, tokens[place]].item() for place in targets]
    figures = tiny_run.read_result_metrics(finished, Stage.SFT)
    expected = math.exp(sum(losses) / len(losses))
    assert figures["perplexity_after"] == pytest.approx(expected, rel=1e-5)
    assert figures["perplexity_after"] < 0.5 * figures["perplexity_before"]


def test_the_steps_are_recorded_and_the_loss_falls(finished: RunConfig) -> None:
    history = read_metrics(stage_folder(finished, Stage.SFT))
    losses = [value for _, value in history.series("sft/loss")]
    assert len(losses) == finished.sft.max_steps == 6
    assert losses[-1] < losses[0] - 0.3
    rates = [value for _, value in history.series("sft/learning_rate")]
    assert rates[0] == finished.sft.optimizer.learning_rate and rates[-1] == 0
    figures = tiny_run.read_result_metrics(finished, Stage.SFT)
    assert history.series("sft/perplexity") == [(6, figures["perplexity_after"])]


def test_the_export_carries_a_tokenizer_that_transformers_loads(finished: RunConfig) -> None:
    theirs = AutoTokenizer.from_pretrained(stage_folder(finished, Stage.SFT) / "model")
    ours = Tokenizer.load(tokenizer_folder(finished))
    text = "<human> what about the river ?<bot> i love it"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
