"""Finds models on this disk and in the hub's cache, and fetches them from the hub beforehand.

Finding asks no network and waits for nobody: that is all a rank does. Fetching belongs to whoever
starts a job, before its ranks join, or to `megachat fetch` on a machine with a network.
"""

import glob
import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from megachat.errors import CheckpointError
from megachat.locks import Purpose, held, why_no_locks

_CONFIG = "config.json"
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
"""Weights in one file, or an index and its parts; the first form that is there is read, as in
`megachat.checkpoint.reader`."""
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
"""Files of which one set makes a tokenizer."""
_SMALL = ("*.json", "*.txt", "*.model")
"""Configuration and tokenizer."""

_UNPUBLISHED: Mapping[str, str] = {
    "facebook/opt-175b": "is on no hub: its authors give the weights on request, by the form in "
    "https://github.com/facebookresearch/metaseq/tree/main/projects/OPT, as metaseq checkpoints: "
    "convert those to a HuggingFace folder and give that folder as the model"
}
"""Models that have a name but no files."""


_OTHER_CACHE = "set HF_HOME to a folder on another one, e.g. on a disk of each node"
"""What to do where the cache's file system has no locks; the hub's client takes some, too."""


class Content(StrEnum):
    """What is needed of a model's folder."""

    MODEL = "model"
    """Configuration and weights, and the tokenizer where there is one."""
    TOKENIZER = "tokenizer"
    """The tokenizer alone."""


def hub_is_reachable() -> bool:
    """Whether the hub's name resolves, or a proxy would resolve it.

    The hub client repeats failing requests for most of a minute. On the many machines without a
    way out (compute nodes, CI) this question spares that minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def hub_cache() -> Path:
    """Where the hub's client keeps what it fetched on this machine; HF_HOME moves it."""
    return Path(constants.HF_HUB_CACHE)


@contextmanager
def fetching() -> Iterator[None]:
    """Lets one process of those that share the hub's cache fetch, while the others wait.

    Raises:
        CheckpointError: The cache cannot be made, or its file system has no locks.
    """
    purpose = Purpose(
        work="fetch models and data from the hub",
        remedy=_OTHER_CACHE,
        error=CheckpointError,
    )
    try:
        hub_cache().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{hub_cache()}: cannot be made ({error.strerror}): set HF_HOME to another folder"
        ) from error
    with held(hub_cache() / "megachat-fetch.lock", purpose):
        yield


def why_unpublished(name: str) -> str | None:
    """Why a model that has a name is on no hub, and where it comes from; None for all others."""
    return None if Path(name).is_dir() else _UNPUBLISHED.get(name)


def folder_on_disk(name_or_folder: str, content: Content = Content.MODEL) -> Path | None:
    """The folder of a model that is whole on this disk or in the hub's cache; None: on neither.

    Asks no network.
    """
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    snapshot = _snapshot(name_or_folder)
    return snapshot if snapshot is not None and lacking(snapshot, content) is None else None


def local_folder(name_or_folder: str, content: Content = Content.MODEL) -> Path:
    """The folder of a model, given as a folder or as a hub name such as `facebook/opt-125m`.

    Asks no network.

    Raises:
        CheckpointError: There is no such folder, and the hub's cache does not hold it whole.
    """
    found = folder_on_disk(name_or_folder, content)
    if found is not None:
        return found
    raise CheckpointError(f"{content} {name_or_folder}: {_why_not_here(name_or_folder, content)}")


def can_be_fetched(name: str) -> bool:
    """Whether something that is not on this disk could come from the hub, asked from here."""
    return _can_be_hub_name(name) and hub_is_reachable()


def fetch(name_or_folder: str, content: Content = Content.MODEL) -> Path:
    """The folder of a model, downloaded into the hub's cache where it is not on this disk.

    Of weights in two formats only the safetensors are downloaded.

    Raises:
        CheckpointError: It is on no hub, the hub cannot be reached, or does not give it.
    """
    found = folder_on_disk(name_or_folder, content)
    if found is not None:
        return found
    if why_unpublished(name_or_folder) is not None or not _can_be_hub_name(name_or_folder):
        return local_folder(name_or_folder, content)
    if not hub_is_reachable():
        raise CheckpointError(
            f"{content} {name_or_folder}: {_why_not_here(name_or_folder, content)}"
        )
    return _download(name_or_folder, content)


