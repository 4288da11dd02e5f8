"""The one place that calls this project's CPU kernels: tensors in, pointers and sizes across.

Every function is the CPU backend of the operation of its name, which documents the arguments. A
kernel runs on as many threads as torch does, in torch's own pool: both use the same OpenMP library.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from megachat.errors import KernelError
from megachat.ops import arguments
from megachat.ops.build import Recipe, check_buildable, load_library

_SUFFIX = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_Number = int | float

check_tensors = functools.partial(
    arguments.check_tensors, device=torch.device("cpu"), dtypes=tuple(_SUFFIX)
)
"""Refuses what a kernel would misread."""


def check() -> None:
    """Refuses a machine on which the kernels are not and cannot be built; builds nothing.

    Raises:
        KernelError: As `prepare`, as far as it can be known without a build.
    """
    check_buildable(Recipe())


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
    check_tensors("kv_append", (qkv, bias, keys, values), indices=(slots,))
    query = qkv.new_empty(tokens, heads, head_dim)
    _call("kv_append", (qkv, bias, keys, values, slots, query), (tokens, heads, head_dim))
    return query


def paged_attention_decode(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor
) -> Tensor:
    """Attention of one new token of each sequence to all its tokens."""
    check_tensors(
        "paged_attention_decode", (query, keys, values), indices=(lengths,), tables=tables
    )
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
    check_tensors("paged_attention_prefill", (query, keys, values), indices=indices, tables=tables)
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
    check_tensors("tiled_linear", (x,))
    if weight.dtype != x.dtype:
        raise KernelError(f"tiled_linear got {x.dtype} inputs and a {weight.dtype} weight")
    out = x.new_empty(tokens, out_features)
    _call(
        "tiled_linear",
        (x, weight, out),
        (tokens, tiles, out_features, width, weight.stride(0), weight.stride(1)),
        dtype=x.dtype,
    )
    return out


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """`max(x + bias, 0)`, in the memory of `x`."""
    check_tensors("bias_relu", (x, bias))
    _call("bias_relu", (x, bias, x), tuple(x.shape))
    return x


def bias_residual_layer_norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Adds bias and residual, and normalises the sum."""
    inputs = (x, bias, residual, weight, norm_bias)
    check_tensors("bias_residual_layer_norm", inputs)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    _call("bias_residual_layer_norm", (*inputs, total, normed), (*x.shape, epsilon))
    return total, normed


def sample(
    logits: Tensor,
    indices: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    min_new_tokens: int,
    first_group: int,
    temperature: float,
) -> Tensor:
    """Chooses a token of each row of logits, of any stride between rows.

    Args:
        logits: `[rows, columns]`.
        indices: Keys and positions of the rows, suppressed columns and stop columns.
        min_new_tokens: As the operation.
        first_group: As the operation.
        temperature: As the operation.

    Returns:
        The parts.
    """
    if logits.stride(1) != 1 or logits.device.type != "cpu":
        raise KernelError(
            f"sample needs logits on the CPU with contiguous rows, got {logits.device} with "
            f"strides {logits.stride()}"
        )
    check_tensors("sample", (logits[:1],), indices=indices)
    rows, columns = logits.shape
    parts = torch.empty(4, rows, dtype=torch.float64)
    counts = (len(indices[2]), len(indices[3]))
    _call(
        "sample",
        (logits, *indices, parts),
        (logits.stride(0), rows, columns, *counts, min_new_tokens, first_group, temperature),
    )
    return parts


def all_reduce_bytes(*, ranks: int, place_bytes: int) -> int:
    """Bytes of the memory that ranks share for their sums."""
    function = load_library().megachat_all_reduce_region
    function.restype = ctypes.c_int64
    size: int = function(ctypes.c_int64(ranks), ctypes.c_int64(place_bytes))
    return size


def all_reduce_post(
    message: Tensor, region: Tensor, *, rank: int, ranks: int, place_bytes: int, call: int
) -> None:
    """Puts this rank's message where all can read it; see `megachat.ops.all_reduce`."""
    function = getattr(load_library(), f"megachat_all_reduce_post_{_SUFFIX[message.dtype]}")
    numbers = (ranks, place_bytes, rank, message.numel(), call)
    function(
        ctypes.c_void_p(message.data_ptr()),
        ctypes.c_void_p(region.data_ptr()),
        *map(ctypes.c_int64, numbers),
    )


def token_logprobs_forward(
    logits: Tensor, targets: Tensor, vocab_start: int, temperature: float
) -> Tensor:
    """What a slice of the vocabulary says about given tokens, in one call over all rows."""
    targets = targets.contiguous()
    check_tensors("token_logprobs_forward", (logits,), indices=(targets,))
    statistics = logits.new_empty(4, len(logits), dtype=torch.float32)
    _call(
        "token_logprobs_forward",
        (logits, targets, statistics),
        (*logits.shape, vocab_start, float(temperature)),
    )
    return statistics


def token_logprobs_backward(
    logits: Tensor,
    targets: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    vocab_start: int,
    temperature: float,
) -> Tensor:
    """The gradient of a slice's logits; a gradient that is None is 0."""
    name, targets = "token_logprobs_backward", targets.contiguous()
    check_tensors(name, (logits,), indices=(targets,))
    gradients = (grad_logprobs, grad_entropy)
    per_token = arguments.numbers_of_tokens(name, (logsumexp, entropy), gradients, logits.device)
    out = torch.empty_like(logits)
    _call(
        name,
        (logits, targets, *per_token, out),
        (*logits.shape, vocab_start, float(temperature)),
        dtype=logits.dtype,
    )
    return out


def all_reduce_collect(
    out: Tensor, region: Tensor, *, ranks: int, place_bytes: int, call: int
) -> int:
    """Waits for the messages of all ranks, for a moment, and adds them up.

    Returns:
        A rank that has not come, or -1: then `out` is the sum.
    """
    function = getattr(load_library(), f"megachat_all_reduce_collect_{_SUFFIX[out.dtype]}")
    function.restype = ctypes.c_int64
    missing: int = function(
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_void_p(region.data_ptr()),
        *map(ctypes.c_int64, (ranks, place_bytes, out.numel(), call)),
    )
    return missing


def decode_step(
    model: ctypes.Structure, step: ctypes.Structure, *, segments: range, dtype: torch.dtype
) -> None:
    """Some consecutive segments of a decode step; see `megachat.ops.decode_step`."""
    kernel = getattr(load_library(), f"megachat_decode_step_{_SUFFIX[dtype]}")
    kernel(
        ctypes.byref(model),
        ctypes.byref(step),
        ctypes.c_int64(segments.start),
        ctypes.c_int64(segments.stop),
        ctypes.c_int(torch.get_num_threads()),
    )


def _call(
    name: str,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[_Number],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Calls `megachat_<name>_<dtype>(pointers..., sizes..., threads)`; floats go as float32."""
    if dtype is None:
        assert tensors[0] is not None, "the first tensor says which kernel it is"
        dtype = tensors[0].dtype
    kernel = getattr(load_library(), f"megachat_{name}_{_SUFFIX[dtype]}")
    kernel(
        *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        *(
            ctypes.c_float(number) if isinstance(number, float) else ctypes.c_int64(number)
            for number in numbers
        ),
        ctypes.c_int(torch.get_num_threads()),
    )
