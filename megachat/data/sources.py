"""The one place that opens a data set: hub name, saved folder, files, or installed demo data."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.cache.cache import Cache

from megachat.data import chitchat
from megachat.data.cache import DataCache, content_key
from megachat.data.config import SourceConfig
from megachat.data.formats import FORMATS
from megachat.data.messages import first_line
from megachat.data.records_io import (
    FILE_SUFFIXES,
    RawRecord,
    is_data_file,
    read_dataset,
    read_file,
)
from megachat.errors import DataError
from megachat.hub import hub_is_reachable
from megachat.locks import why_no_locks

TRAIN = "train"
"""Name of the rows to train on."""
VALIDATION = "validation"
"""Name of the rows a source holds out by itself."""

_VALIDATION_NAMES = ("validation", "valid", "eval", "dev", "test")
"""Names of held-out rows in public data sets, the first that exists is used."""

_COMMIT = re.compile("[0-9a-f]{40}")

Records = Callable[[], Iterator[RawRecord]]
"""Starts a new pass over raw records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenSource:
    """A data set that was found."""

    splits: Mapping[str, Records]
    """`train` and, where the source holds out rows itself, `validation`."""
    fingerprint: str
    """Hash of the content."""
    files: tuple[Path, ...]
    """What is read of it."""


def find_source(config: SourceConfig) -> Path | None:
    """File or folder of a data set; None for one of the hub that is not in the local cache.

    Asks no network.

    Raises:
        DataError: A path does not exist, or a package is not installed.
    """
    if config.path is not None:
        if not config.path.exists():
            raise DataError(f"data set {config.name}: {config.path}: no such file or folder")
        return config.path
    if config.name in _INSTALLED:
        return chitchat.data_files()[0]
    try:
        return Path(_cached(config).cache_dir)
    except DataError:
        return None


def fetch_source(config: SourceConfig) -> Path:
    """File or folder of a data set, downloaded into the library's cache if it is not here.

    Raises:
        DataError: As `find_source`, or the hub cannot be reached or does not give it.
    """
    found = find_source(config)
    if found is not None:
        return found
    if hub_is_reachable():
        _download(config)
    return Path(_cached(config).cache_dir)  # or what is wrong


def open_source(config: SourceConfig, *, cache: DataCache) -> OpenSource:
    """Finds a data set without reading it; asks no network.

    Raises:
        DataError: It does not exist here, cannot be opened, or has no training rows.
    """
    if config.path is not None:
        return _open_path(config.path, cache=cache)
    if config.name in _INSTALLED:
        return _open_installed(_INSTALLED[config.name], cache=cache)
    return _open_hub(config, cache=cache)


def local_records(path: Path) -> Mapping[str, Records]:
    """Passes over the raw records of a local source, by split; nothing is read or hashed before.

    Raises:
        DataError: There is no such file or folder, or it holds no data.
    """
    if path.is_file():
        return {TRAIN: partial(_read_files, (path,))}
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if _is_saved(path):
        return {
            split: partial(read_dataset, dataset, name=f"{path} [{split}]")
            for split, dataset in _splits_of(_load_saved(path), name=str(path)).items()
        }
    return {
        split: partial(_read_files, tuple(files)) for split, files in _training_files(path).items()
    }


def _open_installed(read: Callable[..., Iterator[RawRecord]], *, cache: DataCache) -> OpenSource:
    return OpenSource(
        splits={TRAIN: partial(read, held_out=False), VALIDATION: partial(read, held_out=True)},
        fingerprint=content_key(
            {"files": cache.files_digest(chitchat.data_files()), "vader": chitchat.vader_version()}
        ),
        files=tuple(chitchat.data_files()),
    )


_INSTALLED: Mapping[str, Callable[..., Iterator[RawRecord]]] = {
    "chitchat": chitchat.reply_records,
    "chitchat-upbeat": chitchat.upbeat_records,
}


def _open_path(path: Path, *, cache: DataCache) -> OpenSource:
    if path.is_file():
        return _from_files({TRAIN: [path]}, cache=cache)
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if _is_saved(path):
        return _from_datasets(_load_saved(path), name=str(path), cache=cache)
    return _from_files(_training_files(path), cache=cache)


