"""Holds the settings of the data: sources, how they are split, and length limits."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from megachat.config import ConfigModel, PathField, Seed
from megachat.data.chat import ChatConfig
from megachat.data.formats import FORMATS, Stage, unknown_name
from megachat.data.own_formats import OWN_FORMATS, Render

__all__ = [
    "ColumnsConfig",
    "DataConfig",
    "LongAnswers",
    "LongPrompts",
    "Recipe",
    "SentencePieceConfig",
    "SourceConfig",
    "Stage",
    "Whitespace",
]


class Recipe(StrEnum):
    """Which tokens of a supervised row are training targets."""

    ANSWERS = "answers"
    """The answer and its end of sequence; the prompt only conditions."""
    DEEPSPEED_CHAT = "deepspeed-chat"
    """Prompt, answer and end of sequence, as DeepSpeed-Chat does."""


class LongPrompts(StrEnum):
    """What happens to a prompt of more than `max_prompt_tokens`."""

    DROP = "drop"
    """The row is left out and counted."""
    TRUNCATE_LEFT = "truncate_left"
    """The last tokens are kept, since a question usually ends its context."""
    ERROR = "error"
    """The run stops."""


class LongAnswers(StrEnum):
    """What happens to an answer that does not fit."""

    TRUNCATE = "truncate"
    """The first tokens are kept, without an end of sequence unless `eos_on_truncated`."""
    DROP = "drop"
    """The row is left out and counted."""


SplitWeights = Annotated[
    tuple[
        Annotated[float, Field(ge=0.0, allow_inf_nan=False)],
        Annotated[float, Field(ge=0.0, allow_inf_nan=False)],
        Annotated[float, Field(ge=0.0, allow_inf_nan=False)],
    ],
    Field(strict=False),
]
"""Relative shares of the rows for SFT, reward model and PPO prompts."""


class ColumnsConfig(ConfigModel):
    """What the columns of one's own rows are called, by the name that formats know.

    Example: `columns = {prompt = "question", chosen = "answer"}`.
    """

    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    messages: str | None = None
    text: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None

    @property
    def names(self) -> Mapping[str, str]:
        """The column of the file by the known name; those that are renamed only."""
        return {name: column for name, column in self if column is not None}


class SourceConfig(ConfigModel):
    """One data set: a known one by `name`, or one's own by `path`."""

    name: str = ""
    """A known data set (see `megachat.data.formats.FORMATS`), or any name for your own `path`; by
    default the file name of `path`."""
    path: PathField | None = None
    """A local copy: a .json, .jsonl, .csv, .tsv or .parquet file (text also with .gz), a folder of
    such files, or a folder written by `datasets.Dataset.save_to_disk`. None takes the data set from
    the hub or its cache."""
    format: str | None = None
    """Name of the data set whose fields the rows have, or one of
    `megachat.data.own_formats.OWN_FORMATS`; None means that of `name`, and where `name` is not a
    known data set, what the rows themselves say."""
    columns: ColumnsConfig = ColumnsConfig()
    """Other names of the fields, for your own `path`."""
    render: Annotated[Render, Field(strict=False)] = Render.VERBATIM
    """Whether prompts that come as texts are used as they are, or get the marks of `data.chat`."""
    subset: str | None = None
    """Configuration name of a hub data set that has several."""
    revision: str | None = None
    """Git revision of a hub data set; `refs/convert/parquet` for those that ship a script."""
    split: SplitWeights | None = None
    """Shares for the three steps, e.g. (10, 0, 0) for supervised data; None takes the common
    one."""
    weight: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """How often each training row appears in an epoch: 1 once, 2 twice, 0.5 a new random half in
    every epoch."""
    max_rows: Annotated[int, Field(gt=0)] | None = None
    """Read at most this many raw records; None reads all."""

    @model_validator(mode="before")
    @classmethod
    def _name_from_path(cls, values: Any) -> Any:
        """Names a source after its file; a folder that is called like a known set is not one."""
        if not isinstance(values, Mapping) or values.get("name") or not values.get("path"):
            return values
        path = values["path"]
        if not isinstance(path, str | Path):
            return values
        name = Path(path).name or str(path)
        return {**values, "name": f"{name}/" if name in FORMATS else name}

    @model_validator(mode="after")
    def _known_format(self) -> Self:
        if not self.name:
            raise ValueError("give a path of your own data, or the name of a known data set")
        if self.format is not None and self.format not in (*FORMATS, *OWN_FORMATS):
            raise ValueError(
                unknown_name("format", self.format, known_names=(*FORMATS, *OWN_FORMATS))
            )
        if self.path is None and self.name not in FORMATS:
            raise ValueError(f"{unknown_name('name', self.name)}, or give a path")
        if self.path is None and FORMATS[self.name].needs_path:
            raise ValueError(f"data set '{self.name}' needs a path")
        if self.split is not None and not sum(self.split):
            raise ValueError(f"split of '{self.name}': at least one of the shares must be > 0")
        is_known = self.format_name is not None and self.format_name in FORMATS
        if is_known and (self.columns.names or self.render is not Render.VERBATIM):
            raise ValueError(
                f"columns and render of '{self.name}' are for rows of your own, but the fields of "
                f"'{self.format_name}' are known: leave them out"
            )
        return self

    @property
    def format_name(self) -> str | None:
        """Name of the format of the rows; None where they say it themselves."""
        if self.format is not None:
            return self.format
        return self.name if self.name in FORMATS else None


