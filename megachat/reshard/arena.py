"""The one place for the memory that training and generation weights share.

A rank's arena holds its generation shard. The rank's own training shard is part of it and never
moves: parameters and the optimizer's flat buffers are views. The rest belongs to other ranks'
shards; it is filled for a generation phase and given back afterwards, at the same addresses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megachat.errors import LayoutError, PhaseError
from megachat.model.opt import OptModel
from megachat.parallel.device_memory import MappedDeviceBuffer
from megachat.parallel.lifetime import Owner
from megachat.parallel.memory import AddressStableBuffer
from megachat.reshard.rank_plan import plan_rank
from megachat.reshard.records import Flat, ReshardPlan, View


class ArenaMemory(Protocol):
    """Memory whose addresses stay while its physical pages come and go."""

    def tensor(self) -> Tensor:
        """All of it, `[bytes]` uint8."""

    def acquire(self, start: int = 0, stop: int | None = None) -> None:
        """Makes a range of bytes usable; what was usable keeps its content."""

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Gives a range of bytes back; its content is lost, its addresses stay valid."""

    def close(self) -> None:
        """Gives memory and, once the last view is gone, addresses back; views are void."""


def arena_memory(num_bytes: int, device: torch.device) -> ArenaMemory:
    """The kind of memory that suits a device; nothing is taken yet where it can be given back."""
    if device.type == "cpu":
        return AddressStableBuffer(num_bytes, device, large_pages=True)
    if device.type == "cuda":
        return MappedDeviceBuffer(num_bytes, device)
    return ResidentMemory(num_bytes, device)


