"""Keeps what a stage was made from: its settings, and the content of all that it read.

`made_from.json` lies beside a stage's result. A completed stage is taken for what it is called now
only if settings and contents are the same. Contents are digests, so the same files under other
paths are the same. An input that is not here any more cannot be compared, and is not needed either.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megachat.data.config import Stage
from megachat.digests import FileDigests
from megachat.errors import CheckpointError, ConfigError, DataError, MegachatError
from megachat.hub import folder_on_disk
from megachat.stages.config import RunConfig
from megachat.stages.context import TOKENIZER_RECORD, known_digests, stage_folder
from megachat.stages.results import write_json
from megachat.stages.settings import Settings, stage_settings
from megachat.stages.starts import StartModel, start_models, tokenizer_source

ORIGIN_FILE = "made_from.json"
_FORMAT = 1
_SHOWN_CHANGES = 4
_SHOWN_DIGITS = 12
_REMEDY = "choose another run.output, or delete the folder to make it anew"
TOKENIZER_INPUT = "tokenizer"


@dataclass(frozen=True, kw_only=True, slots=True)
class InputContent:
    """What one input held."""

    place: str
    """Where it lay, for messages alone."""
    digest: str
    files: Mapping[str, str] = field(default_factory=dict)
    """Digests of the files of a data set by their names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What something was made from."""

    settings: Mapping[str, Any]
    """By dotted key."""
    inputs: Mapping[str, InputContent]
    """By the key that names it, or the stage that made it."""
    made: str | None = None
    """Digest of what was made, where that is known by one."""


def model_sources(config: RunConfig, stage: Stage) -> dict[str, StartModel]:
    """The models that a stage reads, by the key or stage that says so (pure).

    One of another run is called by its stage as well: with the same content it is the same run.
    """
    return {
        f"models.{start.role}.model" if start.stage is None else _key_of_stage(start.stage): start
        for start in start_models(config, stage)
    }


def stages_before(config: RunConfig, stage: Stage) -> tuple[Stage, ...]:
    """The stages of this run whose models a stage reads (pure)."""
    return tuple(
        start.stage
        for start in start_models(config, stage)
        if start.stage is not None and config.run.source_of(start.stage) is None
    )


def data_inputs(config: RunConfig) -> dict[str, InputContent]:
    """What data and tokenizer of all stages hold now; those that are not here are left out."""
    found = dict(_data_contents(config))
    tokenizer = read_origin(config.run.output / TOKENIZER_RECORD)
    if tokenizer is not None and tokenizer.made is not None:
        place = str(config.run.output / TOKENIZER_INPUT)
        found[TOKENIZER_INPUT] = InputContent(place=place, digest=tokenizer.made)
    return found


def model_inputs(
    config: RunConfig, stage: Stage, *, read: Mapping[Path, str] | None = None
) -> dict[str, InputContent]:
    """What the models hold that a stage reads; those that are not here are left out.

    Args:
        config: The run.
        stage: Which stage.
        read: Digests of models by folder, where those were read just now.
    """
    known = read or {}
    found = {}
    for key, source in model_sources(config, stage).items():
        folder = folder_on_disk(source.name)
        digest = None
        if folder is not None:
            digest = known.get(folder) or _digest_of_folder(folder, known_digests(config))
        if digest is not None:
            found[key] = InputContent(place=source.name, digest=digest)
    return found


def tokenizer_inputs(config: RunConfig) -> dict[str, InputContent]:
    """What the run's tokenizer would be made from now; nothing where that is not here."""
    name = tokenizer_source(config)
    if name is None:
        return dict(_data_contents(config))
    from megachat.data.tokenizer import Tokenizer

    try:
        digest = Tokenizer.load(name).fingerprint
    except (CheckpointError, DataError):
        return {}
    return {TOKENIZER_INPUT: InputContent(place=name, digest=digest)}


def write_origin(path: Path, origin: Origin) -> None:
    """Writes a record of what something was made from.

    Raises:
        ConfigError: The folder cannot be written.
    """
    write_json(path, {"format": _FORMAT, **asdict(origin)})


