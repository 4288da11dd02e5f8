"""Turns the records of the public data sets into common rows: a prompt and its answers.

Each data set is a small pure function from one raw record to common rows. A function returns no
row where the record is sound but has no answer, and raises `RowError` where it is broken. The
prompt template of the data sets that do not bring their own is DeepSpeed-Chat's:
`" Human: <question> Assistant:"` followed by `" <answer>"`.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

_CITATION = re.compile(r"\s?\[\d+(?:\s*[,;-]\s*\d+)*\]")
_ROLES = MappingProxyType({"USER:": "Human:", "ASSISTANT:": "Assistant:"})
_ROLE = re.compile("|".join(_ROLES))


class Stage(StrEnum):
    """What rows are prepared for; the order is that of the split weights."""

    SFT = "sft"
    """Step 1: prompt and chosen answer, for next-token training."""
    REWARD = "reward"
    """Step 2: pairs of a chosen and a rejected answer."""
    PROMPTS = "prompts"
    """Step 3: prompts alone, to be answered by the actor."""


class RowError(Exception):
    """A record that cannot become a row; the message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one record gives: a prompt, its preferred answer and, in preference data, a worse one.

    The texts are concatenated as they are, so an answer brings its own leading space.
    """

    prompt: str
    """Empty where there is text alone, which then is the answer to nothing."""
    chosen: str | None = None
    """None where there is a prompt alone."""
    rejected: str | None = None

    def __post_init__(self) -> None:
        """Refuses rows that no stage can use."""
        if self.prompt != "" or self.chosen is None:
            _check_text("prompt", self.prompt)
        if self.chosen is not None:
            _check_text("chosen", self.chosen)
        if self.rejected is None:
            return
        _check_text("rejected", self.rejected)
        if self.rejected == self.chosen:
            raise RowError("chosen and rejected are equal")

    @property
    def stages(self) -> frozenset[Stage]:
        """The stages that this row can serve."""
        if self.chosen is None:
            return frozenset({Stage.PROMPTS})
        if not self.prompt:
            return frozenset({Stage.SFT})
        return frozenset(Stage) - (frozenset({Stage.REWARD}) if self.rejected is None else set())


def _check_text(field: str, text: Any) -> None:
    """Refuses what is no text, is blank, or cannot be written as UTF-8."""
    if not isinstance(text, str):
        raise RowError(f"{field} is {type(text).__name__}, not text")
    if not text.strip():
        raise RowError(f"{field} is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"{field} is not valid text: U+{ord(text[error.start]):04X} is half a surrogate pair, "
            "or a byte that is not UTF-8"
        ) from error


RowFunction = Callable[[Mapping[str, Any]], Sequence[Row]]
"""From one raw record to its rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFormat:
    """How to read one data set."""

    rows: RowFunction
    """The conversion of one record."""
    hub_name: str | None = None
    """Where the hub has it; None where only local or installed copies exist."""
    needs_path: bool = False
    """Whether a path must be given."""


def unknown_name(key: str, name: str, *, known_names: Iterable[str] | None = None) -> str:
    """The complaint about a name that is not among the known ones, with near names.

    Args:
        key: What has the name.
        name: The name.
        known_names: None means those of `FORMATS`.
    """
    names = tuple(FORMATS if known_names is None else known_names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not near:
        ends = {known.rpartition("/")[2]: known for known in names}
        matches = difflib.get_close_matches(name.rpartition("/")[2], ends, n=3, cutoff=0.5)
        near = [ends[end] for end in matches]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(names))}"
    return f"{key}: unknown data set '{name}' ({hint})"


def question(text: str) -> str:
    """DeepSpeed-Chat's prompt template around one question."""
    return f" Human: {text} Assistant:"


def field_of(record: Mapping[str, Any], *path: str | int) -> Any:
    """The value at `path` inside a record; missing or null is a `RowError`."""
    value: Any = record
    for depth, key in enumerate(path):
        fits = isinstance(value, list if isinstance(key, int) else Mapping)
        try:
            value = value[key] if fits else None
        except (KeyError, IndexError):
            value = None
        if value is None:
            where = ".".join(str(part) for part in path[: depth + 1])
            raise RowError(f"field {where} is missing")
    return value


