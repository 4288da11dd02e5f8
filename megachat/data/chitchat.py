"""The one place for the demo data: human chats with an upbeat preference (both installable).

The chats are those of the package `chitchat-dataset` (MIT): 7168 conversations of two people. Two
sources are made of them:

* `chitchat`: one human turn as the prompt, the real reply as the answer;
* `chitchat-upbeat`: pairs of the real reply and a random reply from another conversation, the more
  upbeat one preferred, by the VADER sentiment score (`vaderSentiment`, MIT). The score stands
  outside the reward model, so what a trained policy gains can be measured with it.

Conversations are held out by a hash of their name before anything is paired: a held-out prompt or
reply never shares a conversation with a training row, in either source and at any seed.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megachat.data.records_io import RawRecord
from megachat.errors import DataError

HUMAN = "<human>"
"""Marks the human turn; a user-defined symbol of the demo's tokenizer."""
BOT = "<bot>"
"""Marks the turn that the model answers in; a user-defined symbol of the demo's tokenizer."""

HELD_OUT_PER_THOUSAND = 80
"""Conversations that are held out."""
MIN_CHARACTERS = 8
"""Shortest turn that is used, as a prompt or as a reply."""
MAX_PROMPT_CHARACTERS = 140
"""Prompts are shorter than this."""
MAX_REPLY_CHARACTERS = 120
"""Replies are shorter than this."""
UPBEAT_MARGIN = 0.3
"""Smallest difference of two VADER compound scores, in [-1, 1], that makes a preference."""
CANDIDATES = 4
"""Random replies that are tried until one differs by the margin."""

_INSTALL = 'pip install -e ".[demo]"'
_SPACES = re.compile(r"\s+")


class _Analyzer(Protocol):
    lexicon: Mapping[str, float]

    def polarity_scores(self, text: str) -> Mapping[str, float]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One chat of two people."""

    name: str
    turns: tuple[str, ...]
    """Texts in order; the speakers take turns."""
    upbeat: float | None
    """How upbeat a participant rated it, 1 to 10; None without a rating. 5 was preset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversationRating:
    """The two judgements of one conversation."""

    name: str
    human: float
    """Rating by a participant, 1 to 10."""
    vader: float
    """Mean VADER compound score of the turns, in [-1, 1]."""


def prompt_text(text: str) -> str:
    """The prompt that asks for a reply to `text`; a reply starts with a space, as words do."""
    return f"{HUMAN} {text}{BOT}"


def upbeat_score(text: str) -> float:
    """VADER's compound sentiment of a text, in [-1, 1].

    Raises:
        DataError: The package vaderSentiment is not installed.
    """
    return float(_analyzer().polarity_scores(text.strip())["compound"])


def positive_words() -> frozenset[str]:
    """The words that VADER counts as positive: a policy that hacks its score repeats them.

    Raises:
        DataError: The package vaderSentiment is not installed.
    """
    return frozenset(word for word, valence in _analyzer().lexicon.items() if valence > 0)


