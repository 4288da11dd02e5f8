"""The one place for building kernels on the emulator: g++ only, cached by content.

A library holds one kernel source and the emulator. Only the kernel is instrumented by a sanitizer;
the emulator tells that sanitizer about its fibers.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
CACHE = ROOT / "build" / "kernels"

_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-g1", "-Wall", "-Wextra", "-Werror")
_KERNEL = (*_COMMON, "-Wno-unknown-pragmas")
"""`#pragma unroll` is nvcc's."""
_ASAN_CALLS = ("--param", "asan-instrumentation-with-call-threshold=0")
_EMULATOR = (*_COMMON, "-O2")
_EMULATOR_SOURCES = ("simt.cpp", "block.cpp", "fiber.cpp")


class Variant(Enum):
    """What watches the kernel's memory accesses."""

    PLAIN = "plain"
    ASAN = "asan"
    TSAN = "tsan"

    @property
    def kernel_flags(self) -> tuple[str, ...]:
        return {
            Variant.PLAIN: (),
            # Checks as calls, not inline: a third of the time to compile.
            Variant.ASAN: ("-fsanitize=address", *_ASAN_CALLS),
            Variant.TSAN: ("-fsanitize=thread",),
        }[self]

    @property
    def emulator_flags(self) -> tuple[str, ...]:
        return () if self is Variant.PLAIN else (f"-DSIMT_{self.value.upper()}",)

    @property
    def preload(self) -> tuple[str, ...]:
        """Libraries that must be in a process before it loads one built like this."""
        if self is Variant.PLAIN:
            return ()
        return (_library(f"lib{self.value}.so"), _library("libstdc++.so"))


def kernel_library(source: Path, variant: Variant = Variant.PLAIN) -> Path:
    """Builds a `.cu` source with the emulator, unless that has been done.

    Args:
        source: A kernel in a copy of the `kernels` folder, whose headers it includes; or a source
            elsewhere that includes those of `kernels` itself.
        variant: Which sanitizer watches it.

    Returns:
        The shared library.
    """
    objects = [_emulator_object(name, variant) for name in _EMULATOR_SOURCES]
    copied = source.parents[1] / "include"
    # A copy, which has a fault in it, runs a few small cases: building it is most of the time.
    is_fault = copied.exists() and copied.parent != KERNELS
    flags = (*_KERNEL, "-O0" if is_fault else "-O1", *variant.kernel_flags)
    names = _precompiled(flags)
    headers = sorted((copied if copied.exists() else KERNELS / "include").glob("*.h"))
    inputs = [source, *headers, *sorted((KERNELS / "emulator").glob("*.h")), *objects]
    return _build(
        f"{source.stem}-{variant.value}.so",
        inputs,
        (*flags, *names, "-shared", "-x", "c++", str(source), "-x", "none", *map(str, objects)),
        seen=flags,
    )


def _precompiled(flags: tuple[str, ...]) -> tuple[str, str]:
    """Flags that start a kernel with CUDA's names, parsed beforehand: half of a build's time."""
    header = KERNELS / "emulator" / "simt.h"
    # Included by an empty file, since `#pragma once` is an error in the file that is compiled.
    arguments = (*flags, "-include", str(header), "-x", "c++-header", os.devnull)
    built = _build("simt.h.gch", [header], arguments, seen=flags)
    return "-include", str(built.with_suffix(""))


def _emulator_object(name: str, variant: Variant) -> Path:
    flags = (*_EMULATOR, *variant.emulator_flags)
    folder = KERNELS / "emulator"
    return _build(
        f"{Path(name).stem}-{variant.value}.o",
        [folder / name, *sorted(folder.glob("*.h"))],
        (*flags, "-c", str(folder / name)),
        seen=flags,
    )


def _build(name: str, inputs: Sequence[Path], arguments: Sequence[str], *, seen: object) -> Path:
    """Runs g++ into the cache, under a name that inputs, flags and its version determine."""
    digest = hashlib.sha256(repr((seen, _compiler_version())).encode())
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    target = CACHE / digest.hexdigest()[:16] / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{name}.{os.getpid()}.{threading.get_ident()}")
    ran = subprocess.run(
        ["g++", *arguments, "-o", str(unfinished)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    unfinished.replace(target)
    return target


@functools.cache
def _compiler_version() -> str:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels cannot be built on the emulator")
    ran = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    return ran.stdout


@functools.cache
def _library(name: str) -> str:
    ran = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return ran.stdout.strip()
