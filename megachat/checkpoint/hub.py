"""The one place that finds a model's folder: on this disk, in the hub's cache, or by download."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from megachat.errors import CheckpointError

_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.txt", "*.model")
"""Files of a model folder that are of use: weights, configuration, tokenizer."""


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
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(name_or_folder, allow_patterns=list(_PATTERNS)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"model {name_or_folder}: neither a folder here, nor in the hub's cache, nor "
            f"reachable ({reason}): give a local HuggingFace folder"
        ) from error
