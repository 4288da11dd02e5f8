"""What nvcc makes of the kernels, for every architecture: no warning, no spill, the stated budgets.

This needs the CUDA toolkit but no GPU, and says nothing of how fast the kernels are.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels.build import CACHE, KERNELS

ARCHITECTURES = ("80", "90a")
BUDGETS = json.loads((KERNELS / "budgets.json").read_text())
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(
    NVCC is None, reason="no nvcc on PATH: the kernels cannot be compiled for a GPU here"
)


@dataclass(frozen=True)
class Entry:
    """One instance of a kernel for one architecture, as ptxas reports it."""

    name: str
    architecture: str
    frame_bytes: int
    spilled_bytes: int
    registers: int


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one source."""

    entries: tuple[Entry, ...]
    ptx: dict[str, str]
    """Text of each entry, of the first architecture."""


REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'\n"
    r".*?(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@functools.cache
def compiled(kernel: str) -> Compiled:
    """Compiles a source with warnings as errors, unless this very compiler has done so before."""
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in ARCHITECTURES]
    flags = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills")
    source = KERNELS / "cuda" / f"{kernel}.cu"
    digest = hashlib.sha256(repr((flags, targets, _version())).encode())
    for path in (source, *sorted((KERNELS / "include").glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = CACHE / digest.hexdigest()[:16]
    report, ptx = folder / f"{kernel}.ptxas", folder / f"{kernel}.ptx"
    if not report.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            kept = ("-keep", "-keep-dir", scratch)
            ran = subprocess.run(
                [str(NVCC), *flags, *targets, *kept, "-c", str(source), "-o", f"{scratch}/out.o"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert ran.returncode == 0, ran.stderr
            next(Path(scratch).glob(f"*compute_{ARCHITECTURES[0]}*.ptx")).replace(ptx)
            (Path(scratch) / "report").write_text(ran.stdout + ran.stderr)
            (Path(scratch) / "report").replace(report)
    entries = tuple(
        Entry(
            name=found["name"],
            architecture=found["architecture"],
            frame_bytes=int(found["frame"]),
            spilled_bytes=int(found["stores"]) + int(found["loads"]),
            registers=int(found["registers"]),
        )
        for found in REPORT.finditer(report.read_text())
    )
    bodies = re.split(r"\.entry (\w+)", ptx.read_text())[1:]
    return Compiled(entries, dict(zip(bodies[::2], bodies[1::2], strict=True)))


@functools.cache
def _version() -> str:
    return subprocess.run([str(NVCC), "--version"], capture_output=True, text=True).stdout


def test_every_kernel_has_a_budget() -> None:
    assert sorted(BUDGETS) == sorted(path.stem for path in (KERNELS / "cuda").glob("*.cu"))


@pytest.mark.parametrize("kernel", BUDGETS)
def test_nothing_is_spilled_and_registers_stay_in_the_budget(kernel: str) -> None:
    entries = compiled(kernel).entries
    assert {entry.architecture for entry in entries} == set(ARCHITECTURES)
    for name, budget in BUDGETS[kernel].items():
        instances = [entry for entry in entries if name in entry.name]
        assert len(instances) >= budget.get("instances", 3) * len(ARCHITECTURES), name
        for entry in instances:
            assert entry.frame_bytes == entry.spilled_bytes == 0, entry
            assert entry.registers <= budget["registers"], entry
    assert all(any(name in entry.name for name in BUDGETS[kernel]) for entry in entries)


@pytest.mark.parametrize("kernel", BUDGETS)
def test_tensors_are_read_and_written_16_bytes_at_a_time(kernel: str) -> None:
    for name, budget in BUDGETS[kernel].items():
        bodies = [body for entry, body in compiled(kernel).ptx.items() if name in entry]
        assert len(bodies) >= budget.get("instances", 3), name
        for body in bodies:
            loads = len(re.findall(r"ld\.global\.(?:nc\.)?v4\.", body))
            stores = len(re.findall(r"st\.global\.v4\.", body))
            assert loads >= budget["wide_loads"], name
            assert stores >= budget["wide_stores"], name
