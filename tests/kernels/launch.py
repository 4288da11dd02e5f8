"""The one place for calling launchers on the emulator, in this process or in a watched one."""

import ctypes
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.build import Variant, kernel_library

Argument = Tensor | int | float | None | tuple[Tensor, ...]
"""A tuple of tensors is an array of pointers, as launchers take buffers of several devices."""

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INVALID_VALUE = 1
LAUNCH_FAILURE = 719
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Order:
    """How threads and blocks take turns."""

    kind: int
    seed: int
    name: str


FORWARD, REVERSE = Order(0, 0, "forward"), Order(1, 0, "reverse")
RANDOM = Order(2, 7, "random")
ORDERS = (FORWARD, REVERSE, RANDOM)


@dataclass(frozen=True)
class Outcome:
    """What a launch came to."""

    code: int | None
    """The launcher's; None if the process died."""
    error: str
    """The emulator's report, "" if there is none."""
    report: str = ""
    """What the process wrote to its standard error: a sanitizer's findings."""

    @property
    def complaint(self) -> str:
        """The first thing that went wrong, "" if nothing did."""
        found = [line for line in self.report.splitlines() if "Sanitizer" in line]
        if found:
            return found[0]
        if self.code is None:
            return f"the process died: {self.report[-300:]}"
        return self.error or ("" if self.code == 0 else f"the launcher returned {self.code}")


def run_here(source: Path, function: str, arguments: Sequence[Argument], order: Order) -> Outcome:
    """Calls a launcher in this process; tensors are written in place."""
    library = _load(kernel_library(source))
    library.simt_set_order(order.kind, order.seed)
    code = getattr(library, function)(*[_as_c(argument) for argument in arguments])
    return Outcome(code, library.simt_error().decode())


def run_devices_here(
    source: Path, function: str, devices: Sequence[Sequence[Argument]], order: Order
) -> Outcome:
    """Calls a launcher once for each device and runs them all at once, in this process.

    The launcher has to use another stream for each device.
    """
    library = _load(kernel_library(source))
    library.simt_set_order(order.kind, order.seed)
    library.simt_defer()
    for arguments in devices:
        code = getattr(library, function)(*[_as_c(argument) for argument in arguments])
        assert code == 0, library.simt_error().decode()
    return Outcome(library.simt_synchronize(), library.simt_error().decode())


def run_isolated(
    source: Path,
    function: str,
    arguments: Sequence[Argument],
    order: Order,
    *,
    variant: Variant,
    folder: Path,
) -> Outcome:
    """Calls a launcher in a process of its own; see `run_devices_isolated`."""
    return run_devices_isolated(
        source, function, [arguments], order, variant=variant, folder=folder
    )


def run_devices_isolated(
    source: Path,
    function: str,
    devices: Sequence[Sequence[Argument]],
    order: Order,
    *,
    variant: Variant,
    folder: Path,
) -> Outcome:
    """Calls a launcher in a process of its own; tensors have the results afterwards.

    Args:
        source: The kernel.
        function: Its launcher.
        devices: Arguments for each device, as the launcher takes them; a tensor given twice is one
            buffer. Several devices run at once.
        order: How threads take turns.
        variant: Which sanitizer watches.
        folder: For the files that carry the arguments.
    """
    tensors = {id(tensor): tensor for tensor in _tensors(devices)}
    numbers = {key: number for number, key in enumerate(tensors)}
    request = {
        "library": str(kernel_library(source, variant)),
        "order": order.kind,
        "seed": order.seed,
        "function": function,
        "buffers": [ctypes.string_at(t.data_ptr(), t.nbytes) for t in tensors.values()],
        "devices": [[_described(argument, numbers) for argument in given] for given in devices],
    }
    asked, answered = folder / "request", folder / "response"
    asked.write_bytes(pickle.dumps(request))
    answered.unlink(missing_ok=True)
    ran = subprocess.run(
        [*_prefix(variant), sys.executable, "-I", "-S", str(_PROGRAM), str(asked), str(answered)],
        env=_environment(variant),
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_SECONDS,
    )
    if not answered.exists():
        return Outcome(None, "", ran.stderr or f"exit status {ran.returncode}")
    response = pickle.loads(answered.read_bytes())
    for tensor, content in zip(tensors.values(), response["buffers"], strict=True):
        if content:
            ctypes.memmove(tensor.data_ptr(), content, len(content))
    return Outcome(response["code"], response["error"], ran.stderr)


_PROGRAM = Path(__file__).with_name("isolated.py")


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.simt_error.restype = ctypes.c_char_p
    return library


def _tensors(devices: Sequence[Sequence[Argument]]) -> Iterator[Tensor]:
    for arguments in devices:
        for argument in arguments:
            if isinstance(argument, Tensor):
                yield argument
            elif isinstance(argument, tuple):
                yield from argument


def _as_c(argument: Argument) -> object:
    if isinstance(argument, Tensor):
        assert argument.is_contiguous()
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, tuple):
        return (ctypes.c_void_p * len(argument))(*[tensor.data_ptr() for tensor in argument])
    if argument is None:
        return ctypes.c_void_p(None)
    # Also where the launcher takes an int: on x86-64 that is the lower half of the same place.
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


def _described(argument: Argument, numbers: dict[int, int]) -> tuple[str, object]:
    if isinstance(argument, Tensor):
        return "buffer", numbers[id(argument)]
    if isinstance(argument, tuple):
        return "buffers", [numbers[id(tensor)] for tensor in argument]
    if argument is None:
        return "null", None
    return ("float" if isinstance(argument, float) else "int"), argument


def _prefix(variant: Variant) -> tuple[str, ...]:
    """TSan maps fixed addresses, which a randomised layout may have taken."""
    if variant is not Variant.TSAN:
        return ()
    works = subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False)
    if works.returncode != 0:
        pytest.skip("TSan needs `setarch -R`, which this system forbids")
    return ("setarch", "-R")


def _environment(variant: Variant) -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(variant.preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "exitcode=0",
    }
