"""The one place that knows the fields of the public data sets.

Each data set is a small pure function from one raw record to common rows. A function returns no
row where the record is sound but has no answer, and raises `RowError` where it is broken. The
prompt template of the data sets that do not bring their own is DeepSpeed-Chat's:
`" Human: <question> Assistant:"` followed by `" <answer>"`.
"""

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

COMMON_FORMAT = "common"
"""Name of the format of a user's own rows: prompt, chosen and, for pairs, rejected."""

_CITATION = re.compile(r"\s?\[\d+(?:\s*[,;-]\s*\d+)*\]")
_ROLES = MappingProxyType({"USER:": "Human:", "ASSISTANT:": "Assistant:"})
_ROLE = re.compile("|".join(_ROLES))


class RowError(Exception):
    """A record that cannot become a row; the message is the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One prompt with its preferred answer and, in preference data, a worse one.

    The texts are concatenated as they are, so an answer brings its own leading space.
    """

    prompt: str
    chosen: str
    rejected: str | None = None

    def __post_init__(self) -> None:
        """Refuses rows that no stage can use."""
        for field, text in (("prompt", self.prompt), ("chosen", self.chosen)):
            if not isinstance(text, str):
                raise RowError(f"{field} is {type(text).__name__}, not text")
            if not text.strip():
                raise RowError(f"{field} is empty")
        if self.rejected is None:
            return
        if not isinstance(self.rejected, str):
            raise RowError(f"rejected is {type(self.rejected).__name__}, not text")
        if not self.rejected.strip():
            raise RowError("rejected is empty")
        if self.rejected == self.chosen:
            raise RowError("chosen and rejected are equal")


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


def unknown_name(key: str, name: str) -> str:
    """The complaint about a name that is not in `FORMATS`, with near names."""
    near = difflib.get_close_matches(name, FORMATS, n=3, cutoff=0.5)
    if not near:
        ends = {known.rpartition("/")[2]: known for known in FORMATS}
        matches = difflib.get_close_matches(name.rpartition("/")[2], ends, n=3, cutoff=0.5)
        near = [ends[end] for end in matches]
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(FORMATS))}"
    return f"{key}: unknown data set '{name}' ({hint})"


def question(text: str) -> str:
    """DeepSpeed-Chat's prompt template around one question."""
    return f" Human: {text} Assistant:"


def _field(record: Mapping[str, Any], *path: str | int) -> Any:
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


def _text(record: Mapping[str, Any], *path: str | int) -> str:
    """The non-empty text at `path` inside a record."""
    value = _field(record, *path)
    where = ".".join(str(part) for part in path)
    if not isinstance(value, str):
        raise RowError(f"field {where} is {type(value).__name__}, not text")
    if not value.strip():
        raise RowError(f"field {where} is empty")
    return value


def _number(record: Mapping[str, Any], key: str) -> float:
    value = _field(record, key)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"field {key} is not a number")
    return number


def _items(record: Mapping[str, Any], *path: str) -> list[Any]:
    """A list; one of structures may also be stored as a structure of lists."""
    value = _field(record, *path)
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, item, strict=True)) for item in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise RowError(f"field {'.'.join(path)} is {type(value).__name__}, not a list")
    return value


def _verbatim(record: Mapping[str, Any]) -> Sequence[Row]:
    """Fields prompt, chosen and optionally rejected, used as they are."""
    return [
        Row(
            prompt=_text(record, "prompt"),
            chosen=_text(record, "chosen"),
            rejected=record.get("rejected"),
        )
    ]


def _local_json(record: Mapping[str, Any]) -> Sequence[Row]:
    """DeepSpeed-Chat's local JSON: the common fields without their leading spaces."""
    rejected = None if record.get("rejected") is None else f" {_text(record, 'rejected')}"
    return [
        Row(
            prompt=f" {_text(record, 'prompt')}",
            chosen=f" {_text(record, 'chosen')}",
            rejected=rejected,
        )
    ]


def _synthetic_instruct(record: Mapping[str, Any]) -> Sequence[Row]:
    return [
        Row(
            prompt=question(_text(record, "prompt")),
            chosen=f" {_text(record, 'chosen')}",
            rejected=f" {_text(record, 'rejected')}",
        )
    ]


def _rlhf_reward(record: Mapping[str, Any]) -> Sequence[Row]:
    """The answers repeat the `Assistant:` tag, which belongs to the prompt."""
    chosen, rejected = (
        _text(record, key).rpartition("Assistant:")[2] for key in ("chosen", "rejected")
    )
    return [
        Row(prompt=f"{_text(record, 'prompt')}Assistant:", chosen=chosen, rejected=rejected),
    ]


