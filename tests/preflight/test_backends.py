"""Kernels and packages that are asked for and cannot be had."""

import shutil
from pathlib import Path

import pytest
import torch

from megachat.data import chitchat
from megachat.data.config import Stage
from megachat.errors import DataError, KernelError
from megachat.model import layers
from megachat.ops import build
from megachat.preflight.backends import check_backends, check_packages
from tests.preflight.case import config

ALL = frozenset(Stage)
CPU = torch.device("cpu")
GENERATION, LOGPROBS = "rlhf.generation.backend", "models.actor.logprob_backend"


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this user's libraries are kept; nothing is there yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "megachat" / "kernels"


@pytest.mark.parametrize("key", [GENERATION, LOGPROBS])
def test_cuda_kernels_on_a_cpu_are_refused_by_their_key(case: Path, key: str) -> None:
    settings = config(case, f"{key}=cuda")
    [problem] = check_backends(settings, ALL, CPU)
    assert isinstance(problem, KernelError)
    assert str(problem).startswith(f'{key}: backend = "cuda" needs a model on an NVIDIA GPU')
    assert list(check_backends(settings, frozenset(), CPU)) == []


def test_kernels_are_asked_for_only_where_a_stage_computes_with_them(case: Path) -> None:
    only_sft = frozenset({Stage.SFT})
    assert list(check_backends(config(case, f"{GENERATION}=cuda"), only_sft, CPU)) == []
    assert len(list(check_backends(config(case, f"{LOGPROBS}=cuda"), only_sft, CPU))) == 1
    assert list(check_backends(config(case), ALL, CPU)) == []


def test_cpu_kernels_on_a_gpu_are_refused(case: Path) -> None:
    settings = config(case, f"{GENERATION}=cpu")
    [problem] = check_backends(settings, ALL, torch.device("cuda", 0))
    assert str(problem).startswith(f'{GENERATION}: backend = "cpu" needs a model on the CPU')


def test_cpu_kernels_need_a_compiler_or_a_library_and_nothing_is_built(
    case: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(case, f"{GENERATION}=cpu")
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/g++")
    assert list(check_backends(settings, ALL, CPU)) == []
    assert not kernels.exists()
    monkeypatch.setattr(shutil, "which", lambda _: None)
    [problem] = check_backends(settings, ALL, CPU)
    assert f"{GENERATION}: the CPU kernels need g++, and none is on the PATH" in str(problem)
    place = build._place(build.Recipe())
    assert place.parent == kernels
    place.parent.mkdir(parents=True)
    place.touch()
    assert list(check_backends(settings, ALL, CPU)) == []


def test_cpu_kernels_need_a_place_to_be_kept(
    case: Path, kernels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/g++")
    kernels.parent.mkdir(parents=True)
    kernels.touch()
    [problem] = check_backends(config(case, f"{GENERATION}=cpu"), ALL, CPU)
    assert f"{kernels}: cannot keep the CPU kernels here" in str(problem)


def test_apex_that_is_not_there_is_refused_for_the_role_that_asks_for_it(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(backend: layers.NormBackend) -> None:
        raise KernelError("norm_backend is apex, but apex is not installed")

    settings = config(case, "models.reward.norm_backend=apex")
    monkeypatch.setattr(layers, "norm_kernel", missing)
    [problem] = check_packages(settings, ALL)
    assert str(problem).startswith("models.reward: norm_backend is apex, but apex is ")
    monkeypatch.setattr(layers, "norm_kernel", lambda backend: None)
    assert list(check_packages(settings, ALL)) == []
    assert list(check_packages(config(case), ALL)) == []


def test_a_judge_whose_package_is_missing_is_refused_before_the_first_stage(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise DataError("vaderSentiment is not installed")

    settings = config(case, "rlhf.judge=upbeat")
    assert list(check_packages(settings, ALL)) == []
    monkeypatch.setattr(chitchat, "positive_words", missing)
    [problem] = check_packages(settings, ALL)
    assert str(problem) == 'rlhf.judge "upbeat": vaderSentiment is not installed'
    assert isinstance(problem, DataError)
    assert list(check_packages(settings, frozenset({Stage.SFT}))) == []
