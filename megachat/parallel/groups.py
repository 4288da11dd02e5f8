"""The one place that creates process groups: `ProcessGroups.create(layout)`, once per layout.

Groups are handed to whoever communicates; nothing reads a global. Two adapters show the same
groups to megatron-core (`megatron`) and to DeepSpeed (`deepspeed_mpu`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist

from megachat.errors import KernelError, LayoutError
from megachat.parallel import GROUP_TIMEOUT, MEGATRON_HINT
from megachat.parallel.layout import Axis, Coordinate, GenerationPlacement, ParallelLayout

try:
    from megatron.core.process_groups_config import ProcessGroupCollection
except RuntimeError as error:  # what transformer-engine's meta wheel alone makes of the import
    raise KernelError(f"megatron-core cannot be imported ({error}): {MEGATRON_HINT}") from error


@dataclass(frozen=True)
class ProcessGroups:
    """The communicators of one layout, as seen by this rank."""

    layout: ParallelLayout
    rank: int
    tensor: dist.ProcessGroup
    """Ranks that share this rank's layers by slices."""
    pipeline: dist.ProcessGroup
    """The stages of this rank's pipeline, first stage first."""
    data: dist.ProcessGroup
    """Ranks that hold the same parameters."""
    model: dist.ProcessGroup
    """Tensor x pipeline: one copy of the model."""
    embedding: dist.ProcessGroup
    """First and last stage of this pipeline (only on those stages is it used)."""
    single: dist.ProcessGroup
    """This rank alone: megatron-core's context- and expert-parallel groups."""

    @classmethod
    def create(cls, layout: ParallelLayout) -> "ProcessGroups":
        """Creates all groups of a layout; a collective call of the whole world.

        Raises:
            LayoutError: The layout does not have exactly as many ranks as the world.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if layout.world_size != world_size:
            raise LayoutError(
                f"layout {layout} has {layout.tensor} x {layout.pipeline} x {layout.data} = "
                f"{layout.world_size} ranks, but {world_size} processes were started"
            )
        return cls(
            layout=layout,
            rank=rank,
            tensor=_own_group(layout.groups_along(Axis.TENSOR), rank),
            pipeline=_own_group(layout.groups_along(Axis.PIPELINE), rank),
            data=_own_group(layout.groups_along(Axis.DATA), rank),
            model=_own_group(layout.model_groups(), rank),
            embedding=_embedding_group(layout, rank),
            single=_own_group([(other,) for other in range(world_size)], rank),
        )

    @property
    def coordinate(self) -> Coordinate:
        """Position of this rank."""
        return self.layout.coordinate(self.rank)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the input embedding."""
        return self.layout.is_first_stage(self.rank)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head."""
        return self.layout.is_last_stage(self.rank)

    @cached_property
    def megatron(self) -> ProcessGroupCollection:
        """The same groups under megatron-core's names; context and expert degrees are one."""
        return ProcessGroupCollection(
            tp=self.tensor,
            pp=self.pipeline,
            mp=self.model,
            embd=self.embedding,
            pos_embd=self.single,
            cp=self.single,
            tp_cp=self.tensor,
            hcp=[self.single],
            ep=self.single,
            expt_tp=self.tensor,
            tp_ep=self.tensor,
            tp_ep_pp=self.model,
            dp=self.data,
            dp_cp=self.data,
            expt_dp=self.data,
        )

    @cached_property
    def deepspeed_mpu(self) -> "DeepSpeedMpu":
        """The same groups behind the interface that DeepSpeed expects of Megatron."""
        return DeepSpeedMpu(self)


