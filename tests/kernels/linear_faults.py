"""The one place for likely mistakes in the feed-forward kernels, and the cases that notice them."""

from collections.abc import Callable

import torch

from tests.kernels.build import Variant
from tests.kernels.cases import Case
from tests.kernels.faults import Fault
from tests.kernels.linear_cases import Shape, bias_relu_case, linear_case

LINEAR, RELU = "tiled_linear", "bias_relu"
FP32 = "tiled_linear in fp32"

SMALL = Shape(tokens=5, outputs=72, width=136, tiles=3, bias=True, relu=True)
"""Nine steps: the last one's stage is where sums are put afterwards."""
LARGE = Shape(tokens=11, outputs=72, width=136, tiles=2, splits=4, bias=True, interleaved=True)
"""Splits of two of six steps, of which a tile has three; one split has none."""

CASES: dict[str, tuple[Callable[[], Case], ...]] = {
    LINEAR: (
        lambda: linear_case(torch.bfloat16, SMALL),
        lambda: linear_case(torch.bfloat16, LARGE),
    ),
    FP32: (
        lambda: linear_case(torch.float32, SMALL),
        lambda: linear_case(torch.float32, LARGE),
    ),
    RELU: (
        lambda: bias_relu_case(torch.bfloat16, tokens=3, width=136),
        lambda: bias_relu_case(torch.bfloat16, tokens=1030, width=8, in_place=True),
    ),
}

FAULTS = (
    # The ring of stages.
    Fault("wait for one stage too few", LINEAR, "<kAhead - 1>();", "<kAhead>();"),
    Fault(
        "barrier of the ring removed",
        LINEAR,
        "    __syncthreads();  // all see",
        "    // all see",
    ),
    Fault(
        "stage copied while it is read",
        LINEAR,
        "    copy_step(step + kAhead);\n    multiply_stage",
        "    copy_step(step + kAhead + 1);\n    multiply_stage",
    ),
    Fault(
        "next stage copied before the barrier",
        LINEAR,
        "    __syncthreads();  // all see this stage and are done with the last\n"
        "    copy_step(step + kAhead);\n",
        "    copy_step(step + kAhead);\n    __syncthreads();\n",
        watch=Variant.TSAN,
    ),
    Fault(
        "no groups for the steps behind the end",
        LINEAR,
        "    commit_copies();  //",
        "    if (step < end) commit_copies();  //",
    ),
    Fault(
        "sums written over stages that are still read",
        LINEAR,
        "  __syncthreads();\n  auto* const block_sums",
        "  auto* const block_sums",
        watch=Variant.TSAN,
    ),
    Fault(
        "sums read before all are written",
        LINEAR,
        "  __syncthreads();\n  constexpr int kPacks",
        "  constexpr int kPacks",
    ),
    # Tails.
    Fault("columns of the next tile taken in", LINEAR, "column < a.width;", "true;"),
    Fault(
        "rows behind the weight read",
        LINEAR,
        "inside && output < a.outputs);",
        "inside);",
        watch=Variant.ASAN,
    ),
    Fault(
        "rows behind the tokens read",
        LINEAR,
        "inside && token < a.tokens);",
        "inside);",
        watch=Variant.ASAN,
    ),
    Fault(
        "tokens behind the last written",
        LINEAR,
        "if (token >= a.tokens || output >= a.outputs) continue;",
        "if (output >= a.outputs) continue;",
        watch=Variant.ASAN,
    ),
    Fault(
        "outputs behind the last written",
        LINEAR,
        "|| output >= a.outputs) continue;",
        ") continue;",
    ),
    # Where things lie.
    Fault(
        "tiles taken for adjacent",
        LINEAR,
        "tile * a.tile_stride",
        "tile * a.row_stride * a.outputs",
    ),
    Fault("rows taken for adjacent", LINEAR, "output * a.row_stride", "output * a.width"),
    Fault(
        "all tiles multiply the first columns", LINEAR, "static_cast<int64_t>(tile) * a.width", "0"
    ),
    Fault(
        "tile advanced one stage early",
        LINEAR,
        "if (column >= a.width) {",
        "if (column + kDepth<T> >= a.width) {",
    ),
    Fault(
        "split begins with the first column of its tile",
        LINEAR,
        "column = begin % steps_of_tile * kDepth<T>;",
        "column = 0;",
    ),
    Fault(
        "chunks of odd rows not exchanged when read",
        LINEAR,
        "place_of(kRows + lane % 8, chunk + lane / 8 % 2)",
        "place_of(kRows, chunk + lane / 8 % 2) + lane % 8 * kRowBytes",
    ),
    Fault(
        "halves of the columns exchanged for the weight",
        LINEAR,
        "chunk + lane / 16));\n      if constexpr",
        "chunk + 1 - lane / 16));\n      if constexpr",
    ),
    Fault(
        "second eight tokens are the first",
        LINEAR,
        "{tokens[2], tokens[3]}",
        "{tokens[0], tokens[1]}",
    ),
    Fault(
        "rows and tokens of a sum exchanged",
        LINEAR,
        "lane % 4 * 2 + i % 2;",
        "lane % 4 * 2 + i / 2;",
    ),
    # Splits and what follows.
    Fault(
        "rest of the steps forgotten",
        LINEAR,
        "(steps + a.splits - 1) / a.splits",
        "steps / a.splits",
    ),
    Fault("first split left out", LINEAR, "int s = 0; s < a.splits", "int s = 1; s < a.splits"),
    Fault("splits written over each other", LINEAR, "(blockIdx.z) * a.tokens", "(0) * a.tokens"),
    Fault(
        "ReLU before the bias",
        LINEAR,
        "values[i] += bias[i];",
        "values[i] = relu(values[i]) + bias[i];",
    ),
    Fault("bias of another output", LINEAR, "a.bias + output, bias", "a.bias + output % 64, bias"),
    # fp32.
    Fault(
        "fp32 sums of neighbouring tokens exchanged",
        LINEAR,
        "tokens[i % 2][k]",
        "tokens[(i + 1) % 2][k]",
        cases=FP32,
        only="float",
    ),
    Fault(
        "last column of each fp32 chunk left out",
        LINEAR,
        "for (int k = 0; k < 4; ++k) sums",
        "for (int k = 0; k < 3; ++k) sums",
        cases=FP32,
        only="float",
    ),
    Fault(
        "columns beyond the bias",
        RELU,
        "  if (column >= a.width) return;\n",
        "",
        watch=Variant.ASAN,
    ),
    Fault("tokens of later rounds left out", RELU, "token += gridDim.y", "token += a.tokens"),
    Fault("result not rectified", RELU, "relu(values[i] + bias[i])", "values[i] + bias[i]"),
)
