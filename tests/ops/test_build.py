"""The kernels are built once, whoever asks first, and whoever cannot build is told what to do."""

import ctypes
import errno
import fcntl
import json
import logging
import multiprocessing
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import filelock
import pytest

from megachat import locks
from megachat.errors import KernelError
from megachat.ops import build as module
from megachat.ops import targets
from megachat.ops.build import NVCC, Recipe, build, build_ahead, find, load_library

KERNELS = Path(__file__).parents[2] / "kernels"
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A library of one small function."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cpp").write_text(SOURCE, encoding="utf-8")
    (sources / "answer.h").write_text("#define ANSWER 42\n", encoding="utf-8")
    return Recipe(sources=sources, cache=tmp_path / "cache")


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each compilation, written by a `g++` that comes first on the PATH."""
    real, folder, notes = shutil.which("g++"), tmp_path / "bin", tmp_path / "compilations"
    folder.mkdir()
    notes.touch()
    wrapper = folder / "g++"
    wrapper.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || echo compiled >> "{notes}"\nexec "{real}" "$@"\n',
        encoding="utf-8",
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return notes


def _answer(recipe: Recipe) -> int:
    answer: int = load_library(recipe).answer()
    return answer


@NEEDS_COMPILER
def test_many_processes_compile_once_and_a_later_one_not_at_all(
    recipe: Recipe, compilations: Path
) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_answer, [recipe] * 4, chunksize=1) == [42] * 4
    assert _answer(recipe) == 42
    assert compilations.read_text(encoding="utf-8").splitlines() == ["compiled"]
    assert not list(recipe.cache.glob("*.tmp"))


@NEEDS_COMPILER
def test_who_comes_second_waits_for_the_lock_and_finds_the_library(
    recipe: Recipe, compilations: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = build(recipe)
    whole = library.read_bytes()
    library.unlink()
    waiting = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "waiting for another process" in record.getMessage():
                waiting.set()

    listener = Listener()
    logger = logging.getLogger(locks.__name__)
    logger.addHandler(listener)
    second = threading.Thread(target=build, args=(recipe,))
    with caplog.at_level(logging.INFO), filelock.FileLock(library.with_suffix(".lock")):
        second.start()
        assert waiting.wait(timeout=60)
        library.write_bytes(whole)
    second.join(timeout=60)
    logger.removeHandler(listener)
    assert not second.is_alive()
    assert compilations.read_text(encoding="utf-8").splitlines() == ["compiled"]


@NEEDS_COMPILER
def test_progress_is_logged_once(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=module.__name__):
        library = build(recipe)
        build(recipe)
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("building the CPU kernels")
    assert re.fullmatch(rf"built {re.escape(str(library))} in \d+\.\d s", last)


@NEEDS_COMPILER
def test_another_source_header_flag_or_cpu_is_another_library(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [build(recipe)]
    (recipe.sources / "answer.h").write_text("#define ANSWER 43\n", encoding="utf-8")
    found.append(build(recipe))
    assert ctypes.CDLL(str(found[1])).answer() == 43
    (recipe.sources / "answer.cpp").write_text(f"{SOURCE}// changed\n", encoding="utf-8")
    found.append(build(recipe))
    found.append(build(Recipe(sources=recipe.sources, cache=recipe.cache, flags=("-DNDEBUG",))))
    monkeypatch.setattr(targets, "cpu_features", lambda: "of another CPU")
    found.append(build(recipe))
    assert len(set(found)) == 5


def test_without_a_compiler_the_message_says_how_to_get_one_or_do_without(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError) as caught:
        build(recipe)
    message = str(caught.value)
    assert "need g++" in message and "\n" not in message
    assert "apt-get install g++" in message and 'backend = "reference"' in message


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
def test_nvcc_builds_launchers_that_check_their_arguments_without_a_gpu(tmp_path: Path) -> None:
    """The smallest kernel; `tests/kernels/test_nvcc.py` compiles them all."""
    sources = tmp_path / "cuda"
    sources.mkdir()
    shutil.copy(KERNELS / "cuda/bias_relu.cu", sources)
    headers = shutil.copytree(KERNELS / "include", tmp_path / "include")
    recipe = Recipe(
        toolchain=NVCC,
        sources=sources,
        headers=headers,
        cache=tmp_path / "cache",
        targets=("sm_80",),
    )
    library = build(recipe)
    launcher = load_library(recipe).megachat_bias_relu
    nothing, odd = (0, None, None, None, 0, 8, None), (0, None, None, None, 1, 7, None)
    assert launcher(*nothing) == 0
    assert launcher(*odd) == 1
    (headers / "reduce.h").write_text("// changed\n", encoding="utf-8")
    assert find(recipe) is None and library.is_file()


def test_without_nvcc_the_message_says_where_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match="CUDA kernels need nvcc, and none is on the PATH: inst"):
        build(Recipe.for_gpus("sm_90a", cache=tmp_path / "cache"))


def test_without_sources_the_message_says_where_they_were_expected(tmp_path: Path) -> None:
    absent = tmp_path / "kernels"
    with pytest.raises(KernelError, match=re.escape(f"{absent}: no kernel sources")):
        build(Recipe(sources=absent, cache=tmp_path))


@NEEDS_COMPILER
def test_a_source_that_does_not_compile_is_an_error_of_one_line(recipe: Recipe) -> None:
    (recipe.sources / "answer.h").write_text("", encoding="utf-8")
    with pytest.raises(KernelError, match=r"error: .*ANSWER.*use g\+\+ 12 or later") as caught:
        build(recipe)
    assert "\n" not in str(caught.value)
    assert not list(recipe.cache.glob("*.tmp")) and not list(recipe.cache.glob("*.so"))


@NEEDS_COMPILER
def test_a_cache_that_cannot_be_written_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KernelError, match="cannot keep the CPU kernels here"):
        build(Recipe(sources=recipe.sources, cache=tmp_path / "file" / "cache"))


@NEEDS_COMPILER
def test_a_damaged_library_is_named(recipe: Recipe) -> None:
    library = build(recipe)
    library.write_bytes(b"not a library")
    with pytest.raises(KernelError, match=re.escape(f"{library}: cannot be loaded")):
        load_library(recipe)


@NEEDS_COMPILER
@pytest.mark.parametrize("target", [targets.NATIVE, "x86-64-v2"])
def test_a_library_in_the_cache_is_loaded_where_there_is_no_compiler(
    recipe: Recipe, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made for this very CPU, or for an instruction set that it has."""
    if target != targets.NATIVE and targets.machine() != "x86_64":
        pytest.skip("levels of the instruction set are those of x86-64")
    made = build_ahead(replace(recipe, targets=(target,)))
    assert made.seconds is not None and made.num_bytes == made.path.stat().st_size
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build(recipe) == made.path
    assert _answer(recipe) == 42
    assert build_ahead(replace(recipe, targets=(target,))).seconds is None
    record = json.loads(made.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["targets"] == [target] and "g++" in record["compiler"]
    assert f"-march={target}" in record["flags"]


@NEEDS_COMPILER
def test_a_library_for_another_cpu_is_never_taken(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_ahead(recipe)
    build_ahead(replace(recipe, targets=("x86-64-v2",)))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(targets, "cpu_features", lambda: "flags : fpu sse2")
    with pytest.raises(KernelError, match=r"need g\+\+.*megachat build-kernels --isa x86-64-v3"):
        build(recipe)


@NEEDS_COMPILER
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_lock_that_the_file_system_does_not_have_is_one_line(
    recipe: Recipe, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what can be done about it works: building ahead takes no lock."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(KernelError) as caught:
        build(recipe)
    message = str(caught.value)
    assert str(recipe.cache) in message and os.strerror(number) in message
    assert "the file system has no file locks" in message and "\n" not in message
    assert "megachat build-kernels" in message
    made = build_ahead(recipe)
    assert build(recipe) == made.path


@NEEDS_COMPILER
def test_a_failed_build_ahead_leaves_nothing(recipe: Recipe) -> None:
    (recipe.sources / "answer.h").write_text("", encoding="utf-8")
    with pytest.raises(KernelError, match="ANSWER"):
        build_ahead(recipe)
    assert not list(recipe.cache.iterdir())
