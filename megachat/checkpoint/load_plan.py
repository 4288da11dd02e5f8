"""Plans who reads what when a model is loaded: `plan_load` (pure).

Each weight is read once, by one rank of the pipeline stage that needs it. The readers are the
first tensor ranks: one for each data coordinate and stage, so that on a cluster each node reads its
share. A reader's share is one range of the stage's weights in the order of the files, cut into
batches. All readers of a stage read a batch each, then its ranks exchange them: that is a round.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest

import torch

from megachat.checkpoint.names import huggingface_names
from megachat.checkpoint.reader import StoredTensor
from megachat.model.config import OptConfig
from megachat.model.specs import TensorSpec, stage_of
from megachat.parallel.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterRead:
    """One parameter and the tensors that make it up."""

    spec: TensorSpec
    parts: tuple[StoredTensor, ...]
    """Query, key and value for a fused parameter, else one tensor."""
    twin: StoredTensor | None = None
    """Must hold the same numbers: an output that is stored beside the embedding it is tied to."""

    @property
    def dtype(self) -> torch.dtype:
        """Holds the values of all parts exactly."""
        return reduce(torch.promote_types, (part.dtype for part in self.parts))

    @property
    def read_bytes(self) -> int:
        """Bytes that come from the disk."""
        twin = 0 if self.twin is None else self.twin.num_bytes
        return sum(part.num_bytes for part in self.parts) + twin

    @property
    def kept_bytes(self) -> int:
        """Bytes in memory from when it is read to when it is sent."""
        if len(self.parts) == 1:
            return self.parts[0].num_bytes
        return self.spec.num_elements * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one reader reads before it sends anything on."""

    reader: int
    """Data coordinate of the reading rank; its tensor coordinate is 0."""
    reads: tuple[ParameterRead, ...]

    @property
    def read_bytes(self) -> int:
        """Bytes that come from the disk."""
        return sum(read.read_bytes for read in self.reads)

    @property
    def kept_bytes(self) -> int:
        """Bytes in the reader's memory when it has read them."""
        return _kept_bytes(self.reads)

    def in_file_order(self) -> list[tuple[StoredTensor, ParameterRead, int]]:
        """(tensor, its parameter, which part of that it is), as they lie on the disk."""
        tensors = [
            (part, read, number) for read in self.reads for number, part in enumerate(read.parts)
        ]
        return sorted(tensors, key=lambda tensor: (tensor[0].file, tensor[0].offset))


Round = tuple[Batch, ...]
"""At most one batch for each reader of a stage, in the order in which they are exchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPlan:
    """Everything that is read for one layout of a model, and by whom."""

    layout: ParallelLayout
    stages: tuple[tuple[Round, ...], ...]
    """By pipeline stage."""

    @property
    def read_bytes(self) -> int:
        """Bytes that all ranks together read."""
        return sum(
            batch.read_bytes for stage in self.stages for round_ in stage for batch in round_
        )


def plan_load(
    specs: Sequence[TensorSpec],
    stored: Mapping[str, StoredTensor],
    *,
    config: OptConfig,
    layout: ParallelLayout,
    twins: Mapping[str, StoredTensor] | None = None,
) -> LoadPlan:
    """Spreads the reading of parameters over the ranks of a layout.

    A batch is no larger than the largest parameter of the model. Beside it a reader holds, while it
    reads, one part of a fused parameter, and while it sends, a copy of one parameter: never more
    than two of the largest. Parameters whose parts lie between each other, as those of attention do
    in a file that is sorted by name, are in one batch if they fit, so that nobody reads backwards.

    Args:
        specs: The parameters to load, the tied embedding once.
        stored: The folder's tensors by canonical name, each parameter's among them.
        config: The architecture.
        layout: Who needs the parameters.
        twins: Tensors to compare with parameters, by the parameter's name. Who reads the one reads
            the other, piece by piece.
    """
    reads = [
        ParameterRead(
            spec=spec,
            parts=tuple(stored[name] for name in huggingface_names(spec)),
            twin=(twins or {}).get(spec.name),
        )
        for spec in specs
    ]
    limit = max((read.kept_bytes for read in reads), default=0)
    stages: list[list[ParameterRead]] = [[] for _ in range(layout.pipeline)]
    for read in sorted(reads, key=_first_byte):
        stages[stage_of(read.spec, config, pipeline=layout.pipeline)].append(read)
    return LoadPlan(
        layout=layout,
        stages=tuple(
            tuple(_rounds(stage, num_readers=layout.data, limit=limit)) for stage in stages
        ),
    )


def piece_of(spec: TensorSpec, rank: int, *, tensor: int) -> tuple[slice, ...]:
    """Where the piece of one of `tensor` ranks lies in the stored parameter, which has no padding.

    The piece has fewer rows than the rank's shard where that ends in padding.
    """
    rows, *others = spec.slices(rank, tensor=tensor)
    stored_rows = spec.unpadded_shape[0]
    return (slice(min(rows.start, stored_rows), min(rows.stop, stored_rows)), *others)


def _rounds(reads: Sequence[ParameterRead], *, num_readers: int, limit: int) -> Iterator[Round]:
    """A stage's parameters, in file order, over its readers."""
    shares: list[list[Sequence[ParameterRead]]] = [[] for _ in range(num_readers)]
    total, before = sum(read.read_bytes for read in reads), 0
    for unit in _units(reads, limit=limit):
        size = sum(read.read_bytes for read in unit)
        middle = before + size / 2
        shares[min(int(middle * num_readers / max(total, 1)), num_readers - 1)].append(unit)
        before += size
    by_reader = [
        [Batch(reader=reader, reads=group) for group in _group(share, limit=limit)]
        for reader, share in enumerate(shares)
    ]
    for batches in zip_longest(*by_reader):
        yield tuple(batch for batch in batches if batch is not None)


def _units(reads: Sequence[ParameterRead], *, limit: int) -> Iterator[Sequence[ParameterRead]]:
    """Parameters, by their first byte, with those whose bytes lie between theirs, if these fit."""
    units: list[list[ParameterRead]] = []
    last = ("", -1)
    for read in reads:
        if not units or _first_byte(read) > last:
            units.append([])
        units[-1].append(read)
        last = max(last, *((part.file, part.offset) for part in read.parts))
    for unit in units:
        if _kept_bytes(unit) <= limit:
            yield unit
        else:
            yield from ([read] for read in unit)


def _group(
    units: Iterable[Sequence[ParameterRead]], *, limit: int
) -> list[tuple[ParameterRead, ...]]:
    """Consecutive units that fit into `limit` bytes together."""
    groups: list[list[ParameterRead]] = []
    for unit in units:
        if not groups or _kept_bytes([*groups[-1], *unit]) > limit:
            groups.append([])
        groups[-1] += unit
    return [tuple(group) for group in groups]


def _kept_bytes(reads: Iterable[ParameterRead]) -> int:
    return sum(read.kept_bytes for read in reads)


def _first_byte(read: ParameterRead) -> tuple[str, int]:
    return min((part.file, part.offset) for part in read.parts)
