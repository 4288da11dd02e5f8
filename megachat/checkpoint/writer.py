"""The one place that writes HuggingFace model folders: planned, streamed, complete or absent.

Each weight file has one writer. It collects a few parameters over the groups that training has,
writes them, and only then asks for the next: meanwhile the others wait in the job's store and in no
collective. All ranks learn of a failure.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megachat.checkpoint.checksums import MARKER_FILE
from megachat.checkpoint.draft import Draft, is_complete, writing
from megachat.checkpoint.exchange import collect
from megachat.checkpoint.names import huggingface_names, huggingface_shape, take_part
from megachat.checkpoint.reader import CONFIG_FILE, SAFETENSORS_INDEX
from megachat.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from megachat.checkpoint.save_plan import FileTask, WeightFile, plan_files, plan_save
from megachat.errors import DivergenceError, MegachatError
from megachat.model.config import Head
from megachat.model.specs import TensorSpec
from megachat.ops.finite import all_finite
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.handover import Board, on_first_rank
from megachat.telemetry.transfer import TransferProgress

if TYPE_CHECKING:  # megatron-core takes seconds to import, and folders are looked at without it
    from megachat.model.opt import OptModel

__all__ = ["MARKER_FILE", "is_complete", "save_huggingface"]

MAX_SHARD_BYTES = 5 * 10**9
"""Largest weight file, as the hub's tools have it."""

GENERATION_FILE = "generation_config.json"


def save_huggingface(
    model: "OptModel",
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, Path] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    role: str = "model",
) -> None:
    """Writes a folder that `transformers` loads; a collective call of all ranks of the layout.

    A language model becomes an `OPTForCausalLM`, a scalar head an `OPTForSequenceClassification`
    with one label. Padding rows are dropped.

    Args:
        model: This rank's shard.
        folder: The target, under the same path on all ranks; an earlier export there is replaced
            in one step.
        dtype: Of the weights in the files; None keeps the model's.
        extra_files: Files to copy into the folder (the tokenizer's), by their name in it.
        max_shard_bytes: Largest weight file.
        role: What the model is called in an error.

    Raises:
        DivergenceError: On every rank, and nothing is touched, if a weight is NaN or infinite.
        CheckpointError: On every rank, if the folder cannot be written or holds something else
            than an export, an extra file is missing, or the disk is too small.
        LaunchError: A writer took longer than `HANDOVER_LIMIT` for a batch of weights.
    """
    _require_finite(model, role=role)
    groups, kept = model.groups, dtype or model.options.dtype
    files = plan_files(model.global_specs(), dtype=kept, max_shard_bytes=max_shard_bytes)
    target, needed = folder.resolve(), sum(file.num_bytes for file in files)
    start = partial(Draft.start, target, needed=needed, extra_files=extra_files or {})
    draft = on_first_rank(start, task=f"preparing {folder}")
    try:
        tasks = plan_save(files, config=model.config, layout=groups.layout, dtype=kept)
        with TransferProgress(f"writing {folder}", total=needed) as progress:
            saver = _Saver(model, draft, kept, Board(f"writing {folder}"), progress)
            saver.run(tasks)
            saver.conclude()
        digests = saver.gather_digests(tasks) if groups.rank == 0 else {}
        configs = {CONFIG_FILE: model.config.to_huggingface(head=model.head, dtype=kept)}
        configs |= _generation_config(model) | _index(files)
        on_first_rank(partial(draft.finish, configs, tensors=digests), task=f"finishing {folder}")
    finally:
        if groups.rank == 0:
            draft.discard()


def _require_finite(model: "OptModel", *, role: str) -> None:
    """Looks at every weight where it lies; a collective call that raises on all ranks alike."""
    named = model.parameters_by_spec()
    flags = torch.stack([all_finite(parameter.detach()) for parameter in named.values()])
    own = [name for name, is_finite in zip(named, flags.tolist(), strict=True) if not is_finite]
    bad = list(dict.fromkeys(name for rank in all_gather_objects(own) for name in rank))
    if bad:
        raise DivergenceError(
            f"the {role} is not written: {bad[0]} holds NaN or infinity ({len(bad)} parameters "
            "do): lower the learning rate"
        )


