"""Runs that must not be called done: numbers that are none, outputs that are not tied, idle steps.

All of them start from the export of a small finished run.
"""

import math
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megachat.checkpoint.checksums import MARKER_FILE
from megachat.checkpoint.names import SCORE
from megachat.checkpoint.reader import list_weights
from megachat.data.config import Stage
from megachat.errors import CheckpointError, DivergenceError, MegachatError
from megachat.model import Head
from megachat.stages.context import stage_folder
from megachat.stages.loop import export
from megachat.stages.results import RESULT_FILE, read_result
from megachat.stages.roles import load_model
from tests.harness import run_ranks
from tests.stages import tiny_run

WORDS, OUTPUT = "model.decoder.embed_tokens.weight", "lm_head.weight"


def _change(folder: Path, **tensors: torch.Tensor) -> Path:
    """Puts tensors into a model folder, `__` standing for a dot; it is no export of ours then."""
    (folder / MARKER_FILE).unlink(missing_ok=True)
    file = folder / "model.safetensors"
    state = load_file(file)
    state |= {name.replace("__", "."): value.contiguous() for name, value in tensors.items()}
    save_file(state, file, metadata={"format": "pt"})
    return folder


def _errors(folder: Path, runs: dict[str, tuple[list[str], Stage]]) -> dict[str, tuple[str, str]]:
    """(kind, words) of what ends each run, "" where nothing does."""
    found = {}
    for name, (overrides, stage) in runs.items():
        output = f"run.output={folder / name}"
        try:
            tiny_run.run(folder, [output, *overrides], [stage])
        except MegachatError as error:
            found[name] = (type(error).__name__, str(error))
        else:
            found[name] = ("", "")
    return found


def _start(model: Path, tokenizer: Path) -> list[str]:
    """Overrides of a run that starts from a model folder."""
    actor = f'models.actor={{model = "{model}", precision = "fp32", micro_batch_rows = 4}}'
    return [actor, f'tokenizer={{path = "{tokenizer}"}}']


def _copy(finished_folder: Path, folder: Path) -> Path:
    shutil.copy(finished_folder / "rows.jsonl", folder / "rows.jsonl")
    return finished_folder / "run"


def test_runs_whose_numbers_are_none_end_in_one_line_and_export_nothing(
    finished_folder: Path, tmp_path: Path
) -> None:
    source = _copy(finished_folder, tmp_path)
    tokenizer = source / "tokenizer"
    words = load_file(source / "sft" / "model" / "model.safetensors")[WORDS]
    spoiled, other = words.clone(), words.clone()
    spoiled[5, 7], other[-1] = torch.nan, other[-1] + 0.5
    starts = {
        "nan": _change(
            shutil.copytree(source / "sft" / "model", tmp_path / "start nan"),
            **{WORDS.replace(".", "__"): spoiled},
        ),
        "untied": _change(
            shutil.copytree(source / "sft" / "model", tmp_path / "start untied"),
            lm_head__weight=other,
        ),
    }
    fast = ["sft.optimizer.learning_rate=1e30", "sft.optimizer.schedule=constant"]
    runs = {
        "fast": ([*fast, "sft.max_steps=3"], Stage.SFT),
        "one fast step": ([*fast, "sft.max_steps=1"], Stage.SFT),
        **{name: (_start(start, tokenizer), Stage.SFT) for name, start in starts.items()},
    }
    (found,) = run_ranks(1, _errors, tmp_path, runs)
    diverged, refused = DivergenceError.__name__, CheckpointError.__name__
    expected = {
        "fast": (diverged, "sft step 1: the loss of the actor is "),
        "one fast step": (diverged, "sft after training: the held-out "),
        "nan": (refused, f"{starts['nan']}/model.safetensors: {WORDS} holds NaN or infinity (1 of"),
        "untied": (refused, f"{starts['untied']}/model.safetensors: {OUTPUT} differs from {WORDS}"),
    }
    for name, (kind, words_of_error) in expected.items():
        assert found[name][0] == kind, found[name]
        assert found[name][1].startswith(words_of_error) and "\n" not in found[name][1]
        folder = tmp_path / name / "sft"
        assert not (folder / RESULT_FILE).exists() and not (folder / "model").exists()


