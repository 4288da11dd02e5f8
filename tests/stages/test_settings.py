"""Which settings count for a stage, and how a change of them is told."""

from pathlib import Path
from typing import Any

import pytest

from megachat.config import build_config
from megachat.data.config import Stage
from megachat.stages.config import RunConfig
from megachat.stages.settings import Settings, stage_settings, tokenizer_settings
from tests.stages import tiny_run


def _config(**actor: Any) -> RunConfig:
    tree = tiny_run.tree(Path("folder"))
    if actor:
        del tree["models"]["actor"]["shape"]
        tree["models"]["actor"] |= actor
    return build_config(RunConfig, tree, source="test")


def test_settings_are_values_by_dotted_key_without_any_path() -> None:
    values = stage_settings(_config(model="some/folder"), Stage.SFT).values
    assert values["sft.optimizer.learning_rate"] == 5e-3
    assert values["data.split"] == [2.0, 4.0, 4.0]
    assert values["data.sources.0.name"] == "chats"
    assert values["tokenizer.train.vocab_size"] == 134
    assert not any("folder" in str(value) for value in values.values())
    assert not any(key.endswith((".path", ".cache_dir", "micro_batch_rows")) for key in values)


def test_a_start_from_the_supervised_model_is_a_setting_and_a_folder_is_not() -> None:
    assert stage_settings(_config(), Stage.REWARD).values["models.reward.model"] == "sft"
    for stage in Stage:
        assert "models.actor.model" not in stage_settings(_config(model="x"), stage).values


def test_changes_name_each_key_with_both_values() -> None:
    before = stage_settings(_config(), Stage.SFT).values
    now = Settings(values={**before, "sft.batch_rows": 9}, chosen=frozenset({"sft.batch_rows"}))
    assert now.changes_since(before) == ["sft.batch_rows was 8, is 9"]
    assert stage_settings(_config(), Stage.SFT).changes_since(before) == []


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"a": 1}, []),
        ({"a": 1, "b": "x"}, []),
        ({}, ["a was not set, is 1"]),
        ({"a": 1, "gone": None}, ["gone was None, is not set"]),
        ({"a": 1.5, "b": "y"}, ["a was 1.5, is 1", "b was 'y', is 'x'"]),
    ],
)
def test_a_key_that_is_new_has_had_the_effect_of_its_default(
    recorded: dict[str, Any], expected: list[str]
) -> None:
    """`b` is at the default of this version, `a` is not."""
    now = Settings(values={"a": 1, "b": "x"}, chosen=frozenset("a"))
    assert now.changes_since(recorded) == expected


def test_chosen_are_the_settings_that_are_not_defaults() -> None:
    found = stage_settings(_config(), Stage.SFT)
    assert {"sft.batch_rows", "run.seed", "data.sources.0.name"} <= found.chosen
    assert found.chosen < set(found.values)
    assert "sft.dropout" not in found.chosen and "sft.dropout" in found.values


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("sft.batch_rows=9", True),
        ("data.cache_dir=elsewhere", True),
        ("models.actor.shape.layers=3", True),
        ("tokenizer.train.vocab_size=133", False),
        ("data.seed=9", False),
    ],
)
def test_a_trained_tokenizer_depends_on_its_settings_and_the_data(
    override: str, same: bool
) -> None:
    first, second = (tiny_run.config(Path("folder"), items) for items in ([], [override]))
    assert (tokenizer_settings(first) == tokenizer_settings(second)) is same


def test_of_a_tokenizer_from_elsewhere_only_the_chat_template_is_a_setting() -> None:
    tree = tiny_run.tree(Path("folder"))
    tree["tokenizer"] = {"path": "x"}
    values = tokenizer_settings(build_config(RunConfig, tree, source="test")).values
    assert set(values) == {"data.chat.human", "data.chat.assistant", "data.chat.system"}