def _webgpt(record: Mapping[str, Any]) -> Sequence[Row]:
    """The better scored answer is chosen, citations such as [1] removed; a tie is no preference."""
    answers = [
        (_number(record, f"score_{side}"), _CITATION.sub("", _text(record, f"answer_{side}")))
        for side in (0, 1)
    ]
    (best, chosen), (worst, rejected) = sorted(answers, key=lambda item: -item[0])
    return [
        Row(
            prompt=question(_text(record, "question", "full_text")),
            chosen=f" {chosen}",
            rejected=None if best == worst else f" {rejected}",
        )
    ]


def _shp(record: Mapping[str, Any]) -> Sequence[Row]:
    """Label 1 prefers answer A, label 0 answer B."""
    label = _field(record, "labels")
    if label not in (0, 1):
        raise RowError("field labels is neither 0 nor 1")
    better, worse = ("A", "B") if label == 1 else ("B", "A")
    return [
        Row(
            prompt=question(_text(record, "history")),
            chosen=f" {_text(record, f'human_ref_{better}')}",
            rejected=f" {_text(record, f'human_ref_{worse}')}",
        )
    ]


def _sharegpt_vicuna(record: Mapping[str, Any]) -> Sequence[Row]:
    """Conversations with USER: and ASSISTANT: tags; the label is the last answer."""
    prompt = _ROLE.sub(lambda match: _ROLES[match.group()], _text(record, "prompt"))
    return [Row(prompt=prompt, chosen=f" {_text(record, 'label')}")]


def _zhihu(record: Mapping[str, Any]) -> Sequence[Row]:
    return [
        Row(prompt=question(_text(record, "INSTRUCTION")), chosen=f" {_text(record, 'RESPONSE')}")
    ]


def _miracl(record: Mapping[str, Any]) -> Sequence[Row]:
    """The first relevant passage against the first irrelevant one, where there are such."""
    relevant = _items(record, "positive_passages")
    if not relevant:
        return []
    irrelevant = _items(record, "negative_passages") if record.get("negative_passages") else []
    return [
        Row(
            prompt=question(_text(record, "query")),
            chosen=f" {_text(relevant[0], 'text')}",
            rejected=f" {_text(irrelevant[0], 'text')}" if irrelevant else None,
        )
    ]


def _hc3(record: Mapping[str, Any]) -> Sequence[Row]:
    """The first human answer; ChatGPT's answers are not used."""
    answers = _items(record, "human_answers")
    if not answers or answers[0] is None:
        return []
    return [
        Row(
            prompt=question(_text(record, "question")),
            chosen=f" {_text(record, 'human_answers', 0)}",
        )
    ]


def _mkqa(record: Mapping[str, Any], *, language: str) -> Sequence[Row]:
    """The first answer in one language; many questions are marked as unanswerable."""
    prompt = question(_text(record, "queries", language))
    answers = _items(record, "answers", language)
    first = answers[0] if answers else None
    if first is None or (isinstance(first, Mapping) and first.get("text") is None):
        return []
    return [Row(prompt=prompt, chosen=f" {_text(first, 'text')}")]


def _mkqa_chinese(record: Mapping[str, Any]) -> Sequence[Row]:
    return _mkqa(record, language="zh_cn")


def _mkqa_japanese(record: Mapping[str, Any]) -> Sequence[Row]:
    return _mkqa(record, language="ja")


def _jaquad_question(record: Mapping[str, Any]) -> Sequence[Row]:
    """The sentence that holds the answer."""
    return [Row(prompt=question(_text(record, "question")), chosen=f" {_text(record, 'sentence')}")]


def _jaquad_pairs(record: Mapping[str, Any]) -> Sequence[Row]:
    """The first question of a paragraph, answered by the paragraph."""
    return [
        Row(prompt=question(_text(record, "questions", 0)), chosen=f" {_text(record, 'paragraph')}")
    ]


_HUB: Mapping[str, RowFunction] = {
    "Dahoas/rm-static": _verbatim,
    "Dahoas/full-hh-rlhf": _verbatim,
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
        COMMON_FORMAT: DataFormat(rows=_verbatim, needs_path=True),
        "chitchat": DataFormat(rows=_verbatim),
        "chitchat-upbeat": DataFormat(rows=_verbatim),
    }
)
"""Every data set that a configuration can name."""
