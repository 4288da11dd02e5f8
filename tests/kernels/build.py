"""The one place for building kernels on the emulator: g++ only, cached by content.

A library holds one kernel source and the emulator. Only the kernel is instrumented by a sanitizer;
the emulator tells that sanitizer about its fibers.
"""

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path

import pytest

from tools.build_cache import BuildCache, digest_of

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
EMULATOR = KERNELS / "emulator"
CACHE = BuildCache()

_COMMON = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-g1", "-Wall", "-Wextra", "-Werror")
_KERNEL = (*_COMMON, "-Wno-unknown-pragmas")
"""`#pragma unroll` is nvcc's."""
_ASAN_CALLS = ("--param", "asan-instrumentation-with-call-threshold=0")
_EMULATOR = (*_COMMON, "-O2")
EMULATOR_SOURCES = ("simt.cpp", "block.cpp", "fiber.cpp")


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


@functools.cache
def kernel_library(source: Path, variant: Variant = Variant.PLAIN) -> Path:
    """Builds a `.cu` source with the emulator, unless that has been done.

    Args:
        source: A kernel in a copy of the `kernels` folder, whose headers it includes; or a source
            elsewhere that includes those of `kernels` itself. Nothing of it changes any more.
        variant: Which sanitizer watches it.

    Returns:
        The shared library.
    """
    copied = source.parents[1] / "include"
    # A copy, which has a fault in it, and what AddressSanitizer watches run a few small cases:
    # building them is most of the time. ThreadSanitizer sees more races in optimised code.
    is_fault = copied.exists() and copied.parent != KERNELS
    is_small = is_fault or variant is Variant.ASAN
    flags = (*_KERNEL, "-O0" if is_small else "-O1", *variant.kernel_flags)
    headers = sorted((copied if copied.exists() else KERNELS / "include").glob("*.h"))
    emulator = sorted(path for path in EMULATOR.iterdir() if path.suffix in (".h", ".cpp"))
    name = f"{source.stem}-{variant.value}.so"

    def make(folder: Path) -> None:
        objects = [str(_emulator_object(object_name, variant)) for object_name in EMULATOR_SOURCES]
        started = (*flags, *_precompiled(flags), "-shared", "-x", "c++", str(source))
        _compile((*started, "-x", "none", *objects), folder / name)

    return _built(name, [source, *headers, *emulator], (*flags, *variant.emulator_flags), make)


def _precompiled(flags: tuple[str, ...]) -> tuple[str, str]:
    """Flags that start a kernel with CUDA's names, parsed beforehand: half of a build's time."""
    header, name = EMULATOR / "simt.h", "simt.h.gch"
    # Included by an empty file, since `#pragma once` is an error in the file that is compiled.
    arguments = (*flags, "-include", str(header), "-x", "c++-header", os.devnull)
    built = _built(name, [header], flags, lambda folder: _compile(arguments, folder / name))
    return "-include", str(built.with_suffix(""))


def _emulator_object(source: str, variant: Variant) -> Path:
    flags, name = (*_EMULATOR, *variant.emulator_flags), f"{Path(source).stem}-{variant.value}.o"
    inputs = [EMULATOR / source, *sorted(EMULATOR.glob("*.h"))]
    arguments = (*flags, "-c", str(EMULATOR / source))
    return _built(name, inputs, flags, lambda folder: _compile(arguments, folder / name))


def _built(
    name: str, inputs: Sequence[Path], flags: Sequence[str], make: Callable[[Path], None]
) -> Path:
    """A file in the cache, under a key of its name, inputs, flags and the compiler's version."""
    key = digest_of([name, *flags, _compiler_version()], inputs)
    return CACHE.folder_of(key, make) / name


def _compile(arguments: Sequence[str], output: Path) -> None:
    ran = subprocess.run(
        ["g++", *arguments, "-o", str(output)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


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
