"""Step 1 in a run: its figures recomputed from what it left on the disk."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megachat.data.config import Stage
from megachat.data.stage_data import build_stage_data
from megachat.data.tokenizer import Tokenizer
from megachat.stages.config import RunConfig
from megachat.stages.context import stage_folder, tokenizer_folder
from megachat.telemetry.metrics import read_metrics
from tests.harness import run_ranks
from tests.kernels.emulated import KernelCalls, emulated_cuda
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
    assert rates[0] == finished.sft.optimizer.learning_rate and min(rates) == rates[-1] > 0
    figures = tiny_run.read_result_metrics(finished, Stage.SFT)
    assert history.series("sft/perplexity") == [(6, figures["perplexity_after"])]


def _run_on_kernels(folder: Path, output: Path) -> dict[str, int]:
    """How often each kernel was called."""
    with emulated_cuda(), KernelCalls() as calls:
        overrides = [f"run.output={output}", "models.actor.logprob_backend=cuda"]
        tiny_run.run(folder, overrides, [Stage.SFT])
    return calls.counts


def test_losses_of_the_cuda_kernels_train_the_same_model(
    finished: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    """On the emulator. fp32 sums in another order, carried through all steps."""
    (calls,) = run_ranks(1, _run_on_kernels, finished_folder, tmp_path)
    # Six steps of 8 rows and two evaluations of 9 rows, in micro-batches of 4.
    assert calls == {"token_logprobs_forward": 6 * 2 + 2 * 3, "token_logprobs_backward": 6 * 2}
    other = finished.model_copy(
        update={"run": finished.run.model_copy(update={"output": tmp_path})}
    )
    assert tiny_run.read_result_metrics(other, Stage.SFT) == pytest.approx(
        tiny_run.read_result_metrics(finished, Stage.SFT), rel=1e-4
    )


def test_the_export_carries_a_tokenizer_that_transformers_loads(finished: RunConfig) -> None:
    theirs = AutoTokenizer.from_pretrained(stage_folder(finished, Stage.SFT) / "model")
    ours = Tokenizer.load(tokenizer_folder(finished))
    text = "<human> what about the river ?<bot> i love it"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.pad_id)