def read_origin(path: Path) -> Origin | None:
    """What something was made from; None where there is no record.

    Raises:
        CheckpointError: The file is no such record.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != _FORMAT:
            raise ValueError("another format")
        inputs = {key: InputContent(**each) for key, each in values.pop("inputs").items()}
        return Origin(inputs=inputs, **values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: no record of what the folder was made from ({error}): {_REMEDY}"
        ) from error


def check_stage(config: RunConfig, stage: Stage) -> bool:
    """Holds a completed stage against the run as it is now.

    Returns:
        Whether it is made from the models that the stages before it have left; where it is not,
        it has to be run again.

    Raises:
        ConfigError: Settings, data or a start model are others than it was made from; names them.
        CheckpointError: Its record is broken.
    """
    folder = stage_folder(config, stage)
    recorded = read_origin(folder / ORIGIN_FILE)
    if recorded is None:
        raise ConfigError(
            f"{folder}: completed by a version of megachat that kept no record of what it was made "
            f"from: {_REMEDY}"
        )
    check_settings(folder, stage_settings(config, stage), recorded)
    check_contents(folder, data_inputs(config), recorded)
    present = model_inputs(config, stage)
    made_here = {_key_of_stage(before) for before in stages_before(config, stage)}
    given = {key: content for key, content in present.items() if key not in made_here}
    check_contents(folder, given, recorded)
    return all(
        key in present
        and key in recorded.inputs
        and present[key].digest == recorded.inputs[key].digest
        for key in made_here
    )


def check_settings(folder: Path, settings: Settings, recorded: Origin) -> None:
    """Refuses to take what was made under other settings.

    Raises:
        ConfigError: Names the keys with both values.
    """
    changes = settings.changes_since(recorded.settings)
    if changes:
        shown, others = changes[:_SHOWN_CHANGES], len(changes) - _SHOWN_CHANGES
        more = f" and {others} more" if others > 0 else ""
        raise ConfigError(
            f"{folder}: completed under another configuration: {', '.join(shown)}{more}: {_REMEDY}"
        )


def check_contents(folder: Path, present: Mapping[str, InputContent], recorded: Origin) -> None:
    """Refuses to take what was made from other files.

    Raises:
        ConfigError: Names the file and both digests.
    """
    for key, now in present.items():
        before = recorded.inputs.get(key)
        if before is None:
            raise ConfigError(f"{folder}: made without {key} ({now.place}): {_REMEDY}")
        if before.digest != now.digest:
            raise ConfigError(f"{folder}: made from other files: {_change(key, before, now)}")


def _change(key: str, before: InputContent, now: InputContent) -> str:
    """What is another one than it was, and what to do."""
    place, kind, old, new = now.place, "content", before.digest, now.digest
    changed = [name for name, digest in now.files.items() if before.files.get(name) != digest]
    if changed and changed[0] in before.files:
        name = changed[0]
        kind, old, new = "sha256", before.files[name], now.files[name]
        if Path(place).name != name:
            place = str(Path(place) / name)
    moved = f" (then {before.place})" if before.place != now.place else ""
    return (
        f"{key} {place} had {kind} {old[:_SHOWN_DIGITS]}{moved}, now {new[:_SHOWN_DIGITS]}: put "
        f"that back, {_REMEDY}"
    )


def _key_of_stage(stage: Stage) -> str:
    return f"stage {stage}"


def _digest_of_folder(folder: Path, digests: FileDigests) -> str | None:
    """Which model a folder holds; None where it is broken, which ends whoever reads it."""
    from megachat.checkpoint.content import folder_digest  # seconds, where nothing is done yet

    try:
        return folder_digest(folder, digests)
    except MegachatError:
        return None


def _data_contents(config: RunConfig) -> Iterator[tuple[str, InputContent]]:
    from megachat.data.cache import DataCache  # likewise
    from megachat.data.sources import open_source

    cache = DataCache(config.data.cache_dir)
    for number, source in enumerate(config.data.sources):
        try:
            opened = open_source(source, cache=cache)
            files = {path.name: cache.file_digest(path) for path in opened.files}
        except DataError:
            continue
        place = str(source.path) if source.path is not None else source.name
        key = f"data.sources.{number}"
        yield key, InputContent(place=place, digest=opened.fingerprint, files=files)
