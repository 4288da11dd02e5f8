"""Asynchronous copies and tensor cores on the emulator: what they compute, what misuse does.

The layout of fragments is written out here from the PTX manual's tables, lane by lane, and shares
nothing with the emulator's code.
"""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import FP32_ROUND_OFF
from tests.kernels.build import CACHE, KERNELS, Variant
from tests.kernels.launch import (
    FORMATS,
    FORWARD,
    LAUNCH_FAILURE,
    ORDERS,
    RANDOM,
    REVERSE,
    Order,
    run_here,
    run_isolated,
)
from tools.build_cache import digest_of
from tools.kernel_evidence import compiler_version

PROBE = Path(__file__).with_name("tensor_core_probe.cu")
PEER_PROBE = PROBE.with_name("peer_probe.cu")
INSTRUCTIONS = (
    r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+;",
    r"cp\.async\.commit_group;",
    r"cp\.async\.wait_group [012];",
    r"ldmatrix\.sync\.aligned\.m8n8\.x2\.shared\.b16",
    r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16",
    r"ldmatrix\.sync\.aligned\.m8n8\.x2\.trans\.shared\.b16",
    r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16",
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
    r"ld\.acquire\.sys\.global\.u32",
    r"st\.release\.sys\.global\.u32",
)
"""Of PTX, that the probes ask for."""
ORDER_NAMES = [order.name for order in ORDERS]


def fragment_of_a(tile: Tensor, lane: int) -> list[Tensor]:
    """Elements a0 to a7 of a lane: `[16, 16]`, rows by k."""
    group, place = lane >> 2, lane & 3
    elements = []
    for i in range(8):
        row = group if i in (0, 1, 4, 5) else group + 8
        column = place * 2 + (i & 1) + (8 if i >= 4 else 0)
        elements.append(tile[row, column])
    return elements


def fragment_of_b(tile: Tensor, lane: int) -> list[Tensor]:
    """Elements b0 to b3 of a lane: `[16, 8]`, k by columns."""
    group, place = lane >> 2, lane & 3
    return [tile[place * 2 + (i & 1) + (8 if i >= 2 else 0), group] for i in range(4)]


