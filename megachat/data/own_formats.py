"""Knows the formats of people's own rows, and finds out which one a file has.

A public data set is known by its name (`formats`); a file of one's own is known by its fields. The
first records decide: the format that fits most of them is taken for all, so a record of another
kind is counted as unusable and never read by other rules than its neighbours.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from os.path import commonprefix
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from megachat.data.chat import ChatConfig, Speaker, Turn, answer_of, prompt_of
from megachat.data.formats import Row, RowError, field_of, text_of, verbatim
from megachat.errors import DataError

if TYPE_CHECKING:  # reading a configuration does not wait for the data libraries
    from megachat.data.records_io import RawRecord

LOOKED_AT = 100
"""Records that decide the format of a file."""

_NAMED_FIELDS = 12
"""So many fields of an unknown record are named."""

_SPEAKERS: Mapping[str, Speaker] = MappingProxyType(
    {
        "system": Speaker.SYSTEM,
        "developer": Speaker.SYSTEM,
        "user": Speaker.HUMAN,
        "human": Speaker.HUMAN,
        "assistant": Speaker.ASSISTANT,
        "gpt": Speaker.ASSISTANT,
        "chatgpt": Speaker.ASSISTANT,
        "bot": Speaker.ASSISTANT,
        "model": Speaker.ASSISTANT,
    }
)
"""Roles of OpenAI's and of ShareGPT's messages."""

_HH_ASSISTANT = "\n\nAssistant:"
_HH_SPEAKERS: Mapping[str, Speaker] = MappingProxyType(
    {"\n\nHuman:": Speaker.HUMAN, _HH_ASSISTANT: Speaker.ASSISTANT}
)
"""What stands before the turns of Anthropic's dialogues, whatever the run's own markers are."""


class Render(StrEnum):
    """What becomes of prompts and answers that come as texts."""

    VERBATIM = "verbatim"
    """They are used as they are; an answer brings its own leading space."""
    CHAT = "chat"
    """A prompt is one thing said by a person: `data.chat` stands around it, and a space before the
    answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendering:
    """How the texts of a source are put together."""

    chat: ChatConfig
    render: Render = Render.VERBATIM


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnFormat:
    """How to recognise and read one kind of rows."""

    fields: str
    """What the rows have, for messages."""
    fits: Callable[[Mapping[str, Any]], bool]
    """Whether the fields of a record are of this kind; looks at names and types alone."""
    rows: Callable[[Mapping[str, Any], Rendering], Sequence[Row]]
    """The conversion of one record; raises `RowError` where it is broken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFormat:
    """What the first records of a file say."""

    name: str
    """Key of `OWN_FORMATS`."""
    fitting: int
    """Records that have the fields of this format."""
    looked_at: int
    """Records that were looked at."""

    @property
    def reason(self) -> str:
        """Why it was taken."""
        return (
            f"{self.fitting} of the first {self.looked_at} records have "
            f"{OWN_FORMATS[self.name].fields}"
        )


def find_format(records: "Iterable[RawRecord]", *, source: str) -> FoundFormat:
    """The format of most of the first records; a record is of the first one that fits it.

    Args:
        records: From the beginning.
        source: What they come from, for messages.

    Raises:
        DataError: No format fits any of them; names the fields there are.
    """
    first = [record.value for record in islice(records, LOOKED_AT)]
    readable = [value for value in first if value is not None]
    kinds = Counter(
        next((name for name, known in OWN_FORMATS.items() if known.fits(value)), None)
        for value in readable
    )
    counts = {name: kinds[name] for name in OWN_FORMATS}
    best = max(counts, key=lambda name: counts[name])
    if readable and not counts[best]:
        there = ", ".join(ascii(str(name))[1:-1] for name in list(readable[0])[:_NAMED_FIELDS])
        known = "; ".join(f"{name}: {each.fields}" for name, each in OWN_FORMATS.items())
        raise DataError(
            f"{source}: unknown format: the first record has the fields {there or '(none)'}, but "
            f'expected are {known}: name yours by columns, e.g. columns = {{prompt = "question", '
            'chosen = "answer"}'
        )
    return FoundFormat(name=best, fitting=counts[best], looked_at=len(first))


def rename_columns(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A record under the names that formats know.

    Args:
        record: The fields as the file names them.
        columns: The file's name by the known one; other fields stay as they are.

    Raises:
        RowError: A named field is missing.
    """
    missing = [there for there in columns.values() if there not in record]
    if missing:
        raise RowError(f"field {missing[0]} is missing")
    moved = set(columns.values())
    return {name: value for name, value in record.items() if name not in moved} | {
        here: record[there] for here, there in columns.items()
    }


