"""A rank that fails in the middle of its work ends the job soon, with its own message first."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megachat.errors import CapacityError, InternalError, LaunchError, MegachatError
from megachat.parallel.launch import LaunchConfig, Worker, launch
from tests.hybrid import failing
from tests.stages import tiny_run

SECONDS_TO_END = 10.0
"""Longest time from a rank's failure to the end of the job."""
JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No job around; what `launch` sets is put back."""
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, os.environ[name])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        (failing.in_generation, CapacityError, failing.CAPACITY),
        (failing.in_reshard, LaunchError, "rank 1 was killed by SIGKILL"),
        (
            failing.in_training,
            InternalError,
            "internal error on rank 1: KeyError: 'the third micro-batch'",
        ),
    ],
    ids=["generation", "reshard", "training"],
)
def test_a_failing_rank_ends_the_job_with_its_own_message(
    entry: Callable[[Worker, Path], None], kind: type[MegachatError], message: str, tmp_path: Path
) -> None:
    """The other rank waits for it in a collective, whose breaking down must not be the news."""
    config = LaunchConfig(device="cpu", threads=1, processes=2)
    with pytest.raises(MegachatError) as caught:
        launch(config, entry, tmp_path)
    waited = time.time() - float((tmp_path / "failed").read_text())
    assert type(caught.value) is kind
    assert str(caught.value).startswith(message)
    assert waited < SECONDS_TO_END


def _command(folder: Path) -> list[str]:
    """`megachat train` on two processes, far longer than the test waits."""
    settings = (
        "launch.processes=2",
        f"run.output={folder / 'run'}",
        f'data.sources=[{{name = "chats", path = "{tiny_run.write_rows(folder / "rows.jsonl")}"}}]',
        f"data.cache_dir={folder / 'cache'}",
        "data.split=[2, 4, 4]",
        "data.max_answer_tokens=32",
        "data.max_tokens=56",
        "tokenizer.train.vocab_size=134",
        "models.actor.shape.hidden=32",
        "sft.epochs=100000",
        "sft.max_steps=100000",
        "sft.evaluation_rows=16",
    )
    example = Path(__file__).parents[2] / "examples/tiny_cpu/run.toml"
    options = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "megachat.cli.main", "train", "--config", str(example), *options]


def _children(process: int) -> list[int]:
    """Child processes, the oldest first."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return sorted(int(child) for child in listed)


def _ranks_of(launcher: int) -> list[int]:
    """Processes of the ranks that a launcher has started: children of its fork server."""
    (server,) = (
        child
        for child in _children(launcher)
        if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return _children(server)


def test_a_rank_that_the_system_kills_ends_the_command_with_one_line_and_status_2(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(_command(tmp_path), stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stderr is not None
        lines = iter(launcher.stderr.readline, "")
        next(line for line in lines if "Supervised fine-tuning: 100000 steps" in line)
        ranks = _ranks_of(launcher.pid)
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        *_, last = lines  # until the launcher and all ranks have closed their end
        assert launcher.wait() == 2
        assert time.monotonic() - killed < SECONDS_TO_END
    assert last.startswith("LaunchError: rank 1 was killed by SIGKILL")
