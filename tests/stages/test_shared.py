"""Ranks on nodes with different views of a folder are refused by name, and told what is done."""

import shutil
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megachat.data.config import SourceConfig
from megachat.errors import CheckpointError, ConfigError, DataError, MegachatError
from megachat.stages import run as run_module
from megachat.stages import shared
from megachat.stages.config import RunConfig
from megachat.stages.inputs import DataInput, Input, ModelInput
from megachat.stages.shared import Finding, Problem, check_inputs, check_output, refusal
from tests.harness import run_ranks
from tests.stages import tiny_run

GONE = Problem(what="folder: not seen", remedy="share it")


def findings(text: str) -> list[Finding]:
    """One finding a letter: upper case has a problem; the letter is the node."""
    return [
        Finding(host=f"node-{letter.lower()}", problem=GONE if letter.isupper() else None)
        for letter in text
    ]


@pytest.mark.parametrize(
    ("ranks", "who"),
    [
        ("aAbb", "node-a (rank 1)"),
        ("aaBBcC", "node-b (ranks 2-3), node-c (rank 5)"),
        ("AaAA", "node-a (ranks 0,2-3)"),
        (
            "aBCDEFG",
            "node-b (rank 1), node-c (rank 2), node-d (rank 3), node-e (rank 4) and 2 more",
        ),
    ],
)
def test_a_refusal_names_the_nodes_and_their_ranks(ranks: str, who: str) -> None:
    error = refusal(findings(ranks))
    assert isinstance(error, ConfigError)
    assert str(error).startswith(f"folder: not seen on {who}") and str(error).endswith(": share it")


def test_no_problem_is_no_refusal_and_the_first_of_several_counts() -> None:
    assert refusal(findings("aabb")) is None
    other = Problem(what="other", remedy="mend it", error=DataError)
    both = [*findings("aB"), Finding(host="node-c", problem=other)]
    assert str(refusal(both)) == "folder: not seen on node-b (rank 1): share it"
    assert isinstance(refusal(both[::-1]), DataError)


def _refused(folder: Path, what: str) -> str | None:
    """The refusal on a rank whose node is called after it; `what` is another on each node."""
    rank = dist.get_rank()
    own = folder / f"node{rank}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"node{rank}")
        patch.setattr(shared, "ATTEMPTS", 2)
        overrides = {
            "run.output": [f"run.output={own}/out"],
            "data.cache_dir": [f"data.cache_dir={own}/file/cache" if rank else "data.cache_dir=x"],
        }.get(what, [])
        patch.chdir(folder)
        config = tiny_run.config(folder, overrides)
        worker = tiny_run.worker()
        inputs: dict[str, Input] = {
            "model": ModelInput(name=str(own / "model")),
            "data": DataInput(source=SourceConfig(name="mine", path=own / "rows.jsonl")),
        }
        try:
            check_output(worker, config)
            check_inputs([inputs[what]] if what in inputs else [])
        except MegachatError as error:
            return f"{type(error).__name__}: {error}"
    return None


def both_refused(folder: Path, what: str) -> str:
    """The one line with which both ranks end."""
    first, second = run_ranks(2, _refused, folder, what)
    assert first == second and first is not None and "\n" not in first
    return str(first)


def test_an_output_that_is_another_folder_on_another_node_is_refused(tmp_path: Path) -> None:
    message = both_refused(tmp_path, "run.output")
    assert message.startswith(f"ConfigError: run.output {tmp_path}/node1/out: not the folder")
    assert "not the folder that rank 0 (node0) writes on node1 (rank 1)" in message
    assert message.endswith("choose one on a file system that all nodes share")
    assert not list((tmp_path / "node0" / "out").glob(".*"))


def test_a_cache_of_data_that_one_node_cannot_make_is_refused(tmp_path: Path) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "file").touch()
    message = both_refused(tmp_path, "data.cache_dir")
    assert message.startswith(f"DataError: data.cache_dir {tmp_path}/node1/file/cache: cannot be")
    assert "on node1 (rank 1): choose another" in message