class _Saver:
    """One rank's part in an export."""

    def __init__(
        self,
        model: "OptModel",
        draft: Draft,
        dtype: torch.dtype,
        board: Board,
        progress: TransferProgress,
    ) -> None:
        self._model = model
        self._draft = draft
        self._dtype = dtype
        self._board = board
        self._progress = progress
        self._here = model.groups.coordinate
        self._failure: MegachatError | None = None

    def run(self, tasks: Sequence[FileTask]) -> None:
        """Does this rank's part of every file, in one order on all ranks.

        Ranks stop together when a writer tells of a failure: those of a stage and copy that write
        a file of their own, all of a copy while files are shared.
        """
        for task in tasks:
            if task.data != self._here.data:
                continue
            if task.is_shared or task.stage == self._here.pipeline:
                is_writer = self._here.tensor == 0 and self._here.pipeline == task.stage
                go_on = self._write_file(task) if is_writer else self._help(task)
                if not go_on:
                    return

    def conclude(self) -> None:
        """Waits for all other writers; raises the failure of any."""
        layout, here = self._model.groups.layout, self._here
        places = [(stage, data) for stage in range(layout.pipeline) for data in range(layout.data)]
        self._board.conclude(
            f"stage {here.pipeline} copy {here.data}" if here.tensor == 0 else None,
            self._failure,
            names=[f"stage {stage} copy {data}" for stage, data in places],
            meanwhile=self._show,
        )
        self._show()

    def gather_digests(self, tasks: Sequence[FileTask]) -> dict[str, Mapping[str, str]]:
        """Digests of all tensors by file, from who wrote them; after `conclude`, on one rank."""
        return {task.file.name: self._board.hear(_digests_of(task)) for task in tasks}

    def _write_file(self, task: FileTask) -> bool:
        """Writes a file; tells the ranks that help when a batch is wanted, or that none is.

        Returns:
            Whether to go on. A writer whose disk fails in its last batch has yet to tell so: it
            helps other writers until one of them tells everybody.
        """
        with SafetensorsFile(self._draft.path / task.file.name, self._entries(task)) as file:
            for number, batch in enumerate(task.batches):
                self._failure = self._failure or self._board.failure()
                self._board.post(_name(task, number), self._failure)
                if self._failure is not None:
                    return False
                self._attempt(partial(self._append, file, self._collect(task, batch)))
                self._show()
            self._attempt(file.finish)
            self._board.tell(_digests_of(task), file.digests)
        return True

    def _help(self, task: FileTask) -> bool:
        """Gives this rank's shards of a file to its writer; returns whether to go on."""
        for number, batch in enumerate(task.batches):
            failure = self._board.wait([_name(task, number)], meanwhile=self._show)
            if failure is not None:
                self._failure = self._failure or failure
                return False
            self._collect(task, batch)
        return True

    def _collect(self, task: FileTask, batch: Sequence[TensorSpec]) -> dict[TensorSpec, Tensor]:
        """A batch's parameters on the writer; nothing elsewhere."""
        wholes = {}
        for spec in batch:
            whole = collect(self._model, spec, stage=task.stage, dtype=self._dtype)
            if whole is not None:
                wholes[spec] = whole
        return wholes

    def _attempt(self, action: Callable[[], None]) -> None:
        """Works on the disk, unless that has failed before; a failure is told to other writers."""
        if self._failure is not None:
            return
        try:
            with writing(self._draft.target):
                action()
        except MegachatError as error:
            self._failure = error
            self._board.post(
                f"failure of stage {self._here.pipeline} copy {self._here.data}", error
            )

    def _append(self, file: SafetensorsFile, wholes: dict[TensorSpec, Tensor]) -> None:
        head_dim = self._model.config.head_dim
        for spec in list(wholes):
            rows, names = wholes.pop(spec)[: spec.unpadded_shape[0]], huggingface_names(spec)
            for number, name in enumerate(names):
                part = rows
                if len(names) > 1:
                    part = take_part(rows, number=number, parts=len(names), head_dim=head_dim)
                file.append(name, part)
                self._board.count_bytes(part.nbytes)

    def _entries(self, task: FileTask) -> list[TensorEntry]:
        return [
            TensorEntry(name=name, dtype=self._dtype, shape=huggingface_shape(spec))
            for spec in task.file.specs
            for name in huggingface_names(spec)
        ]

    def _show(self) -> None:
        """Only where someone sees it: the others need not ask the store."""
        if self._progress.is_shown:
            self._progress.show(self._board.count_bytes())


def _name(task: FileTask, batch: int) -> str:
    return f"{task.file.name} batch {batch}"


def _digests_of(task: FileTask) -> str:
    return f"digests of {task.file.name}"


def _generation_config(model: "OptModel") -> dict[str, dict[str, Any]]:
    """What `generate` of transformers stops at; only language models have it."""
    if model.head is not Head.LANGUAGE_MODEL:
        return {}
    config = model.config
    ids = {
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
    return {GENERATION_FILE: {"_from_model_config": True, **ids}}


def _index(files: Sequence[WeightFile]) -> dict[str, dict[str, Any]]:
    """Which file holds which tensor, where there are several."""
    if len(files) == 1:
        return {}
    weight_map = {
        name: file.name for file in files for spec in file.specs for name in huggingface_names(spec)
    }
    total = sum(file.num_bytes for file in files)
    return {SAFETENSORS_INDEX: {"metadata": {"total_size": total}, "weight_map": weight_map}}
