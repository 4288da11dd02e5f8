"""Checks where a run is going to write, without writing: folders, exports, room on the disks.

What a stage writes last is what is refused first: an export that cannot be put into its place costs
the stage otherwise.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.checkpoint.draft import check_target
from megachat.data.config import Stage
from megachat.errors import CapacityError, ConfigError, DataError, MegachatError
from megachat.hub import Content, chosen_files, folder_on_disk
from megachat.model.config import Head, OptConfig
from megachat.model.specs import parameter_specs
from megachat.preflight.host import Host, existing_parent
from megachat.preflight.models import Architectures, told
from megachat.stages.config import RunConfig
from megachat.stages.context import stage_folder, tokenizer_folder
from megachat.stages.results import MODEL_FOLDER
from megachat.stages.starts import tokenizer_source

_BESIDE_BYTES = 16 * 2**20
"""Logs, metrics, curves and report of a run, and the small files of its exports."""
_BESIDE_SHARE = 0.01
"""Of everything else, for what a file system keeps for itself (blocks, folders)."""
_PIECE_BYTES = 100
"""Predicted: a piece of a trained vocabulary, in tokenizer.json and the sentencepiece model."""
_VOCABULARY_BYTES = 2**20
"""Predicted: what such a tokenizer has besides, mostly tables of normalisation."""
_CONVERTED_SHARE = 6
"""Predicted: bytes of a tokenizer.json for one of the vocab.json and merges.txt it is made from."""
_CACHE_SHARE = 2
"""Predicted: bytes in the cache for one of a source, once as text and once as ids of 4 bytes for
tokens of some 4 letters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Write:
    """Something that a run writes."""

    what: str
    folder: Path
    num_bytes: int
    freed_bytes: int = 0
    """What it replaces, which goes only when it is whole."""


def check_folders(config: RunConfig, stages: frozenset[Stage]) -> Iterator[MegachatError]:
    """Refuses folders that cannot be written, and exports whose place is taken."""
    output, cache = config.run.output, config.data.cache_dir
    folders = [output, *(stage_folder(config, stage) for stage in Stage), tokenizer_folder(config)]
    reasons = {folder: _why_unwritable(folder) for folder in folders}
    folder = next((folder for folder in folders if reasons[folder] is not None), None)
    if folder is not None:
        which = "there" if folder == output else f"{folder.name} there"
        yield ConfigError(
            f"run.output {output}: cannot write {which} ({reasons[folder]}): choose another folder"
        )
    reason = _why_unwritable(cache) if stages else None
    if reason is not None:
        yield DataError(f"data.cache_dir {cache}: cannot be written ({reason}): choose another")
    for stage in Stage:
        if stage in stages:
            with told() as problems:
                check_target((stage_folder(config, stage) / MODEL_FOLDER).resolve())
            yield from problems


def check_disk(
    config: RunConfig, stages: frozenset[Stage], models: Architectures | None, host: Host
) -> Iterator[MegachatError]:
    """Refuses a run that writes more than its disks have room for.

    Args:
        config: The run.
        stages: What is going to run.
        models: Their architectures; None leaves out the exports.
        host: Says what is free.
    """
    writes = planned_writes(config, stages, models)
    keys = {config.run.output: "run.output", config.data.cache_dir: "data.cache_dir"}
    places: dict[int, list[Write]] = {}
    for write in writes:
        device = os.stat(existing_parent(write.folder)).st_dev
        places.setdefault(device, []).append(write)
    for group in places.values():
        needed, first = most_at_once(group), group[0].folder
        free = host.free_bytes(existing_parent(first))
        if needed <= free:
            continue
        parts = ", ".join(f"{write.what} {size(write.num_bytes)}" for write in group)
        key = keys[first]
        yield CapacityError(
            f"{key} {first}: the run needs {size(needed)} on that disk ({parts}, and "
            f"{size(needed - _sum_at_once(group))} for logs and the like), but {size(free)} are "
            f"free: make room, or choose another {key}"
        )


def planned_writes(
    config: RunConfig, stages: frozenset[Stage], models: Architectures | None
) -> list[Write]:
    """What stages write, in their order; exports to the byte, tokenizer and data as predicted."""
    if not stages:
        return []
    output, tokenizer = config.run.output, _tokenizer_bytes(config)
    writes = [Write(what="tokenizer", folder=output, num_bytes=tokenizer)]
    cached = _predicted_cache_bytes(config)
    if cached:
        writes.append(Write(what="data", folder=config.data.cache_dir, num_bytes=cached))
    for stage in Stage:
        if stage in stages and models is not None:
            target = stage_folder(config, stage) / MODEL_FOLDER
            writes.append(
                Write(
                    what=f"export of {stage}",
                    folder=output,
                    num_bytes=_export_bytes(config, stage, models) + tokenizer,
                    freed_bytes=_bytes_below(target),
                )
            )
    return writes


def most_at_once(writes: Sequence[Write]) -> int:
    """The most that writes take together at any time, with what comes beside."""
    most = _sum_at_once(writes)
    return most + _BESIDE_BYTES + round(_BESIDE_SHARE * most)


def size(num_bytes: int) -> str:
    """Bytes for a message, e.g. 1.53 GB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes} bytes"


def _sum_at_once(writes: Sequence[Write]) -> int:
    """The same without: an export is written beside the one that it replaces."""
    held = most = 0
    for write in writes:
        held += write.num_bytes
        most = max(most, held)
        held -= write.freed_bytes
    return most


def _export_bytes(config: RunConfig, stage: Stage, models: Architectures) -> int:
    """The weights of a stage's model in its precision."""
    is_reward = stage is Stage.REWARD
    role = config.models.reward if is_reward else config.models.actor
    model: OptConfig = models.critic if is_reward else models.actor
    head = Head.SCALAR if is_reward else Head.LANGUAGE_MODEL
    specs = parameter_specs(model, tensor=1, head=head)
    return sum(spec.num_elements for spec in specs) * role.precision.dtype.itemsize


def _tokenizer_bytes(config: RunConfig) -> int:
    """Of the tokenizer's files: as they lie on this disk, or as predicted."""
    section, source = config.tokenizer, tokenizer_source(config)
    if source is None:
        assert section.train is not None, "there is a source or a training"
        return _VOCABULARY_BYTES + _PIECE_BYTES * section.train.vocab_size
    folder = folder_on_disk(source, Content.TOKENIZER)
    if folder is None:
        return 0
    names = chosen_files([path.name for path in folder.iterdir()], Content.TOKENIZER)
    share = 1 if "tokenizer.json" in names else _CONVERTED_SHARE
    return share * sum((folder / name).stat().st_size for name in names)


def _predicted_cache_bytes(config: RunConfig) -> int:
    """What the data of local sources adds to the cache.

    What the cache holds is taken off: it may be of this data, and nothing is hashed here to know.
    """
    paths = [source.path for source in config.data.sources if source.path is not None]
    total = sum(_bytes_below(path) for path in paths)
    return max(0, _CACHE_SHARE * total - _bytes_below(config.data.cache_dir))


def _bytes_below(path: Path) -> int:
    """Size of a file, or of all files in a folder; 0 where there is nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def _why_unwritable(folder: Path) -> str | None:
    """Why a folder cannot be made or written; None where it can."""
    existing = existing_parent(folder)
    if not existing.is_dir():
        return os.strerror(errno.EEXIST if existing == folder.absolute() else errno.ENOTDIR)
    if not os.access(existing, os.W_OK | os.X_OK):
        return os.strerror(errno.EACCES)
    return None