def _is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _training_files(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by split.

    Raises:
        DataError: There are none to train on.
    """
    try:
        files = _group_files(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror or error}") from error
    if not files.get(TRAIN):
        raise DataError(
            f"{folder}: holds neither a data set written by save_to_disk nor training rows in "
            f"{', '.join(FILE_SUFFIXES)} files"
        )
    return files


def _group_files(folder: Path) -> dict[str, list[Path]]:
    """Files of a folder and of its `data` folder by split; unnamed ones are for training."""
    found = sorted(
        path
        for parent in (folder, folder / "data")
        if parent.is_dir()
        for path in parent.iterdir()
        if is_data_file(path)
    )
    by_name: dict[str, list[Path]] = {}
    for path in found:
        word = path.stem.split("-")[0].split(".")[0]
        by_name.setdefault(word if word in _VALIDATION_NAMES else TRAIN, []).append(path)
    return _choose_splits(by_name)


def _choose_splits(available: Mapping[str, Any]) -> dict[str, Any]:
    """The training rows and the first kind of held-out rows there is."""
    chosen = {TRAIN: available[TRAIN]} if TRAIN in available else {}
    held_out = next((name for name in _VALIDATION_NAMES if name in available), None)
    if held_out is not None:
        chosen[VALIDATION] = available[held_out]
    return chosen


def _from_files(files: Mapping[str, Sequence[Path]], *, cache: DataCache) -> OpenSource:
    return OpenSource(
        splits={name: partial(_read_files, tuple(paths)) for name, paths in files.items()},
        fingerprint=content_key(
            {name: cache.files_digest(list(paths)) for name, paths in files.items()}
        ),
        files=tuple(path for paths in files.values() for path in paths),
    )


def _read_files(paths: Sequence[Path]) -> Iterator[RawRecord]:
    return chain.from_iterable(read_file(path) for path in paths)


def _load_saved(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many types for a damaged folder
        raise DataError(
            f"{path}: cannot be loaded as a saved data set: {first_line(error)}"
        ) from error


def _splits_of(loaded: Any, *, name: str) -> dict[str, Any]:
    """The splits of a `Dataset` or `DatasetDict` that are used."""
    splits = {TRAIN: loaded} if isinstance(loaded, datasets.Dataset) else _choose_splits(loaded)
    if TRAIN not in splits:
        raise DataError(f"{name}: has no split 'train', only {', '.join(loaded)}")
    return splits


def _from_datasets(loaded: Any, *, name: str, cache: DataCache) -> OpenSource:
    """The splits of a `Dataset` or `DatasetDict`, which lie memory-mapped on disk."""
    splits = _splits_of(loaded, name=name)
    if not all(dataset.cache_files for dataset in splits.values()):
        raise DataError(f"{name}: is held in memory: leave datasets.config.IN_MEMORY_MAX_SIZE 0")
    files = {
        split: [Path(file["filename"]) for file in dataset.cache_files]
        for split, dataset in splits.items()
    }
    return OpenSource(
        splits={
            split: partial(read_dataset, dataset, name=f"{name} [{split}]")
            for split, dataset in splits.items()
        },
        fingerprint=content_key(
            {split: [cache.file_digest(path) for path in paths] for split, paths in files.items()}
        ),
        files=tuple(path for paths in files.values() for path in paths),
    )


def _open_hub(config: SourceConfig, *, cache: DataCache) -> OpenSource:
    builder = _cached(config)
    try:
        loaded = builder.as_dataset()
    except Exception as error:  # the library raises many types for a damaged folder
        raise DataError(
            f"{builder.cache_dir}: cannot be loaded ({first_line(error)}): delete the folder and "
            "run megachat fetch"
        ) from error
    return _from_datasets(loaded, name=_hub_name(config), cache=cache)


def _hub_name(config: SourceConfig) -> str:
    return FORMATS[config.name].hub_name or config.name


def _cached(config: SourceConfig) -> Any:
    """The library's builder of what an earlier download of the data set left on this machine.

    Raises:
        DataError: There is no such copy, or only of another commit than the one asked for.
    """
    name = _hub_name(config)
    advice = (
        "run megachat fetch where there is a network and the same cache, or give a local copy by "
        "path"
    )
    try:
        builder = Cache(
            dataset_name=name.rpartition("/")[2],
            repo_id=name,
            config_name=config.subset,
            version="auto",
            hash="auto",
        )
    except (ValueError, OSError) as error:
        _refuse_without_locks(error)
        raise DataError(
            f"data set {name}: no copy is cached here ({first_line(error)}): {advice}"
        ) from error
    # A folder is named after the commit it was made from; what a branch stood for is not kept.
    if config.revision is not None and _COMMIT.fullmatch(config.revision):
        if builder.hash != config.revision:
            raise DataError(
                f"data set {name}: the cached copy is of commit {builder.hash}, but revision is "
                f"{config.revision}: {advice}"
            )
    return builder


def _download(config: SourceConfig) -> None:
    name = _hub_name(config)
    try:
        datasets.load_dataset(name, name=config.subset, revision=config.revision)
    except Exception as error:  # anything between the network and the library
        _refuse_without_locks(error)
        reason = first_line(error)
        hint = (
            'set revision = "refs/convert/parquet", which has the rows without the script'
            if "script" in reason
            else "give a local copy by path"
        )
        raise DataError(f"data set {name}: cannot be loaded: {reason}: {hint}") from error


def _refuse_without_locks(error: Exception) -> None:
    """Tells the library's locks from other errors.

    Raises:
        DataError: Its cache is on a file system without locks.
    """
    no_locks = why_no_locks(error)
    if no_locks is not None:
        raise DataError(
            f"{datasets.config.HF_DATASETS_CACHE}: {no_locks}: set HF_HOME to a folder on another "
            "one, or give a local copy by path"
        ) from error
