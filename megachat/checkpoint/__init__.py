"""Model files: reading and writing HuggingFace folders from and to any layout."""

from megachat.checkpoint.huggingface import (
    MissingHead,
    is_complete,
    load_huggingface,
    read_config,
    save_huggingface,
)

__all__ = ["MissingHead", "is_complete", "load_huggingface", "read_config", "save_huggingface"]
