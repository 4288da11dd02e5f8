"""Each shim point: upstream still needs it, and it answers. One that fails can be removed."""

import importlib
import inspect
import multiprocessing as mp
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional

from megachat.parallel import cpu_compat
from tests.harness import run_ranks

SCHEDULES = "megatron.core.pipeline_parallel.schedules"
TRANSFERS = "megatron.core.pipeline_parallel.p2p_communication"
RANDOM = "megatron.core.tensor_parallel.random"
CHECKPOINTS = "megatron.core.dist_checkpointing.strategies.filesystem_async"
BACKEND = "deepspeed.comm.torch"

without_cuda = pytest.mark.skipif(
    torch.cuda.is_available(), reason="upstream needs no help where CUDA is present"
)


def _module(name: str) -> Any:
    """`import a.torch as b` would bind the real torch instead of DeepSpeed's module."""
    return importlib.import_module(name)


def _fails(call: Callable[[], Any]) -> bool:
    try:
        call()
    except Exception:
        return True
    return False


def _checkpoint_with_dropout() -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of a recomputed dropout, and the mask that its forward pass drew."""
    x = torch.ones(64, requires_grad=True)
    out = _module(RANDOM).checkpoint(lambda inner: functional.dropout(inner, 0.5), False, x)
    torch.rand(5)  # moves the stream on between the two passes
    out.sum().backward()
    assert x.grad is not None
    return x.grad, out.detach()


def _without_shim() -> dict[str, Any]:
    """What upstream does and how it reads, unpatched."""
    random, backend = _module(RANDOM), _module(BACKEND)
    accelerator = _module("deepspeed.accelerator").get_accelerator()
    return {
        "current_device fails": _fails(torch.cuda.current_device),
        "synchronize fails": _fails(torch.cuda.synchronize),
        "add fails": _fails(lambda: random.CudaRNGStatesTracker().add("stream", 1)),
        "recompute fails": _fails(_checkpoint_with_dropout),
        "schedules": inspect.getsource(_module(SCHEDULES)),
        "transfers": inspect.getsource(_module(TRANSFERS)),
        "checkpoints": inspect.getsource(_module(CHECKPOINTS)),
        "backend": inspect.getsource(backend.TorchBackend),
        "build": inspect.getsource(backend.build_shm_op),
        "would build": accelerator.create_op_builder("ShareMemCommBuilder") is not None,
        "tracker": {
            name: list(inspect.signature(vars(random.CudaRNGStatesTracker)[name]).parameters)
            for name in ("add", "fork", "get_states", "set_states")
        },
    }


def _patched_attributes() -> list[Any]:
    random = _module(RANDOM)
    return [
        torch.cuda.current_device,
        torch.cuda.synchronize,
        _module(SCHEDULES).torch,
        random.CudaRNGStatesTracker,
        random._get_cuda_rng_state,
        random._set_cuda_rng_state,
        _module(BACKEND).build_shm_op,
    ]


def _install_where_cuda_is_said_to_be_present() -> list[bool]:
    cuda: Any = torch.cuda
    before = _patched_attributes()
    cuda.is_available = lambda: True
    cpu_compat.install()
    untouched = [one is other for one, other in zip(before, _patched_attributes(), strict=True)]
    cuda.is_available = lambda: False
    cpu_compat.install()
    first = _patched_attributes()
    cpu_compat.install()
    changed = [one is not other for one, other in zip(before, first, strict=True)]
    again = _patched_attributes()
    kept = [first[index] is again[index] for index in (2, 3)]
    return [*untouched, *changed, *kept]


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """A child in which nothing is patched yet."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        yield pool


@pytest.fixture(scope="module")
def upstream(fresh_process: ProcessPoolExecutor) -> dict[str, Any]:
    return fresh_process.submit(_without_shim).result(timeout=120)


@without_cuda
def test_point_1_megatron_asks_cuda_for_the_device_of_its_transfers(
    upstream: dict[str, Any],
) -> None:
    assert upstream["current_device fails"]
    assert "device=torch.cuda.current_device()" in upstream["transfers"]