def _is_text(record: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(record.get(name), str) for name in names)


def _is_list(record: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(record.get(name), list) for name in names)


def _asked(text: str, style: Rendering) -> str:
    """A prompt that came as one text."""
    if style.render is Render.VERBATIM:
        return text
    return prompt_of([Turn(speaker=Speaker.HUMAN, text=text)], style.chat)


def _common(record: Mapping[str, Any], style: Rendering) -> Sequence[Row]:
    if style.render is Render.VERBATIM:
        return verbatim(record)
    rejected = None if record.get("rejected") is None else answer_of(text_of(record, "rejected"))
    return [
        Row(
            prompt=_asked(text_of(record, "prompt"), style),
            chosen=answer_of(text_of(record, "chosen")),
            rejected=rejected,
        )
    ]


def _prompt_alone(record: Mapping[str, Any], style: Rendering) -> Sequence[Row]:
    return [Row(prompt=_asked(text_of(record, "prompt"), style))]


def _text_alone(record: Mapping[str, Any], style: Rendering) -> Sequence[Row]:
    return [Row(prompt="", chosen=text_of(record, "text"))]


def _alpaca(record: Mapping[str, Any], style: Rendering) -> Sequence[Row]:
    """An instruction, and what it is about below it where there is such."""
    asked = text_of(record, "instruction")
    about = record.get("input")
    if about is not None and not isinstance(about, str):
        raise RowError(f"field input is {type(about).__name__}, not text")
    if about and about.strip():
        asked = f"{asked}\n\n{about}"
    return [
        Row(
            prompt=prompt_of([Turn(speaker=Speaker.HUMAN, text=asked)], style.chat),
            chosen=answer_of(text_of(record, "output")),
        )
    ]


def _messages(record: Mapping[str, Any], style: Rendering) -> Sequence[Row]:
    """The last answer, after all that was said before; without an answer the prompt alone."""
    name = "messages" if record.get("messages") is not None else "conversations"
    turns = _turns(field_of(record, name), name)
    answers = [place for place, turn in enumerate(turns) if turn.speaker is Speaker.ASSISTANT]
    before = turns[: answers[-1]] if answers else turns
    if all(turn.speaker is not Speaker.HUMAN for turn in before):
        raise RowError(f"field {name} has nothing said by a user before the answer")
    chosen = answer_of(turns[answers[-1]].text) if answers else None
    return [Row(prompt=prompt_of(before, style.chat), chosen=chosen)]


def _message_pairs(record: Mapping[str, Any], style: Rendering) -> Sequence[Row]:
    """Two continuations of one conversation, which stands in both or in `prompt`."""
    chosen = _turns(field_of(record, "chosen"), "chosen")
    rejected = _turns(field_of(record, "rejected"), "rejected")
    shared: list[Turn] = []
    for left, right in zip(chosen[:-1], rejected[:-1], strict=False):
        if left != right:
            break
        shared.append(left)
    if not shared and record.get("prompt") is not None:
        prompt = record["prompt"]
        if isinstance(prompt, str):
            shared = [Turn(speaker=Speaker.HUMAN, text=text_of(record, "prompt"))]
        else:
            shared = _turns(prompt, "prompt")
        chosen, rejected = shared + chosen, shared + rejected
    answers = [turns[len(shared) :] for turns in (chosen, rejected)]
    if not shared or any(
        [turn.speaker for turn in answer] != [Speaker.ASSISTANT] for answer in answers
    ):
        raise RowError("chosen and rejected are not two answers to one conversation")
    return [
        Row(
            prompt=prompt_of(shared, style.chat),
            chosen=answer_of(answers[0][0].text),
            rejected=answer_of(answers[1][0].text),
        )
    ]


