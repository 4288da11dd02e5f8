"""`megachat build-kernels`: libraries that runs load without a compiler."""

import re
import shutil
from pathlib import Path

import pytest

from megachat.ops.build import NVCC, Recipe, find
from tests.cli.test_main import assert_one_line, invoke

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels of one small source a kind, and a home without libraries."""
    for kind, text in (
        ("cpu", 'extern "C" int answer() { return 42; }\n'),
        ("cuda", '__global__ void nothing() {}\nextern "C" int answer() { return 43; }\n'),
    ):
        folder = tmp_path / "kernels" / kind
        folder.mkdir(parents=True)
        (folder / f"answer.{'cpp' if kind == 'cpu' else 'cu'}").write_text(text)
    (tmp_path / "kernels" / "include").mkdir()
    monkeypatch.setattr("megachat.ops.build._KERNELS", tmp_path / "kernels")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
def test_a_library_for_two_gpus_serves_both_without_a_compiler(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke("build-kernels", "--arch", "sm_90,sm_80")
    assert result.exit_code == 0, result.output
    line = re.fullmatch(
        r"CUDA kernels for sm_80, sm_90: built in \d+\.\d s, \d+\.\d MB, (\S+\.so)\n", result.stdout
    )
    assert line is not None, result.stdout
    library = Path(line[1])
    assert library.parent == small / "home" / ".cache" / "megachat" / "kernels"
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".json"}
    monkeypatch.setenv("PATH", str(small))
    for device in ("sm_80", "sm_86", "sm_90a"):
        assert find(Recipe.for_gpus(device)) == library
    assert find(Recipe.for_gpus("sm_100")) is None
    again = invoke("build-kernels", "--arch", "sm_80,sm_90")
    assert again.exit_code == 0 and "was there" in again.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
def test_libraries_for_processors_go_into_the_folder_that_is_asked_for(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megachat.ops.targets.machine", lambda: "x86_64")
    result = invoke("build-kernels", "--isa", "x86-64-v2", "--into", small / "libraries")
    assert result.exit_code == 0, result.output
    assert "CPU kernels for x86-64-v2: built in" in result.stdout
    (library,) = (small / "libraries").glob("*.so")
    assert str(library) in result.stdout and library.name.endswith("-x86-64-v2.so")
    assert not (small / "home").exists()


@pytest.mark.parametrize(
    ("arguments", "needles"),
    [
        ([], ["nothing to build", "--arch sm_80,sm_90"]),
        (["--arch", "sm_80,hopper"], ["'hopper' is no GPU architecture", "sm_90a"]),
        (["--arch", "sm_70"], ["sm_70", "8.0"]),
        (["--isa", "avx2"], ["'avx2'", "x86-64-v3"]),
    ],
)
def test_what_cannot_be_built_is_one_line(
    small: Path, arguments: list[str], needles: list[str]
) -> None:
    assert_one_line(invoke("build-kernels", *arguments), "Error: ", *needles)
    assert not (small / "home").exists()


def test_without_a_compiler_it_is_one_line(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(small))
    assert_one_line(invoke("build-kernels", "--cpu"), "need g++", "apt-get install g++")
    assert_one_line(invoke("build-kernels", "--arch", "sm_80"), f"need {NVCC.compiler}")


def test_a_folder_that_cannot_be_written_is_one_line(small: Path) -> None:
    (small / "file").touch()
    result = invoke("build-kernels", "--cpu", "--into", small / "file" / "libraries")
    assert_one_line(result, "cannot keep the CPU kernels here", str(small / "file"))
