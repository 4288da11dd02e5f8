"""One run has one folder, and one attempt at a stage has its curves for itself."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

import pytest
import torch.distributed as dist

from megachat.data.config import Stage
from megachat.errors import ConfigError, MegachatError
from megachat.locks import HeldElsewhereError, claimed
from megachat.stages.output import LOCK_FILE, claimed_output, start_afresh
from megachat.telemetry.metrics import TENSORBOARD_FOLDER, MetricsWriter, read_metrics
from tests.harness import run_ranks
from tests.stages import tiny_run


def _run_anyhow(folder: Path) -> str | None:
    """The refusal of a run on this rank."""
    try:
        tiny_run.run(folder, stages=[Stage.SFT])
    except MegachatError as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_a_second_run_is_refused_on_all_ranks_and_touches_nothing(tmp_path: Path) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    output = tmp_path / "run"
    (output / "logs").mkdir(parents=True)
    (output / "logs" / "rank_000.log").write_text("of the first run")
    with claimed(output / LOCK_FILE):
        first, second = run_ranks(2, _run_anyhow, tmp_path)
    assert first == second and first is not None and "\n" not in first
    assert first.startswith(f"ConfigError: run.output {output}: another run is writing there")
    assert f"process {os.getpid()} on host {socket.gethostname()}, since 20" in first
    assert first.endswith("wait for its end, end it, or choose another folder")
    assert (output / "logs" / "rank_000.log").read_text() == "of the first run"
    assert not (output / "config.json").exists()


def _hold_together(folder: Path) -> list[str]:
    """Who holds the folder, in this rank's eyes, while the ranks of one job are in it."""
    config = tiny_run.config(folder)
    seen = []
    with claimed_output(config):
        try:
            with claimed(config.run.output / LOCK_FILE):
                seen.append("free")
        except HeldElsewhereError as error:
            assert error.holder is not None
            seen.append("me" if error.holder.pid == os.getpid() else "rank 0")
        dist.barrier()
    return seen


def test_ranks_of_one_job_share_the_folder_that_rank_0_holds(tmp_path: Path) -> None:
    assert run_ranks(2, _hold_together, tmp_path) == [["me"], ["rank 0"]]
    with claimed(tmp_path / "run" / LOCK_FILE):
        pass


def _hold_without_locks(folder: Path, number: int) -> list[str]:
    """Warnings of a run on a file system whose locks fail with `number`."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    logger = logging.getLogger("megachat.stages.output")
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        try:
            with claimed_output(tiny_run.config(folder)):
                said.append("runs")
        except ConfigError as error:
            said.append(str(error))
    logger.removeHandler(handler)
    return said


def test_without_locks_the_run_goes_on_and_says_that_nothing_guards_it(tmp_path: Path) -> None:
    [said] = run_ranks(1, _hold_without_locks, tmp_path, errno.ENOLCK)
    assert said[1:] == ["runs"]
    assert "no file locks" in said[0] and "nothing keeps a second run out" in said[0]
    [said] = run_ranks(1, _hold_without_locks, tmp_path, errno.EIO)
    [refusal] = said
    assert f"{LOCK_FILE} cannot be written" in refusal and "\n" not in refusal


def test_a_new_attempt_keeps_the_model_and_sets_the_rest_aside(tmp_path: Path) -> None:
    for name in ("model", "tensorboard", "last_good", ".model.0123abcd.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    for name in ("metrics.jsonl", "result.json"):
        (tmp_path / name).write_text(name)
    start_afresh(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "attempts"}
    kept = {path.name for path in (tmp_path / "attempts" / "1").iterdir()}
    assert kept == {"tensorboard", "last_good", "metrics.jsonl", "result.json"}
    start_afresh(tmp_path)  # nothing to set aside: no empty attempt
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["1"]


def test_a_stage_that_is_run_again_has_the_steps_of_one_attempt(tmp_path: Path) -> None:
    """The first was killed after more steps than the second takes."""
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    folder = tmp_path / "run" / "sft"
    with MetricsWriter(folder) as metrics:
        for step in range(9):
            metrics.write(step, {"sft/loss": 100.0 + step})
    run_ranks(1, tiny_run.run, tmp_path, ["sft.max_steps=2"], [Stage.SFT])
    losses = read_metrics(folder).series("sft/loss")
    assert [step for step, _ in losses] == [0, 1] and all(loss < 100 for _, loss in losses)
    assert len(list((folder / TENSORBOARD_FOLDER).iterdir())) == 1
    earlier = folder / "attempts" / "1"
    assert len(read_metrics(earlier).series("sft/loss")) == 9
    assert len(list((earlier / TENSORBOARD_FOLDER).iterdir())) == 1
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "attempts" not in report