@without_cuda
def test_point_2_schedules_create_counters_on_the_literal_device_cuda(
    upstream: dict[str, Any],
) -> None:
    """And nothing else there does: `torch.zeros` is all that the shim replaces."""
    literal = re.findall(r'device=["\']cuda["\']', upstream["schedules"])
    zeros = re.findall(r'torch\.zeros\([^()]*device=["\']cuda["\']\)', upstream["schedules"])
    assert len(literal) == len(zeros) > 0


@without_cuda
def test_point_3_the_tracker_and_recomputation_use_cuda_generators(
    upstream: dict[str, Any],
) -> None:
    assert upstream["add fails"]
    assert upstream["recompute fails"]
    assert upstream["tracker"] == {
        "add": ["self", "name", "seed"],
        "fork": ["self", "name"],
        "get_states": ["self"],
        "set_states": ["self", "states"],
    }


@without_cuda
def test_point_4_transfers_and_checkpoints_synchronize_with_cuda(upstream: dict[str, Any]) -> None:
    assert upstream["synchronize fails"]
    assert "torch.cuda.synchronize()" in upstream["transfers"]
    assert "torch.cuda.synchronize()" in upstream["checkpoints"]


@without_cuda
def test_point_5_deepspeed_compiles_its_shared_memory_op(upstream: dict[str, Any]) -> None:
    assert "self.shm_comm_op = build_shm_op()" in upstream["backend"]
    assert "ShareMemCommBuilder" in upstream["build"]
    assert ".load()" in upstream["build"]
    assert upstream["would build"]


@without_cuda
def test_install_touches_nothing_where_cuda_is_present_and_each_point_once_elsewhere(
    upstream: dict[str, Any], fresh_process: ProcessPoolExecutor
) -> None:
    assert upstream["current_device fails"], "the child must not have been patched before"
    outcome = fresh_process.submit(_install_where_cuda_is_said_to_be_present).result(timeout=120)
    assert outcome == [True] * 16


def _with_shim() -> dict[str, Any]:
    """The same questions after `install`, which the harness has called."""
    schedules, random, backend = _module(SCHEDULES), _module(RANDOM), _module(BACKEND)
    tracker = random.CudaRNGStatesTracker()
    tracker.add("one", 1)
    tracker.add("two", 2)
    before = torch.get_rng_state()
    draws = []
    for name in ("one", "two", "one"):
        with tracker.fork(name):
            draws.append(torch.rand(3))
    expected = {
        seed: torch.rand(6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    }
    try:
        with tracker.fork("two"):
            raise KeyError("inside")
    except KeyError:
        left = torch.equal(torch.get_rng_state(), before)
    gradient, mask = _checkpoint_with_dropout()
    built: list[int] = []
    backend.build_shm_op = lambda: built.append(1)
    _module("deepspeed").init_distributed(dist_backend="gloo", verbose=False)
    return {
        "device": torch.cuda.current_device(),
        "synchronize": torch.cuda.synchronize(),
        "zeros": schedules.torch.zeros([], dtype=torch.int, device="cuda"),
        "other zeros": schedules.torch.zeros(2, 3, device="meta").device.type,
        "rest of torch": schedules.torch.Tensor is torch.Tensor,
        "draws": torch.equal(torch.cat([draws[0], draws[2]]), expected[1])
        and torch.equal(draws[1], expected[2][:3]),
        "outer stream": left,
        "twice": _fails(lambda: tracker.add("one", 3)) and _fails(lambda: tracker.add("three", 1)),
        "recompute": torch.equal(gradient, mask) and 0 < int((mask == 0).sum()) < 64,
        "build_shm_op called": built,
    }


@without_cuda
def test_with_the_shim_every_point_answers_on_the_cpu() -> None:
    found = run_ranks(1, _with_shim)[0]
    zeros = found.pop("zeros")
    assert (zeros.device.type, zeros.dtype, zeros.item()) == ("cpu", torch.int, 0)
    assert found == {
        "device": torch.device("cpu"),
        "synchronize": None,
        "other zeros": "meta",
        "rest of torch": True,
        "draws": True,
        "outer stream": True,
        "twice": True,
        "recompute": True,
        "build_shm_op called": [1],
    }
