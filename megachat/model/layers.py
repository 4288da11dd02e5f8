"""The one importer of megatron-core's modules, and of transformer-engine and apex where present.

Every megatron module here gets its process groups as arguments: megatron's own `parallel_state` is
never initialised, so a read of its groups would fail, not silently pick another layout.
Activations are `[tokens, 1, hidden]`, rows one after the other without padding (see `packing`), and
`[tokens/tp, 1, hidden]` between the matrix products where sequence parallelism is on.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megachat.errors import KernelError
from megachat.model.config import ModelOptions, NormBackend, OptConfig, Recompute
from megachat.model.dropout import ResidualAdd, attention_with_dropout
from megachat.model.packing import RowPacking
from megachat.parallel import MEGATRON_HINT
from megachat.parallel.cpu_compat import import_megatron
from megachat.parallel.layout import ParallelLayout
from megachat.parallel.rng import seed_for

try:
    import_megatron()
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        gather_from_sequence_parallel_region,
        get_cuda_rng_tracker,
        linear_with_grad_accumulation_and_async_allreduce,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.tensor_parallel.layers import linear_with_frozen_weight
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import (
        TransformerBlock,
        TransformerBlockSubmodules,
    )
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    from megachat.parallel.groups import ProcessGroups
except RuntimeError as error:  # what transformer-engine's meta wheel alone makes of the import
    raise KernelError(f"megatron-core cannot be imported ({error}): {MEGATRON_HINT}") from error

LAYER_NORM_EPSILON = 1e-5
"""Of every OPT model."""

_RNG_STREAM = "model-parallel-rng"
"""Megatron's name of the random stream that its block enters under sequence parallelism."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """Whether one optional package can be used here."""

    name: str
    available: bool
    detail: str
    """Its version, or in one line why it cannot be used."""


def accelerators() -> tuple[Accelerator, ...]:
    """Imports the optional accelerators and says which work, and why the others do not.

    A package that is installed under the right name may still be the wrong one: PyPI's `apex` is
    unrelated to NVIDIA's, and the `transformer-engine` wheel alone holds no torch code.
    """
    return (
        _probe("transformer-engine", "transformer_engine", "transformer_engine.pytorch"),
        _probe("apex", "apex", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"),
    )


def _probe(name: str, package: str, *needed: str) -> Accelerator:
    """Imports what megachat needs of a package; no failure of it may end the program."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        detail = "not installed" if error.name == package else f"needs {error.name}"
        return Accelerator(name=name, available=False, detail=detail)
    except Exception as error:  # a broken installation raises anything
        return Accelerator(name=name, available=False, detail=f"broken: {_one_line(error)}")
    try:
        for part in needed:
            importlib.import_module(part)
    except Exception as error:
        detail = f"installed without {part} ({_one_line(error)}): build it from NVIDIA's source"
        return Accelerator(name=name, available=False, detail=detail)
    version = vars(module).get("__version__", "unknown version")
    return Accelerator(name=name, available=True, detail=str(version))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


NormKernel = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], float], Tensor]
"""(input, weight, bias, normalised shape, epsilon) -> output of the input's shape."""


def norm_kernel(backend: NormBackend) -> NormKernel:
    """The function that computes layer norms.

    Raises:
        KernelError: apex is asked for, but cannot be used here.
    """
    if backend is NormBackend.TORCH:
        return _torch_layer_norm
    apex = next(item for item in accelerators() if item.name == "apex")
    if not apex.available:
        raise KernelError(
            f"norm_backend is apex, but apex is {apex.detail}: use norm_backend=torch"
        )
    fused = importlib.import_module("apex.normalization.fused_layer_norm")
    return cast(NormKernel, fused.fused_layer_norm_affine)


def _torch_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], epsilon: float
) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, epsilon)


def parameter_device() -> torch.device:
    """Where megatron puts parameters; on machines without CUDA `cpu_compat` says the CPU."""
    return torch.device(torch.cuda.current_device())


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter beside megatron's."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=parameter_device()))


def mark_sequence_parallel(parameters: nn.Module | nn.Parameter, *, enabled: bool) -> None:
    """Marks replicated parameters that see a shard of the sequence.

    Each tensor rank then computes part of their gradient, and the engine sums it over the group.
    """
    items = [parameters] if isinstance(parameters, nn.Parameter) else parameters.parameters()
    for parameter in items:
        vars(parameter)["sequence_parallel"] = enabled