def model(folder: Path, *, width: int = 8, weights: bytes = b"weights") -> None:
    """A folder with the files of a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f'{{"hidden": {width}}}')
    (folder / "model.safetensors").write_bytes(weights)


def test_a_model_that_one_node_lacks_is_refused(tmp_path: Path) -> None:
    model(tmp_path / "node0" / "model")
    message = both_refused(tmp_path, "model")
    assert message.startswith(f"CheckpointError: model {tmp_path}/node1/model: not there on node1")
    assert "run megachat fetch there" in message


@pytest.mark.parametrize("change", [{"width": 9}, {"weights": b"longer weights"}])
def test_a_model_that_is_another_on_one_node_is_refused(
    tmp_path: Path, change: dict[str, int | bytes]
) -> None:
    model(tmp_path / "node0" / "model")
    model(tmp_path / "node1" / "model", **change)  # type: ignore[arg-type]
    message = both_refused(tmp_path, "model")
    assert "other files than on rank 0's node node0 on node1 (rank 1): make them equal" in message


def test_data_that_one_node_lacks_is_refused(tmp_path: Path) -> None:
    for node in ("node0", "node1"):
        (tmp_path / node).mkdir()
    tiny_run.write_rows(tmp_path / "node0" / "rows.jsonl")
    message = both_refused(tmp_path, "data")
    assert message.startswith("DataError: data set mine: ")
    assert "node1/rows.jsonl: no such file or folder on node1 (rank 1): " in message


def test_folders_that_all_share_pass_and_nothing_is_left_behind(tmp_path: Path) -> None:
    assert run_ranks(2, _refused, tmp_path, "nothing") == [None, None]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"sft", "reward", "rlhf"}


def test_a_file_that_a_network_file_system_shows_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, path = shared._Mark(name="mark", text="seen", host="node0"), tmp_path / "mark"
    pauses: list[float] = []

    def show_at_the_third_look(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            path.write_text(mark.text)

    monkeypatch.setattr(time, "sleep", show_at_the_third_look)
    assert shared._sees(tmp_path, mark)
    assert len(pauses) == 2
    path.write_text("of another run")
    assert not shared._sees(tmp_path, mark)
    assert len(pauses) == 2 + shared.ATTEMPTS - 1


def _run_with_a_stale_view(folder: Path, output: str) -> str | None:
    """A finished run on two ranks, of which the second sees none of its results."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(run_module, "completed_stages", lambda _: {})
        try:
            tiny_run.run(folder, [f"run.output={output}"])
        except MegachatError as error:
            return f"{type(error).__name__}: {error}"
    return None


def test_rank_0_decides_what_is_complete(
    finished: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    """A rank that sees an older state of the folder would otherwise start a stage on its own."""
    output = tmp_path / "run"
    shutil.copytree(finished.run.output, output)
    assert run_ranks(2, _run_with_a_stale_view, finished_folder, str(output)) == [None, None]
    log = (output / "logs" / "rank_001.log").read_text(encoding="utf-8")
    assert log.count("complete in") == 3


def test_what_rank_0_finds_wrong_ends_all_ranks(
    finished: RunConfig, finished_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished.run.output, output)
    (output / "sft" / "result.json").write_text("{")
    first, second = run_ranks(2, _run_with_a_stale_view, finished_folder, str(output))
    assert first == second and first.startswith("CheckpointError: ")
    assert "not a stage result" in first


def _prepare_another_tokenizer(folder: Path) -> str | None:
    """The refusal where the second rank reads another tokenizer than the first."""
    from megachat.data.tokenizer import Tokenizer

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(Tokenizer, "fingerprint", "of another one")
        patch.setattr(socket, "gethostname", lambda: f"node{dist.get_rank()}")
        try:
            tiny_run.context(tiny_run.config(folder))
        except CheckpointError as error:
            return str(error)
    return None


def test_a_rank_that_reads_another_tokenizer_is_named(tmp_path: Path) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    first, second = run_ranks(2, _prepare_another_tokenizer, tmp_path)
    assert first == second
    assert "read as another tokenizer than on rank 0 on node1 (rank 1): " in first
