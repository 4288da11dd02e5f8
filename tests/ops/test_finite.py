"""What is no finite number, and how it is told."""

import math

import pytest
import torch

from megachat.errors import DivergenceError
from megachat.ops.finite import all_finite, require_finite, require_number

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_among_many_is_found_wherever_it_stands(value: float, dtype: torch.dtype) -> None:
    for place in (0, 1, 8_000, 16_383):
        values = torch.randn(16_384, generator=torch.Generator().manual_seed(place))
        assert all_finite(values.to(dtype))
        values[place] = value
        assert not all_finite(values.to(dtype).view(128, 128).t())


def test_the_largest_and_smallest_numbers_are_finite_and_so_is_nothing() -> None:
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        assert all_finite(torch.tensor([info.max, info.min, info.tiny, 0.0], dtype=dtype))
    assert all_finite(torch.empty(0, 3))


def test_values_that_are_numbers_pass_and_others_are_told_by_count_and_row() -> None:
    values = torch.zeros(5, 3)
    assert require_finite(values, what="scores") is values
    values[2, 1], values[4] = -math.inf, math.nan
    with pytest.raises(DivergenceError, match="4 of 15 scores are not finite") as caught:
        require_finite(values, what="scores")
    assert "the first is -inf in row 2: lower the learning rate" in str(caught.value)
    with pytest.raises(DivergenceError, match="1 of 2 values are not finite, the first is nan in"):
        require_finite(torch.tensor([0.0, math.nan]), what="values")
    assert "\n" not in str(caught.value)


def test_a_number_passes_and_what_is_none_is_named() -> None:
    assert require_number(-1.5, what="loss of the actor") == -1.5
    for value in (math.nan, math.inf):
        with pytest.raises(DivergenceError, match=f"the loss of the actor is {value}: lower"):
            require_number(value, what="loss of the actor")
