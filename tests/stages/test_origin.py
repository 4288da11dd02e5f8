"""What a stage was made from is known by content, and a change is told by its name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megachat.config import build_config
from megachat.data.config import Stage
from megachat.errors import CheckpointError, ConfigError
from megachat.stages.config import RunConfig
from megachat.stages.context import TOKENIZER_RECORD, stage_folder, tokenizer_folder
from megachat.stages.origin import (
    ORIGIN_FILE,
    InputContent,
    Origin,
    check_contents,
    check_stage,
    model_sources,
    read_origin,
    stages_before,
    tokenizer_inputs,
    write_origin,
)
from megachat.stages.results import MODEL_FOLDER
from megachat.stages.run import run_stages
from megachat.stages.status import completed_stages
from tests.harness import run_ranks
from tests.stages import tiny_run


def _from_folder(folder: Path, model: Path) -> RunConfig:
    """The very small run that starts from a model folder and its tokenizer."""
    tree = tiny_run.tree(folder)
    del tree["models"]["actor"]["shape"], tree["tokenizer"]
    tree["models"]["actor"]["model"] = str(model)
    tree["sft"]["max_steps"] = 1
    return build_config(RunConfig, tree, source="test")


def _train_from(folder: Path, model: Path) -> None:
    run_stages(tiny_run.worker(), _from_folder(folder, model), [Stage.SFT], "megachat sft")


def _flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_start_model_is_known_by_its_weights_wherever_it_lies(
    finished: RunConfig, tmp_path: Path
) -> None:
    source = stage_folder(finished, Stage.SFT) / MODEL_FOLDER
    foreign, copy = tmp_path / "foreign", tmp_path / "copy"
    shutil.copytree(source, foreign)
    (foreign / "megachat_export.json").unlink()  # as from anywhere
    shutil.copytree(foreign, copy)
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    run_ranks(2, _train_from, tmp_path, foreign)
    record = json.loads((tmp_path / "run" / "sft" / ORIGIN_FILE).read_text())
    assert set(record["inputs"]) == {"data.sources.0", "tokenizer", "models.actor.model"}
    for same in (foreign, copy, source):
        assert set(completed_stages(_from_folder(tmp_path, same))) == {Stage.SFT}
    implicit = tokenizer_inputs(_from_folder(tmp_path, foreign))
    tree = _from_folder(tmp_path, foreign).model_dump(mode="json")
    tree["tokenizer"]["path"] = str(copy)
    explicit = tokenizer_inputs(build_config(RunConfig, tree, source="test"))
    assert [each.digest for each in implicit.values()] == [explicit["tokenizer"].digest]
    _flip_last_bit(copy / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        completed_stages(_from_folder(tmp_path, copy))
    message = str(caught.value)
    assert f"made from other files: models.actor.model {copy} had content " in message
    assert f"(then {foreign}), now " in message and "\n" not in message
    shutil.rmtree(copy)
    assert set(completed_stages(_from_folder(tmp_path, copy))) == {Stage.SFT}


def test_the_record_of_a_finished_run_has_no_path_among_what_is_compared(
    finished: RunConfig, finished_folder: Path
) -> None:
    for stage in Stage:
        origin = read_origin(stage_folder(finished, stage) / ORIGIN_FILE)
        assert origin is not None
        contents = [(each.digest, each.files) for each in origin.inputs.values()]
        assert str(finished_folder) not in str((origin.settings, contents))
        assert check_stage(finished, stage)
    assert read_origin(finished.run.output / TOKENIZER_RECORD) is not None
    assert tokenizer_folder(finished).is_dir()


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_origin(tmp_path / "x") is None
    origin = Origin(
        settings={"a.b": [1, 2.5], "c": None},
        inputs={"d": InputContent(place="p", digest="0", files={"f": "1"})},
        made="2",
    )
    write_origin(tmp_path / "x", origin)
    assert read_origin(tmp_path / "x") == origin


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "{}", '{"format": 2, "settings": {}, "inputs": {}}', '{"format": 1}']
    + ['{"format": 1, "settings": {}, "inputs": {"a": 1}}', "0123456789abcdef"],
)
def test_a_broken_record_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(CheckpointError, match="no record of what") as caught:
        read_origin(tmp_path / "x")
    assert "\n" not in str(caught.value)


def _content(digest: str, place: str = "/data/folder", **files: str) -> InputContent:
    return InputContent(place=place, digest=digest, files=files)


def _refusal(now: InputContent, before: InputContent) -> str:
    recorded = Origin(settings={}, inputs={"data.sources.1": before})
    with pytest.raises(ConfigError) as caught:
        check_contents(Path("out/sft"), {"data.sources.1": now}, recorded)
    return str(caught.value)


def test_of_several_files_the_changed_one_is_named() -> None:
    message = _refusal(_content("2", a="old", b="new"), _content("1", a="old", b="was"))
    assert message.startswith(
        "out/sft: made from other files: data.sources.1 /data/folder/b had sha256 was, now new: "
    )
    assert message.endswith("choose another run.output, or delete the folder to make it anew")


def test_a_file_that_came_or_went_changes_the_content_of_the_whole() -> None:
    for now in (_content("2", a="old"), _content("2", a="old", b="was", c="more")):
        message = _refusal(now, _content("1", a="old", b="was"))
        assert "data.sources.1 /data/folder had content 1, now 2: " in message


def test_an_input_that_was_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"out/sft: made without data.sources.1 \(/data/folder\)"):
        check_contents(
            Path("out/sft"), {"data.sources.1": _content("1")}, Origin(settings={}, inputs={})
        )


def test_contents_that_cannot_be_looked_at_are_no_change() -> None:
    recorded = Origin(settings={}, inputs={"data.sources.1": _content("1")})
    check_contents(Path("out/sft"), {}, recorded)
    check_contents(Path("out/sft"), {"data.sources.1": _content("1", "/elsewhere")}, recorded)


@pytest.mark.parametrize(
    ("reward", "before"),
    [("sft", (Stage.SFT,)), ("nobody/other", ())],
)
def test_each_stage_reads_the_models_that_its_configuration_names(
    reward: str, before: tuple[Stage, ...], tmp_path: Path
) -> None:
    tree: dict[str, Any] = tiny_run.tree(tmp_path)
    tree["models"]["reward"]["model"] = reward
    config = build_config(RunConfig, tree, source="test")
    assert model_sources(config, Stage.SFT) == {}  # random weights
    assert stages_before(config, Stage.REWARD) == before
    assert stages_before(config, Stage.PROMPTS) == (Stage.SFT, Stage.REWARD)
    named = model_sources(_from_folder(tmp_path, tmp_path / "x"), Stage.SFT)
    assert [source.name for source in named.values()] == [str(tmp_path / "x")]
