"""The page of evidence: what it is made of, and that it is up to date."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import typer

from megachat.errors import KernelError
from tools import kernel_evidence
from tools.kernel_evidence import Instance, Occupancy, count, occupancies, sources
from tools.kernel_launches import Format, Launch

NAME = "_ZN8megachat56_GLOBAL__N__2e214fa8_9_sample_cu_5cbad92313sample_kernelI6__halfEEvNS0_1AE"


def tools_are_here() -> bool:
    try:
        kernel_evidence.disassembler()
    except KernelError:
        return False
    return shutil.which("nvcc") is not None


needs_tools = pytest.mark.skipif(not tools_are_here(), reason="no nvcc or no nvdisasm here")


def instance(*, registers: int, architecture: str = "80") -> Instance:
    return Instance(
        name=NAME,
        architecture=architecture,
        frame_bytes=0,
        spilled_bytes=0,
        registers=registers,
    )


def launch(*, threads: int, shared_bytes: int = 0) -> Launch:
    return Launch(
        kernel="sample_kernel", grid=(1, 1, 1), threads=threads, shared_bytes=shared_bytes
    )


def test_a_mangled_name_says_kernel_and_format() -> None:
    found = instance(registers=1)
    assert found.kernel == "sample_kernel"
    assert [number for number in Format if found.has(number)] == [Format.FLOAT16]


def test_instructions_are_counted_by_their_first_word_and_width() -> None:
    found = Counter(
        {"LDG.E.128.CONSTANT": 3, "LDG.E": 2, "LDGSTS.E.BYPASS.128": 5, "STG.E.128": 1, "LDL": 4}
    )
    assert count(found, "LDG") == 5
    assert count(found, "LDG", wide=True) == 3
    assert count(found, "LDGSTS", wide=True) == 5
    assert count(found, "LDL") == 4
    assert count(found, "STL") == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_occupancy_is_what_registers_threads_and_shared_memory_leave() -> None:
    """65536 registers, 2048 threads, 32 blocks; 164 and 228 KiB, 1 KiB of them for each block."""
    found = occupancies(
        [
            (instance(registers=32), launch(threads=256)),
            (instance(registers=128), launch(threads=128)),
            (instance(registers=16), launch(threads=32)),
            (instance(registers=32), launch(threads=128, shared_bytes=40 << 10)),
            (
                instance(registers=32, architecture="90a"),
                launch(threads=128, shared_bytes=40 << 10),
            ),
        ]
    )
    assert found == [
        Occupancy(8, "warps"),
        Occupancy(4, "registers"),
        Occupancy(32, "blocks"),
        Occupancy(4, "shared"),
        Occupancy(5, "shared"),
    ]


def test_the_page_says_that_it_measures_nothing_and_names_each_source() -> None:
    written = kernel_evidence.PAGE.read_text(encoding="utf-8")
    assert "**Nothing on this page is a measurement**" in written
    for source in sources():
        text = (kernel_evidence.KERNELS / "cuda" / f"{source}.cu").read_text(encoding="utf-8")
        named = [word for word in written.split() if word.endswith("_kernel") and word in text]
        assert named, source


@needs_tools
def test_a_page_that_is_out_of_date_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernel_evidence, "page", lambda: "new")
    monkeypatch.setattr(kernel_evidence, "PAGE", tmp_path / "kernels.md")
    with pytest.raises(typer.Exit):
        kernel_evidence.main(check=True)
    kernel_evidence.main(check=False)
    kernel_evidence.main(check=True)


def test_without_a_compiler_or_a_disassembler_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(kernel_evidence, "DISASSEMBLER", "no-such-package")
    with pytest.raises(KernelError, match="nvdisasm is not on PATH: pip install"):
        kernel_evidence.disassembler()
    kernel_evidence.compiler_version.cache_clear()
    kernel_evidence.compiled.cache_clear()
    with pytest.raises(typer.Exit):
        kernel_evidence.main(check=True)
    assert capsys.readouterr().err.startswith("nvcc is not on PATH: install a CUDA toolkit")
