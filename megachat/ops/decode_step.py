"""The one place for a whole decode step in one call: `CpuDecodeStep`.

A decode step of one rank is one call of C++ and one parallel region: the threads go through all
phases of all layers together and meet at barriers. Written as operations, the same step is some
hundred calls, each with a parallel region of its own, and the memory idles in between. In a tensor
group the step is cut where its ranks' partial sums are added up: once for the embedding and twice a
layer. The phases are made of the very kernels behind the single operations and round where those
round, so that both ways give the same logits but for the order of sums in a first LayerNorm.
"""

import ctypes
from dataclasses import dataclass

from torch import Tensor

from megachat.errors import KernelError
from megachat.ops import cpu_kernels
from megachat.ops.all_reduce import GroupSum

MOST_ROWS = 128
"""Sequences of a step. With more of them, products are better left to a large GEMM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLayer:
    """One transformer layer and its cache; `tp` is the tensor degree."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    qkv_weight: Tensor
    """`[3 x hidden/tp, hidden]`, rows by head, and within a head query, key, value."""
    qkv_bias: Tensor
    proj_weight: Tensor
    """`[tiles, hidden, hidden/tp/tiles]`."""
    proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor
    """`[ffn/tp, hidden]`."""
    fc1_bias: Tensor
    fc2_weight: Tensor
    """`[tiles, hidden, ffn/tp/tiles]`."""
    fc2_bias: Tensor
    keys: Tensor
    """`[blocks, block_size, heads/tp, head_dim]`, written."""
    values: Tensor
    """As `keys`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeModel:
    """What a decode step reads besides its rows; nothing of it may move while a step has it."""

    layers: tuple[DecodeLayer, ...]
    words: Tensor
    """`[padded_vocab/tp, embed_dim]`, input and output embedding."""
    positions: Tensor
    """`[rows, hidden]`."""
    position_offset: int
    """Row of position 0."""
    project_in: Tensor | None
    """`[hidden, embed_dim]`; None where the embedding is as wide as the model."""
    project_out: Tensor | None
    """`[embed_dim, hidden]`; None like `project_in`."""
    final_norm_weight: Tensor | None
    """`[hidden]`; None for a post-LN model."""
    final_norm_bias: Tensor | None
    """`[hidden]`; None for a post-LN model."""
    norm_first: bool
    """Pre-LN; else post-LN."""
    epsilon: float
    """Of every LayerNorm."""
    vocab_start: int
    """First vocabulary id of this rank's rows of `words`."""
    local_vocab: int
    """Rows of `words` that mean something; padding follows."""
    group_sum: GroupSum | None
    """Sums over the tensor group; None where this rank is alone."""


class _Matrix(ctypes.Structure):
    """`Matrix` of linear.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("tiles", ctypes.c_int64),
        ("out", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("tile_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, weight: Tensor | None) -> "_Matrix":
        """Of `[out, in]` or `[tiles, out, in/tiles]`.

        Raises:
            KernelError: Its rows are not contiguous.
        """
        if weight is None:
            return cls()
        tiled = weight if weight.ndim == 3 else weight[None]
        if tiled.stride(2) != 1:
            raise KernelError(
                f"a decode step cannot read a weight with strides {weight.stride()}: its rows must "
                "be contiguous"
            )
        return cls(tiled.data_ptr(), *tiled.shape, tiled.stride(0), tiled.stride(1))


_MATRICES = ("qkv", "proj", "fc1", "fc2")
_BIASES = ("qkv_bias", "proj_bias", "fc1_bias", "fc2_bias")
_NORMS = ("norm1_weight", "norm1_bias", "norm2_weight", "norm2_bias")


class _Layer(ctypes.Structure):
    """`Layer` of decode_step.cpp."""

    _fields_ = (
        *((name, _Matrix) for name in _MATRICES),
        *((name, ctypes.c_void_p) for name in (*_BIASES, *_NORMS, "keys", "values")),
    )

    @classmethod
    def of(cls, layer: DecodeLayer) -> "_Layer":
        vectors = [getattr(layer, name) for name in (*_BIASES, *_NORMS)]
        cpu_kernels.check_tensors("decode_step", [*vectors, layer.keys, layer.values])
        return cls(
            *(_Matrix.of(getattr(layer, f"{name}_weight")) for name in _MATRICES),
            *(tensor.data_ptr() for tensor in (*vectors, layer.keys, layer.values)),
        )


class _Model(ctypes.Structure):
    """`Model` of decode_step.cpp."""

    _fields_ = (
        *((name, _Matrix) for name in ("words", "project_in", "project_out")),
        *((name, ctypes.c_void_p) for name in ("positions", "final_weight", "final_bias")),
        ("layers", ctypes.POINTER(_Layer)),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_layers",
                "norm_first",
                "hidden",
                "heads",
                "head_dim",
                "block_size",
                "vocab_start",
                "vocab",
                "position_offset",
            )
        ),
        ("epsilon", ctypes.c_double),
    )

    @classmethod
    def of(cls, model: DecodeModel) -> "_Model":
        layers = (_Layer * len(model.layers))(*(_Layer.of(layer) for layer in model.layers))
        block_size, heads, head_dim = model.layers[0].keys.shape[1:]
        return cls(
            *(_Matrix.of(weight) for weight in (model.words, model.project_in, model.project_out)),
            *(
                None if tensor is None else tensor.data_ptr()
                for tensor in (model.positions, model.final_norm_weight, model.final_norm_bias)
            ),
            layers,  # ctypes keeps the array alive
            len(model.layers),
            model.norm_first,
            model.positions.shape[1],
            heads,
            head_dim,
            block_size,
            model.vocab_start,
            model.local_vocab,
            model.position_offset,
            model.epsilon,
        )


_INPUTS = ("tokens", "positions", "slots", "tables", "lengths")
_BUFFERS = ("logits", "partial", "hidden", "normed", "qkv", "query", "mixed", "inner")


class _Step(ctypes.Structure):
    """`Step` of decode_step.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_INPUTS, *_BUFFERS)),
        ("table_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
    )


