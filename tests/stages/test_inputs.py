"""What a run reads is fetched once before its ranks join, and they ask no network for it."""

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from megachat import hub
from megachat.config import build_config
from megachat.data.config import SourceConfig, Stage
from megachat.errors import CheckpointError, DataError
from megachat.hub import Content
from megachat.stages import inputs as module
from megachat.stages.config import RunConfig
from megachat.stages.context import TOKENIZER_RECORD, prepare_output
from megachat.stages.inputs import (
    DataInput,
    ModelInput,
    check_published,
    describe_inputs,
    fetch_missing,
    inputs_of,
)
from megachat.stages.results import MODEL_FOLDER
from megachat.stages.run import run_stages
from tests.harness import fake_hub, run_ranks
from tests.stages import tiny_run

NAME = "nobody/tiny"


def from_hub(folder: Path, *, reward: str = "sft", sources: Sequence[str] = ()) -> RunConfig:
    """The very small run with models, and perhaps data, by their names on a hub."""
    tree = tiny_run.tree(folder)
    del tree["models"]["actor"]["shape"], tree["tokenizer"]
    tree["models"]["actor"]["model"] = NAME
    tree["models"]["reward"]["model"] = reward
    tree["sft"]["max_steps"] = 1
    if sources:
        tree["data"]["sources"] = [{"name": name} for name in sources]
    return build_config(RunConfig, tree, source="test")


def test_a_run_reads_models_tokenizer_and_data_each_once(tmp_path: Path) -> None:
    names = ["Dahoas/rm-static", "chitchat"]
    config = from_hub(tmp_path, reward="nobody/other", sources=names)
    data = [DataInput(source=SourceConfig(name=name)) for name in names]
    tokenizer = ModelInput(name=NAME, content=Content.TOKENIZER)
    actor, reward = ModelInput(name=NAME), ModelInput(name="nobody/other")
    assert inputs_of(config, list(Stage)) == (actor, reward, tokenizer, *data)
    assert inputs_of(config, [Stage.SFT]) == (actor, tokenizer, *data)
    assert inputs_of(config, [Stage.REWARD]) == (reward, tokenizer, *data)
    assert inputs_of(config, [Stage.PROMPTS]) == (tokenizer, *data)
    assert inputs_of(config, []) == ()
    prepare_output(config)
    (config.run.output / TOKENIZER_RECORD).touch()  # a run that goes on has its tokenizer
    assert inputs_of(config, [Stage.PROMPTS]) == tuple(data)
    trained = tiny_run.config(tmp_path)  # random weights, a tokenizer of its own, reward from SFT
    assert inputs_of(trained, list(Stage)) == (DataInput(source=trained.data.sources[0]),)


def test_of_several_processes_one_fetches_and_the_others_wait(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [ModelInput(name=NAME)]
    outcomes: list[bool] = []
    everyone = threading.Barrier(3)
    find = ModelInput.find

    def find_together(self: ModelInput) -> object:
        place = find(self)
        if not everyone.broken and len(first_looks) < 3:
            first_looks.append(place)
            everyone.wait(60)  # all see that nothing is there before one begins
        return place

    first_looks: list[object] = []
    monkeypatch.setattr(ModelInput, "find", find_together)
    with fake_hub.serve() as running:
        fake_hub.use(running, tmp_path / "cache", monkeypatch)
        model = finished.run.output / "sft" / MODEL_FOLDER
        running.repositories[f"models/{NAME}"] = fake_hub.files_of(model)
        threads = [
            threading.Thread(target=lambda: outcomes.append(fetch_missing(wanted)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert first_looks == [None] * 3 and outcomes == [True] * 3
        assert running.requests.count(f"GET api/models/{NAME}") == 1
        assert running.downloaded.count(f"{NAME}/model.safetensors") == 1
        assert fetch_missing(wanted) is False


def test_what_is_fetched_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_hub.serve() as running, caplog.at_level(logging.INFO, logger=module.__name__):
        fake_hub.use(running, tmp_path, monkeypatch)
        running.repositories[f"models/{NAME}"] = {"tokenizer.json": b"{}"}
        fetch_missing([ModelInput(name=NAME, content=Content.TOKENIZER)])
    first, last = (record.getMessage() for record in caplog.records)
    assert first == f"fetching tokenizer {NAME}"
    assert last.startswith(f"fetched tokenizer {NAME}: 0.0 MB, {tmp_path}")


def _train_from_hub(folder: Path, cache: Path) -> None:
    """One supervised step on this rank, with a hub that nobody may ask."""

    def refuse() -> bool:
        raise AssertionError("a rank asked for the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setattr(hub, "hub_is_reachable", refuse)
        patch.setattr("megachat.data.sources.hub_is_reachable", refuse)
        run_stages(tiny_run.worker(), from_hub(folder), [Stage.SFT], "megachat sft")


def test_ranks_train_from_what_was_fetched(
    finished: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    config = from_hub(tmp_path)
    with fake_hub.serve() as running:
        fake_hub.use(running, tmp_path / "hub", monkeypatch)
        model = finished.run.output / "sft" / MODEL_FOLDER
        running.repositories[f"models/{NAME}"] = {
            **fake_hub.files_of(model),
            "pytorch_model.bin": b"the same weights in the old format",
        }
        assert fetch_missing(inputs_of(config, [Stage.SFT])) is True
        assert f"{NAME}/pytorch_model.bin" not in running.downloaded
    run_ranks(2, _train_from_hub, tmp_path, tmp_path / "hub")
    assert (config.run.output / "sft" / MODEL_FOLDER / "model.safetensors").is_file()


def test_what_nobody_can_download_is_refused_before_anything_is(tmp_path: Path) -> None:
    wanted = [ModelInput(name="nobody/other"), ModelInput(name="facebook/opt-175b")]
    for refuse in (check_published, fetch_missing):
        with pytest.raises(CheckpointError, match="model facebook/opt-175b: is on no hub"):
            refuse(wanted)
    check_published(wanted[:1])


def test_a_data_file_that_does_not_exist_is_refused_before_the_launch(tmp_path: Path) -> None:
    config = tiny_run.config(tmp_path)
    with pytest.raises(DataError, match=r"data set chats: .*rows\.jsonl: no such file"):
        fetch_missing(inputs_of(config, list(Stage)))


def test_each_input_is_described_by_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "none")
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    wanted = [
        ModelInput(name=str(tmp_path)),
        ModelInput(name="nobody/other"),
        ModelInput(name="facebook/opt-175b"),
        DataInput(source=SourceConfig(name="mine", path=rows)),
        DataInput(source=SourceConfig(name="mine", path=tmp_path / "absent")),
        DataInput(source=SourceConfig(name="Dahoas/rm-static")),
    ]
    own, other, unpublished, data, absent, static = describe_inputs(wanted)
    assert own == f"input model {tmp_path}: {tmp_path}"
    assert other == "input model nobody/other: not here, fetched before the start"
    assert unpublished.startswith("input model facebook/opt-175b: is on no hub")
    assert data == f"input data set mine: {rows}"
    assert absent == f"input data set mine: {tmp_path}/absent: no such file or folder"
    assert static == "input data set Dahoas/rm-static: fetched before the start, unless it is here"