def text_of(record: Mapping[str, Any], *path: str | int) -> str:
    """The non-empty text at `path` inside a record."""
    value = field_of(record, *path)
    where = ".".join(str(part) for part in path)
    if not isinstance(value, str):
        raise RowError(f"field {where} is {type(value).__name__}, not text")
    if not value.strip():
        raise RowError(f"field {where} is empty")
    return value


def _number(record: Mapping[str, Any], key: str) -> float:
    value = field_of(record, key)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"field {key} is not a number")
    return number


def items_of(record: Mapping[str, Any], *path: str) -> list[Any]:
    """A list; one of structures may also be stored as a structure of lists."""
    value = field_of(record, *path)
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, item, strict=True)) for item in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise RowError(f"field {'.'.join(path)} is {type(value).__name__}, not a list")
    return value


def verbatim(record: Mapping[str, Any]) -> Sequence[Row]:
    """Fields prompt, chosen and optionally rejected, used as they are."""
    return [
        Row(
            prompt=text_of(record, "prompt"),
            chosen=text_of(record, "chosen"),
            rejected=record.get("rejected"),
        )
    ]


def _local_json(record: Mapping[str, Any]) -> Sequence[Row]:
    """DeepSpeed-Chat's local JSON: the common fields without their leading spaces."""
    rejected = None if record.get("rejected") is None else f" {text_of(record, 'rejected')}"
    return [
        Row(
            prompt=f" {text_of(record, 'prompt')}",
            chosen=f" {text_of(record, 'chosen')}",
            rejected=rejected,
        )
    ]


def _synthetic_instruct(record: Mapping[str, Any]) -> Sequence[Row]:
    return [
        Row(
            prompt=question(text_of(record, "prompt")),
            chosen=f" {text_of(record, 'chosen')}",
            rejected=f" {text_of(record, 'rejected')}",
        )
    ]


def _rlhf_reward(record: Mapping[str, Any]) -> Sequence[Row]:
    """The answers repeat the `Assistant:` tag, which belongs to the prompt."""
    chosen, rejected = (
        text_of(record, key).rpartition("Assistant:")[2] for key in ("chosen", "rejected")
    )
    return [
        Row(prompt=f"{text_of(record, 'prompt')}Assistant:", chosen=chosen, rejected=rejected),
    ]


def _webgpt(record: Mapping[str, Any]) -> Sequence[Row]:
    """The better scored answer is chosen, citations such as [1] removed; a tie is no preference."""
    answers = [
        (_number(record, f"score_{side}"), _CITATION.sub("", text_of(record, f"answer_{side}")))
        for side in (0, 1)
    ]
    (best, chosen), (worst, rejected) = sorted(answers, key=lambda item: -item[0])
    return [
        Row(
            prompt=question(text_of(record, "question", "full_text")),
            chosen=f" {chosen}",
            rejected=None if best == worst else f" {rejected}",
        )
    ]


def _shp(record: Mapping[str, Any]) -> Sequence[Row]:
    """Label 1 prefers answer A, label 0 answer B."""
    label = field_of(record, "labels")
    if label not in (0, 1):
        raise RowError("field labels is neither 0 nor 1")
    better, worse = ("A", "B") if label == 1 else ("B", "A")
    return [
        Row(
            prompt=question(text_of(record, "history")),
            chosen=f" {text_of(record, f'human_ref_{better}')}",
            rejected=f" {text_of(record, f'human_ref_{worse}')}",
        )
    ]


def _sharegpt_vicuna(record: Mapping[str, Any]) -> Sequence[Row]:
    """Conversations with USER: and ASSISTANT: tags; the label is the last answer."""
    prompt = _ROLE.sub(lambda match: _ROLES[match.group()], text_of(record, "prompt"))
    return [Row(prompt=prompt, chosen=f" {text_of(record, 'label')}")]


