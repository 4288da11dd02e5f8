"""The one place for likely mistakes in prefill attention, and the cases that notice them."""

from collections.abc import Callable

import torch

from tests.kernels.build import Variant
from tests.kernels.cases import Case
from tests.kernels.faults import Fault
from tests.kernels.prefill_cases import prefill_case

PREFILL = "paged_attention_prefill"

CASES: dict[str, tuple[Callable[[], Case], ...]] = {
    PREFILL: (
        lambda: prefill_case(
            torch.bfloat16, head_dim=80, block_size=16, chunks=((40, 70), (0, 0), (0, 3)), size=2.0
        ),
    ),
}

FAULTS = (
    Fault(
        "next keys loaded while the last are read",
        PREFILL,
        "    __syncthreads();  // nobody reads the last tile any more\n",
        "",
    ),
    Fault(
        "keys read while they are loaded",
        PREFILL,
        "    __syncthreads();\n    attend",
        "    attend",
    ),
    Fault(
        "weights read before other lanes have them",
        PREFILL,
        "  __syncwarp(kWholeWarp);  // the lanes of a query are of one warp\n",
        "",
        watch=Variant.TSAN,
    ),
    Fault("earlier values not rescaled", PREFILL, "state.mixed[q][p][i] *= decay;", ";"),
    Fault("earlier weights not rescaled", PREFILL, "state.sum[q] * decay +", "state.sum[q] +"),
    Fault(
        "a query sees the token behind it",
        PREFILL,
        "position + first_query + q + 1, end",
        "position + first_query + q + 2, end",
    ),
    Fault(
        "the past of a chunk forgotten",
        PREFILL,
        "static_cast<int>(a.starts[chunk]) + first",
        "first",
    ),
    Fault(
        "rows behind the last token loaded",
        PREFILL,
        "if (row < count) raw",
        "if (row <= count) raw",
    ),
    Fault("tiles of later chunks not shifted", PREFILL, "+ first + half <= tile", "<= tile"),
    Fault("table of the first chunk", PREFILL, "<size_t>(chunk) * a.columns", "<size_t>(0)"),
    Fault("queries behind the chunk written", PREFILL, "if (first_query + q >= queries)", "if (0)"),
    Fault(
        "packs beyond the head written",
        PREFILL,
        "      if (lane + p * kLanes >= Shape::kPacks) continue;\n#pragma unroll",
        "#pragma unroll",
    ),
)