def data_files() -> tuple[Path, ...]:
    """The files that the sources are made of, for their fingerprint.

    Raises:
        DataError: The package chitchat-dataset is not installed.
    """
    spec = importlib.util.find_spec("chitchat_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"data set chitchat: chitchat-dataset is not installed: run {_INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / "dataset.json"
    if not path.is_file():
        raise DataError(f"{path}: missing: install chitchat-dataset again with {_INSTALL}")
    return (path,)


def vader_version() -> str | None:
    """The installed version of vaderSentiment, None without it."""
    try:
        return metadata.version("vaderSentiment")
    except metadata.PackageNotFoundError:
        return None


def conversations(*, held_out: bool | None = None) -> Iterator[Conversation]:
    """The conversations in an order that is random but fixed.

    Args:
        held_out: Which ones; None gives all.

    Raises:
        DataError: The package chitchat-dataset is not installed.
    """
    with data_files()[0].open(encoding="utf-8") as file:
        raw: dict[str, dict[str, Any]] = json.load(file)
    for name in sorted(raw, key=_stable_number):
        if held_out is None or held_out == is_held_out(name):
            yield _conversation(name, raw[name])


def is_held_out(name: str) -> bool:
    """Whether a conversation belongs to the validation rows."""
    return _stable_number(name) % 1000 < HELD_OUT_PER_THOUSAND


def reply_records(*, held_out: bool) -> Iterator[RawRecord]:
    """Rows of the source `chitchat`: adjacent turns of one half of the conversations."""
    for row, (_, prompt, reply) in enumerate(_adjacent_turns(held_out=held_out), start=1):
        value = {"prompt": prompt_text(prompt), "chosen": f" {reply}"}
        yield RawRecord(file="chitchat", row=row, value=value)


def upbeat_records(*, held_out: bool) -> Iterator[RawRecord]:
    """Rows of the source `chitchat-upbeat`: pairs whose scores differ by the margin.

    A reply whose candidates are all too close to it gives no pair.
    """
    turns = list(_adjacent_turns(held_out=held_out))
    random = np.random.default_rng(_stable_number(f"chitchat-upbeat {held_out}"))
    drawn = random.integers(len(turns), size=(len(turns), CANDIDATES))

    @cache
    def score(index: int) -> float:
        return upbeat_score(turns[index][2])

    row = 0
    for index, (name, prompt, reply) in enumerate(turns):
        for other in map(int, drawn[index]):
            difference = score(index) - score(other)
            if turns[other][0] == name or abs(difference) < UPBEAT_MARGIN:
                continue
            row += 1
            texts = (f" {reply}", f" {turns[other][2]}")
            chosen, rejected = texts if difference > 0 else reversed(texts)
            value = {"prompt": prompt_text(prompt), "chosen": chosen, "rejected": rejected}
            yield RawRecord(file="chitchat-upbeat", row=row, value=value)
            break


def rated_conversations(*, limit: int = 500) -> tuple[ConversationRating, ...]:
    """Human ratings beside VADER scores of the first `limit` rated conversations.

    Conversations rated 5 are left out: 5 was preset, so most of those were never judged.
    """
    found: list[ConversationRating] = []
    for chat in conversations():
        if len(found) == limit:
            break
        if chat.upbeat is None or chat.upbeat == 5 or not chat.turns:
            continue
        scores = [upbeat_score(turn) for turn in chat.turns]
        found.append(
            ConversationRating(name=chat.name, human=chat.upbeat, vader=float(np.mean(scores)))
        )
    return tuple(found)


def rating_correlation(ratings: Sequence[ConversationRating]) -> float:
    """Pearson's correlation of the human ratings with VADER, in [-1, 1]; it is weak.

    Raises:
        DataError: Fewer than three conversations are given.
    """
    if len(ratings) < 3:
        raise DataError(f"rating_correlation: {len(ratings)} conversations, at least 3 needed")
    human = [rating.human for rating in ratings]
    return float(np.corrcoef(human, [rating.vader for rating in ratings])[0, 1])


def _adjacent_turns(*, held_out: bool) -> Iterator[tuple[str, str, str]]:
    """(conversation, turn, next turn) of suitable lengths."""
    for chat in conversations(held_out=held_out):
        for turn, reply in zip(chat.turns, chat.turns[1:], strict=False):
            if (
                MIN_CHARACTERS <= len(turn) < MAX_PROMPT_CHARACTERS
                and MIN_CHARACTERS <= len(reply) < MAX_REPLY_CHARACTERS
            ):
                yield chat.name, turn, reply


def _conversation(name: str, raw: Mapping[str, Any]) -> Conversation:
    """Joins the messages of a turn and cleans its white space."""
    turns = (
        _SPACES.sub(" ", " ".join(message["text"] for message in turn)).strip()
        for turn in raw["messages"]
    )
    rating = raw.get("ratings", {}).get("upbeat")
    return Conversation(
        name=name, turns=tuple(turns), upbeat=None if rating is None else float(rating)
    )


def _stable_number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@lru_cache(maxsize=1)
def _analyzer() -> _Analyzer:
    try:
        from vaderSentiment import vaderSentiment
    except ImportError as error:
        raise DataError(
            f"upbeat score: vaderSentiment is not installed ({error}): run {_INSTALL}"
        ) from error
    analyzer: _Analyzer = vaderSentiment.SentimentIntensityAnalyzer()
    return analyzer