class LayerNorm(nn.Module):
    """Layer norm with a selectable kernel, usable on sequence shards."""

    def __init__(
        self, *, config: Any, hidden_size: int, kernel: NormKernel, eps: float = LAYER_NORM_EPSILON
    ) -> None:
        """Creates uninitialised parameters; the first three arguments are megatron's.

        Args:
            config: Megatron's TransformerConfig.
            hidden_size: Width of the normalised dimension.
            kernel: Computes the norm.
            eps: Added to the variance.
        """
        super().__init__()
        self.weight = empty_parameter(hidden_size, dtype=config.params_dtype)
        self.bias = empty_parameter(hidden_size, dtype=config.params_dtype)
        mark_sequence_parallel(self, enabled=config.sequence_parallel)
        self._kernel = kernel
        self._epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension; shape and dtype stay."""
        return self._kernel(x, self.weight, self.bias, tuple(self.weight.shape), self._epsilon)


@dataclass
class PackedRows(PackedSeqParams):  # type: ignore[misc]
    """A packing in the place that megatron hands through to attention.

    Its own fields stay None: they are for transformer-engine's kernels.
    """

    packing: RowPacking | None = None


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """Attention of each query to itself and what precedes it in its row; no other mask exists.

    What stands in for missing tokens is to the right of a row's own, so causality keeps it out.
    """

    def __init__(
        self, *, config: Any, layer_number: int, pg_collection: Any, **_unused: object
    ) -> None:
        """Keeps what attention dropout needs; has no parameters.

        Args:
            config: Megatron's TransformerConfig.
            layer_number: Global, from 1.
            pg_collection: Its tensor group says which heads are here.
            **_unused: Mask type, attention type, scale and context-parallel options of megatron.
        """
        super().__init__(config=config)
        self._probability = config.attention_dropout
        self._site = ("attention weights", layer_number, pg_collection.tp.rank())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        _attention_mask: None,
        *,
        packed_seq_params: PackedRows,
        attention_bias: int | None = None,
        **_unused: object,
    ) -> Tensor:
        """Attends.

        Args:
            query: `[tokens, 1, heads/tp, head_dim]`, like `key` and `value`.
            key: As above.
            value: As above.
            _attention_mask: Always None.
            packed_seq_params: Which tokens are a row.
            attention_bias: The dropout key (see `OptLayer`).
            **_unused: Mask type of megatron.

        Returns:
            `[tokens, 1, hidden/tp]`.
        """
        packing = packed_seq_params.packing
        assert packing is not None
        parts = [part.squeeze(1) for part in (query, key, value)]
        if self.training and self._probability and attention_bias is not None:
            seed = seed_for(attention_bias, *self._site)
            attend = functools.partial(_attend, probability=self._probability, seed=seed)
            # One mask for all rows: calls for parts of them would draw equal ones.
            out = packing.by_rows(attend, *parts, at_once=True)
        else:
            out = packing.by_rows(_attend, *parts)
        return out.flatten(1).unsqueeze(1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, probability: float = 0.0, seed: int = 0
) -> Tensor:
    """Causal attention of whole rows, `[rows, seq, heads/tp, head_dim]` like its arguments."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if probability:
        out = attention_with_dropout(query, key, value, probability, seed)
    else:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return out.transpose(1, 2)


class OptLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's layer, given a dropout key with each forward pass.

    The key travels in the argument `attention_bias`, which megatron hands through untouched and
    keeps for the recomputation, so a recomputed layer sees the key of its own micro-batch although
    others were started in between. A mask depends on the key, the layer, the site, and on the
    tensor rank where the masked tensor is a shard.
    """

    def forward(
        self, *args: Any, attention_bias: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """One layer; see TransformerLayer.forward."""
        shard = self.tp_group.rank() if self.config.sequence_parallel else 0
        for site, module in (("attention", self.self_attn_bda), ("mlp", self.mlp_bda)):
            module.seed = (
                None
                if attention_bias is None
                else seed_for(attention_bias, site, self.layer_number, shard)
            )
        out = super().forward(*args, attention_bias=attention_bias, **kwargs)
        return cast(tuple[Tensor, None], out)


def transformer_config(
    config: OptConfig, *, layout: ParallelLayout, options: ModelOptions
) -> TransformerConfig:
    """Megatron's description of the same model; parameters are left uninitialised."""
    recompute: dict[str, Any] = {}
    if options.recompute is Recompute.FULL:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden,
        num_attention_heads=config.heads,
        ffn_hidden_size=config.ffn,
        activation_func=F.relu,
        layernorm_epsilon=LAYER_NORM_EPSILON,
        hidden_dropout=options.hidden_dropout,
        attention_dropout=options.attention_dropout,
        init_method_std=config.init_std,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=options.sequence_parallel and layout.tensor > 1,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.dtype is torch.bfloat16,
        fp16=options.dtype is torch.float16,
        perform_initialization=False,
        # Kernels that exist in megatron's, apex's or TE's CUDA builds only.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        # Works around torch versions older than any that megachat supports.
        batch_p2p_sync=False,
        deallocate_pipeline_outputs=True,
        **recompute,
    )


