"""Turns texts into token rows: control tokens, length limits and their counts.

A row is `[bos] prompt | answer eos`. Prompt and answer are tokenised apart, as in generation, where
the prompt is all there is; so the boundary between them is the same everywhere.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megachat.data.arrow import INT32, INT64, TEXT, TOKENS
from megachat.data.config import DataConfig, LongAnswers, LongPrompts, Stage
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError

ENCODING_VERSION = 2
"""Part of the cache key of tokenised rows; raised when an encoding changes."""

_TEXTS = {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}

STAGE_COLUMNS: Mapping[Stage, Mapping[str, Any]] = {
    Stage.SFT: {
        "id": INT64,
        "length": INT32,
        "prompt_length": INT32,
        "tokens": TOKENS,
    },
    Stage.REWARD: {
        "id": INT64,
        "length": INT32,
        "prompt_length": INT32,
        "chosen_tokens": TOKENS,
        "rejected_tokens": TOKENS,
    },
    Stage.PROMPTS: {"id": INT64, "length": INT32, "tokens": TOKENS},
}
"""Columns of a tokenised row. `length` is that of the longest token row, for bucketing."""


def stage_columns(stage: Stage, *, with_texts: bool) -> dict[str, Any]:
    """The columns on disk; held-out rows keep their texts for reports."""
    return dict(STAGE_COLUMNS[stage]) | (_TEXTS if with_texts else {})


class Outcome(StrEnum):
    """What can happen to a row besides being kept as it is; the keys of the counts."""

    EMPTY_PROMPT = "dropped: prompt without tokens"
    LONG_PROMPT = "dropped: prompt longer than max_prompt_tokens"
    LONG_ANSWER = "dropped: answer too long"
    SHORT_ANSWER = "dropped: answer shorter than min_answer_tokens"
    NO_ANSWER = "dropped: no answer"
    NO_REJECTED = "dropped: no rejected answer"
    NO_DIFFERENCE = "dropped: no difference left after truncation"
    CUT_PROMPT = "kept: prompt truncated on the left"
    CUT_ANSWER = "kept: answer truncated"


class _DroppedRowError(Exception):
    """A row that the limits leave out."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.value)
        self.outcome = outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRows:
    """A block of common rows."""

    source: str
    """Name of the data set, for messages."""
    ids: Sequence[int]
    prompts: Sequence[str]
    chosen: Sequence[str | None]
    rejected: Sequence[str | None]


