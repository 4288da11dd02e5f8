"""The one place for the weights that generation reads: `GenerationWeights`.

Filled from an `OptModel` whose training layout is its generation layout, or from the arena into
which training shards were gathered. Always views: generation holds no weights of its own.
"""

from dataclasses import dataclass, fields
from typing import Protocol, Self

from torch import Tensor
from torch.distributed import ProcessGroup

from megachat.errors import LayoutError
from megachat.model.config import POSITION_OFFSET, OptConfig
from megachat.model.opt import OptModel


class ReplicaCommunicators(Protocol):
    """The two groups that generation talks in; `ProcessGroups` has them."""

    @property
    def tensor(self) -> ProcessGroup:
        """Ranks that share one copy of the model, in the order of their shards."""

    @property
    def data(self) -> ProcessGroup:
        """Ranks with the same shard of the copies that answer different prompts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationLayer:
    """One transformer layer of a generation shard; `tp` is the generation tensor degree."""

    norm1_weight: Tensor
    """`[hidden]`."""
    norm1_bias: Tensor
    """`[hidden]`."""
    qkv_weight: Tensor
    """`[3 x hidden/tp, hidden]`, rows by head, and within a head query, key, value."""
    qkv_bias: Tensor
    """`[3 x hidden/tp]`."""
    proj_weight: Tensor
    """`[tiles, hidden, hidden/tp/tiles]`: each tile is one training rank's."""
    proj_bias: Tensor
    """`[hidden]`, added once, after the sum over the tensor group."""
    norm2_weight: Tensor
    """`[hidden]`."""
    norm2_bias: Tensor
    """`[hidden]`."""
    fc1_weight: Tensor
    """`[ffn/tp, hidden]`."""
    fc1_bias: Tensor
    """`[ffn/tp]`."""
    fc2_weight: Tensor
    """`[tiles, hidden, ffn/tp/tiles]`."""
    fc2_bias: Tensor
    """`[hidden]`, added once, after the sum over the tensor group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationWeights:
    """This rank's share of a whole language model under a layout without pipeline stages."""

    config: OptConfig
    groups: ReplicaCommunicators
    """Of the generation layout."""
    layers: tuple[GenerationLayer, ...]
    words: Tensor
    """`[padded_vocab/tp, embed_dim]`, input and output embedding."""
    positions: Tensor
    """`[max_positions + 2, hidden]`; position 0 is row 2."""
    project_in: Tensor | None
    """`[hidden, embed_dim]`; None where the embedding is as wide as the model."""
    project_out: Tensor | None
    """`[embed_dim, hidden]`; None like `project_in`."""
    final_norm_weight: Tensor | None
    """`[hidden]`; None for a post-LN model."""
    final_norm_bias: Tensor | None
    """`[hidden]`; None for a post-LN model."""

    def __post_init__(self) -> None:
        """Checks that every tensor has the shape that the architecture and the layout ask for.

        Raises:
            LayoutError: A layer is missing, or a shape does not fit the tensor degree.
        """
        if len(self.layers) != self.config.layers:
            raise LayoutError(
                f"generation has the weights of {len(self.layers)} layers, the model has "
                f"{self.config.layers}: gather all pipeline stages"
            )
        for number, layer in enumerate(self.layers):
            self._check_layer(number, layer)
        config, tensor = self.config, self.tensor_degree
        rows = self.words.shape[0]
        if rows * tensor < config.vocab_size:
            raise LayoutError(
                f"{tensor} ranks hold {rows} vocabulary rows each, the model has "
                f"{config.vocab_size}: raise the padding of the vocabulary"
            )
        _check_shape("words", self.words, (rows, config.embed_dim))
        width = (config.max_positions + POSITION_OFFSET, config.hidden)
        _check_shape("positions", self.positions, width)

    @classmethod
    def from_model(cls, model: OptModel) -> Self:
        """Views of a model's parameters, which must be a language model's on one stage.

        Raises:
            LayoutError: The model is cut into pipeline stages.
        """
        layout = model.groups.layout
        if layout.pipeline > 1:
            raise LayoutError(
                f"generation needs whole models, but layout {layout} cuts the actor into "
                f"{layout.pipeline} pipeline stages: use pipeline degree 1"
            )
        embedding, output = model.embedding_weights(), model.output_weights()
        assert embedding is not None and output is not None, "one stage holds everything"
        assert output.words is not None, "generation needs a language-model head"
        return cls(
            config=model.config,
            groups=model.groups,
            layers=tuple(
                GenerationLayer(
                    norm1_weight=layer.norm1_weight,
                    norm1_bias=layer.norm1_bias,
                    qkv_weight=layer.qkv_weight,
                    qkv_bias=layer.qkv_bias,
                    proj_weight=layer.proj_weight.detach().unsqueeze(0),
                    proj_bias=layer.proj_bias,
                    norm2_weight=layer.norm2_weight,
                    norm2_bias=layer.norm2_bias,
                    fc1_weight=layer.fc1_weight,
                    fc1_bias=layer.fc1_bias,
                    fc2_weight=layer.fc2_weight.detach().unsqueeze(0),
                    fc2_bias=layer.fc2_bias,
                )
                for layer in model.layer_weights()
            ),
            words=output.words,
            positions=embedding.positions,
            project_in=embedding.project_in,
            project_out=output.project_out,
            final_norm_weight=output.norm_weight,
            final_norm_bias=output.norm_bias,
        )

    @property
    def tensor_degree(self) -> int:
        """Ranks that share one copy of the model."""
        return self.groups.tensor.size()

    @property
    def vocab_start(self) -> int:
        """First vocabulary id of this rank's slice."""
        return self.groups.tensor.rank() * self.words.shape[0]

    @property
    def local_vocab(self) -> int:
        """Vocabulary ids of this rank's slice that mean something; the rest is padding."""
        rows = self.words.shape[0]
        return min(max(self.config.vocab_size - self.vocab_start, 0), rows)

    def addresses(self) -> tuple[int, ...]:
        """Where each tensor lies: equal for as long as recorded work on them is valid."""
        parts: tuple[GenerationWeights | GenerationLayer, ...] = (self, *self.layers)
        return tuple(
            value.data_ptr()
            for part in parts
            for field in fields(part)
            if isinstance(value := getattr(part, field.name), Tensor)
        )

    def _check_layer(self, number: int, layer: GenerationLayer) -> None:
        config, tensor = self.config, self.tensor_degree
        hidden, width, ffn = config.hidden, config.hidden // tensor, config.ffn // tensor
        proj, fc2 = len(layer.proj_weight), len(layer.fc2_weight)
        for name, found, expected in (
            ("norm1.weight", layer.norm1_weight, (hidden,)),
            ("norm1.bias", layer.norm1_bias, (hidden,)),
            ("qkv.weight", layer.qkv_weight, (3 * width, hidden)),
            ("qkv.bias", layer.qkv_bias, (3 * width,)),
            ("proj.weight", layer.proj_weight, (proj, hidden, width // proj)),
            ("proj.bias", layer.proj_bias, (hidden,)),
            ("norm2.weight", layer.norm2_weight, (hidden,)),
            ("norm2.bias", layer.norm2_bias, (hidden,)),
            ("fc1.weight", layer.fc1_weight, (ffn, hidden)),
            ("fc1.bias", layer.fc1_bias, (ffn,)),
            ("fc2.weight", layer.fc2_weight, (fc2, hidden, ffn // fc2)),
            ("fc2.bias", layer.fc2_bias, (hidden,)),
        ):
            _check_shape(f"layers.{number}.{name}", found, expected)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise LayoutError(
            f"generation weight {name} has shape {list(tensor.shape)}, the layout needs "
            f"{list(expected)}: gather it for this layout"
        )
