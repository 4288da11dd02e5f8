"""Whether the tests would notice: each fault is put into a copy of the sources and must be caught.

A fault names the watch that is to catch it. Most run without a sanitizer in the three orders of
threads, and any of them may notice. Those with another watch pass there, as they do on most days on
a GPU, or do nothing but spoil memory that is somebody else's.

A run looks for one fault of each kernel, and with `--all-faults` for all of them; the record of
`proven` says for which sources that was done last.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.kernels import all_reduce_faults, linear_faults, prefill_faults, sample_faults
from tests.kernels.build import KERNELS, Variant
from tests.kernels.cases import Case, append_case, decode_case, layer_norm_case
from tests.kernels.faults import Fault, first_complaint, sources_with, start_building
from tests.kernels.logprob_cases import gradient_case, statistics_case

NORM, APPEND, DECODE = "bias_residual_layer_norm", "kv_append", "paged_attention_decode"
LOGPROBS = "token_logprobs"

CASES: dict[str, tuple[Callable[[], Case], ...]] = {
    NORM: (lambda: layer_norm_case(torch.bfloat16, hidden=1000, tokens=2),),
    APPEND: (lambda: append_case(torch.bfloat16, head_dim=80, block_size=16),),
    DECODE: (
        lambda: decode_case(torch.bfloat16, head_dim=80, block_size=16, lengths=(0, 37, 150)),
        lambda: decode_case(
            torch.bfloat16, head_dim=80, block_size=32, lengths=(0, 151), splits=3, heads=1
        ),
    ),
    LOGPROBS: (
        lambda: statistics_case(torch.bfloat16, width=2056, padding=3),
        lambda: gradient_case(torch.bfloat16, width=264, padding=3),
    ),
    **prefill_faults.CASES,
    **sample_faults.CASES,
    **linear_faults.CASES,
    **all_reduce_faults.CASES,
}

FAULTS = (
    # Synchronisation.
    Fault("barrier over warps removed", DECODE, "  __syncthreads();\n", ""),
    Fault(
        "barrier of a block sum removed", NORM, "  __syncthreads();\n", "", file="include/reduce.h"
    ),
    Fault(
        "scratch of two sums shared",
        NORM,
        "sum_scratch + kWarpSize;",
        "sum_scratch;",
        watch=Variant.TSAN,
    ),
    Fault(
        "barrier reached at two places",
        DECODE,
        "  __syncthreads();\n",
        "  if (warp == 0) {\n__syncthreads();\n} else {\n__syncthreads();\n}\n",
    ),
    Fault(
        "shuffle in a divergent branch",
        DECODE,
        "score = lane_sum<1, kLanes>(score);",
        "if (base + t * stride + group < end) score = lane_sum<1, kLanes>(score);",
    ),
    # Reductions.
    Fault(
        "step of a lane sum removed",
        DECODE,
        "for (int bit = kTo / 2; bit >= kFrom; bit /= 2) {\n    value +=",
        "for (int bit = kTo / 4; bit >= kFrom; bit /= 2) {\n    value +=",
        file="include/reduce.h",
    ),
    Fault(
        "last step of a lane sum removed",
        NORM,
        "for (int bit = kTo / 2; bit >= kFrom; bit /= 2) {\n    value +=",
        "for (int bit = kTo / 2; bit > kFrom; bit /= 2) {\n    value +=",
        file="include/reduce.h",
    ),
    Fault("groups of a warp not combined", DECODE, "combine_warp<T, kLanes>(state);", ""),
    Fault(
        "first split left out",
        DECODE,
        "for (int s = 0; s < a.splits; ++s) {",
        "for (int s = 1; s < a.splits; ++s) {",
    ),
    # The running softmax.
    Fault("sum not rescaled", DECODE, "state.sum *= decay;", ""),
    Fault("empty row divided by zero", DECODE, "sum == 0.0f ? 0.0f : mixed / sum", "mixed / sum"),
    Fault(
        "empty split weighted with exp2(-inf + inf)",
        DECODE,
        "return sum == 0.0f ? 0.0f : exp2f(value - maximum);",
        "return sum * 0.0f + exp2f(value - maximum);",
    ),
    # Indices.
    Fault(
        "one token too many read",
        DECODE,
        "if (token < end && has_columns)",
        "if (token <= end && has_columns)",
    ),
    Fault(
        "one token too many attended to",
        DECODE,
        "group < end ? score : -INFINITY",
        "group <= end ? score : -INFINITY",
    ),
    Fault(
        "rest of the tokens forgotten",
        DECODE,
        "(length + a.splits - 1) / a.splits",
        "length / a.splits",
    ),
    Fault(
        "next slot of the page",
        DECODE,
        "(token - in_table * block_size)",
        "(token + 1 - in_table * block_size)",
        file="include/pages.h",
    ),
    Fault(
        "next page of the table",
        DECODE,
        "table[in_table]",
        "table[in_table + 1]",
        file="include/pages.h",
    ),
    Fault(
        "pages counted by too small a multiplier",
        DECODE,
        "/ size + 1)",
        "/ size - 1)",
        file="include/pages.h",
    ),
    Fault(
        "lanes beyond the head not masked",
        DECODE,
        "if (token < end && has_columns)",
        "if (token < end)",
    ),
    Fault(
        "statistics one place behind the workspace",
        DECODE,
        "reinterpret_cast<float2*>(partial + elements)",
        "reinterpret_cast<float2*>(partial + elements + 2)",
        watch=Variant.ASAN,
    ),
    Fault(
        "columns beyond the width written",
        NORM,
        "    if (column >= a.hidden) continue;\n    float gamma",
        "    float gamma",
        watch=Variant.ASAN,
    ),
    Fault("unrounded stream normalised", NORM, "round_pack<T>(values[p]);", ""),
    Fault(
        "packs beyond the token moved",
        APPEND,
        "  if (pack >= a.heads * 3 * kHeadPacks) return;\n",
        "",
    ),
    Fault(
        "keys and values exchanged",
        APPEND,
        "part == 1 ? a.keys : a.values",
        "part == 1 ? a.values : a.keys",
    ),
    Fault(
        "heads of a slot overlap",
        APPEND,
        "(place * a.heads + head)",
        "(place * a.heads + head / 2)",
    ),
    Fault("barrier before merging warps removed", LOGPROBS, "  __syncthreads();\n", ""),
    Fault("weighted sum not shifted", LOGPROBS, "(weighted + step * sum)", "weighted"),
    Fault(
        "sum rescaled before the weighted sum needs it",
        LOGPROBS,
        "    weighted = factor * (weighted + step * sum);\n    sum *= factor;\n",
        "    sum *= factor;\n    weighted = factor * (weighted + step * sum);\n",
    ),
    Fault("step between lanes removed", LOGPROBS, "bit = kWarpSize / 2;", "bit = kWarpSize / 4;"),
    Fault("token behind the slice counted", LOGPROBS, "target < a.width", "target <= a.width"),
    Fault("token before the slice counted", LOGPROBS, "target >= 0 && ", ""),
    Fault(
        "gradient in the next column", LOGPROBS, "column + i == target", "column + i == target + 1"
    ),
    Fault(
        "padded columns not kept apart",
        LOGPROBS,
        "< kNegligible ? kNegligible :",
        "< -1e39 ? 0.0f :",
    ),
    *prefill_faults.FAULTS,
    *sample_faults.FAULTS,
    *linear_faults.FAULTS,
    *all_reduce_faults.FAULTS,
)


ALWAYS = {
    NORM: "scratch of two sums shared",
    APPEND: "heads of a slot overlap",
    DECODE: "statistics one place behind the workspace",
    LOGPROBS: "barrier before merging warps removed",
    prefill_faults.PREFILL: "weights read before other lanes have them",
    sample_faults.SAMPLE: "groups compared before all are weighed",
    sample_faults.COMBINE: "last rank of equal ones",
    linear_faults.LINEAR: "rows behind the weight read",
    linear_faults.RELU: "columns beyond the bias",
    all_reduce_faults.REDUCE: "threads read before others have waited",
}
"""The fault of each kernel that every run looks for: where a kernel has such faults, one that only
a sanitizer or only some orders of threads show, since those are the checks that can go blind."""


def _id(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


ALL_IDS = (
    *(f"test_the_fault_is_caught[{fault.kernel}-{_id(fault)}]" for fault in FAULTS),
    *(f"test_without_a_fault_the_same_runs_find_nothing[{cases}]" for cases in CASES),
)
"""The tests that all have to pass before the sources count as proven."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault" in metafunc.fixturenames:
        every = metafunc.config.getoption("all_faults")
        chosen = [fault for fault in FAULTS if every or fault.name == ALWAYS[fault.kernel]]
        metafunc.parametrize("fault", chosen, ids=lambda fault: f"{fault.kernel}-{_id(fault)}")