class StageEncoder:
    """Encodes blocks of rows for one stage and counts what the limits do to them."""

    def __init__(self, config: DataConfig, *, stage: Stage, tokenizer: Tokenizer) -> None:
        """Keeps the limits of `config` that matter for `stage`."""
        self.counts: Counter[Outcome] = Counter()
        self.tokens = 0
        """Tokens of all kept rows together."""
        self._config = config
        self._stage = stage
        self._tokenizer = tokenizer

    def encode(self, rows: TextRows, *, with_texts: bool) -> dict[str, list[Any]]:
        """The columns of the rows that are kept.

        Raises:
            DataError: A prompt is too long and `long_prompts` is `error`.
        """
        columns: dict[str, list[Any]] = {
            name: [] for name in stage_columns(self._stage, with_texts=with_texts)
        }
        for index, encoded in enumerate(self._token_rows(rows)):
            try:
                kept = self._encode_row(rows, index, *encoded)
            except _DroppedRowError as dropped:
                self.counts[dropped.outcome] += 1
                continue
            if with_texts:
                kept |= {
                    "prompt": rows.prompts[index],
                    "chosen": rows.chosen[index],
                    "rejected": rows.rejected[index],
                }
            for name, value in kept.items():
                columns[name].append(value)
        return columns

    def _token_rows(
        self, rows: TextRows
    ) -> list[tuple[list[int], list[int] | None, list[int] | None]]:
        """Tokens of prompt, chosen and rejected text, where the stage needs them."""
        prompts = self._tokenizer.encode_batch(rows.prompts)
        nothing: list[list[int] | None] = [None] * len(prompts)
        chosen, rejected = nothing, nothing
        if self._stage is not Stage.PROMPTS:
            chosen = self._encode_answers(rows.chosen)
        if self._stage is Stage.REWARD:
            rejected = self._encode_answers(rows.rejected)
        return list(zip(prompts, chosen, rejected, strict=True))

    def _encode_answers(self, texts: Sequence[str | None]) -> list[list[int] | None]:
        """Tokens of each answer that there is."""
        encoded = self._tokenizer.encode_batch([text or "" for text in texts])
        return [
            None if text is None else tokens for text, tokens in zip(texts, encoded, strict=True)
        ]

    def _encode_row(
        self,
        rows: TextRows,
        index: int,
        prompt: list[int],
        chosen: list[int] | None,
        rejected: list[int] | None,
    ) -> dict[str, Any]:
        if self._stage is not Stage.PROMPTS and chosen is None:
            raise _DroppedRowError(Outcome.NO_ANSWER)
        if self._stage is Stage.REWARD and rejected is None:
            raise _DroppedRowError(Outcome.NO_REJECTED)
        cuts: Counter[Outcome] = Counter()
        is_text = self._stage is Stage.SFT and not rows.prompts[index]
        start = self._begin() if is_text else self._fit_prompt(prompt, rows.source, cuts)
        answers = [
            start + self._fit_answer(answer, room=self._config.max_tokens - len(start), cuts=cuts)
            for answer in (chosen, rejected)
            if answer is not None
        ]
        if len(answers) == 2 and answers[0] == answers[1]:
            raise _DroppedRowError(Outcome.NO_DIFFERENCE)
        self.counts += cuts
        return self._columns(rows.ids[index], start, answers)

    def _columns(self, row_id: int, start: list[int], answers: list[list[int]]) -> dict[str, Any]:
        rows = answers or [start]
        self.tokens += sum(len(row) for row in rows)
        columns: dict[str, Any] = {"id": row_id, "length": max(len(row) for row in rows)}
        if answers:
            columns["prompt_length"] = len(start)
        if self._stage is Stage.REWARD:
            return columns | {"chosen_tokens": rows[0], "rejected_tokens": rows[1]}
        return columns | {"tokens": rows[0]}

    def _begin(self) -> list[int]:
        """What every row starts with; all that there is before a text without a prompt."""
        return [self._tokenizer.bos_id] if self._tokenizer.adds_bos else []

    def _fit_prompt(self, prompt: list[int], source: str, cuts: Counter[Outcome]) -> list[int]:
        """The prompt with its beginning of sequence, within its limit."""
        bos = self._begin()
        limit = self._config.max_prompt_tokens - len(bos)
        if len(prompt) > limit:
            policy = self._config.long_prompts
            if policy is LongPrompts.ERROR:
                raise DataError(
                    f"data set {source}: prompt of {len(prompt) + len(bos)} tokens, more than "
                    f"max_prompt_tokens {self._config.max_prompt_tokens}: raise it, or set "
                    f"long_prompts to '{LongPrompts.DROP}' or '{LongPrompts.TRUNCATE_LEFT}'"
                )
            if policy is LongPrompts.DROP:
                raise _DroppedRowError(Outcome.LONG_PROMPT)
            cuts[Outcome.CUT_PROMPT] += 1
            prompt = prompt[-limit:]
        if not prompt:
            raise _DroppedRowError(Outcome.EMPTY_PROMPT)
        return bos + prompt

    def _fit_answer(self, answer: list[int], *, room: int, cuts: Counter[Outcome]) -> list[int]:
        """The answer with its end of sequence, within `room` tokens."""
        if self._config.max_answer_tokens is not None:
            room = min(room, self._config.max_answer_tokens)
        eos = [self._tokenizer.eos_id]
        if not answer or len(answer) + 1 < self._config.min_answer_tokens:
            raise _DroppedRowError(Outcome.SHORT_ANSWER)
        if len(answer) + 1 <= room:
            return answer + eos
        if self._config.long_answers is LongAnswers.DROP:
            raise _DroppedRowError(Outcome.LONG_ANSWER)
        cuts[Outcome.CUT_ANSWER] += 1
        return answer[: room - 1] + eos if self._config.eos_on_truncated else answer[:room]
