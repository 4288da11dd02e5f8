import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megachat.config import load_config
from megachat.errors import (
    ConfigError,
    InternalError,
    LaunchError,
    LayoutError,
    MegachatError,
    SignalError,
)
from megachat.parallel.launch import LaunchConfig, launch, num_cores, select_device
from tests.harness.nodes import Nodes
from tests.harness.ports import free_port
from tests.parallel import entries

JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ALONE = LaunchConfig(device="cpu", threads=1)
TWO = LaunchConfig(device="cpu", threads=1, processes=2)
STEP = {
    "SLURM_JOB_ID": "1",
    "SLURM_LOCALID": "5",
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu7",
    "SLURM_STEP_NUM_TASKS": "8",
}
CUDA_VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "NCCL_DEBUG",
)
SECONDS_TO_REPORT = 10.0
"""Longest time from a rank's failure to its error in the parent."""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No job around, and what `launch` sets in the environment and in torch is put back."""
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    for name in ("OMP_NUM_THREADS", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, os.environ[name])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert not dist.is_initialized()


def test_a_world_of_one_runs_in_this_process(tmp_path: Path) -> None:
    launch(LaunchConfig(device="cpu", threads=2), entries.report, tmp_path)
    assert (tmp_path / "0").read_text() == "0 1 cpu 1 2 2 gloo"
    assert not set(JOB) & set(os.environ)


def test_an_error_of_a_world_of_one_comes_through_as_it_is() -> None:
    with pytest.raises(LayoutError, match="rank 0 of 1 has a reason"):
        launch(ALONE, entries.fail_alone)


def test_two_ranks_meet_with_the_device_and_threads_they_were_given(tmp_path: Path) -> None:
    launch(TWO, entries.report, tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"0": "0 2 cpu 3 1 1 gloo", "1": "1 2 cpu 3 1 1 gloo"}


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        (
            "megachat",
            LayoutError,
            ["heads 7 are not a multiple of tensor 2: choose 1 or 7"],
        ),
        (
            "unexpected",
            InternalError,
            [
                "internal error on rank 1",
                "KeyError: 'no such thing' (",
                "entries.py:",
                "its stack is in",
            ],
        ),
        ("kill", LaunchError, ["rank 1 was killed by SIGKILL"]),
        ("end the launcher", SignalError, ["the job was ended by SIGTERM"]),
    ],
)
def test_the_first_failure_of_a_rank_is_raised_here_and_ends_the_others(
    tmp_path: Path, how: str, kind: type[MegachatError], words: list[str]
) -> None:
    """Rank 0 is inside a collective that breaks down with its peer; that must not be the news."""
    with pytest.raises(MegachatError) as caught:
        launch(TWO, entries.fail, tmp_path, how, os.getpid())
    waited = time.time() - float((tmp_path / "failed").read_text())
    assert type(caught.value) is kind
    assert all(part in str(caught.value) for part in words)
    assert "collective" not in str(caught.value) and "\n" not in str(caught.value)
    if kind is LayoutError:
        assert str(caught.value) == words[0]
    assert waited < SECONDS_TO_REPORT
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


def test_a_rank_of_a_torchrun_job_joins_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in zip(JOB, ("0", "1", "0", "127.0.0.1", str(free_port())), strict=True):
        monkeypatch.setenv(name, value)
    launch(ALONE, entries.report, tmp_path)
    assert (tmp_path / "0").read_text() == "0 1 cpu 1 1 1 gloo"


def test_a_torchrun_job_of_another_size_names_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(JOB, ("0", "3", "0", "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"with 3 processes, .*processes 2 x launch.nodes 1 = 2"):
        launch(TWO, entries.fail_alone)


@pytest.mark.parametrize("rendezvous", ["here", "host:", ":29500", "host:port", "host:65536"])
def test_a_malformed_rendezvous_is_refused(rendezvous: str) -> None:
    config = TWO.model_copy(update={"rendezvous": rendezvous})
    with pytest.raises(LaunchError, match=f"rendezvous is '{rendezvous}': expected host:port"):
        launch(config, entries.fail_alone)


def test_a_rendezvous_port_in_use_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        rendezvous = f"127.0.0.1:{taken.getsockname()[1]}"
        config = TWO.model_copy(update={"rendezvous": rendezvous})
        with pytest.raises(
            LaunchError, match=f"{rendezvous}: cannot listen .*in use.*another port"
        ):
            launch(config, entries.fail_alone)


def test_a_rendezvous_on_another_machine_is_refused_for_one_node() -> None:
    config = TWO.model_copy(update={"rendezvous": "192.0.2.1:29500"})  # reserved for examples
    with pytest.raises(LaunchError, match="cannot listen"):
        launch(config, entries.fail_alone)


def test_several_nodes_need_a_rendezvous() -> None:
    config = TWO.model_copy(update={"nodes": 2})
    with pytest.raises(LaunchError, match=r"launch.nodes is 2, but launch.rendezvous is not set"):
        launch(config, entries.fail_alone)


def test_cuda_on_a_machine_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LaunchError, match="device is cuda, but .*launch.device=cpu"):
        launch(LaunchConfig(device="cuda", threads=1), entries.fail_alone)


def test_the_device_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    third = torch.device("cuda", 3)
    assert [select_device(name) for name in ("auto", "cuda")] == [third, third]
    assert select_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")


def test_a_rank_that_sees_a_gpu_of_its_own_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `srun --gpus-per-task=1`."""
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert select_device("auto") == torch.device("cuda", 0)


@pytest.mark.parametrize(("visible", "count"), [("0,1", 2), ("", 1)])
def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(LaunchError, match=f"rank 3 of .* has no CUDA device: there are {count}"):
        select_device("auto")


def test_more_processes_than_gpus_are_refused_before_they_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in CUDA_VARIABLES:
        monkeypatch.setenv(name, "mine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LaunchError, match="launch.processes is 2, but .* has 1 CUDA devices"):
        launch(TWO.model_copy(update={"device": "cuda"}), entries.fail_alone)
    assert {os.environ[name] for name in CUDA_VARIABLES} == {"mine"}


def test_cuda_gets_its_variables_where_the_user_has_set_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*CUDA_VARIABLES, "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LaunchError, match="has 1 CUDA devices"):
        launch(TWO.model_copy(update={"device": "cuda"}), entries.fail_alone)
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert all(os.environ[name] for name in CUDA_VARIABLES)
    # torch's allocator is left as it is: decision 12.
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_a_long_temporary_folder_is_no_obstacle(tmp_path: Path) -> None:
    """A socket's path has at most 107 characters."""
    folder = tmp_path / ("t" * 95)
    folder.mkdir()
    with Nodes(tmp_path) as nodes:
        nodes.start(
            launch, TWO, entries.report, tmp_path, variables={"TMPDIR": str(folder), "TMP": ""}
        )
        (end,) = nodes.ends()
    assert (end.exit_code, end.message) == (0, "")
    assert (tmp_path / "1").exists()


def test_threads_share_the_cores_unless_they_are_set() -> None:
    assert LaunchConfig().threads_per_process == num_cores()
    assert LaunchConfig(processes=num_cores() + 1).threads_per_process == 1
    assert LaunchConfig(processes=2, threads=5).threads_per_process == 5
    assert LaunchConfig(processes=2, nodes=3).world_size == 6


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [("processes=0", "processes"), ("device=tpu", "device"), ("node=2", "did you mean 'nodes'")],
)
def test_a_setting_that_cannot_be_is_named(setting: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(LaunchConfig, overrides=[setting])
