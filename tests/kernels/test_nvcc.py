"""What nvcc makes of the kernels, for every architecture: no warning, no spill, the stated budgets.

This needs the CUDA toolkit but no GPU, and says nothing of how fast the kernels are. A run shows
one kernel to nvcc, and with `--all-faults` all of them; see `proven`.
"""

import json
import re
import shutil

import pytest

from megachat.errors import KernelError
from tools.kernel_evidence import (
    ARCHITECTURES,
    KERNELS,
    PAGE,
    compiled,
    count,
    disassembler,
    instructions,
    page,
    release,
    sources,
)
from tools.kernel_launches import Format

BUDGETS = json.loads((KERNELS / "budgets.json").read_text())
ALWAYS = "tiled_linear"
"""The kernel that every run compiles: it has most instances, tensor cores, asynchronous copies."""
SIXTEEN_BIT = (Format.BFLOAT16, Format.FLOAT16)


def _is_missing() -> str:
    """What the tests of machine code lack here."""
    try:
        disassembler()
    except KernelError as error:
        return str(error)
    return ""


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None,
    reason="no nvcc on PATH: the kernels cannot be compiled for a GPU here",
)
needs_disassembler = pytest.mark.skipif(bool(_is_missing()), reason=_is_missing())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "kernel" in metafunc.fixturenames:
        every = metafunc.config.getoption("all_faults")
        metafunc.parametrize("kernel", sorted(BUDGETS) if every else [ALWAYS])


def test_every_kernel_has_a_budget() -> None:
    assert sorted(BUDGETS) == sources()


@needs_nvcc
def test_nothing_is_spilled_and_registers_stay_in_the_budget(kernel: str) -> None:
    found = compiled(kernel).instances
    assert {instance.architecture for instance in found} == set(ARCHITECTURES)
    for name, budget in BUDGETS[kernel].items():
        instances = [instance for instance in found if instance.kernel == name]
        assert len(instances) >= budget.get("instances", 3) * len(ARCHITECTURES), name
        for instance in instances:
            assert instance.frame_bytes == instance.spilled_bytes == 0, instance
            assert instance.registers <= budget["registers"], instance
    assert {instance.kernel for instance in found} == set(BUDGETS[kernel])


@needs_nvcc
def test_tensors_are_read_and_written_16_bytes_at_a_time(kernel: str) -> None:
    for name, budget in BUDGETS[kernel].items():
        bodies = [body for entry, body in compiled(kernel).ptx.items() if name in entry]
        assert len(bodies) >= budget.get("instances", 3), name
        for body in bodies:
            loads = len(re.findall(r"ld\.global\.(?:nc\.)?v4\.", body))
            stores = len(re.findall(r"st\.global\.v4\.", body))
            assert loads >= budget["wide_loads"], name
            assert stores >= budget["wide_stores"], name


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_machine_code_has_wide_accesses_and_none_to_local_memory(
    kernel: str, architecture: str
) -> None:
    of_instance = instructions(kernel, architecture)
    for instance in compiled(kernel).instances:
        if instance.architecture != architecture:
            continue
        found, budget = of_instance[instance.name], BUDGETS[kernel][instance.kernel]
        assert count(found, "EXIT") >= 1, "this is no machine code"
        assert count(found, "LDL") == count(found, "STL") == 0, instance
        wide_loads = count(found, "LDG", wide=True) + count(found, "LDGSTS", wide=True)
        assert bool(wide_loads) >= bool(budget["wide_loads"]), instance
        assert bool(count(found, "STG", wide=True)) >= bool(budget["wide_stores"]), instance


@needs_nvcc
@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_source_includes_is_what_its_machine_code_uses(
    kernel: str, architecture: str
) -> None:
    """Tensor cores in both 16-bit formats, asynchronous copies of 16 bytes in all.

    A kernel without a format counts as one of each.
    """
    source = (KERNELS / "cuda" / f"{kernel}.cu").read_text()
    of_instance = instructions(kernel, architecture)
    for number in Format:
        found = [
            of_instance[instance.name]
            for instance in compiled(kernel).instances
            if instance.architecture == architecture
            and (instance.has(number) or not instance.has_format)
        ]
        assert found, number
        multiplies = any(count(one, "HMMA") for one in found)
        copies = any(count(one, "LDGSTS", wide=True) for one in found)
        assert multiplies == ("/tensor_core.h" in source and number in SIXTEEN_BIT), number
        assert copies == ("/async_copy.h" in source), number


@needs_nvcc
@needs_disassembler
def test_the_page_of_evidence_is_what_its_command_writes(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("all_faults"):
        pytest.skip("compiles all kernels: with --all-faults")
    written = PAGE.read_text(encoding="utf-8")
    if release() not in written:
        pytest.skip(f"the page was written with another compiler than {release()}")
    assert written == page(), "run python -m tools.kernel_evidence"