@pytest.fixture(scope="module")
def building(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[Fault, "Future[Path]"]:
    """All faults that this session looks at, on their way through the compiler."""
    wanted = [
        item.callspec.params["fault"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "building" in item.fixturenames
    ]
    return start_building(wanted, tmp_path_factory.mktemp("faults"))


def test_the_fault_is_caught(
    fault: Fault, building: dict[Fault, "Future[Path]"], tmp_path: Path
) -> None:
    source = building[fault].result()
    cases = CASES[fault.cases or fault.kernel]
    assert first_complaint(cases, source, fault.watch, tmp_path)


@pytest.mark.parametrize("cases", CASES)
def test_without_a_fault_the_same_runs_find_nothing(
    cases: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Among all faults on what they are put into, which has fewer instances; else on the kernel."""
    fault = next(fault for fault in FAULTS if cases == (fault.cases or fault.kernel))
    source = KERNELS / "cuda" / f"{fault.kernel}.cu"
    if request.config.getoption("all_faults"):
        source = sources_with(replace(fault, old="#include", new="#include"), tmp_path)
    assert first_complaint(CASES[cases], source, Variant.PLAIN, tmp_path) == ""


def test_every_kernel_has_a_fault_that_is_always_looked_for_and_every_watch_has_one() -> None:
    always = [fault for fault in FAULTS if fault.name == ALWAYS[fault.kernel]]
    kernels = sorted(path.stem for path in (KERNELS / "cuda").glob("*.cu"))
    assert sorted(fault.kernel for fault in always) == kernels
    assert {fault.watch for fault in always} == set(Variant)


def test_the_names_of_all_faults_are_those_of_the_tests() -> None:
    assert len(set(ALL_IDS)) == len(FAULTS) + len(CASES)
