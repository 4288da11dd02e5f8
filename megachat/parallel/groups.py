"""The one place that creates process groups: `ProcessGroups.create(layout)`, once per layout.

Groups are handed to whoever communicates; nothing reads a global. Two adapters show the same
groups to megatron-core (`megatron`) and to DeepSpeed (`deepspeed_mpu`). A communicator is made only
for ranks that have something to say to each other, and once however many layouts name them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch.distributed as dist

from megachat.errors import KernelError, LayoutError
from megachat.parallel import GROUP_TIMEOUT, MEGATRON_HINT
from megachat.parallel.cpu_compat import import_megatron
from megachat.parallel.layout import Axis, Coordinate, GenerationPlacement, ParallelLayout

try:
    import_megatron()
    from megatron.core.process_groups_config import ProcessGroupCollection
except RuntimeError as error:  # what transformer-engine's meta wheel alone makes of the import
    raise KernelError(f"megatron-core cannot be imported ({error}): {MEGATRON_HINT}") from error

_Ranks = tuple[int, ...]
"""The ranks of a communicator, in its order."""


class _Communicators:
    """The communicators of this process in one world, by their ranks, and how many use each.

    All ranks take and give back alike and in the same order. torch names groups by counting, so
    that every rank has to name every group; those that are not in it do nothing else for it. (Names
    from a hash, `use_local_synchronization`, depend on how many groups a rank is in: ranks of
    different stages would wait for each other under different names.)

    Who shares a communicator issues its calls from the one thread that runs a rank, so they come in
    the same order everywhere.
    """

    def __init__(self, *, rank: int, world_size: int) -> None:
        """Creates nothing."""
        self._rank = rank
        self._everyone = tuple(range(world_size))
        self._users: dict[_Ranks, int] = {}
        self._own: dict[_Ranks, dist.ProcessGroup] = {}
        self._alone: dist.ProcessGroup | None = None

    def take(self, groups: Sequence[_Ranks]) -> dist.ProcessGroup:
        """The communicator of that group which holds this rank; a collective call of the world.

        Args:
            groups: Of the whole world, the same on every rank; each rank is in exactly one.
        """
        mine: _Ranks | None = None
        for ranks in groups:
            if self._rank in ranks:
                mine = ranks
            if len(ranks) == 1 or ranks == self._everyone:
                continue  # needs none, or is there already
            users = self._users.get(ranks, 0)
            if not users:
                self._create(ranks)
            self._users[ranks] = users + 1
        assert mine is not None, f"rank {self._rank} is in none of {groups}"
        if len(mine) == 1:
            return self._of_this_rank()
        if mine == self._everyone:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        return self._own[mine]

    def give_back(self, groups: Sequence[_Ranks]) -> None:
        """Ends the communicators of groups that nobody else uses; sends nothing."""
        for ranks in groups:
            if ranks not in self._users:
                continue
            self._users[ranks] -= 1
            if not self._users[ranks]:
                del self._users[ranks]
                if ranks in self._own:
                    dist.destroy_process_group(self._own.pop(ranks))

    def _create(self, ranks: _Ranks) -> None:
        # The order given is the order in the group, which torch would otherwise sort.
        in_order = list(ranks) == sorted(ranks)
        group = dist.new_group(list(ranks), timeout=GROUP_TIMEOUT, sort_ranks=in_order)
        if self._rank in ranks:
            self._own[ranks] = group

    def _of_this_rank(self) -> dist.ProcessGroup:
        """This rank alone: one object for all layouts, whose name concerns no other rank."""
        if self._alone is None:
            self._alone = dist.new_group(
                [self._rank], timeout=GROUP_TIMEOUT, use_local_synchronization=True
            )
        return self._alone


_WORLDS: WeakKeyDictionary[dist.ProcessGroup, _Communicators] = WeakKeyDictionary()
"""Of each world that this process has joined; they end with it."""


class _Lease:
    """What one layout uses of a world's communicators, to be given back together."""

    def __init__(self) -> None:
        """Takes nothing yet; this process has joined a world."""
        world = dist.group.WORLD
        assert world is not None
        if world not in _WORLDS:
            _WORLDS[world] = _Communicators(rank=world.rank(), world_size=world.size())
        self._communicators = _WORLDS[world]
        self._taken: list[Sequence[_Ranks]] = []

    def group(self, groups: Sequence[_Ranks]) -> dist.ProcessGroup:
        """Takes this rank's communicator of these groups; a collective call of the world."""
        group = self._communicators.take(groups)
        self._taken.append(groups)
        return group

    def end(self) -> None:
        """Gives all of them back; nothing is left to do where their world has ended before."""
        world = dist.group.WORLD
        while self._taken:
            groups = self._taken.pop()
            if world is not None and _WORLDS.get(world) is self._communicators:
                self._communicators.give_back(groups)


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
    _lease: _Lease = field(repr=False, compare=False)

    @classmethod
    def create(cls, layout: ParallelLayout) -> "ProcessGroups":
        """Creates those groups of a layout that do not exist; a collective call of the world.

        Raises:
            LayoutError: The layout does not have exactly as many ranks as the world.
        """
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if layout.world_size != world_size:
            raise LayoutError(
                f"layout {layout} has {layout.tensor} x {layout.pipeline} x {layout.data} = "
                f"{layout.world_size} ranks, but {world_size} processes were started"
            )
        lease = _Lease()
        return cls(
            layout=layout,
            rank=rank,
            tensor=lease.group(layout.groups_along(Axis.TENSOR)),
            pipeline=lease.group(layout.groups_along(Axis.PIPELINE)),
            data=lease.group(layout.groups_along(Axis.DATA)),
            model=lease.group(layout.model_groups()),
            embedding=lease.group(_embedding_groups(layout)),
            single=lease.group([(other,) for other in range(world_size)]),
            _lease=lease,
        )

    def close(self) -> None:
        """Ends the communicators that no other layout uses; all ranks call it alike.

        It sends nothing and waits for nobody. May be called again.
        """
        self._lease.end()

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
    _lease: _Lease = field(repr=False, compare=False)

    @classmethod
    def create(
        cls, placement: GenerationPlacement, *, training: ProcessGroups
    ) -> "GenerationGroups":
        """Creates those groups that do not exist; a collective call of the whole world.

        Raises:
            LayoutError: The placement was made for another training layout.
        """
        if placement.source != training.layout:
            raise LayoutError(
                f"generation is placed over training layout {placement.source}, but the training "
                f"groups are of layout {training.layout}"
            )
        world_size, lease = placement.source.world_size, _Lease()
        return cls(
            placement=placement,
            rank=training.rank,
            tensor=lease.group(_all_groups(placement.tensor_group, world_size)),
            data=lease.group(_all_groups(placement.replica_group, world_size)),
            tiles=lease.group(_all_groups(placement.tile_group, world_size)),
            gather=lease.group(_all_groups(placement.gather_group, world_size)),
            pipeline=training.pipeline,
            _lease=lease,
        )

    def close(self) -> None:
        """Ends the communicators that no other layout uses, as `ProcessGroups.close`."""
        self._lease.end()

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


def _all_groups(group_of: Callable[[int], _Ranks], world_size: int) -> list[_Ranks]:
    """The groups of a world by first rank, from a function that names the group of a rank."""
    groups: list[_Ranks] = []
    placed: set[int] = set()
    for rank in range(world_size):
        if rank not in placed:
            groups.append(group_of(rank))
            placed.update(groups[-1])
    return groups


def _embedding_groups(layout: ParallelLayout) -> list[_Ranks]:
    """The embedding groups, and each middle stage by itself, so that the field is never None."""
    groups = list(layout.embedding_groups())
    members = {member for group in groups for member in group}
    return groups + [(other,) for other in range(layout.world_size) if other not in members]
