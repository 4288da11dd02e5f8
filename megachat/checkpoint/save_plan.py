"""Plans which weight files an export has and who writes them: `plan_files`, `plan_save` (pure)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megachat.checkpoint.reader import SAFETENSORS_FILE
from megachat.model.config import OptConfig
from megachat.model.specs import TensorSpec, stage_of
from megachat.parallel.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """One weight file of an export: which parameters it holds, whole and in order."""

    name: str
    specs: tuple[TensorSpec, ...]
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FileTask:
    """Who writes a file, and in which steps."""

    file: WeightFile
    data: int
    """The copy of the model that it comes from."""
    stage: int
    """The pipeline stage whose first tensor rank, in that copy, writes it."""
    is_shared: bool
    """Whether it holds parameters of several stages, so that all stages of the copy take part."""
    batches: tuple[tuple[TensorSpec, ...], ...]
    """What the writer collects before it writes anything."""


def plan_files(
    specs: Sequence[TensorSpec], *, dtype: torch.dtype, max_shard_bytes: int
) -> tuple[WeightFile, ...]:
    """Cuts the parameters into weight files, in the same way for every layout.

    A file exceeds the limit only where a single parameter does; a fused parameter is not split.
    """
    groups = _group(specs, dtype=dtype, limit=max_shard_bytes)
    total = len(groups)
    return tuple(
        WeightFile(
            name=SAFETENSORS_FILE
            if total == 1
            else f"model-{number:05d}-of-{total:05d}.safetensors",
            specs=group,
            num_bytes=sum(spec.num_elements for spec in group) * dtype.itemsize,
        )
        for number, group in enumerate(groups, start=1)
    )


def plan_save(
    files: Sequence[WeightFile], *, config: OptConfig, layout: ParallelLayout, dtype: torch.dtype
) -> tuple[FileTask, ...]:
    """Spreads the files over stages and copies of the model, each to whoever has least to write.

    Files of one stage are that stage's business: stages and copies write at the same time. Files
    that stages share come first, while all stages are there.
    """
    largest = max(spec.num_elements for file in files for spec in file.specs) * dtype.itemsize
    loads: dict[tuple[int, int], int] = {}
    tasks = []
    for file in files:
        stages = [stage_of(spec, config, pipeline=layout.pipeline) for spec in file.specs]
        writers = [(stages[0], data) for data in range(layout.data)]
        writer = min(writers, key=lambda place: loads.get(place, 0))
        loads[writer] = loads.get(writer, 0) + file.num_bytes
        tasks.append(
            FileTask(
                file=file,
                stage=writer[0],
                data=writer[1],
                is_shared=len(set(stages)) > 1,
                batches=_group(file.specs, dtype=dtype, limit=largest),
            )
        )
    return tuple(sorted(tasks, key=lambda task: not task.is_shared))


def _group(
    specs: Sequence[TensorSpec], *, dtype: torch.dtype, limit: int
) -> tuple[tuple[TensorSpec, ...], ...]:
    """Consecutive parameters that take at most `limit` bytes together."""
    groups: list[list[TensorSpec]] = []
    used = 0
    for spec in specs:
        size = spec.num_elements * dtype.itemsize
        if not groups or used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += size
    return tuple(tuple(group) for group in groups)
