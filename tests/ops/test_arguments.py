"""Tensors that a kernel would misread are refused in one line that says what was expected."""

import re

import pytest
import torch

from megachat.errors import KernelError
from megachat.ops.arguments import check_tensors

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)


def _check(*tensors: torch.Tensor, **others: object) -> None:
    check_tensors("attend", tensors, device=CPU, dtypes=DTYPES, **others)  # type: ignore[arg-type]


def test_tensors_of_one_known_dtype_that_lie_in_one_piece_pass() -> None:
    indices, tables = (torch.arange(3),), torch.zeros(2, 9, dtype=torch.int32)[:, :4]
    _check(torch.zeros(2, 3), torch.zeros(5), indices=indices, tables=tables)
    _check(torch.zeros(0, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("tensors", "others", "expected"),
    [
        ([torch.zeros(2).half()], {}, "no CPU kernel for torch.float16: use float32 or bfloat16"),
        ([torch.zeros(2), torch.zeros(2).bfloat16()], {}, "needs contiguous torch.float32"),
        ([torch.zeros(2, 3).t()], {}, "with shape [3, 2], strides (1, 3)"),
        ([torch.zeros(2, device="meta")], {}, "got torch.float32 on meta"),
        ([torch.zeros(2)], {"indices": (torch.zeros(2).int(),)}, "contiguous torch.int64 tensors"),
        ([torch.zeros(2)], {"tables": torch.zeros(2, 2)}, "int32 tables with contiguous rows"),
        ([torch.zeros(2)], {"tables": torch.zeros(3, 2).int().t()}, "with strides (1, 2)"),
    ],
)  # fmt: skip
def test_others_are_named(
    tensors: list[torch.Tensor], others: dict[str, object], expected: str
) -> None:
    with pytest.raises(KernelError, match=re.escape(expected)) as caught:
        _check(*tensors, **others)
    assert str(caught.value).startswith("attend") and "\n" not in str(caught.value)
