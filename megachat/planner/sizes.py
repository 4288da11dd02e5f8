"""The one place that counts the parameters of one rank, from the model's own parameter table."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from megachat.model.config import Head, OptConfig
from megachat.model.specs import WORD_EMBEDDING, Placement, TensorSpec, parameter_specs
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
class _Table:
    """Elements of one tensor rank, by part of the model."""

    layer: int
    words: int
    first: int
    """First stage outside the layers, the word embedding included."""
    last: int
    """Last stage outside the layers, a copy of the word embedding not included."""
    largest: int
    """The largest parameter of a layer."""


def stage_elements(setup: RoleSetup, *, stage: int) -> StageElements:
    """Elements of each rank of one pipeline stage."""
    table, pipeline = _table_of(setup), setup.layout.pipeline
    edges = table.first if stage == 0 else 0
    if stage == pipeline - 1:
        edges += table.last
        if stage > 0 and setup.head is Head.LANGUAGE_MODEL:
            edges += table.words
    num_layers = setup.config.layers // pipeline
    return StageElements(layers=num_layers * table.layer, embeddings=edges)


def word_elements(setup: RoleSetup) -> int:
    """Elements of one rank's part of the word embedding."""
    return _table_of(setup).words


def largest_elements(setup: RoleSetup) -> int:
    """Elements of one rank's part of the largest parameter of a layer."""
    return _table_of(setup).largest


def _table_of(setup: RoleSetup) -> _Table:
    return _table(setup.config, setup.head, setup.layout.tensor, setup.vocab_multiple)


@cache
def _table(config: OptConfig, head: Head, tensor: int, vocab_multiple: int) -> _Table:
    # All layers are alike, so the table of a model with one layer says everything.
    specs = parameter_specs(
        replace(config, layers=1), tensor=tensor, head=head, vocab_multiple=vocab_multiple
    )
    inner = [spec for spec in specs if spec.placement is Placement.LAYER]
    return _Table(
        layer=_elements(inner, tensor),
        words=_elements((spec for spec in specs if spec.name == WORD_EMBEDDING), tensor),
        first=_elements((s for s in specs if s.placement is Placement.FIRST_STAGE), tensor),
        last=_elements((s for s in specs if s.placement is Placement.LAST_STAGE), tensor),
        largest=max(prod(spec.local_shape(tensor)) for spec in inner),
    )


def _elements(specs: Iterable[TensorSpec], tensor: int) -> int:
    return sum(prod(spec.local_shape(tensor)) for spec in specs)
