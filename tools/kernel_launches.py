"""The one place for what a decode step launches: calls, configurations, and bytes they must move.

A launcher is asked with the shapes of a real model what it would launch: its source is compiled by
g++ with a `MEGACHAT_LAUNCH` that notes grid, block and shared memory and runs nothing. No pointer
that it gets is ever followed.
"""

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from megachat.errors import KernelError
from megachat.model.config import OPT_MODELS, VOCAB_MULTIPLE
from megachat.ops.cuda_kernels import ALL_REDUCE_BYTES
from tools.build_cache import BuildCache, digest_of

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
CACHE = BuildCache()
MULTIPROCESSORS = 108
"""Of the GPU for which splits are chosen, an A100."""
BLOCK_SIZE = 16
"""Tokens of a cache page."""
FP32_BYTES = 4
BIAS_READERS = 1024
"""Blocks of bias_relu that go down the tokens, each with the bias in its registers."""

Argument = int | float | ctypes.c_void_p | None


class Format(IntEnum):
    """megachat::Format."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2

    @property
    def num_bytes(self) -> int:
        """Of an element."""
        return 4 if self is Format.FLOAT32 else 2

    @property
    def cuda_name(self) -> str:
        """How a kernel's mangled name begins its template arguments."""
        return {"FLOAT32": "If", "BFLOAT16": "I13__nv_bfloat16", "FLOAT16": "I6__half"}[self.name]

    @property
    def label(self) -> str:
        """What tables call it."""
        return {"FLOAT32": "fp32", "BFLOAT16": "bf16", "FLOAT16": "fp16"}[self.name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A decode step: one rank's share of a model, and what it is asked for."""

    name: str
    hidden: int
    ffn: int
    heads: int
    head_dim: int
    vocab: int
    """Padded columns of this rank."""
    layers: int
    ranks: int
    rows: int
    context: int
    """Tokens that each row attends to, the new one included."""

    @property
    def local(self) -> int:
        """Columns of this rank's heads."""
        return self.heads * self.head_dim

    @property
    def columns(self) -> int:
        """Pages of a row."""
        return -(-self.context // BLOCK_SIZE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What one kernel is launched with."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A launcher's call, as often as a decode step makes it, and the bytes of one call."""

    op: str
    source: str
    function: str
    arguments: tuple[Argument, ...]
    times: int
    asked: int
    """What its blocks' loads and stores add up to, wherever caches answer them; each block's own
    second reads of a few bytes are left out."""
    least: int
    """What any implementation has to read and write once."""

    def launches(self) -> tuple[Launch, ...]:
        """What it comes to.

        Raises:
            KernelError: The launcher refuses the arguments.
        """
        library = _recording(self.source)
        library.recorder_clear()
        code = getattr(library, self.function)(*map(_as_c, self.arguments))
        if code != 0:
            raise KernelError(f"{self.function} refuses {self.op}: it returned {code}")
        return tuple(_parsed(library.recorder_launches().decode()))


def shape_of(model: str, *, ranks: int = 1, rows: int = 32, context: int = 512) -> Shape:
    """One tensor rank's share of a published model."""
    config = OPT_MODELS[model]
    multiple = VOCAB_MULTIPLE * ranks
    return Shape(
        name=model.removeprefix("facebook/"),
        hidden=config.hidden,
        ffn=config.ffn // ranks,
        heads=config.heads // ranks,
        head_dim=config.head_dim,
        vocab=-(-config.vocab_size // multiple) * multiple // ranks,
        layers=config.layers,
        ranks=ranks,
        rows=rows,
        context=context,
    )


def decode_calls(shape: Shape, number: Format) -> list[Call]:
    """The calls of a decode step, in their order."""
    builders: tuple[Callable[[Shape, Format], list[Call]], ...] = (
        _products,
        _append,
        _attention,
        _norms,
        _all_reduces,
        _sampling,
    )
    return [call for build in builders for call in build(shape, number)]


def other_calls(shape: Shape, number: Format) -> list[Call]:
    """Calls of the kernels that no decode step makes: a prompt of the context, and scoring it."""
    size, tokens, width = number.num_bytes, shape.context, shape.vocab
    queries = 32 if number is Format.FLOAT32 else 64
    starts = range(0, tokens, queries)
    seen = sum(min(start + queries, tokens) for start in starts)
    pointers = (_pointer(),) * 7
    prefill = Call(
        op="attention of a prompt",
        source="paged_attention_prefill",
        function="megachat_paged_attention_prefill",
        arguments=(
            *(int(number), *pointers, tokens, 1, shape.heads, shape.head_dim),
            *(BLOCK_SIZE, shape.columns, None),
        ),
        times=shape.layers,
        asked=2 * (seen + tokens) * shape.local * size,
        least=4 * tokens * shape.local * size,
    )
    logits = tokens * width * size
    forward = Call(
        op="log-probabilities",
        source="token_logprobs",
        function="megachat_token_logprobs_forward",
        arguments=(int(number), *pointers[:3], tokens, width, 0, 1.0, None),
        times=1,
        asked=logits + 4 * tokens * FP32_BYTES,
        least=logits + 4 * tokens * FP32_BYTES,
    )
    backward = Call(
        op="gradient of log-probabilities",
        source="token_logprobs",
        function="megachat_token_logprobs_backward",
        arguments=(int(number), *pointers[:7], tokens, width, 0, 1.0, None),
        times=1,
        asked=2 * logits + 4 * tokens * FP32_BYTES,
        least=2 * logits + 4 * tokens * FP32_BYTES,
    )
    relu = Call(
        op="bias and ReLU",
        source="bias_relu",
        function="megachat_bias_relu",
        arguments=(int(number), *pointers[:3], tokens, shape.ffn, None),
        times=shape.layers,
        asked=(2 * tokens + min(tokens, BIAS_READERS)) * shape.ffn * size,
        least=(2 * tokens + 1) * shape.ffn * size,
    )
    return [prefill, relu, forward, backward]


def _products(shape: Shape, number: Format) -> list[Call]:
    """A weight is read once for 64 tokens, the tokens once for every 64 of its rows.

    A bias is read with each result.
    """
    wanted = (
        ("QKV product", 3 * shape.local, shape.hidden, shape.layers, False),
        ("attention output product", shape.hidden, shape.local, shape.layers, False),
        ("first MLP product, bias, ReLU", shape.ffn, shape.hidden, shape.layers, True),
        ("second MLP product", shape.hidden, shape.ffn, shape.layers, False),
        ("logits", shape.vocab, shape.hidden, 1, False),
    )
    size, rows = number.num_bytes, shape.rows
    splits_of = _recording("tiled_linear").megachat_tiled_linear_splits
    calls = []
    for op, outputs, width, times, fused in wanted:
        splits = splits_of(int(number), rows, 1, outputs, width, MULTIPROCESSORS)
        parts = 2 * splits * rows * outputs * FP32_BYTES if splits > 1 else 0
        bias = _pointer() if fused else None
        weight, result = outputs * width * size, rows * outputs * size
        bias_bytes = outputs * size if fused else 0
        calls.append(
            Call(
                op=op,
                source="tiled_linear",
                function="megachat_tiled_linear",
                arguments=(
                    *(int(number), _pointer(), _pointer(), bias, _pointer(), _pointer()),
                    *(outputs * width, width, rows, 1, outputs, width, int(fused), splits, None),
                ),
                times=times,
                asked=-(-rows // 64) * weight
                + -(-outputs // 64) * rows * width * size
                + rows * bias_bytes
                + result
                + parts,
                least=weight + rows * width * size + bias_bytes + result,
            )
        )
    return calls


def _append(shape: Shape, number: Format) -> list[Call]:
    width, rows, size = 3 * shape.local, shape.rows, number.num_bytes
    call = Call(
        op="QKV bias, keys and values into pages",
        source="kv_append",
        function="megachat_kv_append",
        arguments=(int(number), *(_pointer(),) * 6, rows, shape.heads, shape.head_dim, None),
        times=shape.layers,
        asked=3 * rows * width * size + 8 * rows,
        least=(2 * rows + 1) * width * size + 8 * rows,
    )
    return [call]


def _attention(shape: Shape, number: Format) -> list[Call]:
    rows, size = shape.rows, number.num_bytes
    library = _recording("paged_attention_decode")
    splits = library.megachat_paged_attention_decode_splits(
        rows, shape.heads, shape.columns, BLOCK_SIZE, MULTIPROCESSORS
    )
    parts = rows * shape.heads * splits * (shape.head_dim + 2) * FP32_BYTES if splits > 1 else 0
    cache = 2 * rows * shape.context * shape.local * size
    vectors, indices = rows * shape.local * size, 4 * rows * shape.columns + 8 * rows
    call = Call(
        op="attention",
        source="paged_attention_decode",
        function="megachat_paged_attention_decode",
        arguments=(
            *(int(number), *(_pointer(),) * 7, rows, shape.heads, shape.head_dim, BLOCK_SIZE),
            *(shape.columns, splits, None),
        ),
        times=shape.layers,
        asked=cache + (splits + 1) * vectors + shape.heads * indices + 2 * parts,
        least=cache + 2 * vectors + indices,
    )
    return [call]


def _norms(shape: Shape, number: Format) -> list[Call]:
    rows, size = shape.rows, number.num_bytes
    call = Call(
        op="bias, residual, LayerNorm",
        source="bias_residual_layer_norm",
        function="megachat_bias_residual_layer_norm",
        arguments=(int(number), *(_pointer(),) * 7, rows, shape.hidden, 1e-5, None),
        times=2 * shape.layers,
        asked=7 * rows * shape.hidden * size,
        least=(4 * rows + 3) * shape.hidden * size,
    )
    return [call]


def _all_reduces(shape: Shape, number: Format) -> list[Call]:
    """Each rank puts its message into its own region, then reads the messages of all.

    One that is longer than the kernel takes is NCCL's.
    """
    elements = shape.rows * shape.hidden
    size = elements * number.num_bytes
    if shape.ranks == 1 or size > ALL_REDUCE_BYTES:
        return []
    regions = (ctypes.c_void_p * shape.ranks)(*[_SOMEWHERE] * shape.ranks)
    call = Call(
        op="all-reduce",
        source="all_reduce",
        function="megachat_all_reduce",
        arguments=(
            *(int(number), _pointer(), _pointer(), ctypes.cast(regions, ctypes.c_void_p)),
            *(0, shape.ranks, elements, ALL_REDUCE_BYTES, None),
        ),
        times=2 * shape.layers,
        asked=(3 + shape.ranks) * size,
        least=2 * size,
    )
    return [call]


def _sampling(shape: Shape, number: Format) -> list[Call]:
    """Without truncation: the maximum, the sum, the groups' masses, then 128 tokens."""
    rows, size = shape.rows, number.num_bytes
    sample = Call(
        op="choice of a token",
        source="sample",
        function="megachat_sample",
        arguments=(
            *(int(number), _pointer(), _pointer(), _pointer(), *(None,) * 5, _pointer()),
            *(rows, shape.vocab, shape.vocab, 0, 0, 0, 1, 0, 0, 1.0, 1.0, 1.0, None),
        ),
        times=1,
        asked=rows * (3 * shape.vocab * size + VOCAB_MULTIPLE * size + 32),
        least=rows * (shape.vocab * size + 32),
    )
    combine = Call(
        op="choice among ranks",
        source="sample_combine",
        function="megachat_sample_combine",
        arguments=(_pointer(), _pointer(), _pointer(), shape.ranks, rows, None),
        times=1,
        asked=rows * (32 * shape.ranks + 12),
        least=rows * (32 * shape.ranks + 12),
    )
    return [sample, combine]


_SOMEWHERE = 1 << 20
"""An aligned address. Launchers look no further than that."""


def _pointer() -> ctypes.c_void_p:
    return ctypes.c_void_p(_SOMEWHERE)


def _as_c(argument: Argument) -> object:
    """An `int` parameter takes the low half of 64 bits on x86-64."""
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_void_p(None) if argument is None else argument


_RECORDER = """
#include <string>
#include "{include}/device.h"
static std::string launches;
static void record(const char* kernel, dim3 grid, dim3 block, size_t shared) {{
  launches += kernel;
  for (size_t n : {{size_t(grid.x), size_t(grid.y), size_t(grid.z),
                    size_t(block.x) * block.y * block.z, shared}}) {{
    launches += " " + std::to_string(n);
  }}
  launches += "\\n";
}}
#undef MEGACHAT_LAUNCH
#define MEGACHAT_LAUNCH(kernel, grid, block, shared, stream, ...) \\
  ((void)(stream), record(#kernel, grid, block, shared))
namespace simt {{
ThreadIndices indices;
cudaError_t take_last_error() {{ return cudaSuccess; }}
}}
MEGACHAT_EXPORT void recorder_clear() {{ launches.clear(); }}
MEGACHAT_EXPORT const char* recorder_launches() {{ return launches.c_str(); }}
#include "{source}"
"""


_FLAGS = ("-std=c++17", "-O0", "-w", "-fPIC", "-shared", "-fvisibility=hidden")


@functools.cache
def _recording(source: str) -> ctypes.CDLL:
    """A source's launchers, which note what they would launch."""
    path = KERNELS / "cuda" / f"{source}.cu"
    inputs = (path, *sorted(KERNELS.glob("include/*.h")), *sorted(KERNELS.glob("emulator/*.h")))
    name = f"{source}-recorder.so"

    def make(folder: Path) -> None:
        text = _RECORDER.format(include=KERNELS / "include", source=path)
        with tempfile.TemporaryDirectory() as scratch:
            unit = Path(scratch, "recorder.cpp")
            unit.write_text(text, encoding="utf-8")
            _compile(unit, folder / name, path)

    key = digest_of([_RECORDER, *_FLAGS, _compiled_by()], inputs)
    target = CACHE.folder_of(key, make) / name
    library = ctypes.CDLL(str(target), mode=ctypes.DEFAULT_MODE)
    library.recorder_launches.restype = ctypes.c_char_p
    return library


def _compile(unit: Path, library: Path, source: Path) -> None:
    ran = _gxx(*_FLAGS, str(unit), "-o", str(library))
    if ran.returncode != 0:
        raise KernelError(f"g++ cannot compile the launchers of {source}: {ran.stderr[:300]}")


def _gxx(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["g++", *arguments], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise KernelError("g++ is not on PATH: it compiles the kernels' launchers") from error


@functools.cache
def _compiled_by() -> str:
    return _gxx("--version").stdout


def _parsed(text: str) -> Iterator[Launch]:
    for line in text.splitlines():
        name, *numbers = line.rsplit(" ", 5)
        found = re.search(r"\w+_kernel", name)
        if found is None:
            raise KernelError(f"a launcher launches {name!r}, whose name does not end in _kernel")
        x, y, z, threads, shared = map(int, numbers)
        yield Launch(kernel=found.group(), grid=(x, y, z), threads=threads, shared_bytes=shared)
