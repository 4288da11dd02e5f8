"""The kernels under AddressSanitizer and ThreadSanitizer, on tiny grids.

Buffers are heap blocks of exactly the size that a launcher asks for, shared memory likewise.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megachat.generation.config import SamplingConfig
from tests.kernels.all_reduce_cases import all_reduce_case
from tests.kernels.build import Variant
from tests.kernels.cases import Case, append_case, decode_case, layer_norm_case
from tests.kernels.launch import FORWARD, RANDOM
from tests.kernels.linear_cases import Shape, bias_relu_case, linear_case
from tests.kernels.logprob_cases import gradient_case, statistics_case
from tests.kernels.prefill_cases import prefill_case
from tests.kernels.sample_cases import combine_case, sample_case

TINY: dict[str, Callable[[], Case]] = {
    "pre-LN of one pack a thread": lambda: layer_norm_case(torch.float32, hidden=136, tokens=2),
    "post-LN of two packs a thread": lambda: layer_norm_case(
        torch.float32, hidden=1032, tokens=1, pre=False, in_place=True
    ),
    "append": lambda: append_case(torch.bfloat16, head_dim=80, block_size=16, tokens=2, heads=2),
    "decode in one split": lambda: decode_case(
        torch.bfloat16, head_dim=64, block_size=16, lengths=(0, 37), heads=1
    ),
    "decode in two splits": lambda: decode_case(
        torch.float16, head_dim=80, block_size=16, lengths=(70,), splits=2, heads=1
    ),
    "statistics": lambda: statistics_case(torch.bfloat16, width=264, tokens=2),
    "gradient": lambda: gradient_case(torch.bfloat16, width=264, tokens=2),
    "prefill": lambda: prefill_case(
        torch.bfloat16, head_dim=80, block_size=16, chunks=((3, 35), (0, 0), (0, 2)), heads=1
    ),
    "greedy": lambda: sample_case(
        torch.float32,
        columns=140,
        rows=1,
        config=SamplingConfig(temperature=0.0, repetition_penalty=2.0, min_new_tokens=5),
        stops=(3,),
    ),
    "draw": lambda: sample_case(
        torch.bfloat16, columns=140, rows=1, config=SamplingConfig(top_k=9, top_p=0.5)
    ),
    "combine": lambda: combine_case(ranks=2, rows=3),
    "product in one split": lambda: linear_case(
        torch.bfloat16, Shape(tokens=11, outputs=24, width=72, tiles=2, bias=True, relu=True)
    ),
    "product in two splits": lambda: linear_case(
        torch.float16, Shape(tokens=3, outputs=72, width=264, tiles=2, splits=2, interleaved=True)
    ),
    "product in fp32": lambda: linear_case(
        torch.float32, Shape(tokens=3, outputs=12, width=172, splits=2, bias=True)
    ),
    "bias and ReLU": lambda: bias_relu_case(torch.bfloat16, tokens=2, width=136),
    "all-reduce of three calls": lambda: all_reduce_case(
        torch.bfloat16, ranks=3, packs=(2, 130, 3)
    ),
}


@pytest.mark.parametrize("variant", [Variant.ASAN, Variant.TSAN], ids=lambda v: v.value)
@pytest.mark.parametrize("name", TINY)
def test_nothing_is_found(name: str, variant: Variant, tmp_path: Path) -> None:
    order = RANDOM if variant is Variant.TSAN else FORWARD
    assert TINY[name]().fault_isolated(order, variant=variant, folder=tmp_path) == ""
