"""Whether the tests would notice: each fault is put into a copy of the sources and must be caught.

A fault names the watch that is to catch it. Most run without a sanitizer in the three orders of
threads, and any of them may notice. Those with another watch pass there, as they do on most days on
a GPU, or do nothing but spoil memory that is somebody else's.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megachat.generation.sampling import SamplingConfig
from tests.kernels.build import KERNELS, Variant
from tests.kernels.cases import Case, append_case, decode_case, layer_norm_case
from tests.kernels.launch import FORWARD, ORDERS, RANDOM
from tests.kernels.logprob_cases import gradient_case, statistics_case
from tests.kernels.prefill_cases import prefill_case
from tests.kernels.sample_cases import combine_case, sample_case

ONE_FORMAT = (
    ("include/numeric.h", "return run(static_cast<float*>(nullptr));", "break;"),
    ("include/numeric.h", "return run(static_cast<Float16*>(nullptr));", "break;"),
    ("include/numeric.h", "return run(std::integral_constant<int, 64>{});", "return 1;"),
    ("include/numeric.h", "return run(std::integral_constant<int, 96>{});", "return 1;"),
    ("include/numeric.h", "return run(std::integral_constant<int, 128>{});", "return 1;"),
)
"""Leaves bf16 and a head size of 80, so that a fault compiles in a second."""

NORM, APPEND, DECODE = "bias_residual_layer_norm", "kv_append", "paged_attention_decode"
LOGPROBS, PREFILL, SAMPLE = "token_logprobs", "paged_attention_prefill", "sample"

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
    PREFILL: (
        lambda: prefill_case(
            torch.bfloat16, head_dim=80, block_size=16, chunks=((40, 70), (0, 0), (0, 3)), size=2.0
        ),
    ),
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
        lambda: combine_case(ranks=3, rows=3),
    ),
}


@dataclass(frozen=True)
class Fault:
    """A change of one place in the sources."""

    name: str
    kernel: str
    old: str
    new: str
    file: str | None = None
    """Relative to `kernels`; None for the kernel itself."""
    watch: Variant = Variant.PLAIN

    @property
    def path(self) -> str:
        return self.file or f"cuda/{self.kernel}.cu"


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
    ),
    Fault(
        "step of the bins' sum removed",
        SAMPLE,
        "delta = 1; delta < kWarpSize",
        "delta = 2; delta < kWarpSize",
    ),
    Fault("one token fewer kept", SAMPLE, "reached + at >= wanted", "reached + at > wanted"),
    Fault("edge itself cut", SAMPLE, "if (x[i] < lowest)", "if (x[i] <= lowest)"),
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
        SAMPLE,
        "part(rank, 0) > part(winner, 0)",
        "part(rank, 0) >= part(winner, 0)",
    ),
)


def sources_with(fault: Fault, folder: Path) -> Path:
    """A copy of the sources with the fault; returns the kernel."""
    shutil.copytree(KERNELS, folder / "kernels")
    for path, old, new in (*ONE_FORMAT, (fault.path, fault.old, fault.new)):
        file = folder / "kernels" / path
        text = file.read_text()
        assert old in text, f"{path} has changed: {old!r} is no longer in it"
        file.write_text(text.replace(old, new))
    return folder / "kernels" / "cuda" / f"{fault.kernel}.cu"


def first_complaint(kernel: str, source: Path, variant: Variant, folder: Path) -> str:
    """What any of the runs finds, "" if none finds anything."""
    orders = {Variant.PLAIN: ORDERS, Variant.ASAN: (FORWARD,), Variant.TSAN: (RANDOM,)}[variant]
    for make in CASES[kernel]:
        for order in orders:
            found = make().fault_isolated(order, variant=variant, folder=folder, source=source)
            if found:
                return found
    return ""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_the_fault_is_caught(fault: Fault, tmp_path: Path) -> None:
    source = sources_with(fault, tmp_path)
    assert first_complaint(fault.kernel, source, fault.watch, tmp_path)


@pytest.mark.parametrize("kernel", CASES)
def test_without_a_fault_the_same_runs_find_nothing(kernel: str, tmp_path: Path) -> None:
    source = sources_with(Fault("none", kernel, "#include", "#include"), tmp_path)
    assert first_complaint(kernel, source, Variant.PLAIN, tmp_path) == ""
