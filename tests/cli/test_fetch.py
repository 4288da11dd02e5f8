"""`megachat fetch`: what a run needs, onto this machine, for runs without a network."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from megachat.model.config import OPT_MODELS
from tests.cli.test_main import ROWS, assert_one_line, invoke
from tests.harness import fake_hub
from tests.harness.fake_hub import FakeHub

MODEL = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}
RUN = """
[launch]
device = "cpu"
[run]
output = "{folder}/out"
[[data.sources]]
name = "Dahoas/rm-static"
[[data.sources]]
name = "mine"
path = "{folder}/rows.jsonl"
[models.actor]
model = "nobody/actor"
[models.reward]
model = "nobody/reward"
"""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with two models and a data set, and this machine's empty caches."""
    written = io.BytesIO()
    datasets.Dataset.from_list([json.loads(ROWS.splitlines()[0])]).to_parquet(written)
    with fake_hub.serve() as hub:
        fake_hub.use(hub, tmp_path / "cache", monkeypatch)
        hub.repositories["models/nobody/actor"] = MODEL | {"pytorch_model.bin": b"old"}
        hub.repositories["models/nobody/reward"] = MODEL
        hub.repositories["datasets/Dahoas/rm-static"] = {"data/train.parquet": written.getvalue()}
        yield hub


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(folder=tmp_path))
    return path


def test_models_and_data_are_fetched_once_and_told(served: FakeHub, tmp_path: Path) -> None:
    command = ["fetch", "nobody/actor", "--data", "Dahoas/rm-static", "--data", "chitchat"]
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    model, static, chitchat, total = result.stdout.splitlines()
    assert model.startswith(f"model nobody/actor: fetched, 0.0 MB, {tmp_path}/cache/hub/models--")
    assert static.startswith(f"data set Dahoas/rm-static: fetched, 0.0 MB, {tmp_path}/cache/datas")
    assert chitchat.startswith("data set chitchat: was there, ")
    assert total.startswith("3 in all, ")
    again = invoke(*command)
    assert again.exit_code == 0 and again.stdout.count(": was there, ") == 3
    assert again.stdout.endswith("3 in all, 0.0 MB fetched\n")
    assert served.downloaded.count("nobody/actor/model.safetensors") == 1
    assert "nobody/actor/pytorch_model.bin" not in served.downloaded


def test_a_run_file_names_all_that_is_needed(served: FakeHub, run_file: Path) -> None:
    result = invoke("fetch", "--config", run_file)
    assert result.exit_code == 0, result.output
    states = {line.split(", ")[0] for line in result.stdout.splitlines()[:-1]}
    assert states == {
        "model nobody/actor: fetched",
        "model nobody/reward: fetched",
        "tokenizer nobody/actor: was there",
        "data set Dahoas/rm-static: fetched",
        "data set mine: was there",
    }
    dry = invoke("train", "--config", run_file, "--dry-run")
    assert_one_line(dry, "config.json: model_type is None: expected 'opt'")  # what was fetched
    assert "input model nobody/reward: " in dry.stdout and "not here" not in dry.stdout
    changed = invoke("fetch", "--config", run_file, "--set", "models.reward.model=sft")
    assert "nobody/reward" not in changed.stdout


def test_train_fetches_before_its_ranks_start(served: FakeHub, run_file: Path) -> None:
    """The models are no OPT, which the ranks would be the first to find out."""
    settings = ["--set", "launch.memory_check=off", "--set", "launch.processes=2"]
    dry = invoke("train", "--config", run_file, "--dry-run")
    assert dry.stdout.count("not here, fetched before the start") == 3, dry.stdout
    assert served.downloaded == []
    del served.repositories["datasets/Dahoas/rm-static"]
    result = invoke("train", "--config", run_file, *settings)
    assert_one_line(result, "data set Dahoas/rm-static", "cannot be loaded")
    assert served.downloaded.count("nobody/actor/model.safetensors") == 1
    assert not (run_file.parent / "out").exists()


@pytest.mark.parametrize("command", ["fetch", "train"])
def test_opt_175b_is_one_line_that_says_where_it_comes_from(
    served: FakeHub, run_file: Path, command: str
) -> None:
    name = "facebook/opt-175b"
    assert name in OPT_MODELS
    settings = ["--set", f"models.actor.model={name}", "--set", "launch.memory_check=off"]
    result = invoke(command, "--config", run_file, *settings)
    assert_one_line(result, name, "is on no hub", "metaseq", "HuggingFace folder")
    assert served.downloaded == [] and not (run_file.parent / "out").exists()
    dry = invoke("train", "--config", run_file, "--dry-run", "--set", f"models.actor.model={name}")
    assert_one_line(dry, f"model {name}: is on no hub")
    assert f"input model {name}: is on no hub" in dry.stdout


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        ([], ["nothing to fetch", "--config FILE"]),
        (["nobody/absent"], ["model nobody/absent", "not given by the hub"]),
        (["./absent"], ["model ./absent", "no such folder"]),
        (["--data", "Dahoas/rm-statik"], ["--data", "did you mean Dahoas/rm-static"]),
        (["--config", "absent.toml"], ["absent.toml", "cannot read"]),
        (["facebook/opt-175b", "nobody/actor"], ["is on no hub"]),
    ],
)
def test_what_cannot_be_fetched_is_one_line(
    served: FakeHub, arguments: list[str], needles: list[str]
) -> None:
    assert_one_line(invoke("fetch", *arguments), *needles)
    assert served.downloaded == []


def test_without_a_network_it_is_one_line(served: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megachat.hub.hub_is_reachable", lambda: False)
    monkeypatch.setattr("megachat.data.sources.hub_is_reachable", lambda: False)
    assert_one_line(invoke("fetch", "nobody/actor"), "cannot be reached from here")
    assert_one_line(invoke("fetch", "--data", "Dahoas/rm-static"), "no copy is cached here")
    assert served.requests == []


@pytest.mark.parametrize("name", ["", "empty"])
def test_a_folder_that_holds_no_model_is_not_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    result = invoke("fetch", name)
    assert_one_line(result, "has no config.json: give a whole folder")