@dataclass(frozen=True)
class GenerationGroups:
    """The communicators of a generation placement and of the reshard into it, for this rank."""

    placement: GenerationPlacement
    rank: int
    tensor: dist.ProcessGroup
    """Ranks that generate with one copy of the model, by generation tensor rank."""
    data: dist.ProcessGroup
    """Ranks with the same shard of all the copies, by replica."""
    tiles: dist.ProcessGroup
    """Ranks of this stage whose training shards make up this rank's generation shard."""
    gather: dist.ProcessGroup
    """The same over all stages, by stage, then tile."""
    pipeline: dist.ProcessGroup
    """The stages of this rank's training pipeline."""

    @classmethod
    def create(
        cls, placement: GenerationPlacement, *, training: ProcessGroups
    ) -> "GenerationGroups":
        """Creates the groups; a collective call of the whole world.

        Raises:
            LayoutError: The placement was made for another training layout.
        """
        if placement.source != training.layout:
            raise LayoutError(
                f"generation is placed over training layout {placement.source}, but the training "
                f"groups are of layout {training.layout}"
            )
        rank, ranks = training.rank, range(placement.source.world_size)
        return cls(
            placement=placement,
            rank=rank,
            tensor=_own_group(_distinct(map(placement.tensor_group, ranks)), rank),
            data=_own_group(_distinct(map(placement.replica_group, ranks)), rank),
            tiles=_own_group(_distinct(map(placement.tile_group, ranks)), rank),
            gather=_own_group(_distinct(map(placement.gather_group, ranks)), rank),
            pipeline=training.pipeline,
        )

    @property
    def tensor_rank(self) -> int:
        """Position in the generation tensor group."""
        return self.placement.tensor_rank(self.rank)

    @property
    def replica(self) -> int:
        """Number of the copy of the model that this rank belongs to."""
        return self.placement.replica(self.rank)


class DeepSpeedMpu:
    """What DeepSpeed asks of a Megatron `mpu`, answered from one `ProcessGroups`."""

    def __init__(self, groups: ProcessGroups) -> None:
        """Keeps the groups; creates nothing."""
        self._groups = groups

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor x pipeline."""
        return self._groups.model

    def get_model_parallel_world_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self._groups.model.size()

    def get_model_parallel_rank(self) -> int:
        """Position in that group."""
        return self._groups.model.rank()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor group."""
        return self._groups.tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        """Tensor degree."""
        return self._groups.layout.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        """Tensor coordinate."""
        return self._groups.coordinate.tensor

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first member of the tensor group."""
        return self._groups.layout.ranks_along(Axis.TENSOR, self._groups.rank)[0]

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """Pipeline group."""
        return self._groups.pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Pipeline degree."""
        return self._groups.layout.pipeline

    def get_pipeline_model_parallel_rank(self) -> int:
        """Pipeline coordinate."""
        return self._groups.coordinate.pipeline

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Data group."""
        return self._groups.data

    def get_data_parallel_world_size(self) -> int:
        """Data degree."""
        return self._groups.layout.data

    def get_data_parallel_rank(self) -> int:
        """Data coordinate."""
        return self._groups.coordinate.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data group."""
        return list(self._groups.layout.ranks_along(Axis.DATA, self._groups.rank))


def _own_group(ranks_of_groups: Sequence[Sequence[int]], rank: int) -> dist.ProcessGroup:
    """Creates every group (all ranks must call alike) and returns the one that holds `rank`."""
    own: dist.ProcessGroup | None = None
    for ranks in ranks_of_groups:
        # The order given is the order in the group, which torch would otherwise sort.
        in_order = list(ranks) == sorted(ranks)
        group = dist.new_group(list(ranks), timeout=GROUP_TIMEOUT, sort_ranks=in_order)
        if rank in ranks:
            own = group
    assert own is not None, f"rank {rank} is in none of {ranks_of_groups}"
    return own


def _distinct(groups: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Each group once, in the order of first mention."""
    return list(dict.fromkeys(groups))


def _embedding_group(layout: ParallelLayout, rank: int) -> dist.ProcessGroup:
    """The embedding group; a middle stage gets one of its own so that the field is never None."""
    groups = list(layout.embedding_groups())
    members = {member for group in groups for member in group}
    groups += [(other,) for other in range(layout.world_size) if other not in members]
    return _own_group(groups, rank)
