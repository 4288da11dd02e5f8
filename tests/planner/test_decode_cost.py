"""The cost model counts what a step reads and computes, and grows as its parts do."""

from dataclasses import replace

import pytest

from megachat.model.config import OPT_MODELS
from megachat.planner.decode_cost import SHARES, Limits, predict, work_of

CONFIG = OPT_MODELS["facebook/opt-350m"]
LIMITS = Limits(read=2e10, multiply_add=2e11)


def test_work_is_counted_from_the_model_s_sizes() -> None:
    work = work_of(CONFIG, batch=3, context=20, value_bytes=2)
    layer = 4 * 1024**2 + 2 * 1024 * 4096
    weights = 24 * layer + 2 * 512 * 1024 + 50272 * 512
    assert work.weight_bytes == 2 * weights
    assert work.product_flops == 2 * 3 * weights
    assert work.cache_bytes == 3 * 20 * 2 * 1024 * 24 * 2
    assert work.attention_flops == 3 * 20 * 4 * 1024 * 24
    assert work.dispatches == 24 * 7 + 5


@pytest.mark.parametrize("dtype", SHARES)
def test_one_sequence_is_bound_by_reading_and_many_by_arithmetic(dtype: str) -> None:
    size = {"bf16": 2, "fp32": 4}[dtype]
    for batch, faster in ((1, "read"), (64, "multiply_add")):
        work = work_of(CONFIG, batch=batch, context=16, value_bytes=size)
        before = predict(work, LIMITS, SHARES[dtype])
        gain = {
            limit: before / predict(work, replace(LIMITS, **{limit: 1e15}), SHARES[dtype])
            for limit in ("read", "multiply_add")
        }
        assert max(gain, key=lambda limit: gain[limit]) == faster


def test_a_longer_context_costs_what_it_adds_to_read_and_compute() -> None:
    shares = SHARES["fp32"]
    short, middle, long = (
        predict(work_of(CONFIG, batch=8, context=context, value_bytes=4), LIMITS, shares)
        for context in (100, 200, 400)
    )
    assert 2 * (middle - short) == pytest.approx(long - middle)
