"""The one place that writes HuggingFace model folders: planned, streamed, complete or absent.

Rank 0 collects one weight file's tensors at a time in a folder beside the target and renames it at
the end, so a reader sees the old export, the new one, or none. All ranks learn of a failure.
"""

import functools
import json
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megachat.checkpoint.names import huggingface_names, split
from megachat.checkpoint.reader import (
    CONFIG_FILE,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    one_line,
    read_json,
)
from megachat.errors import CapacityError, CheckpointError, MegachatError
from megachat.model.config import Head
from megachat.model.opt import OptModel
from megachat.model.specs import TensorSpec, stage_of
from megachat.parallel.collectives import (
    all_gather_last_dim,
    all_gather_rows,
    broadcast,
    broadcast_object,
)
from megachat.parallel.groups import ProcessGroups

MARKER_FILE = "megachat_export.json"
"""Written last; lists every other file with its size, so that a partial copy is told apart."""

MAX_SHARD_BYTES = 5 * 10**9
"""Largest weight file, as the hub's tools have it."""

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """One weight file of an export: which parameters it holds, whole and in order."""

    name: str
    specs: tuple[TensorSpec, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """What rank 0 tells the others about its work on the disk."""

    failure: MegachatError | None


def plan_files(
    specs: Sequence[TensorSpec], *, dtype: torch.dtype, max_shard_bytes: int
) -> tuple[WeightFile, ...]:
    """Cuts the parameters into weight files (pure).

    A file exceeds the limit only where a single parameter does; a fused parameter is not split.
    """
    groups: list[list[TensorSpec]] = []
    used = 0
    for spec in specs:
        size = spec.num_elements * dtype.itemsize
        if not groups or used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += size
    total = len(groups)
    return tuple(
        WeightFile(
            name=SAFETENSORS_FILE
            if total == 1
            else f"model-{number:05d}-of-{total:05d}.safetensors",
            specs=tuple(group),
            num_bytes=sum(spec.num_elements for spec in group) * dtype.itemsize,
        )
        for number, group in enumerate(groups, start=1)
    )


def save_huggingface(
    model: OptModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, Path] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a folder that `transformers` loads; a collective call of all ranks of the layout.

    A language model becomes an `OPTForCausalLM`, a scalar head an `OPTForSequenceClassification`
    with one label. Padding rows are dropped.

    Args:
        model: This rank's shard.
        folder: The target; an earlier export there is replaced in one step.
        dtype: Of the weights in the files; None keeps the model's.
        extra_files: Files to copy into the folder (the tokenizer's), by their name in it.
        max_shard_bytes: Largest weight file; also what rank 0 holds at a time.

    Raises:
        CheckpointError: On every rank, if the folder cannot be written or holds something else
            than an export, an extra file is missing, or the disk is too small.
    """
    groups, kept = model.groups, dtype or model.options.dtype
    specs = model.global_specs()
    files = plan_files(specs, dtype=kept, max_shard_bytes=max_shard_bytes)
    draft = _Draft(folder.resolve(), is_writer=groups.rank == 0)
    try:
        draft.attempt(lambda: draft.start(files, extra_files=extra_files or {}))
        _raise_together(groups, draft)
        # Copies of the model have nothing to add; they wait below.
        for file in files if groups.coordinate.data == 0 else ():
            tensors = _collect_file(model, file, kept)
            draft.attempt(functools.partial(draft.write_weights, file, tensors))
            if _shared_failure(groups, draft) is not None:
                break
        configs = {CONFIG_FILE: model.config.to_huggingface(head=model.head, dtype=kept)}
        configs |= _generation_config(model) | _index(files)
        draft.attempt(lambda: draft.finish(configs))
        _raise_together(groups, draft)
    finally:
        draft.discard()


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a whole export of `save_huggingface`: every file with its size."""
    marker = folder / MARKER_FILE
    if not marker.is_file():
        return False
    try:
        sizes = read_json(marker).get("files")
    except CheckpointError:
        return False
    return isinstance(sizes, dict) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )


class _Draft:
    """The folder beside the target in which rank 0 prepares an export; idle on other ranks."""

    def __init__(self, target: Path, *, is_writer: bool) -> None:
        """Touches nothing yet."""
        self._target = target
        self._path = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        self._is_writer = is_writer
        self.failure: MegachatError | None = None

    def attempt(self, action: Callable[[], None]) -> None:
        """Runs `action` on the writer, unless an earlier one failed; keeps what it raises."""
        if not self._is_writer or self.failure is not None:
            return
        try:
            action()
        except MegachatError as error:
            self.failure = error
        except Exception as error:  # anything: an error that only this rank sees hangs the others
            self.failure = CheckpointError(f"{self._target}: cannot write: {one_line(error)}")
            self.failure.__cause__ = error

    def start(self, files: Sequence[WeightFile], *, extra_files: Mapping[str, Path]) -> None:
        """Checks the target and the disk, and copies the extra files."""
        self._check_target()
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._path.mkdir()
        needed = sum(file.num_bytes for file in files)
        free = shutil.disk_usage(self._path).free
        if needed > free:
            raise CapacityError(
                f"{self._target}: the weights take {needed} bytes, but the disk has {free} free"
            )
        for name, source in extra_files.items():
            if Path(name).name != name or not source.is_file():
                raise CheckpointError(f"{source}: cannot be copied as {name}: no such file")
            shutil.copyfile(source, self._path / name)

    def write_weights(self, file: WeightFile, tensors: Mapping[str, Tensor]) -> None:
        """Writes one weight file."""
        save_file(dict(tensors), self._path / file.name, metadata={"format": "pt"})

    def finish(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the small files and the marker, and puts the folder in its place."""
        for name, content in configs.items():
            self._write_json(name, content)
        sizes = {path.name: path.stat().st_size for path in sorted(self._path.iterdir())}
        self._write_json(MARKER_FILE, {"format": 1, "files": sizes})
        if self._target.exists():
            previous = self._path.with_suffix(".previous")
            self._target.rename(previous)
            self._path.rename(self._target)
            shutil.rmtree(previous)
        else:
            self._path.rename(self._target)

    def discard(self) -> None:
        """Removes what is left of an unfinished draft."""
        if self._is_writer:
            shutil.rmtree(self._path, ignore_errors=True)

    def _check_target(self) -> None:
        if self._target.exists() and not self._target.is_dir():
            raise CheckpointError(f"{self._target}: exists and is not a folder")
        if self._target.is_dir() and not (self._target / MARKER_FILE).is_file():
            others = [path.name for path in self._target.iterdir()]
            if others:
                raise CheckpointError(
                    f"{self._target}: holds {others[0]} and is no earlier export: "
                    "choose another folder or empty it"
                )

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (self._path / name).write_text(text, encoding="utf-8")


def _shared_failure(groups: ProcessGroups, draft: _Draft) -> MegachatError | None:
    """The writer's failure, on every rank of its copy of the model."""
    return broadcast_object(_Outcome(failure=draft.failure), groups.model, source=0).failure


def _raise_together(groups: ProcessGroups, draft: _Draft) -> None:
    """Raises the writer's failure on every rank of the layout, if there is one."""
    outcome = _Outcome(failure=_shared_failure(groups, draft))
    failure = broadcast_object(outcome, groups.data, source=0).failure
    if failure is not None:
        raise failure


def _generation_config(model: OptModel) -> dict[str, dict[str, Any]]:
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


def _collect_file(model: OptModel, file: WeightFile, dtype: torch.dtype) -> dict[str, Tensor]:
    """One file's tensors on rank 0, on the CPU; an empty table elsewhere."""
    tensors: dict[str, Tensor] = {}
    for spec in file.specs:
        whole = _collect(model, spec, dtype)
        if model.groups.rank == 0:
            tensors |= _as_huggingface(spec, whole, head_dim=model.config.head_dim)
    return tensors


def _collect(model: OptModel, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """A whole parameter on rank 0: gathered over its tensor group, then sent down the pipeline."""
    groups = model.groups
    stage = stage_of(spec, model.config, pipeline=groups.layout.pipeline)
    if groups.coordinate.pipeline == stage:
        whole = model.parameters_by_spec()[spec.name].detach().to(dtype)
        if spec.shard_dim == 0:
            whole = all_gather_rows(whole, groups.tensor)
        elif spec.shard_dim is not None:
            whole = all_gather_last_dim(whole, groups.tensor)
    elif groups.coordinate.tensor == 0:
        device = next(model.parameters()).device
        whole = torch.empty(spec.shape, dtype=dtype, device=device)
    else:
        whole = torch.empty(0)
    if stage and groups.coordinate.tensor == 0:
        broadcast(whole.contiguous(), groups.pipeline, source=stage)
    return whole


def _as_huggingface(spec: TensorSpec, whole: Tensor, *, head_dim: int) -> dict[str, Tensor]:
    """A whole parameter as the tensors of a HuggingFace file."""
    names, rows = huggingface_names(spec), whole[: spec.unpadded_shape[0]]
    parts = split(rows, head_dim=head_dim, parts=len(names)) if len(names) > 1 else (rows,)
    return {name: part.contiguous().cpu() for name, part in zip(names, parts, strict=True)}