def chosen_files(names: Sequence[str], content: Content) -> tuple[str, ...]:
    """Those files of a repository that are of use (pure).

    Args:
        names: All its files.
        content: What is needed; a model comes with its tokenizer.
    """
    top = [name for name in names if "/" not in name]
    indices = {index for _, index, _ in _WEIGHTS}
    chosen = [
        name
        for name in top
        if name not in indices and any(fnmatch(name, pattern) for pattern in _SMALL)
    ]
    if content is Content.TOKENIZER:
        return tuple(chosen)
    for single, index, parts in _WEIGHTS:
        if single in top:
            return (*chosen, single)
        if index in top:
            return (*chosen, index, *(name for name in top if fnmatch(name, parts)))
    return tuple(chosen)


def lacking(folder: Path, content: Content) -> str | None:
    """What a folder lacks of what is needed; None where it is whole."""
    if content is Content.TOKENIZER:
        whole = any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS)
        return None if whole else _TOKENIZERS[0][0]
    if not (folder / _CONFIG).is_file():
        return _CONFIG
    for single, index, _ in _WEIGHTS:
        if (folder / single).is_file():
            return None
        if (folder / index).is_file():
            parts = _parts(folder / index)
            return next((name for name in parts if not (folder / name).is_file()), None)
    return _WEIGHTS[0][0]


def _parts(index: Path) -> list[str]:
    """Files that an index of weights names; one that cannot be read names itself."""
    try:
        return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [f"{index.name} (readable)"]


def _snapshot(name: str) -> Path | None:
    """The folder of a name in the hub's cache, whole or not.

    Any one file makes a folder: which ones a run needs is not the hub's client to say, since
    megachat does not fetch all of a repository.
    """
    for pattern in (_CONFIG, *chain.from_iterable(_TOKENIZERS)):
        try:
            found = Path(snapshot_download(name, local_files_only=True, allow_patterns=[pattern]))
        except HFValidationError:
            return None
        except LocalEntryNotFoundError:
            continue
        return found
    return None


def _can_be_hub_name(name: str) -> bool:
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _why_not_here(name: str, content: Content) -> str:
    """Why a folder is not on this disk, and what to do."""
    unpublished = why_unpublished(name)
    if unpublished is not None:
        return unpublished
    if not _can_be_hub_name(name):
        return "no such folder"
    snapshot = _snapshot(name)
    if snapshot is None:
        state = f"no such folder, not in the local cache {hub_cache()}"
    else:
        state = (
            f"not whole in the local cache: {snapshot / str(lacking(snapshot, content))} is missing"
        )
    way = "" if hub_is_reachable() else ", and the hub cannot be reached from here"
    return (
        f"{state}{way}: run megachat fetch where there is a network and the same cache, or give a "
        "HuggingFace folder"
    )


def _download(name: str, content: Content) -> Path:
    """Brings the chosen files into the hub's cache."""
    try:
        siblings = HfApi().model_info(name).siblings or ()
        wanted = chosen_files([file.rfilename for file in siblings], content)
        # No revision: the client notes which commit the name stands for, by which it is found.
        folder = Path(snapshot_download(name, allow_patterns=[*map(glob.escape, wanted)]))
    except Exception as error:  # anything between the network and the library
        no_locks = why_no_locks(error)
        if no_locks is not None:
            raise CheckpointError(f"{hub_cache()}: {no_locks}: {_OTHER_CACHE}") from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{content} {name}: not given by the hub ({reason}): check the name, or give a "
            "HuggingFace folder"
        ) from error
    missing = lacking(folder, content)
    if missing is not None:
        raise CheckpointError(
            f"{content} {name}: the hub's copy has no {missing} ({folder}): give another name or a "
            "HuggingFace folder"
        )
    return folder
