"""The one place for the table of parameters: name, global shape, how it is cut, how it starts.

Everything that moves weights (initialisation, checkpoints, resharding, optimizer state) works from
this table and never from the module tree, so it also works for layouts this process is not in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING

from megachat.model.config import POSITION_OFFSET, Head, OptConfig

if TYPE_CHECKING:
    from torch import Tensor

WORD_EMBEDDING = "embedding.word.weight"
"""The tied embedding: on the first stage, and for a language model on the last stage too."""


class Init(StrEnum):
    """How a parameter starts in a randomly initialised model."""

    NORMAL = "normal"
    """Mean 0, standard deviation `OptConfig.init_std`; padding rows are zero."""
    ZEROS = "zeros"
    ONES = "ones"


class Placement(StrEnum):
    """Which pipeline stage holds a parameter."""

    FIRST_STAGE = "first_stage"
    LAYER = "layer"
    """The stage that holds `TensorSpec.layer`."""
    LAST_STAGE = "last_stage"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """The global view of one parameter, equal on all ranks of all layouts of one tensor degree."""

    name: str
    """Unique in the model, with the global layer number: `layers.3.qkv.weight`."""
    shape: tuple[int, ...]
    """Of the whole tensor, padding rows included."""
    shard_dim: int | None
    """Dimension that tensor ranks cut into equal, consecutive parts; None: each holds all of it."""
    layer: int | None
    """Global number of the transformer layer, from 0; None outside the layers."""
    placement: Placement
    init: Init
    decays: bool
    """Whether weight decay applies: not to biases and norms."""
    padding: int = 0
    """Rows at the end of dim 0 that only even out the shards (word embedding)."""
    tied: bool = False
    """Whether the last pipeline stage holds a copy beside the first stage's."""

    @property
    def unpadded_shape(self) -> tuple[int, ...]:
        """Shape without padding rows: what a HuggingFace file holds."""
        return (self.shape[0] - self.padding, *self.shape[1:])

    @property
    def num_elements(self) -> int:
        """Elements without padding."""
        return prod(self.unpadded_shape)

    def local_shape(self, tensor: int) -> tuple[int, ...]:
        """Shape of one of `tensor` shards."""
        return tuple(
            size // tensor if dim == self.shard_dim else size for dim, size in enumerate(self.shape)
        )

    def slices(self, rank: int, *, tensor: int) -> tuple[slice, ...]:
        """Where the shard of one of `tensor` ranks lies in the whole tensor."""
        local = self.local_shape(tensor)
        return tuple(
            slice(rank * size, (rank + 1) * size) if dim == self.shard_dim else slice(0, size)
            for dim, size in enumerate(local)
        )


def parameter_specs(
    config: OptConfig, *, tensor: int, head: Head, vocab_multiple: int = 1
) -> tuple[TensorSpec, ...]:
    """All parameters of a model in the order of the forward pass, the tied embedding once.

    Args:
        config: The architecture.
        tensor: Tensor degree; it decides how many padding rows the word embedding has.
        head: Adds `head.score.weight` for a scalar head.
        vocab_multiple: `ModelOptions.vocab_multiple` of the model.
    """
    padded = config.padded_vocab(tensor, vocab_multiple=vocab_multiple)
    return (
        *_embedding_specs(config, padded, tied=head is Head.LANGUAGE_MODEL),
        *(spec for layer in range(config.layers) for spec in _layer_specs(config, layer)),
        *_last_stage_specs(config, head),
    )


def stage_specs(
    config: OptConfig,
    *,
    tensor: int,
    pipeline: int,
    stage: int,
    head: Head,
    vocab_multiple: int = 1,
) -> tuple[TensorSpec, ...]:
    """The parameters that each rank of one pipeline stage holds (a shard of).

    The last stage of a language model with several stages has its own copy of the tied embedding,
    listed last.
    """
    specs = parameter_specs(config, tensor=tensor, head=head, vocab_multiple=vocab_multiple)
    held = [spec for spec in specs if stage_of(spec, config, pipeline=pipeline) == stage]
    if 0 < stage == pipeline - 1:
        held += [spec for spec in specs if spec.tied]
    return tuple(held)


