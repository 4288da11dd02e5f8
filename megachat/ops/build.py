"""The one place where this project's kernels are compiled: once, at first use, for this machine.

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

_WITHOUT = 'use backend = "reference" to do without the kernels'
_KERNELS = Path(__file__).resolve().parents[2] / "kernels"
"""Where an editable install finds the kernels: beside the package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Toolchain:
    """Who makes libraries of one kind, and how."""

    name: str
    """Starts the names of files."""
    title: str
    """What messages call the kernels."""
    compiler: str
    """The program."""
    flags: tuple[str, ...]
    """For every library."""
    suffix: str
    """Of the sources that are compiled."""
    duration: str
    """What to expect of a build."""
    how_to_get: str
    """What to do where there is no compiler."""
    oldest: str
    """What to try where it fails."""


GXX = Toolchain(
    name="cpu",
    title="CPU kernels",
    compiler="g++",
    flags=(
        "-std=c++17",
        "-O3",
        "-ffp-contract=fast",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fopenmp",
        "-fPIC",
        "-shared",
        "-Wno-psabi",
    ),
    suffix=".cpp",
    duration="some ten seconds",
    how_to_get="install one (apt-get install g++)",
    oldest="use g++ 12 or later",
)
NVCC = Toolchain(
    name="cuda",
    title="CUDA kernels",
    compiler="nvcc",
    # All processors, since each of the sources takes some ten seconds.
    flags=("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--threads", "0"),
    suffix=".cu",
    duration="a minute",
    how_to_get="install NVIDIA's CUDA toolkit and put its bin folder there",
    oldest="use CUDA 12 or later",
)


def _cache() -> Path:
    return Path.home() / ".cache" / "megachat" / "kernels"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What a library is made from, and where it is kept."""

    toolchain: Toolchain = GXX
    """Who makes it."""
    sources: Path = _KERNELS / "cpu"
    """Folder of the sources, which become one library, and of headers that they include."""
    headers: Path | None = None
    """Folder of further headers that they include."""
    cache: Path = field(default_factory=_cache)
    """Folder of finished libraries."""
    flags: tuple[str, ...] = ("-march=native",)
    """For the compiler, besides those that every library has; the default asks for this CPU's
    features, and the sources fall back to plain code where it has none of those they know."""

    @classmethod
    def for_gpu(cls, architecture: str) -> "Recipe":
        """The CUDA kernels for an architecture such as `sm_90a`."""
        return cls(
            toolchain=NVCC,
            sources=_KERNELS / "cuda",
            headers=_KERNELS / "include",
            flags=(f"-arch={architecture}",),
        )


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
    tools = recipe.toolchain
    units = sorted(recipe.sources.glob(f"*{tools.suffix}"))
    if not units:
        raise KernelError(
            f"{recipe.sources}: no kernel sources: install megachat from its repository "
            f"(pip install -e .), or {_WITHOUT}"
        )
    compiler = shutil.which(tools.compiler)
    if compiler is None:
        raise KernelError(
            f"the {tools.title} need {tools.compiler}, and none is on the PATH: "
            f"{tools.how_to_get}, or {_WITHOUT}"
        )
    library = recipe.cache / f"{tools.name}-{_digest(recipe, compiler)}.so"
    if library.is_file():
        return library
    try:
        recipe.cache.mkdir(parents=True, exist_ok=True)
        with _lock_for(library, tools):
            if not library.is_file():
                _compile(recipe, units, compiler=compiler, library=library)
    except OSError as error:
        raise KernelError(
            f"{recipe.cache}: cannot keep the {tools.title} here ({error.strerror}): make it "
            f"writable, or {_WITHOUT}"
        ) from error
    return library


def _lock_for(library: Path, tools: Toolchain) -> filelock.BaseFileLock:
    """A lock, not yet held; says so where another process has it."""
    lock = filelock.FileLock(library.with_suffix(".lock"))
    try:
        lock.acquire(blocking=False)
        lock.release()
    except filelock.Timeout:
        _LOG.info("waiting for another process to build the %s", tools.title)
    return lock


def _compile(recipe: Recipe, units: list[Path], *, compiler: str, library: Path) -> None:
    tools = recipe.toolchain
    _LOG.info("building the %s, once for this machine (%s)", tools.title, tools.duration)
    started = time.perf_counter()
    unfinished = library.with_suffix(f".{uuid.uuid4().hex}.tmp")
    command = [compiler, *tools.flags, *recipe.flags, *map(str, units), "-o", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        unfinished.unlink(missing_ok=True)
        lines = done.stderr.splitlines()
        first = next(
            (line for line in lines if "error" in line or "fatal" in line),
            f"status {done.returncode}",
        )
        _LOG.debug("%s\n%s", " ".join(command), done.stderr)
        raise KernelError(
            f"{compiler} cannot build {recipe.sources}: {first.strip()}: {tools.oldest}, or "
            f"{_WITHOUT}"
        )
    unfinished.replace(library)
    _LOG.info("built %s in %.1f s", library, time.perf_counter() - started)


def _digest(recipe: Recipe, compiler: str) -> str:
    """A hash of everything that the library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    tools = recipe.toolchain
    parts = [version.stdout, *tools.flags, *recipe.flags, platform.machine(), _cpu_features()]
    digest = hashlib.sha256("\0".join(parts).encode())
    folders = [recipe.sources] if recipe.headers is None else [recipe.sources, recipe.headers]
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.suffix in {tools.suffix, ".h"}:
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
