"""The one place where this project's kernels are compiled: once, at first use or ahead of it.

A library is kept in the user's cache folder under a hash of the sources and flags, and under what
its code is made for: GPU architectures, or a processor. Nothing of that asks a compiler, so a
library that is there is loaded on a machine without one. It is built beside its place and renamed,
so it is either whole or absent; a file lock makes one process build it while the others wait.
"""

import ctypes
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from megachat.errors import KernelError
from megachat.locks import Purpose, held
from megachat.ops.targets import NATIVE, TARGETS_IN_NAME, best_match, label, machine

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
    target_flags: str
    """For each target, with `{number}` or `{target}` in its place."""
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
    target_flags="-march={target}",
    suffix=".cpp",
    duration="some ten seconds",
    how_to_get="install one (apt-get install g++), or make them where there is one: megachat "
    "build-kernels --isa x86-64-v3",
    oldest="use g++ 12 or later",
)
NVCC = Toolchain(
    name="cuda",
    title="CUDA kernels",
    compiler="nvcc",
    # All processors, since each of the sources takes some ten seconds.
    flags=("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--threads", "0"),
    target_flags="-gencode=arch=compute_{number},code=sm_{number}",
    suffix=".cu",
    duration="a minute",
    how_to_get="install NVIDIA's CUDA toolkit and put its bin folder there, or make them where "
    "there is one: megachat build-kernels --arch sm_80,sm_90",
    oldest="use CUDA 12 or later",
)


