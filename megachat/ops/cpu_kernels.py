"""The one place that calls this project's CPU kernels: tensors in, pointers and sizes across.

Every function is the CPU backend of the operation of its name, which documents the arguments. A
kernel runs on as many threads as torch does, in torch's own pool: both use the same OpenMP library.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from megachat.errors import KernelError
from megachat.ops.build import load_library

_SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_Number = int | float


def prepare() -> None:
    """Builds and loads the kernels, so that whoever configures them learns at once what is missing.

    Raises:
        KernelError: They cannot be built or loaded.
    """
    load_library()


def kv_append(qkv: Tensor, bias: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Adds the bias, stores keys and values, returns the queries."""
    heads, head_dim = keys.shape[2:]
    tokens = len(qkv)
    _check("kv_append", (qkv, bias, keys, values), indices=(slots,))
    query = qkv.new_empty(tokens, heads, head_dim)
    _call("kv_append", (qkv, bias, keys, values, slots, query), (tokens, heads, head_dim))
    return query


def paged_attention_decode(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor
) -> Tensor:
    """Attention of one new token of each sequence to all its tokens."""
    _check("paged_attention_decode", (query, keys, values), indices=(lengths,), tables=tables)
    out = torch.empty_like(query)
    _call(
        "paged_attention_decode",
        (query, keys, values, tables, lengths, out),
        (tables.stride(0), len(query), *keys.shape[1:]),
    )
    return out


def paged_attention_prefill(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, offsets: Tensor
) -> Tensor:
    """Causal attention of a chunk of each sequence to the chunk and all that precedes it."""
    indices = (starts, offsets)
    _check("paged_attention_prefill", (query, keys, values), indices=indices, tables=tables)
    out = torch.empty_like(query)
    _call(
        "paged_attention_prefill",
        (query, keys, values, tables, starts, offsets, out),
        (tables.stride(0), len(starts), *keys.shape[1:]),
    )
    return out


def tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A product with a weight `[tiles, out, in/tiles]`, of any strides but along a row."""
    tiles, out_features, width = weight.shape
    tokens = len(x)
    if weight.stride(2) != 1:
        raise KernelError(
            f"tiled_linear cannot read a weight with strides {weight.stride()}: its rows must be "
            "contiguous"
        )
    _check("tiled_linear", (x,))
    if weight.dtype != x.dtype:
        raise KernelError(f"tiled_linear got {x.dtype} inputs and a {weight.dtype} weight")
    out = x.new_empty(tokens, out_features)
    _call(
        "tiled_linear",
        (x.float(), weight, out),
        (tokens, tiles, out_features, width, weight.stride(0), weight.stride(1)),
        dtype=x.dtype,
    )
    return out


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """`max(x + bias, 0)`, in the memory of `x`."""
    _check("bias_relu", (x, bias))
    _call("bias_relu", (x, bias, x), tuple(x.shape))
    return x


def bias_residual_layer_norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Adds bias and residual, and normalises the sum."""
    inputs = (x, bias, residual, weight, norm_bias)
    _check("bias_residual_layer_norm", inputs)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _call("bias_residual_layer_norm", (*inputs, total, normed), (*x.shape, epsilon))
    return total, normed


def _check(
    name: str,
    tensors: Sequence[Tensor],
    *,
    indices: Sequence[Tensor] = (),
    tables: Tensor | None = None,
) -> None:
    """Refuses what a kernel would misread.

    Raises:
        KernelError: A tensor is elsewhere, of another dtype or not contiguous.
    """
    dtype = tensors[0].dtype
    if dtype not in _SUFFIX:
        raise KernelError(
            f"{name} has no CPU kernel for {dtype}: use float32 or bfloat16, or backend = "
            '"reference"'
        )
    wanted = [(tensor, dtype) for tensor in tensors] + [(index, torch.int64) for index in indices]
    for tensor, expected in wanted:
        if tensor.dtype != expected or tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise KernelError(
                f"{name} needs contiguous {expected} tensors on the CPU, got {tensor.dtype} on "
                f"{tensor.device} with shape {list(tensor.shape)}, strides {tensor.stride()}"
            )
    if tables is not None and (tables.dtype != torch.int32 or tables.stride(1) != 1):
        raise KernelError(
            f"{name} needs int32 tables with contiguous rows, got {tables.dtype} with strides "
            f"{tables.stride()}"
        )


def _call(
    name: str,
    tensors: Sequence[Tensor],
    numbers: Sequence[_Number],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Calls `megachat_<name>_<dtype>(pointers..., sizes..., threads)`; floats go as float32."""
    kernel = getattr(load_library(), f"megachat_{name}_{_SUFFIX[dtype or tensors[0].dtype]}")
    kernel(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors),
        *(
            ctypes.c_float(number) if isinstance(number, float) else ctypes.c_int64(number)
            for number in numbers
        ),
        ctypes.c_int(torch.get_num_threads()),
    )
