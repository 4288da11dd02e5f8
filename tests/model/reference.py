"""Tiny OPT models, HuggingFace's implementation as the oracle, and a plain schedule to run ours."""

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn
from transformers import OPTConfig as HuggingFaceConfig
from transformers import OPTForCausalLM, OPTForSequenceClassification

from megachat.model import Head, ModelOptions, OptConfig
from megachat.model.opt import OptModel
from megachat.parallel.collectives import all_reduce_sum
from megachat.parallel.layout import ParallelLayout
from tests.harness.groups import groups_of

SEQ, ROWS = 12, 2
PRE_LN = OptConfig(
    vocab_size=131, max_positions=20, hidden=32, ffn=48, layers=4, heads=4, embed_dim=32
)

POST_LN = OptConfig(
    vocab_size=131,
    max_positions=20,
    hidden=32,
    ffn=48,
    layers=4,
    heads=4,
    embed_dim=16,
    layer_norm_first=False,
)
"""The shape of OPT-350m: norms after the sums, projections, no final norm."""


def huggingface_model(config: OptConfig, head: Head = Head.LANGUAGE_MODEL) -> nn.Module:
    """A model in evaluation mode in which no parameter has a special value."""
    torch.manual_seed(0)
    values = config.to_huggingface(head=head, dtype=torch.float32)
    hf_config = HuggingFaceConfig(**{**values, "dropout": 0.0})
    kind = OPTForCausalLM if head is Head.LANGUAGE_MODEL else OPTForSequenceClassification
    model = kind(hf_config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def by_spec_name(tensors: dict[str, Tensor], config: OptConfig) -> dict[str, Tensor]:
    """HuggingFace's tensors (weights or gradients) under the names of the specification."""
    decoder = "model.decoder."
    found = {
        "embedding.word.weight": tensors[decoder + "embed_tokens.weight"],
        "embedding.position.weight": tensors[decoder + "embed_positions.weight"],
    }
    for theirs, ours in (
        ("model.decoder.project_in.weight", "embedding.project_in.weight"),
        ("model.decoder.project_out.weight", "head.project_out.weight"),
        ("model.decoder.final_layer_norm.weight", "final_norm.weight"),
        ("model.decoder.final_layer_norm.bias", "final_norm.bias"),
        ("score.weight", "head.score.weight"),
    ):
        if theirs in tensors:
            found[ours] = tensors[theirs]
    for layer in range(config.layers):
        source, target = f"{decoder}layers.{layer}.", f"layers.{layer}."
        for kind in ("weight", "bias"):
            for theirs, ours in (
                ("self_attn_layer_norm", "norm1"),
                ("self_attn.out_proj", "proj"),
                ("final_layer_norm", "norm2"),
                ("fc1", "fc1"),
                ("fc2", "fc2"),
            ):
                found[f"{target}{ours}.{kind}"] = tensors[f"{source}{theirs}.{kind}"]
            rows = []
            for head in range(config.heads):
                cut = slice(head * config.head_dim, (head + 1) * config.head_dim)
                rows += [tensors[f"{source}self_attn.{part}_proj.{kind}"][cut] for part in "qkv"]
            found[f"{target}qkv.{kind}"] = torch.cat(rows)
    return found


def own_part(model: OptModel, name: str, whole: Tensor) -> Tensor:
    """This rank's part of a tensor named as in `named_parameters`, padding rows zero."""
    spec = model.local_specs()[name]
    padded = whole.new_zeros(spec.shape)
    padded[: whole.shape[0]] = whole
    return padded[model.local_slices(spec)]


@torch.no_grad()
def copy_weights(model: OptModel, reference: nn.Module) -> None:
    """Gives our model the reference's weights."""
    weights = by_spec_name(reference.state_dict(), model.config)
    for name, parameter in model.named_parameters():
        parameter.copy_(own_part(model, name, weights[model.local_specs()[name].name]))


def build_model(
    config: OptConfig,
    layout: ParallelLayout,
    *,
    head: Head = Head.LANGUAGE_MODEL,
    reference: nn.Module | None = None,
    seed: int | None = None,
    **options: Any,
) -> OptModel:
    """A model of ours on new groups, with the reference's or random weights."""
    model = OptModel(
        config,
        groups=groups_of(layout),
        head=head,
        options=ModelOptions(**options),
        seed=seed,
    )
    if reference is not None:
        copy_weights(model, reference)
    return model


def random_batches(config: OptConfig, count: int, *, seed: int = 1) -> list[Tensor]:
    """`count` micro-batches `[ROWS, SEQ + 1]` without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, SEQ + 1)
    return [torch.randint(4, config.vocab_size, shape, generator=generator) for _ in range(count)]


def whole_logits(model: OptModel, logits: Tensor) -> Tensor:
    """`[batch, seq, vocab]` from every rank's part, differentiable."""
    gathered = gather_from_tensor_model_parallel_region(logits, group=model.groups.tensor)
    return gathered[..., : model.config.vocab_size]


def token_loss(logits: Tensor, batch: Tensor) -> Tensor:
    """Mean cross entropy of the next token."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def score_loss(scores: Tensor, batch: Tensor) -> Tensor:
    """A loss that weighs every position of the scores differently."""
    weights = torch.linspace(-1.0, 2.0, scores.numel()).view_as(scores)
    return (scores * weights).sum() + 0 * batch.sum()


def run(
    model: OptModel,
    batches: Sequence[Tensor],
    loss: Callable[[Tensor, Tensor], Tensor] = token_loss,
    *,
    keys: Sequence[int] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Forward and backward of the mean loss over micro-batches through megatron's schedules.

    Returns:
        (output, loss) of each micro-batch on the last stage; gradients that several ranks share
        are summed afterwards.
    """
    collected: list[tuple[Tensor, Tensor]] = []

    def forward_step(iterator: Any, _: Any) -> tuple[Tensor, Any]:
        index, batch = next(iterator)
        if keys is not None:
            model.set_dropout_key(keys[index])
        return model(batch[:, :SEQ]), partial(collect, batch)

    def collect(batch: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        if model.head is Head.LANGUAGE_MODEL:
            output = whole_logits(model, output)
        value = loss(output, batch)
        collected.append((output.detach().clone(), value.detach().clone()))
        return value, value.detach()

    pipelined = model.groups.layout.pipeline > 1
    config = model.transformer_config
    schedule = (
        forward_backward_pipelining_without_interleaving
        if pipelined
        else forward_backward_no_pipelining
    )
    schedule(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(batches)),
        model=SimpleNamespace(
            config=config,
            model_type=ModelType.encoder_or_decoder,
            set_input_tensor=model.set_input_tensor,
        ),
        num_microbatches=len(batches),
        seq_length=ROWS * SEQ,
        micro_batch_size=1,
        forward_only=False,
        p2p_communicator=P2PCommunicator(model.groups.pipeline, config) if pipelined else None,
        pg_collection=model.groups.megatron,
    )
    for parameter in model.tensor_reduced_parameters():
        all_reduce_sum(parameter.grad, model.groups.tensor)
    for parameter in model.tied_parameters():
        all_reduce_sum(parameter.grad, model.groups.embedding)
    return collected


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def gradient_error(model: OptModel, expected: dict[str, Tensor]) -> tuple[float, str]:
    """Largest relative error of this rank's gradients, and where it is."""
    errors = [
        (
            relative_error(
                parameter.grad, own_part(model, name, expected[model.local_specs()[name].name])
            ),
            name,
        )
        for name, parameter in model.named_parameters()
    ]
    return max(errors)
