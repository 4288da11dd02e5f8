"""The one place for what an OPT model is: its sizes, its HuggingFace form and how it is to be run.

`OptConfig` is the architecture (Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language
Models", table 1); `ModelOptions` is how one role runs it. Both are pure values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import isfinite, lcm
from typing import TYPE_CHECKING, Any

from megachat.errors import ConfigError, LayoutError
from megachat.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    import torch

POSITION_OFFSET = 2
"""OPT's position table starts with this many rows that no position uses."""

VOCAB_MULTIPLE = 128
"""Each tensor rank's rows of the vocabulary are a multiple of this (matrix tiles stay full)."""


class Head(StrEnum):
    """What the last pipeline stage computes."""

    LANGUAGE_MODEL = "language_model"
    """Logits over the vocabulary, with the tied input embedding."""
    SCALAR = "scalar"
    """One number per position: reward and value models."""


class Recompute(StrEnum):
    """Which activations are recomputed in the backward pass."""

    NONE = "none"
    FULL = "full"
    """Keeps each layer's input only."""


class NormBackend(StrEnum):
    """Which kernel computes layer norms."""

    TORCH = "torch"
    APEX = "apex"
    """NVIDIA apex's fused kernel; refused where it cannot be imported."""


def _float32() -> "torch.dtype":
    import torch  # here and not above: architectures are pure, and plans do not wait for torch

    return torch.float32


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOptions:
    """How one role runs its model; nothing here changes what the weights mean."""

    dtype: "torch.dtype" = field(default_factory=_float32)
    """Of parameters and activations."""
    sequence_parallel: bool = False
    """Shards activations between the matrix products along the sequence over the tensor group."""
    recompute: Recompute = Recompute.NONE
    hidden_dropout: float = 0.0
    """Probability on the output of each attention and each MLP, before the residual sum."""
    attention_dropout: float = 0.0
    """Probability on attention weights. Above zero, attention keeps `[seq, seq]` weights."""
    norm_backend: NormBackend = NormBackend.TORCH
    vocab_multiple: int = 1
    """Of the padded vocabulary, beside the layout's own needs; see `vocab_multiple_for`."""

    def __post_init__(self) -> None:
        """Refuses probabilities outside [0, 1) and dtypes no OPT is trained in."""
        import torch

        for name, value in (
            ("hidden_dropout", self.hidden_dropout),
            ("attention_dropout", self.attention_dropout),
        ):
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"{name} is {value}: expected a probability in [0, 1)")
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(f"dtype is {self.dtype}: expected float32, bfloat16 or float16")
        if self.vocab_multiple < 1:
            raise ConfigError(f"vocab_multiple is {self.vocab_multiple}: expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptConfig:
    """The architecture of one OPT model."""

    vocab_size: int = 50272
    """Rows of the word embedding that mean something, before padding."""
    max_positions: int = 2048
    """Longest sequence."""
    hidden: int
    ffn: int
    layers: int
    heads: int
    embed_dim: int
    """Width of the word embedding; `project_in` and `project_out` bridge to `hidden` if it differs.
    """
    layer_norm_first: bool = True
    """False: each norm follows its residual sum and there is no final norm (OPT-350m)."""
    dropout: float = 0.1
    """What the model was trained with; what a run uses is `ModelOptions.hidden_dropout`."""
    attention_dropout: float = 0.0
    init_std: float = 0.006
    pad_id: int = 1
    bos_id: int = 2
    eos_id: int = 2

    def __post_init__(self) -> None:
        """Refuses sizes that describe no transformer."""
        for name, value in (
            ("vocab_size", self.vocab_size),
            ("max_positions", self.max_positions),
            ("hidden", self.hidden),
            ("ffn", self.ffn),
            ("layers", self.layers),
            ("heads", self.heads),
            ("embed_dim", self.embed_dim),
        ):
            if value < 1:
                raise ConfigError(f"model {name} is {value}: expected at least 1")
        if self.hidden % self.heads:
            raise ConfigError(
                f"model hidden {self.hidden} is not a multiple of heads {self.heads}: "
                "change one of them"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def has_projection(self) -> bool:
        """Whether `project_in` and `project_out` exist."""
        return self.embed_dim != self.hidden

    @property
    def num_parameters(self) -> int:
        """Parameters of the language model, the tied embedding counted once, without padding."""
        embeddings = self.vocab_size * self.embed_dim
        embeddings += (self.max_positions + POSITION_OFFSET) * self.hidden
        projections = 2 * self.embed_dim * self.hidden if self.has_projection else 0
        final_norm = 2 * self.hidden if self.layer_norm_first else 0
        attention = 4 * self.hidden * self.hidden + 4 * self.hidden
        mlp = 2 * self.hidden * self.ffn + self.ffn + self.hidden
        return (
            embeddings
            + projections
            + final_norm
            + self.layers * (attention + mlp)
            + (self.layers * 4 * self.hidden)
        )

    def padded_vocab(self, tensor: int, *, vocab_multiple: int = 1) -> int:
        """Rows of the word embedding so that `tensor` ranks get equal, aligned shares.

        Args:
            tensor: Tensor degree of the layout.
            vocab_multiple: The result is a multiple of it too, for a second layout of the weights.
        """
        multiple = lcm(VOCAB_MULTIPLE * tensor, vocab_multiple)
        return -(-self.vocab_size // multiple) * multiple

    def layers_of_stage(self, stage: int, *, pipeline: int) -> range:
        """Global numbers of the layers that one of `pipeline` equal stages holds."""
        share = self.layers // pipeline
        return range(stage * share, (stage + 1) * share)

    def validate_layout(self, layout: ParallelLayout) -> None:
        """Checks that a layout cuts this model into equal parts.

        Raises:
            LayoutError: Heads, MLP width or layers are not a multiple of the degree that cuts them.
        """
        for what, size, axis, degree in (
            ("attention heads", self.heads, "tensor", layout.tensor),
            ("ffn width", self.ffn, "tensor", layout.tensor),
            ("layers", self.layers, "pipeline", layout.pipeline),
        ):
            if size % degree:
                raise LayoutError(
                    f"{what} {size} are not a multiple of {axis} degree {degree} of layout "
                    f"{layout}: choose a {axis} degree that divides {size}"
                )

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any]) -> "OptConfig":
        """Reads the content of a HuggingFace `config.json`.

        Raises:
            ConfigError: Not an OPT model, a missing or malformed entry, or a variant of OPT that
                megachat does not implement.
        """
        _refuse_variants(values)
        hidden = _integer(values, "hidden_size")
        return cls(
            vocab_size=_integer(values, "vocab_size"),
            max_positions=_integer(values, "max_position_embeddings"),
            hidden=hidden,
            ffn=_integer(values, "ffn_dim"),
            layers=_integer(values, "num_hidden_layers"),
            heads=_integer(values, "num_attention_heads"),
            embed_dim=_integer(values, "word_embed_proj_dim", default=hidden),
            layer_norm_first=_flag(values, "do_layer_norm_before", default=True),
            dropout=_number(values, "dropout", default=0.1),
            attention_dropout=_number(values, "attention_dropout", default=0.0),
            init_std=_number(values, "init_std", default=0.006),
            pad_id=_integer(values, "pad_token_id", default=1),
            bos_id=_integer(values, "bos_token_id", default=2),
            eos_id=_integer(values, "eos_token_id", default=2),
        )

    def to_huggingface(self, *, head: Head, dtype: "torch.dtype") -> dict[str, Any]:
        """The content of a `config.json` that `transformers` reads as the same model."""
        architecture = {
            Head.LANGUAGE_MODEL: "OPTForCausalLM",
            Head.SCALAR: "OPTForSequenceClassification",
        }[head]
        values: dict[str, Any] = {
            "architectures": [architecture],
            "model_type": "opt",
            "activation_function": "relu",
            "attention_dropout": self.attention_dropout,
            "bos_token_id": self.bos_id,
            "do_layer_norm_before": self.layer_norm_first,
            "dropout": self.dropout,
            "dtype": str(dtype).removeprefix("torch."),
            "enable_bias": True,
            "eos_token_id": self.eos_id,
            "ffn_dim": self.ffn,
            "hidden_size": self.hidden,
            "init_std": self.init_std,
            "layer_norm_elementwise_affine": True,
            "layerdrop": 0.0,
            "max_position_embeddings": self.max_positions,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "pad_token_id": self.pad_id,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": self.vocab_size,
            "word_embed_proj_dim": self.embed_dim,
        }
        if head is Head.SCALAR:
            # transformers derives num_labels from the size of this table.
            values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        return values


def vocab_multiple_for(*tensor_degrees: int) -> int:
    """What the vocabulary is padded to if the same rows are to serve several tensor degrees."""
    return VOCAB_MULTIPLE * lcm(*tensor_degrees)


def _opt(*, layers: int, hidden: int, heads: int) -> OptConfig:
    """One of the regular sizes: pre-LN, no projection, MLP four times as wide."""
    return OptConfig(layers=layers, hidden=hidden, heads=heads, ffn=4 * hidden, embed_dim=hidden)


OPT_MODELS: Mapping[str, OptConfig] = {
    "facebook/opt-125m": _opt(layers=12, hidden=768, heads=12),
    "facebook/opt-350m": OptConfig(
        layers=24, hidden=1024, heads=16, ffn=4096, embed_dim=512, layer_norm_first=False
    ),
    "facebook/opt-1.3b": _opt(layers=24, hidden=2048, heads=32),
    "facebook/opt-2.7b": _opt(layers=32, hidden=2560, heads=32),
    "facebook/opt-6.7b": _opt(layers=32, hidden=4096, heads=32),
    "facebook/opt-13b": _opt(layers=40, hidden=5120, heads=40),
    "facebook/opt-30b": _opt(layers=48, hidden=7168, heads=56),
    "facebook/opt-66b": _opt(layers=64, hidden=9216, heads=72),
    "facebook/opt-175b": _opt(layers=96, hidden=12288, heads=96),
}
"""The nine published sizes under their hub names (175B: as published, weights by request)."""

_ONLY_VALUES: Mapping[str, object] = {
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
    "tie_word_embeddings": True,
}
"""Entries of config.json whose other values are variants that no published OPT uses."""


def _refuse_variants(values: Mapping[str, Any]) -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"holds a {type(values).__name__}: expected a JSON object")
    if values.get("model_type") != "opt":
        raise ConfigError(f"model_type is {values.get('model_type')!r}: expected 'opt'")
    for key, expected in _ONLY_VALUES.items():
        value = values.get(key, expected)
        if value != expected:
            raise ConfigError(f"{key} is {value!r}: megachat implements OPT with {expected!r} only")


def _integer(values: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    value = values.get(key, default)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}: expected an integer")
    return value


def _number(values: Mapping[str, Any], key: str, *, default: float) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise ConfigError(f"{key} is {value!r}: expected a number")
    return float(value)


def _flag(values: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {value!r}: expected true or false")
    return value