def library_folder() -> Path:
    """Where runs of this user look for finished libraries and keep them."""
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
    cache: Path = field(default_factory=library_folder)
    """Folder of finished libraries."""
    targets: tuple[str, ...] = (NATIVE,)
    """What its code is made for, see `megachat.ops.targets`; the default asks for this CPU's
    features, and the sources fall back to plain code where it has none of those they know."""
    flags: tuple[str, ...] = ()
    """For the compiler, besides those that every library has."""

    @classmethod
    def for_gpus(cls, *architectures: str, cache: Path | None = None) -> "Recipe":
        """The CUDA kernels for architectures such as `sm_80` and `sm_90a`, in one library."""
        return cls(
            toolchain=NVCC,
            sources=_KERNELS / "cuda",
            headers=_KERNELS / "include",
            cache=cache or library_folder(),
            targets=architectures,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BuiltLibrary:
    """A library in the cache folder."""

    path: Path
    num_bytes: int
    seconds: float | None
    """What its compilation took; None where it was there already."""


@functools.cache
def load_library(recipe: Recipe | None = None) -> ctypes.CDLL:
    """Builds a library where no process of this user has done so, and loads it.

    Raises:
        KernelError: There are no sources; or it is not in the cache, and there is no compiler, it
            fails, or the cache cannot be written.
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
    """The file of a library: one of the cache that serves the recipe's target, or a new one.

    Raises:
        KernelError: As `load_library`.
    """
    found = find(recipe)
    if found is not None:
        return found
    tools, compiler = recipe.toolchain, _compiler(recipe.toolchain)
    library = _place(recipe)
    purpose = Purpose(
        work=f"build the {tools.title}",
        remedy=f"make them beforehand with megachat build-kernels, which needs none, or {_WITHOUT}",
        error=KernelError,
    )
    _make_cache(recipe)
    with held(library.with_suffix(".lock"), purpose):
        if not library.is_file():
            _compile(recipe, compiler=compiler, library=library)
    return library


def check_buildable(recipe: Recipe) -> None:
    """Refuses a library that is not there and that this machine has no means to build.

    Builds nothing: a compiler that fails shows only when it is called.

    Raises:
        KernelError: As `load_library`.
    """
    if find(recipe) is not None:
        return
    _compiler(recipe.toolchain)
    folder = recipe.cache
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        refused = errno.EACCES if folder.is_dir() else errno.ENOTDIR
        raise _cannot_keep(recipe, OSError(refused, os.strerror(refused)))


def build_ahead(recipe: Recipe) -> BuiltLibrary:
    """Makes a library for later runs, here or on other machines, unless it is there.

    It takes no lock, so that it serves file systems without locks, too; two such builds at a time
    do the work twice.

    Raises:
        KernelError: As `load_library`.
    """
    library = _place(recipe)
    seconds: float | None = None
    if not library.is_file():
        compiler = _compiler(recipe.toolchain)
        _make_cache(recipe)
        seconds = _compile(recipe, compiler=compiler, library=library)
    return BuiltLibrary(path=library, num_bytes=library.stat().st_size, seconds=seconds)


def find(recipe: Recipe) -> Path | None:
    """The library of the cache that serves best; None where none does. Asks no compiler.

    Raises:
        KernelError: There are no sources.
    """
    library = _place(recipe)
    if library.is_file():
        return library
    if len(recipe.targets) != 1:
        return None
    start = f"{recipe.toolchain.name}-{_digest(recipe)}-"
    others = {
        path: tuple(path.name.removeprefix(start).removesuffix(".so").split(TARGETS_IN_NAME))
        for path in sorted(recipe.cache.glob(f"{start}*.so"))
    }
    found = best_match(recipe.targets[0], others)
    if found is not None:
        _LOG.info("the %s are those of %s", recipe.toolchain.title, found)
    return found


def _place(recipe: Recipe) -> Path:
    """Where exactly this recipe's library is kept."""
    made_for = TARGETS_IN_NAME.join(label(target) for target in recipe.targets)
    return recipe.cache / f"{recipe.toolchain.name}-{_digest(recipe)}-{made_for}.so"


def _make_cache(recipe: Recipe) -> None:
    try:
        recipe.cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_keep(recipe, error) from error


def _cannot_keep(recipe: Recipe, error: OSError) -> KernelError:
    return KernelError(
        f"{recipe.cache}: cannot keep the {recipe.toolchain.title} here ({error.strerror}): make "
        f"it writable, or {_WITHOUT}"
    )


def _compiler(tools: Toolchain) -> str:
    """The compiler's place.

    Raises:
        KernelError: It has none.
    """
    compiler = shutil.which(tools.compiler)
    if compiler is None:
        raise KernelError(
            f"the {tools.title} need {tools.compiler}, and none is on the PATH: "
            f"{tools.how_to_get}, or {_WITHOUT}"
        )
    return compiler


def _units(recipe: Recipe) -> list[Path]:
    """The sources that are compiled.

    Raises:
        KernelError: There are none.
    """
    units = sorted(recipe.sources.glob(f"*{recipe.toolchain.suffix}"))
    if not units:
        raise KernelError(
            f"{recipe.sources}: no kernel sources: install megachat from its repository "
            f"(pip install -e .), or {_WITHOUT}"
        )
    return units


def _compile(recipe: Recipe, *, compiler: str, library: Path) -> float:
    """Compiles a library and puts it into its place; returns the seconds that took."""
    tools = recipe.toolchain
    made_for = ", ".join(recipe.targets)
    _LOG.info("building the %s for %s (%s)", tools.title, made_for, tools.duration)
    started = time.perf_counter()
    unfinished = library.with_suffix(f".{uuid.uuid4().hex}.tmp")
    command = [compiler, *_flags(recipe), *map(str, _units(recipe)), "-o", str(unfinished)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            _LOG.debug("%s\n%s", " ".join(command), done.stderr)
            raise KernelError(_refusal(recipe, compiler, done))
        seconds = time.perf_counter() - started
        record = {
            "compiler": _version(compiler),
            "flags": _flags(recipe),
            "seconds": round(seconds, 1),
            "targets": recipe.targets,
        }
        unfinished.with_suffix(".json").write_text(
            json.dumps(record, indent=2, allow_nan=False), encoding="utf-8"
        )
        unfinished.with_suffix(".json").replace(library.with_suffix(".json"))
        unfinished.replace(library)
    except OSError as error:
        raise _cannot_keep(recipe, error) from error
    finally:
        unfinished.unlink(missing_ok=True)
        unfinished.with_suffix(".json").unlink(missing_ok=True)
    _LOG.info("built %s in %.1f s", library, seconds)
    return seconds


def _refusal(recipe: Recipe, compiler: str, done: subprocess.CompletedProcess[str]) -> str:
    """Why a compilation failed, in one line."""
    lines = done.stderr.splitlines()
    first = next(
        (line for line in lines if "error" in line or "fatal" in line), f"status {done.returncode}"
    )
    return (
        f"{compiler} cannot build {recipe.sources}: {first.strip()}: {recipe.toolchain.oldest}, or "
        f"{_WITHOUT}"
    )


def _version(compiler: str) -> str:
    """What a compiler says of itself."""
    asked = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return asked.stdout.strip()


def _flags(recipe: Recipe) -> list[str]:
    """All flags, those of the recipe last: they win over the target's."""
    tools = recipe.toolchain
    made_for = [
        tools.target_flags.format(target=target, number=target.removeprefix("sm_"))
        for target in recipe.targets
    ]
    return [*tools.flags, *made_for, *recipe.flags]


def _digest(recipe: Recipe) -> str:
    """A hash of what the library is made from, whoever makes it and whatever for."""
    tools = recipe.toolchain
    parts = [*tools.flags, tools.target_flags, *recipe.flags, machine()]
    digest = hashlib.sha256("\0".join(parts).encode())
    _units(recipe)
    folders = [recipe.sources] if recipe.headers is None else [recipe.sources, recipe.headers]
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        if path.suffix in {tools.suffix, ".h"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]
