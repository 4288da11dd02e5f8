"""The one place where this project's C++ kernels are compiled: once, at first use, for this CPU.

A library is kept in the user's cache folder under a hash of all it was made from: sources, flags,
compiler and the CPU's features. It is built beside its place and renamed, so it is either whole or
absent; a file lock makes one process build it while the others wait.
"""

import ctypes
import functools
import hashlib
import logging
import platform
import shutil
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from megachat.errors import KernelError

_LOG = logging.getLogger(__name__)

COMPILER = "g++"
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-Wno-psabi",
)
_WITHOUT = 'use backend = "reference" to do without the kernels'


def _sources() -> Path:
    """Where an editable install finds the kernels: beside the package."""
    return Path(__file__).resolve().parents[2] / "kernels" / "cpu"


def _cache() -> Path:
    return Path.home() / ".cache" / "megachat" / "kernels"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a library is made from, and where it is kept."""

    sources: Path = field(default_factory=_sources)
    """Folder of `.cpp` files, which become one library, and of the headers they include."""
    cache: Path = field(default_factory=_cache)
    """Folder of finished libraries."""
    flags: tuple[str, ...] = ("-march=native",)
    """For the compiler, besides those that every library has; the default asks for this CPU's
    features, and the sources fall back to plain code where it has none of those they know."""


@functools.cache
def load_library(recipe: Recipe | None = None) -> ctypes.CDLL:
    """Builds a library where no process of this user has done so, and loads it.

    Raises:
        KernelError: There are no sources, no compiler, it fails, or the cache cannot be written.
    """
    library = build(recipe if recipe is not None else Recipe())
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise KernelError(
            f"{library}: cannot be loaded ({reason}): delete it to build it anew, or {_WITHOUT}"
        ) from error


def build(recipe: Recipe) -> Path:
    """The file of a library, compiled if it is not in the cache.

    Raises:
        KernelError: As `load_library`.
    """
    units = sorted(recipe.sources.glob("*.cpp"))
    if not units:
        raise KernelError(
            f"{recipe.sources}: no kernel sources: install megachat from its repository "
            f"(pip install -e .), or {_WITHOUT}"
        )
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise KernelError(
            f"the CPU kernels need {COMPILER}, and none is on the PATH: install one "
            f"(apt-get install g++), or {_WITHOUT}"
        )
    library = recipe.cache / f"cpu-{_digest(recipe, compiler)}.so"
    if library.is_file():
        return library
    try:
        recipe.cache.mkdir(parents=True, exist_ok=True)
        with _lock_for(library):
            if not library.is_file():
                _compile(recipe, units, compiler=compiler, library=library)
    except OSError as error:
        raise KernelError(
            f"{recipe.cache}: cannot keep the CPU kernels here ({error.strerror}): make it "
            f"writable, or {_WITHOUT}"
        ) from error
    return library


def _lock_for(library: Path) -> filelock.BaseFileLock:
    """A lock, not yet held; says so where another process has it."""
    lock = filelock.FileLock(library.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
        lock.release()
    except filelock.Timeout:
        _LOG.info("waiting for another process to build the CPU kernels")
    return lock


def _compile(recipe: Recipe, units: list[Path], *, compiler: str, library: Path) -> None:
    _LOG.info("building the CPU kernels, once for this machine (some ten seconds)")
    started = time.perf_counter()
    unfinished = library.with_suffix(f".{uuid.uuid4().hex}.tmp")
    command = [compiler, *_FLAGS, *recipe.flags, *map(str, units), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        unfinished.unlink(missing_ok=True)
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), f"status {done.returncode}")
        _LOG.debug("%s\n%s", " ".join(command), done.stderr)
        raise KernelError(
            f"{compiler} cannot build {recipe.sources}: {first.strip()}: use g++ 12 or later, or "
            f"{_WITHOUT}"
        )
    unfinished.replace(library)
    _LOG.info("built %s in %.1f s", library, time.perf_counter() - started)


def _digest(recipe: Recipe, compiler: str) -> str:
    """A hash of everything that the library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    parts = [version.stdout, *_FLAGS, *recipe.flags, platform.machine(), _cpu_features()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in sorted(recipe.sources.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _cpu_features() -> str:
    """The instruction sets that the system lists; libraries of another CPU must not be loaded."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    # Three lines say what -march=native looks at: the features, and which generation it tunes for.
    wanted = ("flags", "Features", "model\t", "cpu family")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