class DataConfig(ConfigModel):
    """All data of a run; the same table serves the three stages."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """The data sets, blended by their weights."""
    chat: ChatConfig = ChatConfig()
    """What stands before the turns of conversations, in training and in the exported template."""
    split: SplitWeights = (2.0, 4.0, 4.0)
    """Shares of each source for SFT, reward model and PPO prompts; the parts are disjoint. A step
    that the rows of a source cannot serve (no pairs, no prompts) gets none of them."""
    validation_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of a stage's rows that is held out where a source has no validation rows of its own."""
    max_validation_rows: Annotated[int, Field(gt=0)] | None = 2000
    """Largest number of held-out rows per source; rows beyond it stay in the training set where
    they were held out by share."""
    seed: Seed = 1234
    """Seed of the split and the hold-out."""
    max_prompt_tokens: Annotated[int, Field(gt=1)] = 256
    """Longest prompt, a beginning-of-sequence token included."""
    max_tokens: Annotated[int, Field(gt=2)] = 512
    """Longest row: prompt, answer and end of sequence."""
    max_answer_tokens: Annotated[int, Field(gt=0)] | None = None
    """Longest answer, end of sequence included; None leaves what the prompt leaves of the row."""
    min_answer_tokens: Annotated[int, Field(gt=0)] = 2
    """Shortest answer, end of sequence included; rows below it are left out and counted."""
    long_prompts: Annotated[LongPrompts, Field(strict=False)] = LongPrompts.DROP
    """What happens to longer prompts."""
    long_answers: Annotated[LongAnswers, Field(strict=False)] = LongAnswers.TRUNCATE
    """What happens to longer answers."""
    eos_on_truncated: bool = False
    """Whether a truncated answer gets an end of sequence. It did not end there, so by default it
    does not: a reward read at the end of sequence stays a reward for ending."""
    recipe: Annotated[Recipe, Field(strict=False)] = Recipe.ANSWERS
    """Training targets of supervised rows."""
    max_bad_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.05
    """Largest share of unusable records of a source; above it the run stops."""
    cache_dir: PathField = Path("runs/cache/data")
    """Folder of the converted and tokenised data, shared by runs and ranks."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not sum(self.split):
            raise ValueError("split: at least one of the three shares must be > 0")
        shortest = self.max_tokens - self.max_prompt_tokens
        if shortest < self.min_answer_tokens:
            raise ValueError(
                f"max_tokens {self.max_tokens} - max_prompt_tokens {self.max_prompt_tokens} = "
                f"{shortest} leaves no room for an answer of min_answer_tokens "
                f"{self.min_answer_tokens}"
            )
        if self.max_answer_tokens is not None and self.max_answer_tokens < self.min_answer_tokens:
            raise ValueError(
                f"max_answer_tokens {self.max_answer_tokens} is below min_answer_tokens "
                f"{self.min_answer_tokens}"
            )
        return self

    def split_of(self, source: SourceConfig) -> tuple[float, float, float]:
        """The shares that hold for one source."""
        return self.split if source.split is None else source.split


class Whitespace(StrEnum):
    """What becomes of line breaks, tabs and forms of characters before text is cut into pieces."""

    KEEP = "keep"
    """All text stays as it is, so decoding gives back what was encoded."""
    FOLD = "fold"
    """Line breaks and tabs become spaces, and characters their simplest form (NFKC)."""


class SentencePieceConfig(ConfigModel):
    """How to train a small sentencepiece unigram vocabulary."""

    vocab_size: Annotated[int, Field(gt=8)] = 4096
    """Number of pieces, the four control tokens and the markers included."""
    smaller_if_needed: bool = False
    """Whether text that does not yield so many pieces gives a smaller vocabulary, not an error."""
    whitespace: Annotated[Whitespace, Field(strict=False)] = Whitespace.KEEP
    """Whether line breaks survive."""
    character_coverage: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9995
    """Share of the characters of the text that get a piece; the rest becomes `<unk>`."""
    user_defined_symbols: Annotated[tuple[str, ...], Field(strict=False)] = ("<human>", "<bot>")
    """Markers that are always one token, in this order directly after the control tokens."""
    bos_token: Literal["<s>", "</s>"] = "<s>"
    """Beginning of sequence: `<s>` (id 0), or `</s>` (id 2), which OPT uses for both ends."""
    add_bos: bool = False
    """Whether a sequence starts with the beginning-of-sequence token."""
    max_sentences: Annotated[int, Field(gt=0)] = 40_000
    """Texts that are sampled for training; more costs time and memory for little gain."""
    max_sentence_bytes: Annotated[int, Field(gt=0)] = 16_384
    """Texts longer than this many UTF-8 bytes are left out of the training."""
    seed: Seed = 1234
    """Seed of the sampling of texts."""
