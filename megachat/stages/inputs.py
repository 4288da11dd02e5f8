"""Lists the models and data sets that a run reads, and fetches them before its ranks join.

A rank reads what is on its node. So whoever starts ranks on a node fetches first, under a lock that
lets one process do it while the others wait outside of any collective.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.data.config import SourceConfig, Stage
from megachat.data.formats import FORMATS
from megachat.errors import CheckpointError, DataError, MegachatError
from megachat.hub import (
    Content,
    chosen_files,
    fetch,
    fetching,
    folder_on_disk,
    why_unpublished,
)
from megachat.stages.config import RunConfig
from megachat.stages.context import TOKENIZER_RECORD
from megachat.stages.starts import start_models, tokenizer_source

logger = logging.getLogger(__name__)

_NOTES = "dataset_info.json"
"""Left beside the rows by the library of data sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where an input lies on this machine."""

    path: Path
    files: tuple[Path, ...]
    """What of it is of use, in order of the names."""

    @property
    def num_bytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInput:
    """A model or tokenizer."""

    name: str
    """A folder or hub name."""
    content: Content = Content.MODEL

    def __str__(self) -> str:
        """As messages call it."""
        return f"{self.content} {self.name}"

    @property
    def error(self) -> type[MegachatError]:
        """What is raised where it cannot be had."""
        return CheckpointError

    def find(self) -> Place | None:
        """Where it lies; None where it is not here. Asks no network."""
        folder = folder_on_disk(self.name, self.content)
        return None if folder is None else self._place(folder)

    def fetch(self) -> Place:
        """Where it lies, downloaded if it was not here.

        Raises:
            CheckpointError: It cannot be had.
        """
        return self._place(fetch(self.name, self.content))

    def _place(self, folder: Path) -> Place:
        names = chosen_files([path.name for path in folder.iterdir()], self.content)
        return Place(path=folder, files=tuple(folder / name for name in sorted(names)))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInput:
    """A data set."""

    source: SourceConfig

    def __str__(self) -> str:
        """As messages call it."""
        return f"data set {self.source.name}"

    @property
    def needs_hub(self) -> bool:
        """Whether it comes from the hub: it is neither a path nor part of an installed package."""
        known = FORMATS.get(self.source.name)
        return self.source.path is None and known is not None and known.hub_name is not None

    @property
    def error(self) -> type[MegachatError]:
        """What is raised where it cannot be had."""
        return DataError

    def find(self) -> Place | None:
        """Where it lies; None where it is not here. Asks no network.

        Raises:
            DataError: A path does not exist, or a package is not installed.
        """
        from megachat.data.sources import find_source  # a second, which a dry run can do without

        path = find_source(self.source)
        return None if path is None else self._place(path)

    def fetch(self) -> Place:
        """Where it lies, downloaded if it was not here.

        Raises:
            DataError: It cannot be had.
        """
        from megachat.data.sources import fetch_source

        return self._place(fetch_source(self.source))

    @staticmethod
    def _place(path: Path) -> Place:
        """The files, without the library's notes, in which machines may differ."""
        below = sorted(each for each in path.rglob("*") if each.is_file())
        files = [each for each in below if each.name != _NOTES]
        return Place(path=path, files=tuple(files) if path.is_dir() else (path,))


Input = ModelInput | DataInput


def inputs_of(config: RunConfig, stages: Iterable[Stage]) -> tuple[Input, ...]:
    """What some stages of a run read besides what the run folder holds already, each once.

    The tokenizer is copied into the run folder at the start, and from there on read from it.
    """
    wanted = set(stages)
    has_tokenizer = (config.run.output / TOKENIZER_RECORD).is_file()
    found: list[Input] = [
        ModelInput(name=start.name)
        for stage in Stage
        if stage in wanted
        for start in start_models(config, stage)
        if start.stage is None
    ]
    tokenizer = tokenizer_source(config)
    if wanted and tokenizer is not None and not has_tokenizer:
        found.append(ModelInput(name=tokenizer, content=Content.TOKENIZER))
    if wanted:
        found += [DataInput(source=source) for source in config.data.sources]
    return tuple(dict.fromkeys(found))


def check_published(inputs: Sequence[Input]) -> None:
    """Refuses models that nobody can download.

    Raises:
        CheckpointError: One is on no hub; says where its weights come from.
    """
    for each in inputs:
        if isinstance(each, ModelInput) and (reason := why_unpublished(each.name)) is not None:
            raise CheckpointError(f"{each}: {reason}")


def fetch_missing(inputs: Sequence[Input]) -> bool:
    """Fetches what is not on this node; returns whether anything was.

    Every process that starts ranks calls this, before they join.

    Raises:
        CheckpointError: A model cannot be had, or the hub's cache has no locks.
        DataError: A data set cannot be had.
    """
    check_published(inputs)
    missing = [each for each in inputs if each.find() is None]
    if not missing:
        return False
    with fetching():
        for each in missing:
            if each.find() is None:  # who held the lock before may have fetched it
                logger.info("fetching %s", each)
                place = each.fetch()
                logger.info("fetched %s: %.1f MB, %s", each, place.num_bytes / 1e6, place.path)
    return True


def describe_inputs(inputs: Sequence[Input]) -> list[str]:
    """A line for each input: where it lies, or what becomes of it.

    It is for a dry run, which does not load the library of data sets to look into its cache.
    """
    return [f"input {each}: {_description(each)}" for each in inputs]


def _description(each: Input) -> str:
    if isinstance(each, DataInput):
        path = each.source.path
        if path is None:
            return "fetched before the start, unless it is here"
        return str(path) if path.exists() else f"{path}: no such file or folder"
    place = each.find()
    if place is not None:
        return str(place.path)
    return why_unpublished(each.name) or "not here, fetched before the start"
