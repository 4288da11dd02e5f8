"""What is known of models before a run, and models, layouts and tokenizers that do not fit."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megachat.data.config import Stage
from megachat.errors import CheckpointError, ConfigError, DataError, LayoutError, MegachatError
from megachat.hub import constants
from megachat.model.config import OPT_MODELS
from megachat.preflight import models
from megachat.preflight.models import Architectures, known_architectures
from megachat.stages.config import RunConfig
from tests.checkpoint.folders import write_folder
from tests.preflight.case import MODEL, config

ALL = frozenset(Stage)
Check = Callable[[RunConfig, frozenset[Stage], Architectures], Iterator[MegachatError]]


def found(check: Check, settings: RunConfig, stages: frozenset[Stage] = ALL) -> list[MegachatError]:
    known = known_architectures(settings)
    assert isinstance(known, Architectures)
    return list(check(settings, stages, known))


def line(problems: list[MegachatError], kind: type[MegachatError]) -> str:
    """The only problem, of a kind, in one line."""
    [problem] = problems
    assert type(problem) is kind and "\n" not in str(problem)
    return str(problem)


def test_architectures_come_from_folders_names_and_shapes(case: Path) -> None:
    assert known_architectures(config(case)) == Architectures(actor=MODEL, critic=MODEL)
    named = config(case, "models.reward.model=facebook/opt-350m")
    assert known_architectures(named) == Architectures(
        actor=MODEL, critic=OPT_MODELS["facebook/opt-350m"]
    )
    absent = config(case, "models.reward.model=nobody/nothing")
    assert known_architectures(absent) == "nobody/nothing"


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "gpt2"}'])
def test_a_folder_that_is_no_opt_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt" / "config.json").write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match="opt/config.json"):
        known_architectures(config(tmp_path))


@pytest.mark.parametrize(
    ("settings", "needles"),
    [
        (["launch.processes=4", "models.actor.tensor=4"], ["models.actor", "heads 2", "degree 4"]),
        (["launch.processes=3", "models.actor.pipeline=3"], ["models.actor", "layers 2"]),
        (["launch.processes=4", "models.reward.tensor=4"], ["models.reward", "heads 2"]),
        (["launch.processes=4", "rlhf.generation_tensor=4"], ["rlhf.generation_tensor 4", "heads"]),
    ],
)
def test_a_layout_that_does_not_cut_a_model_is_refused_with_its_key(
    case: Path, settings: list[str], needles: list[str]
) -> None:
    text = line(found(models.check_layouts, config(case, *settings)), LayoutError)
    for needle in needles:
        assert needle in text


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        (["launch.processes=4", "models.actor.tensor=2", "models.reward.pipeline=2"], ALL),
        (["launch.processes=4", "models.reward.tensor=4"], {Stage.SFT}),
        (["launch.processes=4", "rlhf.generation_tensor=4"], {Stage.SFT, Stage.REWARD}),
    ],
)
def test_layouts_that_cut_what_runs_pass(
    case: Path, settings: list[str], stages: frozenset[Stage]
) -> None:
    assert found(models.check_layouts, config(case, *settings), frozenset(stages)) == []


def test_rows_beyond_the_positions_of_a_folder_are_refused_for_the_stages_that_have_them(
    case: Path,
) -> None:
    long = config(case, "data.max_tokens=65")
    text = line(found(models.check_positions, long, frozenset({Stage.SFT})), ConfigError)
    assert "data.max_tokens is 65" in text and "models.actor.model" in text and " 64 " in text
    assert found(models.check_positions, long, frozenset({Stage.PROMPTS})) == []
    replies = config(case, "rlhf.sampling.max_new_tokens=41")
    text = line(found(models.check_positions, replies), ConfigError)
    assert "24 + rlhf.sampling.max_new_tokens 41 = 65" in text
    assert found(models.check_positions, config(case, "rlhf.sampling.max_new_tokens=40")) == []
    own = config(case, "data.max_tokens=2049", f"models.reward.model={case}/opt")
    assert len(found(models.check_positions, own)) == 2


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(
    case: Path, tmp_path: Path
) -> None:
    assert found(models.check_vocabulary, config(case)) == []
    shutil.copytree(case / "opt", tmp_path / "opt")
    write_folder(replace(MODEL, vocab_size=55), tmp_path / "opt")
    text = line(found(models.check_vocabulary, config(tmp_path)), ConfigError)
    assert "vocab_size is 55" in text and "56 ids" in text and "models.actor.model" in text
    trained = config(case, "tokenizer.train.vocab_size=65")
    assert "65 ids" in line(found(models.check_vocabulary, trained), ConfigError)
    assert found(models.check_vocabulary, config(case, "tokenizer.train.vocab_size=64")) == []


def test_a_tokenizer_that_pads_with_its_end_is_refused(case: Path, tmp_path: Path) -> None:
    shutil.copytree(case / "opt", tmp_path / "opt")
    settings = tmp_path / "opt" / "tokenizer_config.json"
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps(values | {"pad_token": "</s>"}))
    (tmp_path / "opt" / "special_tokens_map.json").unlink(missing_ok=True)
    assert "pad id" in line(found(models.check_vocabulary, config(tmp_path)), DataError)
    (tmp_path / "opt" / "tokenizer.json").write_text("{")
    problems = list(models.check_vocabulary(config(tmp_path), ALL, None))
    assert "cannot be loaded" in line(problems, CheckpointError)


def test_roles_with_different_vocabularies_are_refused_where_they_meet(
    case: Path, tmp_path: Path
) -> None:
    write_folder(replace(MODEL, vocab_size=70), tmp_path / "other")
    settings = config(case, f"models.reward.model={tmp_path}/other")
    text = line(found(models.check_vocabulary, settings), ConfigError)
    assert "70 vocabulary rows" in text and "models.actor has 64" in text
    assert found(models.check_vocabulary, settings, frozenset({Stage.SFT, Stage.REWARD})) == []


def test_a_reward_folder_that_lacks_a_tensor_is_refused_before_the_supervised_stage(
    case: Path, tmp_path: Path
) -> None:
    folder = write_folder(MODEL, tmp_path / "reward")
    settings = config(case, f"models.reward.model={folder}")
    assert list(models.check_weights(settings, ALL)) == []
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.1.fc1.weight"]
    save_file(tensors, folder / "model.safetensors")
    text = line(list(models.check_weights(settings, ALL)), CheckpointError)
    assert "layers.1.fc1.weight is missing" in text and str(folder) in text
    assert list(models.check_weights(settings, frozenset({Stage.SFT}))) == []


def test_a_model_that_is_nowhere_is_refused_unless_the_hub_may_have_it(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(case, "models.reward.model=./nothing")
    assert "no such folder" in line(list(models.check_available(path, ALL)), CheckpointError)
    name = config(case, "models.reward.model=nobody/nothing")
    text = line(list(models.check_available(name, ALL)), CheckpointError)
    assert "the hub cannot be reached from here: run megachat fetch" in text
    unpublished = config(case, "models.reward.model=facebook/opt-175b")
    assert "is on no hub" in line(list(models.check_available(unpublished, ALL)), CheckpointError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    assert list(models.check_available(name, ALL)) == []
    assert list(models.check_available(path, frozenset({Stage.SFT}))) == []
