"""Data: tokenizers, the public data sets, their blending and split, and global batches.

Only the settings are gathered here, so that reading a configuration does not wait for the data
libraries. The rest: `tokenizer`, `stage_data` (`build_stage_data`), `loaders`, `chitchat`.
"""

from megachat.data.config import (
    DataConfig,
    LongAnswers,
    LongPrompts,
    Recipe,
    SourceConfig,
    Stage,
)

__all__ = ["DataConfig", "LongAnswers", "LongPrompts", "Recipe", "SourceConfig", "Stage"]