def _refused_ppo(run: Path, folder: Path) -> tuple[str, str]:
    """(kind, words) of what ends PPO on raw scores in a run whose other stages are done."""
    none = [f"run.output={run}", "rlhf.ppo.reward.normalization=none"]
    (found,) = run_ranks(1, _errors, folder, {"run": (none, Stage.PROMPTS)})
    assert not (run / "rlhf" / RESULT_FILE).exists() and not (run / "rlhf" / "model").exists()
    assert "\n" not in found["run"][1]
    return found["run"]


def _without_ppo(finished_folder: Path, folder: Path) -> Path:
    """A copy of the finished run that has yet to do PPO."""
    run = shutil.copytree(finished_folder / "run", folder / "run")
    shutil.rmtree(run / "rlhf")
    return run


def test_a_reward_model_with_nan_in_its_file_is_refused_by_name(
    finished_folder: Path, tmp_path: Path
) -> None:
    run = _without_ppo(finished_folder, tmp_path)
    model = run / "reward" / "model"
    score = list_weights(model)[SCORE]
    with open(model / score.file, "r+b") as file:
        file.seek(score.offset)
        file.write(struct.pack("<f", math.nan))
    kind, words = _refused_ppo(run, finished_folder)
    assert kind == CheckpointError.__name__ and str(model / score.file) in words


def _export_with_huge_scores(folder: Path, run: Path) -> None:
    """A reward model of finite weights, the sums of whose products are not finite."""
    context = tiny_run.context(tiny_run.config(folder, [f"run.output={run}"]))
    role, target = context.config.models.reward, run / "reward" / "model"
    model = load_model(context, role, target, head=Head.SCALAR, options=role.options())
    model.parameters_by_spec()["head.score.weight"].data.fill_(3e38)
    export(context, Stage.REWARD, model, role="reward model")


def test_a_reward_model_that_answers_no_numbers_ends_ppo(
    finished_folder: Path, tmp_path: Path
) -> None:
    run = _without_ppo(finished_folder, tmp_path)
    run_ranks(1, _export_with_huge_scores, finished_folder, run)
    kind, words = _refused_ppo(run, finished_folder)
    assert kind == DivergenceError.__name__
    assert words.startswith("prompts before training: ")
    assert "scores of the reward model are not finite" in words


def test_every_counted_step_moves_the_weights_over_as_many_epochs_as_it_takes(
    finished_folder: Path, tmp_path: Path
) -> None:
    """An equal output beside the embedding is accepted; 10 epochs of one step each."""
    source = _copy(finished_folder, tmp_path)
    start = shutil.copytree(source / "sft" / "model", tmp_path / "start")
    _change(start, lm_head__weight=load_file(start / "model.safetensors")[WORDS].clone())
    common = [*_start(start, source / "tokenizer"), "sft.batch_rows=40"]
    rate = "sft.optimizer.learning_rate=0.01"
    runs = {
        f"{steps} steps": ([*common, rate, f"sft.max_steps={steps}"], Stage.SFT)
        for steps in (1, 2, 4)
    }
    runs["epochs"] = ([*common, rate, "sft.max_steps=100", "sft.epochs=1"], Stage.SFT)
    (found,) = run_ranks(1, _errors, tmp_path, runs)
    assert set(found.values()) == {("", "")}, found
    exports = {
        name: load_file(tmp_path / name / "sft" / "model" / "model.safetensors")[WORDS]
        for name in runs
    }
    assert not torch.equal(exports["1 steps"], exports["2 steps"])
    assert not torch.equal(exports["2 steps"], exports["4 steps"])
    ends = {}
    for name, (overrides, _) in runs.items():
        config = tiny_run.config(tmp_path, [f"run.output={tmp_path / name}", *overrides])
        result = read_result(stage_folder(config, Stage.SFT))
        assert result is not None
        ends[name] = (result.metrics["steps"], result.ended_by)
    assert [ends[f"{steps} steps"] for steps in (1, 2, 4)] == [
        (steps, "max_steps") for steps in (1, 2, 4)
    ]
    assert ends["epochs"][1] == "epochs" and ends["epochs"][0] < 4
