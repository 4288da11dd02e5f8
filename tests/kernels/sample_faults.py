"""The one place for likely mistakes in `sample`, and the cases that notice them."""

from collections.abc import Callable

import torch

from megachat.generation.config import SamplingConfig
from tests.kernels.build import Variant
from tests.kernels.cases import Case
from tests.kernels.faults import Fault
from tests.kernels.sample_cases import combine_case, edges_case, sample_case

SAMPLE, COMBINE = "sample", "sample_combine"
ONE_ROW = "sample of one row"
"""For ThreadSanitizer, which takes long."""

CASES: dict[str, tuple[Callable[[], Case], ...]] = {
    SAMPLE: (
        lambda: sample_case(
            torch.bfloat16,
            columns=300,
            rows=8,
            mean=-4.0,
            deviation=1.0,
            config=SamplingConfig(temperature=0.7, top_k=40, top_p=0.8, repetition_penalty=1.5),
            suppressed=(1, 299),
        ),
        lambda: sample_case(
            torch.bfloat16,
            columns=700,
            rows=6,
            deviation=1.0,
            config=SamplingConfig(min_new_tokens=4),
            stops=tuple(range(1280, 1980, 2)),
            vocab_start=1280,
        ),
        lambda: sample_case(
            torch.bfloat16, columns=40, rows=6, deviation=0.5, config=SamplingConfig(top_k=1)
        ),
        lambda: edges_case(torch.bfloat16, columns=40, keep=1, rows=6),
    ),
    COMBINE: (lambda: combine_case(ranks=3, rows=3),),
    ONE_ROW: (
        lambda: sample_case(
            torch.bfloat16, columns=140, rows=1, config=SamplingConfig(top_k=9, top_p=0.5)
        ),
    ),
}

FAULTS = (
    Fault(
        "bits set before all are cleared",
        SAMPLE,
        "said_[i] = 0;\n    __syncthreads();",
        "said_[i] = 0;",
    ),
    Fault(
        "digit read before it is found",
        SAMPLE,
        "  __syncthreads();\n  edge.ordered",
        "  edge.ordered",
    ),
    Fault(
        "bins cleared while the digit is read",
        SAMPLE,
        "    __syncthreads();  // everyone has read the digit\n",
        "",
        watch=Variant.TSAN,
        cases=ONE_ROW,
    ),
    Fault(
        "groups compared before all are weighed",
        SAMPLE,
        "lowest, groups, scratch);\n  __syncthreads();",
        "lowest, groups, scratch);",
    ),
    Fault(
        "scratch of two winners shared",
        SAMPLE,
        "  __syncthreads();  // nobody reads what an earlier call left\n  if (lane == 0) {",
        "  if (lane == 0) {",
        watch=Variant.TSAN,
        cases=ONE_ROW,
    ),
    Fault(
        "step of the bins' sum removed",
        SAMPLE,
        "delta = 1; delta < kWarpSize",
        "delta = 2; delta < kWarpSize",
    ),
    Fault("one token fewer kept", SAMPLE, "reached + at >= wanted", "reached + at > wanted"),
    Fault("edge itself cut", SAMPLE, "if (x[i] < lowest)", "if (x[i] <= lowest)"),
    Fault("edge of another row", SAMPLE, "return a.edges[at];", "return a.edges[at == 0];"),
    Fault("all digits but one forgotten", SAMPLE, "kDigits = 3", "kDigits = 1"),
    Fault("top-p of the mass of everything", SAMPLE, "row, edge.ordered, mass", "row, 0, mass"),
    Fault(
        "penalty as if all logits were positive",
        SAMPLE,
        "scaled > 0.0f ? scaled / a_.penalty :",
        "true ? scaled / a_.penalty :",
    ),
    Fault(
        "history behind its length counted",
        SAMPLE,
        "min(a_.history_lengths[row_], static_cast<int64_t>(a_.history_width))",
        "a_.history_width",
    ),
    Fault(
        "forbidden columns taken for tokens",
        SAMPLE,
        "a_.num_stops, 0)",
        "a_.num_stops, a_.vocab_start)",
    ),
    Fault(
        "stops forbidden a token too long", SAMPLE, "+ 1 < a_.min_new_tokens", "< a_.min_new_tokens"
    ),
    Fault(
        "noise of another rank's groups",
        SAMPLE,
        "kGroupStream, first_group + group",
        "kGroupStream, group",
    ),
    Fault(
        "tokens of all groups with one noise",
        SAMPLE,
        "kTokenStream + first_group + group;",
        "kTokenStream + first_group;",
    ),
    Fault("nine rounds", SAMPLE, "kRounds = 10", "kRounds = 9", file="include/philox.h"),
    Fault(
        "words of a counter exchanged",
        SAMPLE,
        "word == 0 ? counter[0] : counter[1]",
        "word == 0 ? counter[1] : counter[0]",
        file="include/philox.h",
    ),
    Fault("high half of the key dropped", SAMPLE, "(key >> 32)", "(0)", file="include/philox.h"),
    Fault(
        "log-probability after the penalty",
        SAMPLE,
        "= row.scaled(column);",
        "= row.choice(column, row.scaled(column));",
    ),
    Fault(
        "columns behind the vocabulary counted",
        SAMPLE,
        "if (column + i < a_.columns) visit",
        "visit",
    ),
    Fault(
        "last rank of equal ones",
        COMBINE,
        "part(rank, 0) > part(winner, 0)",
        "part(rank, 0) >= part(winner, 0)",
    ),
)
