"""Small models, layouts and an oracle that needs no communication, shared by the reshard tests."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from megachat.model.config import Head, ModelOptions, OptConfig, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.model.specs import TensorSpec
from megachat.parallel.groups import GenerationGroups, ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.parallel.rng import generator_for
from megachat.reshard import ReshardPlan, plan_for_model
from megachat.reshard.arena import ModelStorage, WeightArena

PRE_LN = OptConfig(
    vocab_size=250, max_positions=32, hidden=64, ffn=128, layers=4, heads=8, embed_dim=64
)
POST_LN = OptConfig(
    vocab_size=250,
    max_positions=32,
    hidden=64,
    ffn=96,
    layers=4,
    heads=8,
    embed_dim=48,
    layer_norm_first=False,
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """(tensor, pipeline, data) -> generation tensor degree."""

    train: tuple[int, int, int]
    generate: int

    @property
    def source(self) -> ParallelLayout:
        tensor, pipeline, data = self.train
        return ParallelLayout(tensor=tensor, pipeline=pipeline, data=data)

    @property
    def target(self) -> ParallelLayout:
        return ParallelLayout(tensor=self.generate, data=self.source.world_size // self.generate)

    @property
    def vocab_multiple(self) -> int:
        return vocab_multiple_for(self.train[0], self.generate)


@dataclass(frozen=True, kw_only=True)
class Actor:
    """What a rank of a test holds."""

    plan: ReshardPlan
    arena: WeightArena
    model: OptModel
    storage: ModelStorage
    groups: GenerationGroups


def build_actor(
    case: Case,
    config: OptConfig,
    dtype: torch.dtype,
    *,
    groups: ProcessGroups,
    ranks_per_node: int | None = None,
) -> Actor:
    """A model in an arena, every parameter filled with what `whole_value` says."""
    plan = plan_for_model(
        config,
        source=case.source,
        target=case.target,
        element_bytes=dtype.itemsize,
        ranks_per_node=ranks_per_node,
    )
    options = ModelOptions(dtype=dtype, vocab_multiple=case.vocab_multiple)
    model = OptModel(config, groups=groups, head=Head.LANGUAGE_MODEL, options=options, seed=None)
    fill(model)
    arena = WeightArena(plan, rank=groups.rank, dtype=dtype, device=torch.device("cpu"))
    storage = arena.adopt(model)
    generation = GenerationGroups.create(plan.placement, training=groups)
    return Actor(plan=plan, arena=arena, model=model, storage=storage, groups=generation)


def whole_value(spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """A whole parameter of values that differ everywhere."""
    return torch.randn(spec.shape, generator=generator_for("reshard", spec.name)).to(dtype)


@torch.no_grad()
def fill(model: OptModel) -> None:
    """Overwrites the local shards with their part of `whole_value`."""
    parameters = dict(model.named_parameters())
    for name, spec in model.local_specs().items():
        whole = whole_value(spec, model.options.dtype)
        parameters[name].copy_(whole[model.local_slices(spec)])


def wrong_weights(actor: Actor) -> list[str]:
    """Names of generation weights whose bytes differ from the slice of the whole parameter."""
    rank, degree = actor.groups.tensor_rank, actor.plan.placement.tensor
    weights = actor.arena.weights()
    specs = actor.model.global_specs()
    assert set(weights) == {spec.name for spec in specs}
    wrong = []
    for spec in specs:
        expected = whole_value(spec, actor.model.options.dtype)[spec.slices(rank, tensor=degree)]
        found = weights[spec.name]
        if spec.shard_dim == 1:
            found = torch.cat(list(found), dim=1)
        if sha256(found) != sha256(expected):
            wrong.append(spec.name)
    return wrong


def sha256(tensor: Tensor) -> str:
    """Of shape, dtype and bytes."""
    contiguous = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{contiguous.dtype} {tuple(contiguous.shape)}".encode())
    digest.update(contiguous.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
