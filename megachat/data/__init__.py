"""Data: tokenizers, the public data sets, their blending and split, and global batches."""

from megachat.data.config import (
    DataConfig,
    LongAnswers,
    LongPrompts,
    Recipe,
    SourceConfig,
    Stage,
)
from megachat.data.loaders import (
    BatchLoader,
    LastBatch,
    LoaderOptions,
    Order,
    PreferenceLoader,
    PromptLoader,
    SftLoader,
    endless,
)
from megachat.data.stage_data import (
    DataReport,
    SourceReport,
    StageData,
    TextRow,
    TokenSet,
    build_stage_data,
    training_texts,
)
from megachat.data.tokenizer import SentencePieceConfig, Tokenizer, train_sentencepiece

__all__ = [
    "BatchLoader",
    "DataConfig",
    "DataReport",
    "LastBatch",
    "LoaderOptions",
    "LongAnswers",
    "LongPrompts",
    "Order",
    "PreferenceLoader",
    "PromptLoader",
    "Recipe",
    "SentencePieceConfig",
    "SftLoader",
    "SourceConfig",
    "SourceReport",
    "Stage",
    "StageData",
    "TextRow",
    "TokenSet",
    "Tokenizer",
    "build_stage_data",
    "endless",
    "train_sentencepiece",
    "training_texts",
]
