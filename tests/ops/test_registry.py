"""The registry of operations."""

import inspect
from dataclasses import fields, is_dataclass
from typing import get_args

import pytest
import torch

import megachat.ops.all_reduce
import megachat.ops.epilogues
import megachat.ops.paged_cache
import megachat.ops.tiled_linear  # noqa: F401
from megachat.errors import KernelError
from megachat.ops.registry import Backend, CudaKernel, Op, define, register, registered_ops


def _double(x: int) -> int:
    return 2 * x


def test_a_backend_is_picked_and_one_that_is_missing_is_refused() -> None:
    op = Op(name="double", schema="(int x) -> int", reference=_double, tolerance={})
    assert op.on(Backend.REFERENCE)(4) == 8
    with pytest.raises(KernelError, match="double has no cuda backend here, only reference"):
        op.on(Backend.CUDA)
    op.backends[Backend.CUDA] = lambda x: x + x
    assert op.on(Backend.CUDA)(4) == 8


def test_two_operations_cannot_share_a_name() -> None:
    op = Op(name="tiled_linear", schema="(int x) -> int", reference=_double, tolerance={})
    with pytest.raises(KernelError, match="tiled_linear is registered already"):
        register(op)
    kernel = CudaKernel(launch=_double, fake=_double)
    for taken in ("tiled_linear_bias_relu", "all_reduce"):
        with pytest.raises(KernelError, match=f"CUDA operation named {taken} is defined already"):
            define(taken, "(int x) -> int", kernel)


@pytest.mark.parametrize("op", registered_ops().values(), ids=registered_ops())
def test_schemas_name_the_arguments_of_the_reference(op: Op) -> None:
    schema = torch._C.parse_schema(op.name + op.schema)
    names: list[str] = []
    for name, parameter in inspect.signature(op.reference).parameters.items():
        types = get_args(parameter.annotation) or (parameter.annotation,)
        records = [one for one in types if isinstance(one, type) and is_dataclass(one)]
        # The fields of a record are arguments of the schema.
        names += [field.name for one in records for field in fields(one)] or [name]
    assert [argument.name for argument in schema.arguments] == names
    formats = set(op.tolerance)
    assert {torch.float32, torch.bfloat16} <= formats or formats == {torch.float64}