def _dialogues(record: Mapping[str, Any], style: Rendering) -> Sequence[Row]:
    """Anthropic's pairs: two whole dialogues as text, equal up to the answers.

    The prompt ends at the last place where both have an assistant's turn before they differ. What
    is said beyond that belongs to the answer.
    """
    chosen, rejected = text_of(record, "chosen"), text_of(record, "rejected")
    common = commonprefix([chosen, rejected])
    start = common.rfind(_HH_ASSISTANT)
    if start < 0:
        raise RowError("chosen and rejected are not two answers to one dialogue")
    end = start + len(_HH_ASSISTANT)
    return [
        Row(
            prompt=prompt_of(_dialogue_turns(common[:start]), style.chat),
            chosen=answer_of(chosen[end:].removeprefix(" ")),
            rejected=answer_of(rejected[end:].removeprefix(" ")),
        )
    ]


def _dialogue_turns(text: str) -> list[Turn]:
    """The turns of a dialogue in Anthropic's markers."""
    turns: list[Turn] = []
    rest = text
    while rest:
        mark = next((each for each in _HH_SPEAKERS if rest.startswith(each)), None)
        if mark is None:
            raise RowError("the dialogue does not begin with a turn of Human or Assistant")
        rest = rest.removeprefix(mark)
        ends = [place for each in _HH_SPEAKERS if (place := rest.find(each)) >= 0]
        said, rest = (rest[: min(ends)], rest[min(ends) :]) if ends else (rest, "")
        turns.append(Turn(speaker=_HH_SPEAKERS[mark], text=said.removeprefix(" ")))
    return turns


def _turns(messages: Any, name: str) -> list[Turn]:
    """The turns of messages in OpenAI's (role, content) or ShareGPT's (from, value) fields."""
    if not isinstance(messages, list) or not messages:
        raise RowError(f"field {name} is no list of messages")
    return [_turn(message, f"{name}.{place}") for place, message in enumerate(messages)]


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise RowError(f"a message is {type(message).__name__}, not an object: {where}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    speaker = _SPEAKERS.get(role.lower()) if isinstance(role, str) else None
    if speaker is None:
        raise RowError(f"a message has an unknown role: {ascii(role)[:40]} in {where}")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RowError(f"a message has {type(content).__name__} as content, not text: {where}")
    return Turn(speaker=speaker, text=content)


def _part(part: Any, where: str) -> str:
    """The text of one part of a message that comes in parts."""
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise RowError(f"a message has a part that is not text: {where}")
    return text


OWN_FORMATS: Mapping[str, OwnFormat] = MappingProxyType(
    {
        "common": OwnFormat(
            fields="prompt, chosen and, for pairs, rejected",
            fits=lambda record: _is_text(record, "prompt", "chosen"),
            rows=_common,
        ),
        "message-pairs": OwnFormat(
            fields="chosen and rejected as lists of messages",
            fits=lambda record: _is_list(record, "chosen", "rejected"),
            rows=_message_pairs,
        ),
        "dialogues": OwnFormat(
            fields="chosen and rejected as dialogues of Human: and Assistant:",
            fits=lambda record: (
                _is_text(record, "chosen", "rejected") and _HH_ASSISTANT in record["chosen"]
            ),
            rows=_dialogues,
        ),
        "messages": OwnFormat(
            fields="messages (role, content) or conversations (from, value)",
            fits=lambda record: _is_list(record, "messages") or _is_list(record, "conversations"),
            rows=_messages,
        ),
        "alpaca": OwnFormat(
            fields="instruction, output and, where there is one, input",
            fits=lambda record: _is_text(record, "instruction", "output"),
            rows=_alpaca,
        ),
        "text": OwnFormat(
            fields="text",
            fits=lambda record: _is_text(record, "text"),
            rows=_text_alone,
        ),
        "prompts": OwnFormat(
            fields="prompt alone",
            fits=lambda record: _is_text(record, "prompt"),
            rows=_prompt_alone,
        ),
    }
)
"""Every format that is found by itself, in the order of preference."""