def build_decoder(
    config: OptConfig,
    *,
    megatron: TransformerConfig,
    groups: ProcessGroups,
    norm_backend: NormBackend,
) -> TransformerBlock:
    """The layers of this rank's stage, with the final norm on the last stage of a pre-LN model."""
    if megatron.sequence_parallel:
        _prepare_sequence_parallel()
    norm = ModuleSpec(module=LayerNorm, params={"kernel": norm_kernel(norm_backend)})
    layers = config.layers_of_stage(groups.coordinate.pipeline, pipeline=groups.layout.pipeline)
    layer = _layer_spec(config, megatron=megatron, norm=norm)
    return TransformerBlock(
        config=megatron,
        spec=TransformerBlockSubmodules(
            layer_specs=[layer] * len(layers), layer_norm=norm if config.layer_norm_first else None
        ),
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        pg_collection=groups.megatron,
    )


def _layer_spec(config: OptConfig, *, megatron: TransformerConfig, norm: ModuleSpec) -> ModuleSpec:
    """Pre-LN: norms before each block. Post-LN: norms inside the residual sums."""
    after: Callable[[], nn.Module] | None = None
    if not config.layer_norm_first:
        after = functools.partial(
            LayerNorm, config=megatron, hidden_size=config.hidden, **norm.params
        )
    before = norm if config.layer_norm_first else IdentityOp
    add = ModuleSpec(module=ResidualAdd, params={"norm": after})
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CausalAttention,
        linear_proj=RowParallelLinear,
    )
    return ModuleSpec(
        module=OptLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=before,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=add,
        ),
    )


def _prepare_sequence_parallel() -> None:
    """Renews the process-wide scratch that megatron uses under sequence parallelism.

    A buffer for gathered activations, and a random stream that its block enters (nothing here
    draws from it). Neither holds a process group, and neither outlives a call, so models share it;
    it is renewed because a dry run leaves fake tensors in it.
    """
    parallel_state.destroy_global_memory_buffer()
    parallel_state._set_global_memory_buffer()
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(_RNG_STREAM, seed_for(_RNG_STREAM))


def word_embedding(
    rows: int, width: int, *, megatron: TransformerConfig, groups: ProcessGroups
) -> nn.Module:
    """A lookup table with `rows` cut over the tensor group; maps `[...]` ids to `[..., width]`."""
    table = VocabParallelEmbedding(
        rows, width, init_method=None, config=megatron, tp_group=groups.tensor
    )
    return cast(nn.Module, table)


def scatter_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`[tokens, ...]`, equal on all tensor ranks, to this rank's `[tokens/tp, ...]`."""
    return cast(Tensor, scatter_to_sequence_parallel_region(x, group=group))


def gather_sequence(x: Tensor, group: dist.ProcessGroup, *, sum_gradients: bool) -> Tensor:
    """`[tokens/tp, ...]` of each tensor rank to `[tokens, ...]` on all of them.

    Args:
        x: This rank's shard.
        group: The tensor group.
        sum_gradients: True where each rank goes on to compute a different part of the output, so
            that each holds part of the gradient; False where all compute the same.
    """
    gathered = gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=sum_gradients, group=group
    )
    return cast(Tensor, gathered)


def column_parallel_product(
    x: Tensor, weight: Tensor, group: dist.ProcessGroup, *, reduce_gradient: bool
) -> Tensor:
    """`x @ weight.T` where each tensor rank holds some rows of the weight.

    Args:
        x: `[..., width]`, equal on all ranks.
        weight: `[rows/tp, width]`.
        group: The tensor group.
        reduce_gradient: Sums the gradient of `x` over the group; False where its producer does.

    Returns:
        `[..., rows/tp]`.
    """
    linear = (
        linear_with_grad_accumulation_and_async_allreduce
        if weight.requires_grad
        else linear_with_frozen_weight
    )
    product = linear(
        input=x,
        weight=weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=reduce_gradient and group.size() > 1,
        sequence_parallel=False,
        tp_group=group,
    )
    return cast(Tensor, product)
