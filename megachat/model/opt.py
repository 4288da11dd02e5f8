"""The one place for the model itself: one rank's part of an OPT, assembled from `layers`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from megachat.errors import CapacityError, LayoutError
from megachat.model import layers
from megachat.model.config import POSITION_OFFSET, Head, ModelOptions, OptConfig
from megachat.model.dropout import require_dropout_key
from megachat.model.heads import build_head
from megachat.model.packing import RowPacking
from megachat.model.specs import (
    WORD_EMBEDDING,
    TensorSpec,
    initial_value,
    parameter_specs,
    stage_specs,
)
from megachat.parallel.groups import ProcessGroups

_SPEC_NAMES = {
    "embedding.words.weight": WORD_EMBEDDING,
    "embedding.positions": "embedding.position.weight",
    "embedding.project_in": "embedding.project_in.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "decoder.final_layernorm.bias": "final_norm.bias",
    "output.word_embedding": WORD_EMBEDDING,
    "output.project_out": "head.project_out.weight",
    "output.score": "head.score.weight",
}
"""Names in `named_parameters` outside the layers -> names in the specification."""

_LAYER_PARTS = {
    "input_layernorm": "norm1",
    "self_attn_bda.norm": "norm1",
    "self_attention.linear_qkv": "qkv",
    "self_attention.linear_proj": "proj",
    "pre_mlp_layernorm": "norm2",
    "mlp_bda.norm": "norm2",
    "mlp.linear_fc1": "fc1",
    "mlp.linear_fc2": "fc2",
}
"""Names of megatron's submodules of a layer -> parts of names in the specification."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """The parameters of one layer as this rank holds them; views, never copies.

    Pre-LN: norm1 precedes attention and norm2 the MLP. Post-LN: each follows its residual sum.
    """

    layer: int
    """Global number, from 0."""
    norm1_weight: nn.Parameter
    """`[hidden]`."""
    norm1_bias: nn.Parameter
    """`[hidden]`."""
    qkv_weight: nn.Parameter
    """`[3 x hidden/tp, hidden]`, rows by head, and within a head query, key, value."""
    qkv_bias: nn.Parameter
    """`[3 x hidden/tp]`."""
    proj_weight: nn.Parameter
    """`[hidden, hidden/tp]`."""
    proj_bias: nn.Parameter
    """`[hidden]`, to be added once, after the sum over the tensor group."""
    norm2_weight: nn.Parameter
    """`[hidden]`."""
    norm2_bias: nn.Parameter
    """`[hidden]`."""
    fc1_weight: nn.Parameter
    """`[ffn/tp, hidden]`."""
    fc1_bias: nn.Parameter
    """`[ffn/tp]`."""
    fc2_weight: nn.Parameter
    """`[hidden, ffn/tp]`."""
    fc2_bias: nn.Parameter
    """`[hidden]`, to be added once, after the sum over the tensor group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingWeights:
    """The parameters of the first stage outside the layers."""

    words: nn.Parameter
    """`[padded_vocab/tp, embed_dim]`."""
    positions: nn.Parameter
    """`[max_positions + 2, hidden]`; position 0 is row 2."""
    project_in: nn.Parameter | None
    """`[hidden, embed_dim]`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputWeights:
    """The parameters of the last stage outside the layers."""

    norm_weight: nn.Parameter | None
    """`[hidden]`; None for a post-LN model."""
    norm_bias: nn.Parameter | None
    """`[hidden]`; None for a post-LN model."""
    project_out: nn.Parameter | None
    """`[embed_dim, hidden]`."""
    words: nn.Parameter | None
    """`[padded_vocab/tp, embed_dim]`, tied to the first stage's; None for a scalar head."""
    score: nn.Parameter | None
    """`[1, embed_dim]`; None for a language model."""


