"""Loads planned weights into models: readers read, all exchange (`execute_load`).

Between two exchanges the ranks wait in the job's store and in no collective, however slow a disk
is. Each round ends alike for all ranks of a stage: they go by what its readers have posted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megachat.checkpoint.checksums import checked_digest
from megachat.checkpoint.exchange import deliver, share_tied
from megachat.checkpoint.load_plan import Batch, LoadPlan, ParameterRead, Round
from megachat.checkpoint.names import canonical_name, place_part
from megachat.checkpoint.reader import StoredTensor, one_line, read_rows, read_tensor
from megachat.errors import CheckpointError, MegachatError
from megachat.ops.finite import all_finite
from megachat.parallel.handover import Board
from megachat.telemetry.transfer import TransferProgress

if TYPE_CHECKING:  # megatron-core takes seconds to import, and folders are looked at without it
    from megachat.model.opt import OptModel


def execute_load(
    models: "Sequence[OptModel]", plan: LoadPlan, folder: Path
) -> Mapping[str, str] | None:
    """Fills models of one layout from one pass over a folder's files; a collective call.

    What is read is held against its digests, where the folder has them.

    Args:
        models: Their shards on this rank.
        plan: Of the parameters to load; those that it leaves out keep their values.
        folder: The files, under this rank's path.

    Returns:
        On the first rank, the digest of each tensor that was read, by canonical name.

    Raises:
        CheckpointError: On every rank, if any reader cannot read, or reads what was not written.
        LaunchError: A reader took longer than the limit of a handover.
    """
    board = Board(f"reading {folder}")
    with TransferProgress(f"loading {folder}", total=plan.read_bytes) as progress:
        loader = _Loader(models, plan, folder, board, progress)
        failure = loader.run()
        loader.conclude(failure)
    for model in models:
        share_tied(model)
    return loader.gather_digests() if models[0].groups.rank == 0 else None


class _Loader:
    """One rank's part in a load."""

    def __init__(
        self,
        models: "Sequence[OptModel]",
        plan: LoadPlan,
        folder: Path,
        board: Board,
        progress: TransferProgress,
    ) -> None:
        self._models = models
        self._plan = plan
        self._folder = folder
        self._board = board
        self._progress = progress
        self._here = models[0].groups.coordinate
        self._specs = [{spec.name: spec for spec in model.global_specs()} for model in models]
        self._staged: dict[str, Tensor] = {}
        """What this rank has read and not sent on yet, by the parameter's name."""
        self._digests: dict[str, str] = {}
        """Of what this rank has read."""

    def run(self) -> MegachatError | None:
        """Goes through the rounds of this rank's stage; what ended them early."""
        for number, round_ in enumerate(self._plan.stages[self._here.pipeline]):
            own = self._own_batch(round_)
            if own is not None:
                self._board.post(self._name(number, own), self._read(own))
            names = [self._name(number, batch) for batch in round_]
            failure = self._board.wait(names, meanwhile=self._show)
            if failure is not None:
                return failure
            for batch in round_:
                self._exchange(batch)
            self._show()
        return None

    def conclude(self, failure: MegachatError | None) -> None:
        """Waits for the other stages; raises the failure of any."""
        self._staged.clear()
        if self._here.tensor == 0:
            self._board.tell(_digests_of(self._here.pipeline, self._here.data), self._digests)
        is_first = self._here.tensor == self._here.data == 0
        self._board.conclude(
            f"stage {self._here.pipeline}" if is_first else None,
            failure,
            names=[f"stage {stage}" for stage in range(self._plan.layout.pipeline)],
            meanwhile=self._show,
        )
        self._show()

    def gather_digests(self) -> dict[str, str]:
        """Digests of all tensors, from who read them; after `conclude`, on one rank."""
        layout, gathered = self._plan.layout, dict[str, str]()
        for stage in range(layout.pipeline):
            for data in range(layout.data):
                gathered |= self._board.hear(_digests_of(stage, data))
        return gathered

    def _own_batch(self, round_: Round) -> Batch | None:
        if self._here.tensor:
            return None
        return next((batch for batch in round_ if batch.reader == self._here.data), None)

    def _name(self, number: int, batch: Batch) -> str:
        return f"stage {self._here.pipeline} round {number} reader {batch.reader}"

    def _read(self, batch: Batch) -> MegachatError | None:
        """Reads a batch into memory, unless a reader of any stage has failed already."""
        failure = self._board.failure()
        if failure is not None:
            return failure
        try:
            for part, read, number in batch.in_file_order():
                value = read_tensor(self._folder, part)
                self._digests[canonical_name(part.name)] = checked_digest(self._folder, part, value)
                self._check(part, value)
                if read.twin is not None:
                    self._compare(read.twin, part, value)
                self._stage(read, number, value)
        except MegachatError as error:
            return error
        except Exception as error:  # anything: an error that only this rank sees hangs the others
            failure = CheckpointError(f"{self._folder}: cannot read: {one_line(error)}")
            failure.__cause__ = error
            return failure
        self._board.count_bytes(batch.read_bytes)
        return None

    def _check(self, part: StoredTensor, value: Tensor) -> None:
        """Refuses weights that are no finite numbers.

        Raises:
            CheckpointError: One is not; names the file and the tensor.
        """
        if not all_finite(value):
            bad = int((~value.float().isfinite()).sum())
            raise CheckpointError(
                f"{self._folder / part.file}: {part.name} holds NaN or infinity ({bad} of "
                f"{value.numel()} numbers): start from another checkpoint"
            )

    def _compare(self, twin: StoredTensor, part: StoredTensor, value: Tensor) -> None:
        """Refuses a tensor that differs from the one that is used in its place.

        Raises:
            CheckpointError: It does; names the file and both tensors.
        """
        if (twin.file, twin.offset, twin.strides) == (part.file, part.offset, part.strides):
            return  # two names of the same bytes
        first = 0
        for rows in read_rows(self._folder, twin):
            differs = (rows.double() != value[first : first + len(rows)].double()).any(dim=1)
            if bool(differs.any()):
                row = first + int(differs.nonzero()[0])
                raise CheckpointError(
                    f"{self._folder / twin.file}: {twin.name} differs from {part.name} in row "
                    f"{row}: megachat implements OPT whose output is tied to its embedding: tie "
                    "them and save the model again"
                )
            first += len(rows)

    def _stage(self, read: ParameterRead, number: int, value: Tensor) -> None:
        """Keeps a tensor; parts of a fused parameter go to their places in the whole."""
        if len(read.parts) == 1:
            self._staged[read.spec.name] = value
            return
        if read.spec.name not in self._staged:
            self._staged[read.spec.name] = torch.empty(read.spec.unpadded_shape, dtype=read.dtype)
        place_part(
            self._staged[read.spec.name],
            value,
            number=number,
            parts=len(read.parts),
            head_dim=self._models[0].config.head_dim,
        )

    def _exchange(self, batch: Batch) -> None:
        for read in batch.reads:
            whole = self._staged.pop(read.spec.name, None)
            for model, specs in zip(self._models, self._specs, strict=True):
                deliver(model, specs[read.spec.name], whole, source=batch.reader)

    def _show(self) -> None:
        """Only where someone sees it: the others need not ask the store."""
        if self._progress.is_shown:
            self._progress.show(self._board.count_bytes())


def _digests_of(stage: int, data: int) -> str:
    return f"digests of stage {stage} reader {data}"
