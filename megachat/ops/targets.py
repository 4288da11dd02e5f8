"""Names what a library's code is made for, and tells on which device or processor it runs.

A target is a GPU architecture (`sm_80`, `sm_90a`), a level of the x86-64 instruction set
(`x86-64-v3`), or `native`: the CPU of the machine that compiles, with all its features.
"""

import functools
import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from megachat.errors import KernelError

NATIVE = "native"
"""The CPU of the machine that compiles."""

TARGETS_IN_NAME = "+"
"""Stands between the targets in the name of a library's file."""

_LEVELS: Mapping[str, frozenset[str]] = {
    "x86-64-v2": frozenset("cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3".split()),
    "x86-64-v3": frozenset("abm avx avx2 bmi1 bmi2 f16c fma movbe xsave".split()),
    "x86-64-v4": frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split()),
}
"""What each level adds to the one before, as /proc/cpuinfo has it (x86-64 psABI, table 3.1)."""

_GPU = re.compile(r"sm_(?P<number>\d{2,3})(?P<own>[af]?)")
_OLDEST_GPU = 80
"""Compute capability 8.0, below which the kernels do not run."""


def machine() -> str:
    """The kind of processor, e.g. `x86_64`."""
    return platform.machine()


def isa_levels() -> tuple[str, ...]:
    """The levels of the x86-64 instruction set, ascending."""
    return tuple(_LEVELS)


def check_gpu(target: str) -> None:
    """Refuses what is no GPU architecture that the kernels run on.

    Raises:
        KernelError: It is not.
    """
    match = _GPU.fullmatch(target)
    if match is None:
        raise KernelError(f"{target!r} is no GPU architecture: expected e.g. sm_80 or sm_90a")
    if int(match["number"]) < _OLDEST_GPU:
        raise KernelError(
            f"{target}: the CUDA kernels need compute capability 8.0 (sm_80) or later"
        )


def check_isa(target: str) -> None:
    """Refuses what is no level of the instruction set of this kind of machine.

    Raises:
        KernelError: It is not.
    """
    if target not in _LEVELS or machine() != "x86_64":
        raise KernelError(
            f"{target!r} is no instruction set of {machine()} known here: expected one of "
            f"{', '.join(_LEVELS)} on x86_64, or build for this machine's own CPU"
        )


def label(target: str) -> str:
    """A target in the name of a file: `native` is followed by a hash of this CPU's features."""
    if target != NATIVE:
        return target
    return f"{NATIVE}.{hashlib.sha256(cpu_features().encode()).hexdigest()[:12]}"


def best_match(wanted: str, libraries: Mapping[Path, Sequence[str]]) -> Path | None:
    """The library whose code suits a target best; None where none runs on it.

    Args:
        wanted: The target to run on: this CPU, or a GPU's own architecture.
        libraries: The labels of what each library's code is made for.
    """
    ranked = [
        (rank, str(path))
        for path, labels in libraries.items()
        for made_for in labels
        if (rank := _rank(wanted, made_for)) is not None
    ]
    return Path(max(ranked)[1]) if ranked else None


def _rank(wanted: str, made_for: str) -> int | None:
    """How well code suits a target, higher is better; None where it does not run there."""
    if wanted == NATIVE:
        levels = [level for level in _LEVELS if machine() == "x86_64" and _has(level)]
        return levels.index(made_for) if made_for in levels else None
    device, code = _GPU.fullmatch(wanted), _GPU.fullmatch(made_for)
    if device is None or code is None:
        return None
    # Machine code runs on later devices of its major version; that of a variant ("a") on its own.
    here, there = int(device["number"]), int(code["number"])
    runs = here == there if code["own"] else here // 10 == there // 10 and there <= here
    return 2 * there + bool(code["own"]) if runs else None


def _has(level: str) -> bool:
    """Whether this CPU has all features of a level and of those below."""
    words = set(cpu_features().split())
    needed = list(_LEVELS)[: list(_LEVELS).index(level) + 1]
    return all(_LEVELS[each] <= words for each in needed)


@functools.cache
def cpu_features() -> str:
    """What the system lists of this CPU: its features, and which generation a compiler tunes for.

    Code for a CPU's own features must not be loaded on another CPU.
    """
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    wanted = ("flags", "Features", "model\t", "cpu family")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
