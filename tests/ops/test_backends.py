"""A backend that cannot compute with a model's device is refused."""

import pytest
import torch

from megachat.errors import KernelError
from megachat.ops import backends
from megachat.ops.backends import prepare
from megachat.ops.registry import Backend


def test_kernels_are_built_for_who_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(backends.cpu_kernels, "prepare", lambda: asked.append("cpu"))
    monkeypatch.setattr(backends.cuda_kernels, "prepare", asked.append)
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    prepare(Backend.REFERENCE, cpu)
    prepare(Backend.REFERENCE, gpu)
    assert not asked
    prepare(Backend.CPU, cpu)
    prepare(Backend.CUDA, gpu)
    assert asked == ["cpu", gpu]


@pytest.mark.parametrize(
    ("backend", "device", "message"),
    [
        (Backend.CPU, "cuda:0", r"needs a model on the CPU, and this one is on cuda:0"),
        (Backend.CUDA, "cpu", r"needs a model on an NVIDIA GPU, and this one is on the cpu"),
    ],
)
def test_a_device_that_a_backend_is_not_for_is_refused(
    backend: Backend, device: str, message: str
) -> None:
    with pytest.raises(KernelError, match=message):
        prepare(backend, torch.device(device))
