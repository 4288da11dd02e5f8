"""The one place that counts the parameters of one rank, from the model's own parameter table."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from megachat.model.config import Head, OptConfig
from megachat.model.specs import WORD_EMBEDDING, Placement, TensorSpec, parameter_specs
from megachat.parallel.layout import ParallelLayout
from megachat.planner.job import RoleSetup


@dataclass(frozen=True, kw_only=True, slots=True)
class StageElements:
    """Elements of each rank of one pipeline stage, by where the parameters stand in the model."""

    layers: int
    embeddings: int
    """Everything outside the layers: embeddings, projections, final norm, head."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.layers + self.embeddings


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationElements:
    """Elements of one rank's generation shard, seen from a rank of one pipeline stage."""

    shard: int
    """The whole generation shard."""
    kept: int
    """The part of it that the rank trains."""
    redundant: int
    """The part of the training shard outside of it (generation degree above the training one)."""

    @property
    def foreign(self) -> int:
        """What other ranks train: exactly what a reshard must bring."""
        return self.shard - self.kept


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Elements of some parameters."""

    sharded: int
    """Of all tensor ranks together."""
    replicated: int
    """Of one tensor rank."""

    def on_rank(self, tensor: int) -> int:
        """Elements that one of `tensor` ranks holds."""
        return self.sharded // tensor + self.replicated

    def __add__(self, other: "Part") -> "Part":
        """Both together."""
        return Part(
            sharded=self.sharded + other.sharded, replicated=self.replicated + other.replicated
        )

    def __mul__(self, count: int) -> "Part":
        """`count` times as many parameters."""
        return Part(sharded=self.sharded * count, replicated=self.replicated * count)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """The parts of a model."""

    layer: Part
    words: Part
    first: Part
    """First stage outside the layers, the word embedding included."""
    last: Part
    """Last stage outside the layers, a copy of the word embedding not included."""
    layer_tensors: tuple[Part, ...]
    """Each parameter of a layer."""
    first_tensors: tuple[Part, ...]
    last_tensors: tuple[Part, ...]


def stage_elements(setup: RoleSetup, *, stage: int) -> StageElements:
    """Elements of each rank of one pipeline stage."""
    num_layers = setup.config.layers // setup.layout.pipeline
    tensor = setup.layout.tensor
    return StageElements(
        layers=num_layers * _table_of(setup).layer.on_rank(tensor),
        embeddings=_edges(setup, stage).on_rank(tensor),
    )


def stage_part(setup: RoleSetup, *, stage: int) -> Part:
    """All parameters of one pipeline stage."""
    num_layers = setup.config.layers // setup.layout.pipeline
    return _table_of(setup).layer * num_layers + _edges(setup, stage)


def generation_elements(setup: RoleSetup, *, tensor: int, stage: int) -> GenerationElements:
    """How the generation shard at a tensor degree lies over a stage's training shard.

    The tied embedding is in the generation shard once.
    """
    table, train = _table_of(setup), setup.layout.tensor
    whole = table.layer * setup.config.layers + table.first + table.last
    own = stage_part(setup, stage=stage)
    kept = own.on_rank(max(tensor, train))
    return GenerationElements(
        shard=whole.on_rank(tensor), kept=kept, redundant=own.on_rank(train) - kept
    )


def received_between_nodes(setup: RoleSetup, *, tensor: int, rank: int, ranks_per_node: int) -> int:
    """Elements that a rank's reshard must bring from other nodes.

    What another stage trains comes from the peer in the same pipeline, 1 / max(degrees) of every
    matrix; the other tiles come from the same node.
    """
    here = setup.layout.coordinate(rank).pipeline
    cut = max(tensor, setup.layout.tensor)
    words, last = _table_of(setup).words, setup.layout.pipeline - 1
    near = _stages_in_node(setup.layout, rank, ranks_per_node)
    far_ends = [stage for stage in dict.fromkeys((0, last)) if stage not in near]
    far_between = setup.layout.pipeline - len(near) - len(far_ends)
    elements = sum(stage_part(setup, stage=stage).on_rank(cut) for stage in far_ends)
    if far_between:  # they are alike
        elements += far_between * stage_part(setup, stage=1).on_rank(cut)
    if last > 0 and setup.head is Head.LANGUAGE_MODEL:
        # The tied embedding is in two stages' shards, but travels at most once.
        copies_far = len(far_ends)
        wanted = 0 if here in (0, last) or copies_far < 2 else 1
        elements -= (copies_far - wanted) * words.on_rank(cut)
    return elements


def _stages_in_node(layout: ParallelLayout, rank: int, ranks_per_node: int) -> range:
    """The pipeline stages whose peer of a rank is on the rank's node."""
    stage_ranks = layout.tensor * layout.data
    first_peer, node_begin = rank % stage_ranks, rank // ranks_per_node * ranks_per_node
    first = -(-(node_begin - first_peer) // stage_ranks)
    end = -(-(node_begin + ranks_per_node - first_peer) // stage_ranks)
    return range(max(0, first), min(layout.pipeline, end))


def word_elements(setup: RoleSetup) -> int:
    """Elements of one rank's part of the word embedding."""
    return _table_of(setup).words.on_rank(setup.layout.tensor)


def mlp_elements(setup: RoleSetup) -> int:
    """Elements of one rank's part of one of a layer's two MLP matrices, the largest of an OPT."""
    return setup.config.hidden * setup.config.ffn // setup.layout.tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTensors:
    """Elements of each parameter of a rank of one pipeline stage."""

    num_layers: int
    layer: tuple[int, ...]
    """Of one layer; all are alike."""
    edges: tuple[int, ...]
    """Outside the layers."""


@cache
def stage_tensors(setup: RoleSetup, *, stage: int) -> StageTensors:
    """The parameters of a pipeline stage, one by one."""
    table, last = _table_of(setup), setup.layout.pipeline - 1
    edges: tuple[Part, ...] = ()
    if stage == 0:
        edges += table.first_tensors
    if stage == last:
        edges += table.last_tensors
        if stage > 0 and setup.head is Head.LANGUAGE_MODEL:
            edges += (table.words,)
    tensor = setup.layout.tensor
    return StageTensors(
        num_layers=setup.config.layers // setup.layout.pipeline,
        layer=tuple(part.on_rank(tensor) for part in table.layer_tensors),
        edges=tuple(part.on_rank(tensor) for part in edges),
    )


def _edges(setup: RoleSetup, stage: int) -> Part:
    """The parameters of a stage outside the layers."""
    table, last = _table_of(setup), setup.layout.pipeline - 1
    edges = Part(sharded=0, replicated=0)
    if stage == 0:
        edges += table.first
    if stage == last:
        edges += table.last
        if stage > 0 and setup.head is Head.LANGUAGE_MODEL:
            edges += table.words
    return edges


def _table_of(setup: RoleSetup) -> _Table:
    return _table(setup.config, setup.head, setup.layout.tensor, setup.vocab_multiple)


@cache
def _table(config: OptConfig, head: Head, tensor: int, vocab_multiple: int) -> _Table:
    # All layers are alike, so the table of a model with one layer says everything.
    specs = parameter_specs(
        replace(config, layers=1), tensor=tensor, head=head, vocab_multiple=vocab_multiple
    )
    return _Table(
        layer=_part(spec for spec in specs if spec.placement is Placement.LAYER),
        words=_part(spec for spec in specs if spec.name == WORD_EMBEDDING),
        first=_part(spec for spec in specs if spec.placement is Placement.FIRST_STAGE),
        last=_part(spec for spec in specs if spec.placement is Placement.LAST_STAGE),
        layer_tensors=_parts(specs, Placement.LAYER),
        first_tensors=_parts(specs, Placement.FIRST_STAGE),
        last_tensors=_parts(specs, Placement.LAST_STAGE),
    )


def _parts(specs: Iterable[TensorSpec], placement: Placement) -> tuple[Part, ...]:
    """Each parameter of one place in the model."""
    return tuple(_part([spec]) for spec in specs if spec.placement is placement)


def _part(specs: Iterable[TensorSpec]) -> Part:
    sizes = [(prod(spec.shape), spec.shard_dim is not None) for spec in specs]
    return Part(
        sharded=sum(size for size, is_sharded in sizes if is_sharded),
        replicated=sum(size for size, is_sharded in sizes if not is_sharded),
    )
