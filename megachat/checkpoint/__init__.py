"""Model files: reading and writing HuggingFace folders from and to any layout."""

from megachat.checkpoint.huggingface import (
    MissingHead,
    is_complete,
    load_huggingface,
    load_together,
    read_config,
    save_huggingface,
)

__all__ = [
    "MissingHead",
    "is_complete",
    "load_huggingface",
    "load_together",
    "read_config",
    "save_huggingface",
]