class CpuDecodeStep:
    """Runs decode steps of one model over one cache; per step, nothing in Python grows with either.

    All addresses are gathered once: who moves weights or cache makes a new one.
    """

    def __init__(self, model: DecodeModel, *, most_rows: int) -> None:
        """Gathers addresses and takes memory for the activations.

        Args:
            model: Weights, cache and the sum over the group.
            most_rows: Sequences of a step at most; no more than `MOST_ROWS` are ever taken.

        Raises:
            KernelError: A tensor is of a kind that the kernels cannot read.
        """
        cpu_kernels.check_tensors("decode_step", [model.words, model.positions])
        self.most_rows = min(most_rows, MOST_ROWS)
        self._model = model  # keeps every tensor alive
        self._dtype = model.words.dtype
        self._structure = _Model.of(model)
        first, hidden = model.layers[0], model.positions.shape[1]
        heads = first.keys[0, 0].numel()
        widths = {
            "logits": model.words.shape[0],
            "partial": max(hidden, model.words.shape[1]),
            "hidden": hidden,
            "normed": hidden,
            "qkv": 3 * heads,
            "query": heads,
            "mixed": heads,
            "inner": first.fc1_weight.shape[0],
        }
        self._buffers = {
            name: model.words.new_empty(self.most_rows * width) for name, width in widths.items()
        }
        self._step = _Step(**{name: buffer.data_ptr() for name, buffer in self._buffers.items()})
        # What a segment leaves behind for the tensor group to add up is as wide as this.
        self._partial_widths = (model.words.shape[1], hidden)

    def run(
        self, tokens: Tensor, *, positions: Tensor, slots: Tensor, tables: Tensor, lengths: Tensor
    ) -> Tensor:
        """One step; a collective call of the tensor group.

        Args:
            tokens: `[rows]` int64, of at most `most_rows` rows.
            positions: `[rows]` int64, within each token's sequence.
            slots: `[rows]` int64, where the cache keeps each token; no two alike.
            tables: `[rows, columns]` int32, blocks of each row's sequence.
            lengths: `[rows]` int64 tokens to attend to, the new one included.

        Returns:
            `[rows, padded_vocab/tp]` logits, padding columns lowest; overwritten by the next step.

        Raises:
            KernelError: There are too many rows, or a tensor is of the wrong kind.
        """
        rows, step = len(tokens), self._step
        if rows > self.most_rows:
            raise KernelError(f"a decode step of {rows} rows, at most {self.most_rows} fit")
        cpu_kernels.check_tensors(
            "decode_step",
            [self._model.words],
            indices=(tokens, positions, slots, lengths),
            tables=tables,
        )
        for name, tensor in zip(_INPUTS, (tokens, positions, slots, tables, lengths), strict=True):
            setattr(step, name, tensor.data_ptr())
        step.table_stride, step.rows = tables.stride(0), rows
        segments = range(2 * len(self._model.layers) + 2)
        add_up = self._model.group_sum
        if add_up is None:
            self._run(segments)
        else:
            for segment in segments:
                self._run(segments[segment : segment + 1])
                if segment < segments[-1]:
                    width = self._partial_widths[segment > 0]
                    add_up(self._buffers["partial"][: rows * width])
        width = self._model.words.shape[0]
        return self._buffers["logits"][: rows * width].view(rows, width)

    def _run(self, segments: range) -> None:
        cpu_kernels.decode_step(self._structure, self._step, segments=segments, dtype=self._dtype)
