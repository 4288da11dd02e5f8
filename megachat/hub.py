"""The one place that talks to the Hugging Face hub: can it be reached, and where is a model."""

import socket
import urllib.parse
import urllib.request
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from megachat.errors import CheckpointError

_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model")
"""Files of a model folder that are of use: weights, configuration, tokenizer."""


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


def folder_on_disk(name_or_folder: str) -> Path | None:
    """The folder of a model that is on this disk or in the hub's cache; None: it is on neither.

    Asks no network.
    """
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    try:
        return Path(snapshot_download(name_or_folder, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def local_folder(name_or_folder: str) -> Path:
    """The folder of a model, given as a folder or as a hub name such as `facebook/opt-125m`.

    This disk comes first, then the hub's cache, then the hub.

    Raises:
        CheckpointError: There is no such folder, and no such model cached or reachable.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    if name_or_folder.startswith((".", "/", "~")) or name_or_folder.count("/") != 1:
        raise CheckpointError(f"model {name_or_folder}: no such folder")
    try:
        return Path(snapshot_download(name_or_folder, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise CheckpointError(f"model {name_or_folder}: no folder and no hub name") from error
    if not hub_is_reachable():
        raise CheckpointError(
            f"model {name_or_folder}: no such folder, not in the local cache, and the hub cannot "
            "be reached from here: give a HuggingFace folder"
        )
    try:
        return Path(snapshot_download(name_or_folder, allow_patterns=list(_PATTERNS)))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model {name_or_folder}: not given by the hub ({reason}): check the name, or give a "
            "HuggingFace folder"
        ) from error