class OptEmbedding(nn.Module):
    """Token and position embeddings of the first stage."""

    def __init__(
        self, config: OptConfig, *, rows: int, megatron: Any, groups: ProcessGroups
    ) -> None:
        """Creates uninitialised parameters; `rows` is the padded vocabulary."""
        super().__init__()
        dtype = megatron.params_dtype
        self.words = layers.word_embedding(rows, config.embed_dim, megatron=megatron, groups=groups)
        self.positions = layers.empty_parameter(
            config.max_positions + POSITION_OFFSET, config.hidden, dtype=dtype
        )
        self.project_in: nn.Parameter | None = None
        if config.has_projection:
            self.project_in = layers.empty_parameter(config.hidden, config.embed_dim, dtype=dtype)
        self._group = groups.tensor if megatron.sequence_parallel else None

    @property
    def word_weight(self) -> nn.Parameter:
        """`[padded_vocab/tp, embed_dim]`."""
        return cast(nn.Parameter, self.words.weight)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embeds packed tokens; OPT was trained without dropout here.

        Args:
            tokens: `[tokens]` int64 ids.
            positions: `[tokens]` int64, from 0; those of fillers may exceed the model's.

        Returns:
            `[tokens, 1, hidden]` (sequence shard where parallel).
        """
        x: Tensor = self.words(tokens)
        if self.project_in is not None:
            x = nn.functional.linear(x, self.project_in)
        rows = (positions + POSITION_OFFSET).clamp(max=len(self.positions) - 1)
        x = (x + nn.functional.embedding(rows, self.positions)).unsqueeze(1)
        return x if self._group is None else layers.scatter_sequence(x, self._group)


class OptModel(nn.Module):
    """One rank's part of an OPT model with a language-model or scalar head.

    Differs from HuggingFace's in one respect: the row of the padding token in the word embedding
    takes gradients like any other (HuggingFace's `padding_idx` withholds them). Padding is never
    trained on, so no gradient reaches it as an input; as an output it is a token like any other in
    both.
    """

    def __init__(
        self,
        config: OptConfig,
        *,
        groups: ProcessGroups,
        head: Head,
        options: ModelOptions,
        seed: int | None,
    ) -> None:
        """Builds this rank's layers on the current device.

        Args:
            config: The architecture.
            groups: The layout's communicators.
            head: What the last stage computes.
            options: How it runs.
            seed: Of the random initialisation, which is equal for all layouts; None leaves the
                parameters uninitialised, for a checkpoint to fill.

        Raises:
            LayoutError: The layout does not cut the model into equal parts.
            KernelError: An option asks for a kernel that cannot be used here.
        """
        super().__init__()
        config.validate_layout(groups.layout)
        self.config = config
        self.groups = groups
        self.head = head
        self.options = options
        self.transformer_config = layers.transformer_config(
            config, layout=groups.layout, options=options
        )
        self._dropout_key: int | None = None
        self.embedding = (
            OptEmbedding(
                config, rows=self.padded_vocab, megatron=self.transformer_config, groups=groups
            )
            if groups.is_first_stage
            else None
        )
        self.decoder = layers.build_decoder(
            config,
            megatron=self.transformer_config,
            groups=groups,
            norm_backend=options.norm_backend,
        )
        self.output = (
            build_head(
                head,
                config,
                rows=self.padded_vocab // groups.layout.tensor,
                groups=groups,
                dtype=options.dtype,
                sequence=self.transformer_config.sequence_parallel,
            )
            if groups.is_last_stage
            else None
        )
        self._specs = self._match_specs()
        self._mark_parameters()
        if seed is not None:
            self.initialise(seed)

    def forward(self, tokens: Tensor, packing: RowPacking | None = None) -> Tensor:
        """Runs this stage; other stages than the first take their input from `set_input_tensor`.

        Args:
            tokens: `[rows, seq]` int64, right-padded; positions are 0..seq-1.
            packing: Which of them are computed, and where the output is read; None: all of them,
                everywhere.

        Returns:
            Last stage: logits `[outputs, padded_vocab/tp]` in the model's dtype, or scores
            `[outputs]` float32; without packing `[rows, seq, ...]`. Other stages:
            `[tokens, 1, hidden]` for the next stage (`[tokens/tp, 1, hidden]` under sequence
            parallelism).

        Raises:
            CapacityError: More positions than the model has.
            LayoutError: Sequence parallelism cannot cut the sequence evenly.
            ConfigError: Training with dropout without a key.
        """
        rows = packing
        if rows is None:
            rows = RowPacking.of([tokens.shape[1]] * len(tokens), device=tokens.device)
        self._check_length(rows)
        key = None
        if self.training:
            require_dropout_key(self.options, self._dropout_key)
            key = self._dropout_key
        x = None
        if self.embedding is not None:
            x = self.embedding(tokens.flatten()[rows.places], rows.positions)
        x = self.decoder(
            hidden_states=x,
            attention_mask=None,
            attention_bias=key,
            packed_seq_params=layers.PackedRows(packing=rows),
        )
        if self.output is None:
            return cast(Tensor, x)
        words = self.embedding.word_weight if self.embedding is not None else None
        out = cast(Tensor, self.output(x, embedding=words, outputs=rows.outputs))
        return out if packing is not None else out.view(*tokens.shape, *out.shape[1:])

    def set_input_tensor(self, tensor: Tensor | Sequence[Tensor | None] | None) -> None:
        """Takes the previous stage's output, as megatron's schedules hand it over."""
        if tensor is not None and not isinstance(tensor, Tensor):
            tensor = tensor[0]
        self.decoder.set_input_tensor(tensor)

    def set_dropout_key(self, key: int) -> None:
        """Seeds the dropout masks of the next training forward passes; call per micro-batch.

        Masks depend on the key, the layer, the place in it, and on the tensor rank where the masked
        tensor is a shard: equal for all pipeline cuts, with and without recomputation.

        Args:
            key: Any integer that identifies the micro-batch in the run, such as
                `seed_for(run_seed, step, micro_batch)`, equal on all ranks of one model copy.
        """
        self._dropout_key = key

    @property
    def padded_vocab(self) -> int:
        """Rows of the word embedding over all tensor ranks."""
        return self.config.padded_vocab(
            self.groups.layout.tensor, vocab_multiple=self.options.vocab_multiple
        )

    def global_specs(self) -> tuple[TensorSpec, ...]:
        """Specification of every parameter of the whole model, in the order of the forward pass."""
        return parameter_specs(
            self.config,
            tensor=self.groups.layout.tensor,
            head=self.head,
            vocab_multiple=self.options.vocab_multiple,
        )

    def local_specs(self) -> dict[str, TensorSpec]:
        """Global specification of each parameter on this rank, by name in `named_parameters`."""
        return dict(self._specs)

    def parameters_by_spec(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by specification name."""
        return {self._specs[name].name: value for name, value in self.named_parameters()}

    def local_slices(self, spec: TensorSpec) -> tuple[slice, ...]:
        """Where this rank's shard lies in the whole tensor."""
        return spec.slices(self.groups.coordinate.tensor, tensor=self.groups.layout.tensor)

    @torch.no_grad()
    def initialise(self, seed: int, *, names: Sequence[str] | None = None) -> None:
        """Overwrites parameters with their random start, equal for all layouts.

        Args:
            seed: Of the run.
            names: Specification names; None means all.
        """
        parameters = dict(self.named_parameters())
        for name, spec in self._specs.items():
            if names is None or spec.name in names:
                whole = initial_value(spec, seed=seed, std=self.config.init_std)
                parameters[name].copy_(whole[self.local_slices(spec)])

    def tensor_reduced_parameters(self) -> list[nn.Parameter]:
        """Replicated parameters of which each tensor rank computes part of the gradient.

        Their gradients are to be summed over the tensor group; none without sequence parallelism.
        """
        return [value for value in self.parameters() if vars(value)["sequence_parallel"]]

    def tied_parameters(self) -> list[nn.Parameter]:
        """The word embedding where another stage holds a copy.

        Its gradient is to be summed over the embedding group, so that the copies stay equal.
        """
        return [value for value in self.parameters() if vars(value)["shared_embedding"]]

    def layer_weights(self) -> list[LayerWeights]:
        """The layers of this stage, in order."""
        by_name = self.parameters_by_spec()
        numbers = self.config.layers_of_stage(
            self.groups.coordinate.pipeline, pipeline=self.groups.layout.pipeline
        )
        return [
            LayerWeights(
                layer=layer,
                **{
                    f"{part}_{kind}": by_name[f"layers.{layer}.{part}.{kind}"]
                    for part in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")
                    for kind in ("weight", "bias")
                },
            )
            for layer in numbers
        ]

    def embedding_weights(self) -> EmbeddingWeights | None:
        """The embeddings; None on other stages than the first."""
        if self.embedding is None:
            return None
        return EmbeddingWeights(
            words=self.embedding.word_weight,
            positions=self.embedding.positions,
            project_in=self.embedding.project_in,
        )

    def output_weights(self) -> OutputWeights | None:
        """The final norm and the head; None on other stages than the last."""
        if self.output is None:
            return None
        by_name = self.parameters_by_spec()
        return OutputWeights(
            norm_weight=by_name.get("final_norm.weight"),
            norm_bias=by_name.get("final_norm.bias"),
            project_out=self.output.project_out,
            words=by_name[WORD_EMBEDDING] if self.head is Head.LANGUAGE_MODEL else None,
            score=by_name.get("head.score.weight"),
        )

    def _check_length(self, rows: RowPacking) -> None:
        if rows.longest > self.config.max_positions:
            raise CapacityError(
                f"sequences have {rows.longest} tokens, but the model has "
                f"{self.config.max_positions} positions: shorten them"
            )
        tensor = self.groups.layout.tensor
        if self.transformer_config.sequence_parallel and rows.num_tokens % tensor:
            raise LayoutError(
                f"sequence_parallel cuts {rows.num_tokens} tokens over tensor degree {tensor}: "
                f"pack them to a multiple of {tensor}"
            )

    def _match_specs(self) -> dict[str, TensorSpec]:
        """Pairs every parameter with its specification, and both sets completely."""
        layout, coordinate = self.groups.layout, self.groups.coordinate
        expected = {
            spec.name: spec
            for spec in stage_specs(
                self.config,
                tensor=layout.tensor,
                pipeline=layout.pipeline,
                stage=coordinate.pipeline,
                head=self.head,
                vocab_multiple=self.options.vocab_multiple,
            )
        }
        first_layer = self.config.layers_of_stage(
            coordinate.pipeline, pipeline=layout.pipeline
        ).start
        specs = {
            name: expected[_spec_name(name, first_layer)] for name, _ in self.named_parameters()
        }
        found = {spec.name for spec in specs.values()}
        assert found == set(expected), f"module tree and specs differ: {found ^ set(expected)}"
        return specs

    def _mark_parameters(self) -> None:
        """Sets, on every parameter, the attributes that DeepSpeed and the engine go by.

        `tensor_model_parallel`: each tensor rank holds another part. `sequence_parallel`: the
        gradient is to be summed over the tensor group. `shared_embedding`: it is to be summed over
        the embedding group. `ds_pipe_replicated`: the gradient norm counts another stage's copy.
        """
        several_stages = self.groups.layout.pipeline > 1
        for name, parameter in self.named_parameters():
            spec, marks = self._specs[name], vars(parameter)
            marks["tensor_model_parallel"] = spec.shard_dim is not None
            marks["partition_dim"] = -1 if spec.shard_dim is None else spec.shard_dim
            marks["partition_stride"] = 1
            tied = several_stages and self.head is Head.LANGUAGE_MODEL
            marks["shared_embedding"] = tied and spec.name == WORD_EMBEDDING
            marks["ds_pipe_replicated"] = marks["shared_embedding"] and self.embedding is None
            marks.setdefault("sequence_parallel", False)


def _spec_name(name: str, first_layer: int) -> str:
    """`decoder.layers.0.mlp.linear_fc1.bias` on a stage that starts at 6 -> `layers.6.fc1.bias`."""
    if name in _SPEC_NAMES:
        return _SPEC_NAMES[name]
    number, _, rest = name.removeprefix("decoder.layers.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"layers.{first_layer + int(number)}.{_LAYER_PARTS[part]}.{kind}"
