"""The one place for what training asks of memory that it does not own: where flat buffers live."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class FlatStorage(Protocol):
    """Memory for the optimizer's flat parameter buffers, such as an arena shared with generation.

    Training neither knows nor cares what else the memory is used for while it does not train.
    """

    @property
    def parameter_groups(self) -> Sequence[Sequence[str]]:
        """Names of the parameters (as in `named_parameters`) of each flat buffer, in order.

        Each local parameter is in exactly one group, a group either decays or does not, and every
        rank of the model has as many groups: where it has no parameter for one, the group is empty.
        """

    def place(self, index: int, flat: Tensor) -> Tensor:
        """Copies group `index`, flattened and padded, to its place and returns the view there."""

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory of this storage."""

    def weights_changed(self) -> None:
        """Takes note that the optimizer or a checkpoint has written new weights."""
