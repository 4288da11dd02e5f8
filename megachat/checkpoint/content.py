"""Tells which model a folder holds, whatever the folder is called and however it is cut into files.

Of an export the writer's digests tell it. Any other folder is read once: by the ranks that load it
(`load_together`), or here, and then known until its files change.
"""

import logging
from pathlib import Path

from megachat.checkpoint.checksums import read_checksums
from megachat.checkpoint.digests import model_digest, tensor_digest
from megachat.checkpoint.huggingface import read_config
from megachat.checkpoint.reader import CONFIG_FILE, list_weights, one_line, read_tensor
from megachat.digests import FileDigests, FilesState
from megachat.errors import CheckpointError
from megachat.hub import Content, chosen_files

_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_SAID_BYTES = 10**9
"""Reading more than this takes seconds, which is said."""

logger = logging.getLogger(__name__)


def weights_state(folder: Path) -> FilesState:
    """How the files stand of which a folder's model is read.

    Raises:
        OSError: The folder cannot be read.
    """
    chosen = chosen_files([path.name for path in folder.iterdir()], Content.MODEL)
    names = [name for name in chosen if name == CONFIG_FILE or name.endswith(_WEIGHT_SUFFIXES)]
    return FilesState.of([folder / name for name in sorted(names)], kind="model")


def folder_digest(folder: Path, digests: FileDigests) -> str:
    """`model_digest` of the model in a folder.

    Args:
        folder: A HuggingFace folder.
        digests: What is known already, and where it is remembered.

    Raises:
        CheckpointError: It is no model, or cannot be read.
        ConfigError: It is of an architecture that megachat does not know.
    """
    checksums = read_checksums(folder)
    if checksums is not None:
        return model_digest(read_config(folder), checksums.by_canonical_name)
    try:
        state = weights_state(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {one_line(error)}") from error
    known = digests.recall(state)
    if known is not None:
        return known
    stored = list_weights(folder)
    size = sum(tensor.num_bytes for tensor in stored.values())
    if size > _SAID_BYTES:
        # A warning, since a run looks at this before it shows its log.
        logger.warning(
            "reading %s to see whether it is the same model: %.1f GB", folder, size / 1e9
        )
    in_order = sorted(stored.items(), key=lambda item: (item[1].file, item[1].offset))
    tensors = {name: tensor_digest(read_tensor(folder, tensor)) for name, tensor in in_order}
    digest = model_digest(read_config(folder), tensors)
    digests.keep(state, digest)
    return digest
