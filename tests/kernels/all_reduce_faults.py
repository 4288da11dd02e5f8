"""The one place for likely mistakes in `all_reduce`, and the cases that notice them."""

from collections.abc import Callable

import torch

from tests.kernels.all_reduce_cases import all_reduce_case
from tests.kernels.build import Variant
from tests.kernels.cases import Case
from tests.kernels.faults import Fault

REDUCE = "all_reduce"
FP32 = "all_reduce in fp32"

CASES: dict[str, tuple[Callable[[], Case], ...]] = {
    REDUCE: (
        lambda: all_reduce_case(torch.bfloat16, ranks=2, packs=(3,) * 12),
        lambda: all_reduce_case(torch.bfloat16, ranks=3, packs=(1, 133, 2, 140), in_place=True),
        lambda: all_reduce_case(torch.bfloat16, ranks=2, packs=(2,) * 5, calls_before=2**32 - 2),
    ),
    FP32: (lambda: all_reduce_case(torch.float32, ranks=3, packs=(40,)),),
}

FAULTS = (
    # Waiting.
    Fault(
        "flag set before the message is there",
        REDUCE,
        "  __syncthreads();\n  if (thread < a.ranks) {",
        "  if (thread < a.ranks) {",
        watch=Variant.TSAN,
    ),
    Fault("nobody waits", REDUCE, "    while (static_cast<int>", "    if (static_cast<int>"),
    Fault(
        "threads read before others have waited",
        REDUCE,
        "  __syncthreads();\n  if (thread == 0)",
        "  if (thread == 0)",
        watch=Variant.TSAN,
    ),
    Fault(
        "last rank not waited for",
        REDUCE,
        "  if (thread < a.ranks) {",
        "  if (thread + 1 < a.ranks) {",
    ),
    Fault("calls not counted", REDUCE, "if (thread == 0) a.own->calls[block] = call;", ""),
    Fault(
        "one place for all calls", REDUCE, "* 2 + call % 2) * a.place_packs", "* 2) * a.place_packs"
    ),
    Fault(
        "a rank that is ahead not understood",
        REDUCE,
        "[thread]) - call) < 0)",
        "[thread]) - call) != 0)",
    ),
    Fault(
        "count compared without regard to its start at zero",
        REDUCE,
        "static_cast<int>(read_flag(&a.own->flags[block][thread]) - call) < 0",
        "read_flag(&a.own->flags[block][thread]) < call",
    ),
    Fault(
        "flags of all blocks shared",
        REDUCE,
        "flags[block][",
        "flags[0][",
    ),
    Fault("count shared by all blocks", REDUCE, "a.own->calls[block]", "a.own->calls[0]"),
    # Sums.
    Fault(
        "sum begins with the own message",
        REDUCE,
        "place_of(a.regions[r], place)",
        "place_of(a.regions[(r + a.rank) % a.ranks], place)",
        cases=FP32,
        only="float",
    ),
    Fault(
        "sum rounded after each rank",
        REDUCE,
        "for (int k = 0; k < kPack<T>; ++k) sum[k] += part[k];",
        "for (int k = 0; k < kPack<T>; ++k) sum[k] += part[k];\n    round_pack<T>(sum);",
    ),
    Fault("last rank left out", REDUCE, "if (r >= a.ranks) break;", "if (r >= a.ranks - 1) break;"),
    # Indices.
    Fault(
        "places of blocks overlap",
        REDUCE,
        "(static_cast<size_t>(block) * 2",
        "(static_cast<size_t>(block)",
    ),
    Fault(
        "last packs of the message left out",
        REDUCE,
        "return (packs + blocks - 1) / blocks;",
        "return packs / blocks;",
    ),
    Fault(
        "slice of the last block too long",
        REDUCE,
        "min(begin + a.slice, a.packs);",
        "begin + a.slice;",
        watch=Variant.ASAN,
    ),
)