class ResidentMemory(Owner):
    """Ordinary memory of any device, such as the fake memory of a dry run: it always stays."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Allocates."""
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def tensor(self) -> Tensor:
        """All of it, `[bytes]` uint8."""
        return self._bytes

    def acquire(self, start: int = 0, stop: int | None = None) -> None:
        """Does nothing: all of it is usable."""

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Keeps the memory: there is no way to give part of an allocation back."""

    def _end(self) -> None:
        self._bytes.untyped_storage().resize_(0)


class WeightArena(Owner):
    """One rank's generation shard in memory; its training shard is a view of it.

    Its end is that of the weights: parameters that it adopted are empty afterwards.
    """

    def __init__(
        self,
        plan: ReshardPlan,
        *,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Callable[[int], ArenaMemory] | None = None,
    ) -> None:
        """Reserves the memory; no page of it is resident before it is written.

        Args:
            plan: Of the actor's reshard.
            rank: This rank.
            dtype: Of the weights.
            device: Where they are.
            memory: Makes memory of at least a number of bytes; None chooses by the device.

        Raises:
            LayoutError: The plan was made for another size of element.
        """
        if dtype.itemsize != plan.element_bytes:
            raise LayoutError(
                f"the reshard plan counts {plan.element_bytes} bytes an element, but {dtype} has "
                f"{dtype.itemsize}: build the plan with element_bytes={dtype.itemsize}"
            )
        self.plan = plan
        self.part = plan_rank(plan, rank)
        self.version = 0
        """Counts changes of the weights."""
        num_bytes = self.part.elements * dtype.itemsize
        self._memory = arena_memory(num_bytes, device) if memory is None else memory(num_bytes)
        for start, stop in self._own_bytes(dtype.itemsize):
            self._memory.acquire(start, stop)
        self._elements = self._memory.tensor()[:num_bytes].view(dtype)
        self._gathered_version: int | None = None
        self._adopted: list[torch.nn.Parameter] = []
        self._weights = {weight.spec.name: self.view(weight.view) for weight in self.part.weights}

    @property
    def num_bytes(self) -> int:
        """Addresses reserved, which is what is resident while generating."""
        return self._elements.nbytes

    @property
    def is_current(self) -> bool:
        """Whether the whole generation shard is here and holds the present weights."""
        return self._gathered_version == self.version

    def view(self, view: View) -> Tensor:
        """The tensor behind a planned view."""
        return self._elements.as_strided(view.shape, view.strides, view.offset)

    def owns(self, tensor: Tensor) -> bool:
        """Whether all elements of a tensor lie in the arena."""
        storage = self._elements.untyped_storage()
        if tensor.untyped_storage()._cdata != storage._cdata:
            return False
        start = tensor.storage_offset() * tensor.element_size()
        start -= self._elements.storage_offset() * self._elements.element_size()
        last = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        return 0 <= start and start + (last + 1) * tensor.element_size() <= self.num_bytes

    def check_aliasing(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes sure that named tensors still lie in the arena; to be called at phase changes.

        Raises:
            PhaseError: One has left it, so that training and generation would drift apart.
        """
        strays = [name for name, tensor in tensors.items() if not self.owns(tensor)]
        if strays:
            raise PhaseError(
                f"{len(strays)} of {len(tensors)} training tensors are not in the weight arena "
                f"(first: {strays[0]}): something replaced their storage, which ends the sharing "
                "of weights with generation"
            )

    def adopt(self, model: OptModel) -> "ModelStorage":
        """Moves the parameters of a model into the arena, one by one.

        Returns:
            What a `TrainEngine` needs to keep its flat buffers there too.

        Raises:
            LayoutError: The model's parameters are not those of the plan for this rank.
        """
        names = {spec.name: name for name, spec in model.local_specs().items()}
        parameters = model.parameters_by_spec()
        planned = [name for flat in self.part.flats for name in flat.names]
        if sorted(planned) != sorted(parameters):
            raise LayoutError(
                f"the model has {len(parameters)} parameters here and the plan for rank "
                f"{self.part.rank} has {len(planned)}, not the same: build both from one layout"
            )
        with torch.no_grad():
            for flat in self.part.flats:
                at = flat.offset
                for name in flat.names:
                    self._move(parameters[name], name, at)
                    at += parameters[name].numel()
                _check_size(flat, flat.elements, at - flat.offset)
        groups = [[names[name] for name in flat.names] for flat in self.part.flats]
        return ModelStorage(self, groups)

    def weights(self) -> Mapping[str, Tensor]:
        """The generation shard by specification name: views, never copies.

        Sharded rows: `[rows / generation degree, ...]`. Sharded columns: `[tiles, out, columns]`
        (see `Weight.view`), where a single tile may have a row stride above its width. Everything
        else whole.

        Raises:
            PhaseError: The shard is not gathered, or it is older than the training weights, or the
                arena was closed.
        """
        self.check_open()
        if self._gathered_version is None:
            raise PhaseError(
                f"generation weights are not resident (training weights are at version "
                f"{self.version}): gather them before generating"
            )
        if not self.is_current:
            raise PhaseError(
                f"generation weights are of version {self._gathered_version}, training weights of "
                f"version {self.version}: gather them again before generating"
            )
        return self._weights

    def weights_changed(self) -> None:
        """Takes note of new training weights: what was gathered before is stale."""
        self.version += 1

    def mark_gathered(self) -> None:
        """Takes note that the whole shard holds the present weights (for the executor)."""
        self._gathered_version = self.version

    def acquire(self) -> None:
        """Makes room for what belongs to other ranks' shards (for the executor)."""
        self.check_open()
        for start, stop in self._foreign_bytes():
            self._memory.acquire(start, stop)

    def release(self) -> None:
        """Gives back what belongs to other ranks' shards; the training shard is untouched."""
        self._gathered_version = None
        for start, stop in self._foreign_bytes():
            self._memory.release(start, stop)

    def flat(self, index: int) -> Tensor | None:
        """The flat buffer of a block, if this stage has one."""
        flat = self.part.flats[index]
        if not flat.names:
            return None
        return self._elements.narrow(0, flat.offset, flat.padded_elements)

    def _own_bytes(self, element_bytes: int) -> Iterator[tuple[int, int]]:
        """The ranges of bytes of the training shard and its padding: ascending, apart."""
        for flat in self.part.flats:
            if flat.names:
                end = flat.offset + flat.padded_elements
                yield flat.offset * element_bytes, end * element_bytes

    def _foreign_bytes(self) -> Iterator[tuple[int, int]]:
        """The ranges of bytes between those, which belong to other ranks' shards."""
        end = 0
        for start, stop in self._own_bytes(self._elements.element_size()):
            if start > end:
                yield end, start
            end = stop
        last = self._memory.tensor().numel()  # whole pages
        if end < last:
            yield end, last

    def _move(self, parameter: torch.nn.Parameter, name: str, at: int) -> None:
        if parameter.dtype != self._elements.dtype:
            raise LayoutError(
                f"{name} is {parameter.dtype}, the weight arena holds {self._elements.dtype}: "
                "create both with one dtype"
            )
        place = self._elements.narrow(0, at, parameter.numel()).view(parameter.shape)
        parameter.data = place.copy_(parameter.detach())
        self._adopted.append(parameter)

    def _end(self) -> None:
        """Empties the parameters first: who still reads one gets an error, and no stray memory."""
        for parameter in self._adopted:
            if self.owns(parameter):
                parameter.data = parameter.data.new_empty(0)
        self._adopted = []
        self._weights = {}
        self._gathered_version = None
        self._elements = self._elements.new_empty(0)
        self._memory.close()


class ModelStorage:
    """The arena as one model's optimizer sees it (`training.storage.FlatStorage`)."""

    def __init__(self, arena: WeightArena, parameter_groups: Sequence[Sequence[str]]) -> None:
        """Keeps both."""
        self._arena = arena
        self._groups = parameter_groups

    @property
    def parameter_groups(self) -> Sequence[Sequence[str]]:
        """Names of the parameters of each flat buffer."""
        return self._groups

    def place(self, index: int, flat: Tensor) -> Tensor:
        """Copies a flattened group to its place.

        Raises:
            LayoutError: The group has another size than planned.
        """
        place = self._arena.flat(index)
        if place is None:
            return flat
        planned = self._arena.part.flats[index]
        _check_size(planned, planned.padded_elements, flat.numel())
        return place.copy_(flat)

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the arena."""
        return self._arena.owns(tensor)

    def weights_changed(self) -> None:
        """Makes gathered generation weights stale."""
        self._arena.weights_changed()


def _check_size(flat: Flat, planned: int, found: int) -> None:
    if planned != found:
        raise LayoutError(
            f"the parameter group of {flat.names[0]} has {found} elements, but {planned} are "
            "planned: build the model and the plan from one configuration and one layout"
        )
