"""Relations between the tables of a run configuration, and their one-line messages."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megachat.config import build_config, load_config
from megachat.errors import ConfigError, LayoutError, MegachatError
from megachat.model.config import Recompute
from megachat.parallel.layout import ParallelLayout
from megachat.stages.config import (
    Precision,
    RewardSection,
    RlhfSection,
    RoleSection,
    RunConfig,
    SftSection,
    StepLimit,
)
from tests.stages import tiny_run

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_cpu" / "run.toml"
SHAPE = {"hidden": 8, "layers": 1, "heads": 2}


def _changed(path: str, value: Any) -> dict[str, Any]:
    """The tiny tree with one key replaced, or removed where the value is None."""
    values = tiny_run.tree(Path("folder"))
    *tables, key = path.split(".")
    table = values
    for name in tables:
        table = table.setdefault(name, {})
    if value is None:
        del table[key]
    else:
        table[key] = value
    return values


def _message(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(RunConfig, values, source="run.toml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("sft.batch_row", 4, "sft.batch_row: unknown key (did you mean 'batch_rows'?)"),
        ("models.critic", {}, "models.critic: unknown key"),
        ("rlhf.ppo.kl.targett", 1.0, "rlhf.ppo.kl.targett: unknown key (did you mean 'target'?)"),
        ("data", None, "data: required, but not given"),
        ("models.actor", None, "models.actor: required, but not given"),
        ("sft.batch_rows", "8", "sft.batch_rows: input should be a valid integer, got '8'"),
        ("sft.batch_rows", 0, "sft.batch_rows: input should be greater than or equal to 1, got 0"),
        ("sft.dropout", 1.0, "sft.dropout: input should be less than 1"),
        ("models.actor.precision", "fp16", "models.actor.precision: input should be 'fp32' or"),
        (
            "models.actor.logprob_backend",
            "gpu",
            "logprob_backend: input should be 'reference', 'cpu'",
        ),
        ("models.reward.logprob_backend", "cuda", "models.reward.logprob_backend: unknown key"),
        ("models.actor.model", "x", "give either model (folder or name) or shape (random weights)"),
        ("models.reward.model", None, "models.reward: give either model"),
        ("tokenizer.train", None, "models.actor has random weights and so no tokenizer"),
        ("tokenizer.path", "folder", "tokenizer: path and train exclude each other"),
        ("rlhf.sampling.temperature", 0.0, "sampling.temperature 0 explores nothing"),
        ("rlhf.sampling.min_new_tokens", 9, "min_new_tokens 9 exceeds max_new_tokens 8"),
        ("run.seed", -1, "run.seed: input should be greater than or equal to 0"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_its_key(
    path: str, value: Any, message: str
) -> None:
    found = _message(_changed(path, value))
    assert found.startswith("run.toml: ") and message in found
    assert "\n" not in found


def test_starting_from_the_supervised_model_is_for_the_reward_model_only() -> None:
    values = _changed("models.actor.shape", None)
    values["models"]["actor"]["model"] = "sft"
    assert 'models.actor.model "sft" is for models.reward' in _message(values)


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (
            ["launch.processes=3", "models.actor.tensor=2"],
            LayoutError,
            "world size 3 is not a multiple of tensor 2 x pipeline 1 = 2",
        ),
        (
            ["launch.processes=2", "models.reward.pipeline=4"],
            LayoutError,
            "world size 2 is not a multiple of tensor 1 x pipeline 4 = 4",
        ),
        (
            ["data.max_tokens=53"],
            ConfigError,
            "data.max_tokens 53, but models.actor.shape.max_positions is 52",
        ),
        (
            ["rlhf.sampling.max_new_tokens=40"],
            ConfigError,
            "data.max_prompt_tokens 20 + rlhf.sampling.max_new_tokens 40 = 60",
        ),
        (["rlhf.batch_prompts=7"], ConfigError, "7 rows an experience cannot be cut into 2 equal"),
        (["rlhf.ppo.kl.horizon=1"], ConfigError, "could turn the coefficient to 0"),
    ],
)
def test_relations_between_tables_are_checked_before_anything_starts(
    overrides: list[str], kind: type[MegachatError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        tiny_run.config(tmp_path, overrides).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_positions_of_a_reward_model_of_its_own_shape_are_checked_too(tmp_path: Path) -> None:
    values = tiny_run.tree(tmp_path)
    values["models"]["reward"] = {"shape": {**SHAPE, "max_positions": 51}}
    config = build_config(RunConfig, values, source="test")
    with pytest.raises(ConfigError, match="models.reward.shape.max_positions is 51"):
        config.check()


def test_the_tiny_run_and_the_example_are_sound(tmp_path: Path) -> None:
    tiny_run.config(tmp_path).check()
    load_config(RunConfig, path=EXAMPLE).check()


def test_a_role_knows_its_layout_and_how_its_model_runs() -> None:
    role = RoleSection(
        shape=SHAPE,
        tensor=2,
        pipeline=2,
        precision="bf16",
        sequence_parallel=True,
        recompute="full",
    )
    assert role.layout(8) == ParallelLayout(tensor=2, pipeline=2, data=2)
    options = role.options(dropout=0.1, attention_dropout=0.2)
    assert options.dtype is torch.bfloat16 and options.sequence_parallel
    assert options.recompute is Recompute.FULL
    assert (options.hidden_dropout, options.attention_dropout) == (0.1, 0.2)
    alone = role.model_copy(update={"tensor": 1, "precision": Precision.FP32}).options()
    assert alone.dtype is torch.float32 and alone.hidden_dropout == 0
    assert not alone.sequence_parallel  # it splits over the tensor group, and there is none


def test_a_shape_fills_in_the_usual_proportions() -> None:
    shape = build_config(RoleSection, {"shape": {**SHAPE, "max_positions": 9}}, source="t").shape
    assert shape is not None
    config = shape.opt_config(vocab_size=77, pad_id=1, bos_id=0, eos_id=2)
    assert (config.ffn, config.embed_dim, config.vocab_size) == (32, 8, 77)
    assert (config.pad_id, config.bos_id, config.eos_id, config.max_positions) == (1, 0, 2, 9)


@pytest.mark.parametrize(
    ("keys", "steps", "limit"),
    [
        ({}, 10, StepLimit.EPOCHS),
        ({"epochs": 3}, 30, StepLimit.EPOCHS),
        ({"max_steps": 7}, 7, StepLimit.MAX_STEPS),
        ({"max_steps": 70}, 70, StepLimit.MAX_STEPS),  # more steps mean more epochs
        ({"epochs": 3, "max_steps": 7}, 7, StepLimit.MAX_STEPS),
        ({"epochs": 3, "max_steps": 70}, 30, StepLimit.EPOCHS),
        ({"epochs": 3, "max_steps": 30}, 30, StepLimit.MAX_STEPS),
    ],
)
def test_a_stage_ends_with_its_steps_or_its_epochs_and_says_which(
    keys: dict[str, int], steps: int, limit: StepLimit
) -> None:
    for section in (SftSection(**keys), RewardSection(**keys), RlhfSection(**keys)):
        assert (section.num_steps(10), section.step_limit(10)) == (steps, limit)
