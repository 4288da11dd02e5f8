"""The one place for monkeypatches: what megatron-core 0.16.1 and DeepSpeed 0.19.8 assume of CUDA.

`install()` is a no-op where CUDA is present, so no other module branches on the device. There are
five points; each has a test that fails when upstream no longer needs it or moves it:

1. `torch.cuda.current_device()` names the device of p2p buffers and tensor-parallel gathers;
2. `schedules.py` creates its token counter with `device="cuda"`;
3. the random-state tracker reads and writes CUDA generator states;
4. distributed checkpoint writers call `torch.cuda.synchronize()`;
5. DeepSpeed's CPU backend compiles a shared-memory all-reduce with g++ at first use (minutes).

`import_megatron()` is for CPUs and GPUs alike: megatron-core decorates functions, none of which
megachat calls, with `torch.compile`, which imports torch's compiler for seconds.
"""

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

PATCHED_MODULES = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
    "deepspeed.comm.torch",
)
"""What `install` imports; ranks that are forked need not do so each for itself."""


def install() -> None:
    """Patches the five points once; call it before any model or process group is built."""
    if torch.cuda.is_available():
        return
    _patch_torch_cuda()
    _patch_schedules()
    _patch_rng_tracker()
    _patch_deepspeed_build()


def import_megatron() -> None:
    """Imports megatron-core, whose functions are compiled when they are called, not now.

    Modules that import parts of it call this first.

    Raises:
        RuntimeError: What transformer-engine's meta wheel alone makes of the import.
    """
    if "megatron.core" in sys.modules:
        return
    module: Any = torch
    compile_now = torch.compile
    module.compile = _compile_when_called
    try:
        importlib.import_module("megatron.core")
    finally:
        module.compile = compile_now


def _compile_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A decorator like `torch.compile` that calls it late."""
    if function is None:
        return functools.partial(_compile_when_called, **options)
    compiled = functools.cache(lambda: torch.compile(function, **options))

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        return compiled()(*args, **keywords)

    return call


class _TorchOnCpu:
    """The torch module as `schedules.py` sees it: `zeros(device="cuda")` lands on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> torch.Tensor:
        """`torch.zeros` with the literal "cuda" replaced."""
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


def _patch_torch_cuda() -> None:
    """Points 1 and 4."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *_, **__: None


def _patch_schedules() -> None:
    """Point 2."""
    schedules: Any = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    if not isinstance(schedules.torch, _TorchOnCpu):
        schedules.torch = _TorchOnCpu()


def _patch_rng_tracker() -> None:
    """Point 3: the same tracker over the states of the CPU generator."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    if random.CudaRNGStatesTracker.__name__ == "CpuRngStatesTracker":
        return
    default_name = random._MODEL_PARALLEL_RNG_TRACKER_NAME

    class CpuRngStatesTracker(random.CudaRNGStatesTracker):  # type: ignore[misc]
        """Named random streams, kept as states of the default CPU generator."""

        def add(self, name: str, seed: int) -> None:
            """Starts the stream `name` from `seed`."""
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"random stream {name} or seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = default_name) -> Iterator[None]:
            """Runs the body on the stream `name`, then restores the default stream."""
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random.CudaRNGStatesTracker = CpuRngStatesTracker
    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *_, **__: None


def _patch_deepspeed_build() -> None:
    """Point 5. `import_module` on purpose: the `import x.torch as y` form binds the real torch."""
    if importlib.util.find_spec("deepspeed") is not None:
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
