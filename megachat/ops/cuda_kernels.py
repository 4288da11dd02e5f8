"""The one place that calls this project's CUDA kernels: tensors in, pointers and sizes across.

Every function is the CUDA kernel of the operation of its name, which documents the arguments; the
functions called `new_...` make its results. Work goes to torch's current stream, nobody waits for
it or reads from the device, and memory comes from torch: a CUDA graph can record all of it.

The tests run this module on their emulator; those marked `gpu` have run on one H200
(`docs/measurements/gpu.md`).
"""

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megachat.errors import KernelError
from megachat.ops.arguments import check_tensors, numbers_of_tokens
from megachat.ops.build import Recipe, check_buildable, load_library
from megachat.ops.philox import GROUP_TOKENS

_LOG = logging.getLogger(__name__)

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`megachat::Format` of kernels/include/numeric.h."""
_PACK_BYTES = 16
"""What a kernel reads at once: rows are multiples of it, and start at one."""
ALL_REDUCE_BYTES, ALL_REDUCE_RANKS = 1 << 20, 8
"""Longest message of the all-reduce and most ranks, as in kernels/cuda/all_reduce.cu."""
_SEEN_ON = (9, 0)
"""Compute capability of the GPU on which the kernels have been tested."""

_INT, _LONG, _FLOAT, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
LAUNCHERS: dict[str, tuple[type, ...]] = {
    "all_reduce": (_INT, *[_POINTER] * 3, *[_INT] * 2, *[_LONG] * 2, _POINTER),
    "all_reduce_region": (_LONG,),
    "bias_relu": (_INT, *[_POINTER] * 3, *[_INT] * 2, _POINTER),
    "bias_residual_layer_norm": (_INT, *[_POINTER] * 7, *[_INT] * 2, _FLOAT, _POINTER),
    "kv_append": (_INT, *[_POINTER] * 6, *[_INT] * 3, _POINTER),
    "paged_attention_decode": (_INT, *[_POINTER] * 7, *[_INT] * 6, _POINTER),
    "paged_attention_decode_splits": (_INT,) * 5,
    "paged_attention_decode_workspace": (_INT,) * 4,
    "paged_attention_prefill": (_INT, *[_POINTER] * 7, *[_INT] * 6, _POINTER),
    "sample": (_INT, *[_POINTER] * 9, *[_INT] * 9, *[_FLOAT] * 3, _POINTER),
    "sample_combine": (*[_POINTER] * 3, *[_INT] * 2, _POINTER),
    "tiled_linear": (_INT, *[_POINTER] * 5, *[_LONG] * 2, *[_INT] * 6, _POINTER),
    "tiled_linear_splits": (_INT,) * 6,
    "tiled_linear_workspace": (_INT,) * 3,
    "token_logprobs_backward": (_INT, *[_POINTER] * 7, *[_INT] * 3, _FLOAT, _POINTER),
    "token_logprobs_forward": (_INT, *[_POINTER] * 3, *[_INT] * 3, _FLOAT, _POINTER),
}
"""Parameters of each `megachat_<name>` in kernels/cuda."""


class Launchers:
    """The launchers of a library, and what they have to know of the device."""

    def __init__(
        self,
        library: ctypes.CDLL,
        *,
        stream: Callable[[torch.device], int],
        multiprocessors: int,
    ) -> None:
        """Declares the launchers' parameters.

        Args:
            library: Exports `megachat_<name>` for every name in `LAUNCHERS`.
            stream: Handle of the stream on which torch works on a device.
            multiprocessors: How many of them the device has.
        """
        self._functions = {}
        for name, parameters in LAUNCHERS.items():
            function = getattr(library, f"megachat_{name}")
            function.argtypes = parameters
            is_size = name.endswith(("_region", "_workspace"))
            function.restype = ctypes.c_size_t if is_size else ctypes.c_int
            self._functions[name] = function
        self._stream = stream
        self.multiprocessors = multiprocessors

    def ask(self, name: str, *numbers: int) -> int:
        """What a function that launches nothing answers."""
        answer: int = self._functions[name](*numbers)
        return answer

    def launch(
        self,
        name: str,
        tensors: Sequence[Tensor | Sequence[Tensor] | None],
        numbers: Sequence[float],
    ) -> None:
        """Calls a launcher with a format, if it takes one, pointers, numbers and a stream.

        Args:
            name: Of the launcher.
            tensors: What it reads and writes; the first one has the format and the device, and
                several in one place are an array of pointers.
            numbers: Sizes and settings.

        Raises:
            KernelError: The launcher or the CUDA runtime refuses.
        """
        leader = tensors[0]
        assert isinstance(leader, Tensor), "the first tensor says where to launch"
        pointers = [_pointer(tensor) for tensor in tensors]
        formats = [_FORMATS[leader.dtype]] if LAUNCHERS[name][0] is _INT else []
        code = self._functions[name](*formats, *pointers, *numbers, self._stream(leader.device))
        if code:
            shapes = [list(tensor.shape) for tensor in tensors if isinstance(tensor, Tensor)]
            raise KernelError(
                f"the CUDA kernel {name} was not launched (cudaError {code}) for shapes {shapes} "
                f'and numbers {list(numbers)}: use backend = "reference" for such a model'
            )


def _pointer(tensors: Tensor | Sequence[Tensor] | None) -> object:
    """What a launcher is told of a tensor, of several or of none."""
    if tensors is None or isinstance(tensors, Tensor):
        return None if tensors is None else tensors.data_ptr()
    return (_POINTER * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


@functools.cache
def launchers(device: torch.device) -> Launchers:
    """Those for a device, built if no process of this user has done so.

    Raises:
        KernelError: It is no GPU or too old a one, or they cannot be built or loaded.
    """
    capability = _capability(device)
    if capability != _SEEN_ON:
        _LOG.warning(
            "the CUDA kernels have run on GPUs of compute capability %d.%d, this one has %d.%d: "
            'compare a run with backend = "reference" before you rely on them',
            *(*_SEEN_ON, *capability),
        )
    return Launchers(
        load_library(_recipe(capability)),
        stream=lambda device: torch.cuda.current_stream(device).cuda_stream,
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count,
    )


def check(device: torch.device) -> None:
    """Refuses a device that the kernels cannot run on, or be built for here; builds nothing.

    Raises:
        KernelError: As `launchers`, as far as it can be known without a build.
    """
    check_buildable(_recipe(_capability(device)))


def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device that the kernels run on.

    Raises:
        KernelError: It is no GPU or too old a one.
    """
    if device.type != "cuda":
        raise KernelError(
            f'backend = "cuda" needs a model on an NVIDIA GPU, and this one is on the {device}: '
            'use backend = "reference", or "cpu" for generation'
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise KernelError(
            f"the CUDA kernels need compute capability 8.0 (Ampere) or later, this device has "
            f'{major}.{minor}: use backend = "reference"'
        )
    return major, minor


def _recipe(capability: tuple[int, int]) -> Recipe:
    # 9.0a: what Hopper alone has. The kernels use none of it yet, but that is what has run.
    major, minor = capability
    return Recipe.for_gpus("sm_90a" if capability == (9, 0) else f"sm_{major}{minor}")


def prepare(device: torch.device) -> None:
    """Builds and loads the kernels, so that whoever configures them learns at once what is missing.

    Args:
        device: Where the model is.

    Raises:
        KernelError: As `launchers`.
    """
    launchers(device)


def kv_append(qkv: Tensor, bias: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Adds the bias, stores keys and values, returns the queries."""
    _check("kv_append", (qkv, bias, keys, values), indices=(slots,))
    query = new_queries(qkv, bias, keys, values, slots)
    launchers(qkv.device).launch("kv_append", (qkv, bias, query, keys, values, slots), query.shape)
    return query


def new_queries(qkv: Tensor, bias: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """`[tokens, heads/tp, head_dim]`."""
    return qkv.new_empty(len(qkv), *keys.shape[2:])


def paged_attention_decode(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor
) -> Tensor:
    """Attention of one new token of each sequence to all its tokens."""
    _check("paged_attention_decode", (query, keys, values), indices=(lengths,), tables=tables)
    kernels, (rows, heads, head_dim) = launchers(query.device), query.shape
    tables, block_size = tables.contiguous(), keys.shape[1]
    columns = tables.shape[1]
    splits = kernels.ask(
        "paged_attention_decode_splits",
        rows, heads, columns, block_size, kernels.multiprocessors,
    )  # fmt: skip
    workspace = _workspace(
        query, kernels.ask("paged_attention_decode_workspace", rows, heads, head_dim, splits)
    )
    out = torch.empty_like(query)
    kernels.launch(
        "paged_attention_decode",
        (query, keys, values, tables, lengths, out, workspace),
        (rows, heads, head_dim, block_size, columns, splits),
    )
    return out


def paged_attention_prefill(
    query: Tensor, keys: Tensor, values: Tensor, tables: Tensor, starts: Tensor, offsets: Tensor
) -> Tensor:
    """Causal attention of a chunk of each sequence to the chunk and all that precedes it."""
    indices = (starts, offsets)
    _check("paged_attention_prefill", (query, keys, values), indices=indices, tables=tables)
    tokens, heads, head_dim = query.shape
    tables, out = tables.contiguous(), torch.empty_like(query)
    launchers(query.device).launch(
        "paged_attention_prefill",
        (query, keys, values, tables, starts, offsets, out),
        (tokens, len(starts), heads, head_dim, keys.shape[1], tables.shape[1]),
    )
    return out


def tiled_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A product with a weight `[tiles, out, in/tiles]`, of any strides but along a row."""
    return _product(x, weight, None)


def tiled_linear_bias_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same, plus a bias and through a ReLU, rounded once."""
    return _product(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A ReLU follows the bias, if there is one."""
    _check("tiled_linear", (x,) if bias is None else (x, bias))
    tiles, outputs, width = weight.shape
    if weight.stride(2) != 1 or weight.dtype != x.dtype or weight.device != x.device:
        raise KernelError(
            f"tiled_linear got {x.dtype} inputs on {x.device} and a {weight.dtype} weight on "
            f"{weight.device} with strides {weight.stride()}: its rows must be contiguous"
        )
    kernels, tokens = launchers(x.device), len(x)
    splits = kernels.ask(
        "tiled_linear_splits",
        _FORMATS[x.dtype], tokens, tiles, outputs, width, kernels.multiprocessors,
    )  # fmt: skip
    workspace = _workspace(x, kernels.ask("tiled_linear_workspace", tokens, outputs, splits))
    out = new_product(x, weight)
    kernels.launch(
        "tiled_linear",
        (x, weight, bias, out, workspace),
        (weight.stride(0), weight.stride(1), tokens, tiles, outputs, width)
        + (int(bias is not None), splits),
    )
    return out


def new_product(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    """`[tokens, out]`."""
    return x.new_empty(len(x), weight.shape[1])


def bias_relu(x: Tensor, bias: Tensor) -> Tensor:
    """`max(x + bias, 0)`."""
    _check("bias_relu", (x, bias))
    out = torch.empty_like(x)
    launchers(x.device).launch("bias_relu", (x, bias, out), x.shape)
    return out


def bias_residual_layer_norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Adds bias and residual, and normalises the sum."""
    inputs = (x, bias, residual, weight, norm_bias)
    _check("bias_residual_layer_norm", inputs)
    results = torch.empty_like(x), torch.empty_like(x)
    launchers(x.device).launch("bias_residual_layer_norm", (*inputs, *results), (*x.shape, epsilon))
    return results


class _SampleArguments(NamedTuple):
    """Those of the operation, in the order of its schema; the history is optional."""

    logits: Tensor
    keys: Tensor
    positions: Tensor
    suppressed: Tensor
    stops: Tensor
    min_new_tokens: int
    first_group: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    tokens: Tensor | None
    lengths: Tensor | None
    edges: Tensor | None


def sample(*arguments: Any) -> Tensor:
    """Chooses a token of each row of logits, of any stride between rows that is in packs.

    Args:
        arguments: As `_SampleArguments`.

    Returns:
        The parts.
    """
    given = _SampleArguments(*arguments)
    logits, tokens, edges = given.logits, given.tokens, given.edges
    if logits.stride(1) != 1:
        raise KernelError(
            f"sample needs logits with contiguous rows, got strides {logits.stride()}"
        )
    whole_row = logits.as_strided((1, logits.stride(0)), (1, 1))
    indices = (given.keys, given.positions, given.suppressed, given.stops, tokens, given.lengths)
    _check("sample", (whole_row,), indices=[index for index in indices if index is not None])
    if edges is not None:
        check_tensors("sample", (edges,), device=logits.device, dtypes=(torch.float32,))
    parts, (rows, columns) = new_parts(logits), logits.shape
    launchers(logits.device).launch(
        "sample",
        (logits, given.keys, given.positions, tokens, given.lengths, edges)
        + (given.suppressed, given.stops, parts),
        (rows, logits.stride(0), columns, tokens.shape[1] if tokens is not None else 0)
        + (len(given.suppressed), len(given.stops), given.min_new_tokens)
        + (given.first_group * GROUP_TOKENS, given.top_k)
        + (given.temperature, given.top_p, given.repetition_penalty),
    )
    return parts


def new_parts(logits: Tensor, *_: object) -> Tensor:
    """`[4, rows]` float64."""
    return logits.new_empty(4, len(logits), dtype=torch.float64)


def sample_combine(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs from the parts of all ranks."""
    check_tensors("sample_combine", (parts,), device=parts.device, dtypes=(torch.float64,))
    results = new_sampled_tokens(parts)
    ranks, _, rows = parts.shape
    launchers(parts.device).launch("sample_combine", (parts, *results), (ranks, rows))
    return results


def new_sampled_tokens(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs."""
    rows = parts.shape[2]
    return (
        parts.new_empty(rows, dtype=torch.int64),
        parts.new_empty(rows, dtype=torch.float32),
    )


def token_logprobs_forward(
    logits: Tensor, targets: Tensor, vocab_start: int, temperature: float
) -> Tensor:
    """What a slice of the vocabulary says about given tokens."""
    targets = targets.contiguous()
    _check("token_logprobs_forward", (logits,), indices=(targets,))
    statistics = new_token_statistics(logits)
    launchers(logits.device).launch(
        "token_logprobs_forward",
        (logits, targets, statistics),
        (*logits.shape, vocab_start, temperature),
    )
    return statistics


def new_token_statistics(logits: Tensor, *_: object) -> Tensor:
    """`[4, tokens]` float32."""
    return logits.new_empty(4, len(logits), dtype=torch.float32)


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
    """The gradient of a slice's logits."""
    name, targets = "token_logprobs_backward", targets.contiguous()
    _check(name, (logits,), indices=(targets,))
    gradients = (grad_logprobs, grad_entropy)
    per_token = numbers_of_tokens(name, (logsumexp, entropy), gradients, logits.device)
    out = torch.empty_like(logits)
    launchers(logits.device).launch(
        name,
        (logits, targets, *per_token, out),
        (*logits.shape, vocab_start, temperature),
    )
    return out


def all_reduce(message: Tensor, regions: Sequence[Tensor], rank: int) -> None:
    """Adds up what the ranks have in `message`, in place.

    Args:
        message: At most `ALL_REDUCE_BYTES`, a multiple of 16 bytes, the same shape on all ranks.
        regions: `[all_reduce_region_bytes]` uint8 of every rank, in the order of the ranks, as this
            device sees them; see `megachat.ops.peer_memory`.
        rank: This one.

    Raises:
        KernelError: It is nothing that the kernel can read.
    """
    name, device = "all_reduce", message.device
    check_tensors(name, [message], device=device, dtypes=tuple(_FORMATS))
    _check(name, (message.view(-1),))
    check_tensors(name, regions, device=device, dtypes=(torch.uint8,))
    needed = all_reduce_region_bytes(device)
    if any(region.nbytes < needed for region in regions):
        sizes = [region.nbytes for region in regions]
        raise KernelError(f"{name} needs regions of {needed} bytes, got {sizes}")
    launchers(device).launch(
        name,
        (message, message, regions),
        (rank, len(regions), message.numel(), ALL_REDUCE_BYTES),
    )


def all_reduce_region_bytes(device: torch.device) -> int:
    """What each rank provides for `all_reduce`, zeroed."""
    return launchers(device).ask("all_reduce_region", ALL_REDUCE_BYTES)


def _check(
    name: str,
    tensors: Sequence[Tensor],
    *,
    indices: Sequence[Tensor] = (),
    tables: Tensor | None = None,
) -> None:
    """Refuses what a kernel would misread.

    Raises:
        KernelError: A tensor is elsewhere, of another dtype, not contiguous or not in packs.
    """
    leader = tensors[0]
    check_tensors(
        name,
        tensors,
        device=leader.device,
        dtypes=tuple(_FORMATS),
        indices=indices,
        tables=tables,
    )
    for tensor in tensors:
        row_bytes = tensor.shape[-1] * tensor.element_size()
        if tensor.data_ptr() % _PACK_BYTES or row_bytes % _PACK_BYTES:
            raise KernelError(
                f"{name} reads {_PACK_BYTES} bytes at once, and a tensor of shape "
                f"{list(tensor.shape)} has rows of {row_bytes} bytes or starts between two such "
                'packs: use backend = "reference" for this model'
            )


def _workspace(like: Tensor, num_bytes: int) -> Tensor | None:
    """Memory of a call; None for none."""
    return like.new_empty(num_bytes, dtype=torch.uint8) if num_bytes else None