def stage_of(spec: TensorSpec, config: OptConfig, *, pipeline: int) -> int:
    """The first of `pipeline` stages that holds a parameter."""
    if spec.layer is None:
        return 0 if spec.placement is Placement.FIRST_STAGE else pipeline - 1
    return spec.layer // (config.layers // pipeline)


def initial_value(spec: TensorSpec, *, seed: int, std: float) -> "Tensor":
    """The whole tensor, fp32 on the CPU, as a new model starts; equal for every layout.

    Random values are drawn for the unpadded shape, so the tensor degree changes nothing but the
    number of zero rows.
    """
    import torch  # here and not above: the table itself is pure, and plans do not wait for torch

    from megachat.parallel.rng import generator_for

    if spec.init is Init.ZEROS:
        return torch.zeros(spec.shape)
    if spec.init is Init.ONES:
        return torch.ones(spec.shape)
    value = torch.zeros(spec.shape)
    value[: spec.unpadded_shape[0]].normal_(std=std, generator=generator_for(seed, spec.name))
    return value


def _embedding_specs(config: OptConfig, padded: int, *, tied: bool) -> Iterator[TensorSpec]:
    yield TensorSpec(
        name=WORD_EMBEDDING,
        shape=(padded, config.embed_dim),
        shard_dim=0,
        layer=None,
        placement=Placement.FIRST_STAGE,
        init=Init.NORMAL,
        decays=True,
        padding=padded - config.vocab_size,
        tied=tied,
    )
    yield _replicated(
        "embedding.position.weight",
        (config.max_positions + POSITION_OFFSET, config.hidden),
        Placement.FIRST_STAGE,
    )
    if config.has_projection:
        yield _replicated(
            "embedding.project_in.weight", (config.hidden, config.embed_dim), Placement.FIRST_STAGE
        )


def _last_stage_specs(config: OptConfig, head: Head) -> Iterator[TensorSpec]:
    if config.layer_norm_first:
        for part, init in (("weight", Init.ONES), ("bias", Init.ZEROS)):
            yield _replicated(f"final_norm.{part}", (config.hidden,), Placement.LAST_STAGE, init)
    if config.has_projection:
        yield _replicated(
            "head.project_out.weight", (config.embed_dim, config.hidden), Placement.LAST_STAGE
        )
    if head is Head.SCALAR:
        yield _replicated("head.score.weight", (1, config.embed_dim), Placement.LAST_STAGE)


def _replicated(
    name: str, shape: tuple[int, ...], placement: Placement, init: Init = Init.NORMAL
) -> TensorSpec:
    """A parameter outside the layers that every tensor rank holds in full."""
    return TensorSpec(
        name=name,
        shape=shape,
        shard_dim=None,
        layer=None,
        placement=placement,
        init=init,
        decays=init is Init.NORMAL,
    )


def _layer_specs(config: OptConfig, layer: int) -> Iterator[TensorSpec]:
    """Rows of `qkv` are ordered by head, and within a head query, key, value (as megatron has it).

    The products are column parallel (`qkv`, `fc1`: rows cut) then row parallel (`proj`, `fc2`:
    columns cut, bias whole).
    """
    hidden, ffn = config.hidden, config.ffn
    for part, shape, shard_dim, init in (
        ("norm1.weight", (hidden,), None, Init.ONES),
        ("norm1.bias", (hidden,), None, Init.ZEROS),
        ("qkv.weight", (3 * hidden, hidden), 0, Init.NORMAL),
        ("qkv.bias", (3 * hidden,), 0, Init.ZEROS),
        ("proj.weight", (hidden, hidden), 1, Init.NORMAL),
        ("proj.bias", (hidden,), None, Init.ZEROS),
        ("norm2.weight", (hidden,), None, Init.ONES),
        ("norm2.bias", (hidden,), None, Init.ZEROS),
        ("fc1.weight", (ffn, hidden), 0, Init.NORMAL),
        ("fc1.bias", (ffn,), 0, Init.ZEROS),
        ("fc2.weight", (hidden, ffn), 1, Init.NORMAL),
        ("fc2.bias", (hidden,), None, Init.ZEROS),
    ):
        yield TensorSpec(
            name=f"layers.{layer}.{part}",
            shape=shape,
            shard_dim=shard_dim,
            layer=layer,
            placement=Placement.LAYER,
            init=init,
            decays=init is Init.NORMAL,
        )