def element_of_d(lane: int, i: int) -> tuple[int, int]:
    group, place = lane >> 2, lane & 3
    return (group if i < 2 else group + 8), place * 2 + (i & 1)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_fragments_is_the_product_of_the_tiles(
    dtype: torch.dtype, order: Order
) -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(16, 16, generator=generator).to(dtype)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    before = torch.randn(16, 8, generator=generator)
    left = torch.stack([e for lane in range(32) for e in fragment_of_a(a, lane)])
    right = torch.stack([e for lane in range(32) for e in fragment_of_b(b, lane)])
    places = [element_of_d(lane, i) for lane in range(32) for i in range(4)]
    d = torch.stack([before[place] for place in places])
    assert run_here(PROBE, "probe_fragments", [FORMATS[dtype], left, right, d], order).code == 0
    exact = a.double() @ b.double() + before.double()
    size = a.double().abs() @ b.double().abs() + before.double().abs()
    for place, got in zip(places, d, strict=True):
        assert abs(got.double() - exact[place]) <= 17 * FP32_ROUND_OFF * size[place]


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_a_lane_gets_two_neighbours_of_each_matrix(
    matrices: int, transposed: bool, order: Order
) -> None:
    rows = torch.arange(256, dtype=torch.int16)
    out = torch.full((32, 8), -1, dtype=torch.int16)
    arguments = [matrices, int(transposed), 32, rows, out]
    assert run_here(PROBE, "probe_load", arguments, order).code == 0
    for lane in range(32):
        for m in range(matrices):
            matrix = rows.view(4, 8, 8)[m]
            matrix = matrix.T if transposed else matrix
            first = lane % 4 * 2
            assert out[lane, 2 * m : 2 * m + 2].equal(matrix[lane // 4, first : first + 2])
        assert (out[lane, 2 * matrices :] == -1).all()


@pytest.mark.parametrize("variant", [Variant.PLAIN, Variant.ASAN], ids=lambda v: v.value)
def test_a_copy_that_is_not_valid_gives_zeros_and_reads_nothing(
    variant: Variant, tmp_path: Path
) -> None:
    rows = torch.arange(1, 41, dtype=torch.int16)  # five rows and no more
    out = torch.full((32, 8), -1, dtype=torch.int16)
    outcome = run_isolated(
        PROBE, "probe_load", [4, 0, 5, rows, out], FORWARD, variant=variant, folder=tmp_path
    )
    assert outcome.complaint == ""
    loaded = out.view(8, 4, 4, 2).permute(2, 0, 1, 3).reshape(32, 8)
    assert loaded[:5].flatten().equal(rows)
    assert (loaded[5:] == 0).all()


def test_asan_sees_a_copy_from_behind_its_source(tmp_path: Path) -> None:
    rows, out = torch.ones(40, dtype=torch.int16), torch.zeros(32, 8, dtype=torch.int16)
    outcome = run_isolated(
        PROBE, "probe_load", [4, 0, 6, rows, out], FORWARD, variant=Variant.ASAN, folder=tmp_path
    )
    assert "heap-buffer-overflow" in outcome.complaint


def pipeline(fault: int, order: Order, variant: Variant, folder: Path) -> str:
    """What is wrong with the pipelined product, "" if nothing is."""
    generator = torch.Generator().manual_seed(5)
    x, w = (torch.randn(16, 80, generator=generator).bfloat16() for _ in range(2))
    out = torch.full((16, 16), torch.nan)
    arguments = [fault, 80, x, w, out]
    outcome = run_isolated(
        PROBE, "probe_pipeline", arguments, order, variant=variant, folder=folder
    )
    if outcome.complaint:
        return outcome.complaint
    error = (out.double() - x.double() @ w.double().T).abs()
    bound = 80 * FP32_ROUND_OFF * (x.double().abs() @ w.double().abs().T)
    return "" if (error <= bound).all() else "wrong result"


@pytest.mark.parametrize("variant", list(Variant), ids=lambda v: v.value)
@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
def test_a_pipeline_of_copies_and_products_is_right_and_clean(
    order: Order, variant: Variant, tmp_path: Path
) -> None:
    assert pipeline(0, order, variant, tmp_path) == ""


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
def test_a_wait_for_too_few_copies_gives_a_wrong_result(order: Order, tmp_path: Path) -> None:
    assert pipeline(1, order, Variant.PLAIN, tmp_path) == "wrong result"


def test_a_missing_barrier_after_the_wait_gives_a_wrong_result_in_a_fixed_order(
    tmp_path: Path,
) -> None:
    found = [pipeline(2, order, Variant.PLAIN, tmp_path) for order in (FORWARD, REVERSE)]
    assert "wrong result" in found


@pytest.mark.parametrize("fault", [2, 3], ids=["after the wait", "after the use"])
def test_tsan_sees_a_missing_barrier_around_the_stages(fault: int, tmp_path: Path) -> None:
    assert "data race" in pipeline(fault, RANDOM, Variant.TSAN, tmp_path)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize(
    ("what", "threads", "message", "place"),
    [
        (1, 32, "cp.async writes outside the block's shared memory", "copy_async(out, rows)"),
        (2, 32, "not aligned to 16 bytes", "copy_async(tile, rows + 1)"),
        (3, 32, "not aligned to 16 bytes", "load_matrices(b, tile + threadIdx.x * 4)"),
        (4, 32, "ldmatrix reads outside", "load_matrices(a, tile + 8"),
        (5, 32, "deadlock", "if (threadIdx.x < 16) multiply_add"),
        (5, 16, "warp of few lanes", "if (threadIdx.x < 16) multiply_add"),
    ],
)
def test_misuse_is_an_error_with_its_place(
    what: int, threads: int, message: str, place: str, order: Order
) -> None:
    rows, out = torch.zeros(512, dtype=torch.int16), torch.zeros(64)
    outcome = run_here(PROBE, "probe_tensor_misuse", [what, threads, rows, out], order)
    lines = PROBE.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if place in text)
    assert outcome.code == LAUNCH_FAILURE
    assert message in outcome.error
    assert f"{PROBE.name}:{line}" in outcome.error


@pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc on PATH: PTX cannot be assembled here"
)
def test_nvcc_takes_the_instructions_that_are_meant(request: pytest.FixtureRequest) -> None:
    """The emulator does not read the PTX; that it is what the names say is checked here."""
    every = request.config.getoption("all_faults")
    for architecture in ("80", "90a") if every else ("80",):
        ptx = "".join(ptx_of(probe, architecture) for probe in (PROBE, PEER_PROBE))
        for instruction in INSTRUCTIONS:
            assert re.search(instruction, ptx), (instruction, architecture)


def ptx_of(probe: Path, architecture: str) -> str:
    """What nvcc, with warnings as errors, makes of a probe."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ("-std=c++17", "-O3", "-Werror", "all-warnings", target)

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            command = ["nvcc", *flags, "-keep", "-keep-dir", scratch, "-c", str(probe)]
            ran = subprocess.run(
                [*command, "-o", f"{scratch}/out.o"], capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, ran.stderr
            (ptx,) = Path(scratch).glob("*.ptx")
            shutil.copy(ptx, folder / "ptx")

    headers = sorted((KERNELS / "include").glob("*.h"))
    key = digest_of(["ptx", *flags, compiler_version()], [probe, *headers])
    return (CACHE.folder_of(key, make) / "ptx").read_text()
