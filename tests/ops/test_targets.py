"""On what devices and processors a library runs, and which of several is taken."""

from pathlib import Path

import pytest

from megachat.errors import KernelError
from megachat.ops import targets
from megachat.ops.targets import NATIVE, best_match, check_gpu, check_isa, label

FAT, HOPPER, AMPERE = Path("fat.so"), Path("hopper.so"), Path("ampere.so")
LIBRARIES = {FAT: ("sm_80", "sm_90"), HOPPER: ("sm_90a",), AMPERE: ("sm_86",)}


@pytest.mark.parametrize(
    ("device", "library"),
    [
        ("sm_80", FAT),  # A100; code for 8.6 does not run there
        ("sm_86", AMPERE),  # its own is better than that for 8.0, which runs too
        ("sm_89", AMPERE),  # the nearest one before it
        ("sm_90a", HOPPER),  # H100 and H200: with what Hopper alone has
        ("sm_100", None),  # another major version: no machine code runs there
        ("sm_75", None),
    ],
)
def test_a_gpu_gets_the_library_that_suits_it_best(device: str, library: Path | None) -> None:
    assert best_match(device, LIBRARIES) == library


def test_code_without_hoppers_own_instructions_runs_on_hopper() -> None:
    assert best_match("sm_90a", {FAT: ("sm_80", "sm_90")}) == FAT


def test_code_with_a_devices_own_instructions_runs_on_no_other() -> None:
    assert best_match("sm_103", {FAT: ("sm_100a",)}) is None
    assert best_match("sm_103", {FAT: ("sm_100",)}) == FAT


V2 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
V3 = f"{V2} abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("features", "level"),
    [
        ("sse2", None),
        (V2, "x86-64-v2"),
        (V3, "x86-64-v3"),
        (V4, "x86-64-v4"),
        (V3.replace("fma ", ""), "x86-64-v2"),
        (V4.replace("fma ", ""), "x86-64-v2"),  # a level has all those below it
    ],
)
def test_a_processor_gets_the_highest_level_that_it_has(
    features: str, level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "cpu_features", lambda: f"flags\t\t: fpu {features} rdrand")
    monkeypatch.setattr(targets, "machine", lambda: "x86_64")
    libraries = {Path(name): (name,) for name in ("x86-64-v2", "x86-64-v3", "x86-64-v4")}
    assert best_match(NATIVE, libraries) == (level and Path(level))
    monkeypatch.setattr(targets, "machine", lambda: "aarch64")
    assert best_match(NATIVE, libraries) is None


def test_code_for_a_processors_own_features_is_named_after_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = label(NATIVE)
    monkeypatch.setattr(targets, "cpu_features", lambda: "flags : of another CPU")
    assert label(NATIVE) != here
    assert best_match(NATIVE, {FAT: (here,)}) is None
    assert label("sm_80") == "sm_80"


@pytest.mark.parametrize(
    ("target", "message"),
    [("sm80", "expected e.g. sm_80"), ("native", "expected e.g. sm_80"), ("sm_75", "8.0")],
)
def test_what_is_no_gpu_of_ours_is_refused(target: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        check_gpu(target)


def test_what_is_no_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "machine", lambda: "x86_64")
    check_isa("x86-64-v3")
    with pytest.raises(KernelError, match=r"'avx2' is no instruction set .* x86-64-v4"):
        check_isa("avx2")
    monkeypatch.setattr(targets, "machine", lambda: "aarch64")
    with pytest.raises(KernelError, match="aarch64"):
        check_isa("x86-64-v3")