def _zhihu(record: Mapping[str, Any]) -> Sequence[Row]:
    return [
        Row(
            prompt=question(text_of(record, "INSTRUCTION")),
            chosen=f" {text_of(record, 'RESPONSE')}",
        )
    ]


def _miracl(record: Mapping[str, Any]) -> Sequence[Row]:
    """The first relevant passage against the first irrelevant one, where there are such."""
    relevant = items_of(record, "positive_passages")
    if not relevant:
        return []
    irrelevant = items_of(record, "negative_passages") if record.get("negative_passages") else []
    return [
        Row(
            prompt=question(text_of(record, "query")),
            chosen=f" {text_of(relevant[0], 'text')}",
            rejected=f" {text_of(irrelevant[0], 'text')}" if irrelevant else None,
        )
    ]


def _hc3(record: Mapping[str, Any]) -> Sequence[Row]:
    """The first human answer; ChatGPT's answers are not used."""
    answers = items_of(record, "human_answers")
    if not answers or answers[0] is None:
        return []
    return [
        Row(
            prompt=question(text_of(record, "question")),
            chosen=f" {text_of(record, 'human_answers', 0)}",
        )
    ]


def _mkqa(record: Mapping[str, Any], *, language: str) -> Sequence[Row]:
    """The first answer in one language; many questions are marked as unanswerable."""
    prompt = question(text_of(record, "queries", language))
    answers = items_of(record, "answers", language)
    first = answers[0] if answers else None
    if first is None or (isinstance(first, Mapping) and first.get("text") is None):
        return []
    return [Row(prompt=prompt, chosen=f" {text_of(first, 'text')}")]


def _mkqa_chinese(record: Mapping[str, Any]) -> Sequence[Row]:
    return _mkqa(record, language="zh_cn")


def _mkqa_japanese(record: Mapping[str, Any]) -> Sequence[Row]:
    return _mkqa(record, language="ja")


def _jaquad_question(record: Mapping[str, Any]) -> Sequence[Row]:
    """The sentence that holds the answer."""
    return [
        Row(prompt=question(text_of(record, "question")), chosen=f" {text_of(record, 'sentence')}")
    ]


def _jaquad_pairs(record: Mapping[str, Any]) -> Sequence[Row]:
    """The first question of a paragraph, answered by the paragraph."""
    return [
        Row(
            prompt=question(text_of(record, "questions", 0)),
            chosen=f" {text_of(record, 'paragraph')}",
        )
    ]


_HUB: Mapping[str, RowFunction] = {
    "Dahoas/rm-static": verbatim,
    "Dahoas/full-hh-rlhf": verbatim,
    "Dahoas/synthetic-instruct-gptj-pairwise": _synthetic_instruct,
    "yitingxie/rlhf-reward-datasets": _rlhf_reward,
    "openai/webgpt_comparisons": _webgpt,
    "stanfordnlp/SHP": _shp,
    "pvduy/sharegpt_alpaca_oa_vicuna_format": _sharegpt_vicuna,
    "wangrui6/Zhihu-KOL": _zhihu,
    "Cohere/miracl-zh-queries-22-12": _miracl,
    "Cohere/miracl-ja-queries-22-12": _miracl,
    "Hello-SimpleAI/HC3-Chinese": _hc3,
    "lmqg/qg_jaquad": _jaquad_question,
    "lmqg/qag_jaquad": _jaquad_pairs,
}

FORMATS: Mapping[str, DataFormat] = MappingProxyType(
    {name: DataFormat(rows=rows, hub_name=name) for name, rows in _HUB.items()}
    | {
        "mkqa-Chinese": DataFormat(rows=_mkqa_chinese, hub_name="apple/mkqa"),
        "mkqa-Japanese": DataFormat(rows=_mkqa_japanese, hub_name="apple/mkqa"),
        "local/jsonfile": DataFormat(rows=_local_json, needs_path=True),
        "chitchat": DataFormat(rows=verbatim),
        "chitchat-upbeat": DataFormat(rows=verbatim),
    }
)
"""Every data set that a configuration can name."""
