import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.data.arrow import open_arrow
from megachat.data.cache import DataCache
from megachat.data.chat import ChatConfig
from megachat.data.config import SourceConfig
from megachat.data.conversion import ConversionReport, convert_source, read_reports
from megachat.data.formats import Row, RowError
from megachat.data.own_formats import OWN_FORMATS, Render, Rendering, find_format, rename_columns
from megachat.data.records_io import RawRecord
from megachat.data.sources import open_source
from megachat.errors import DataError
from tests.data.samples import pair, pairs, write_jsonl

HH = Rendering(chat=ChatConfig())
MARKED = Rendering(chat=ChatConfig(system="<sys>", human="<human> ", assistant="<bot>"))
ASKED = "\n\nHuman: Why?\n\nAssistant:"

RECORDS: Mapping[str, list[tuple[dict[str, Any], Row]]] = {
    "common": [
        (
            {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
            Row(prompt="Why?", chosen=" So.", rejected=" No."),
        ),
        ({"prompt": "Why?", "chosen": " So.", "rejected": None}, Row(prompt="Why?", chosen=" So.")),
    ],
    "prompts": [({"prompt": "Why?", "id": 3}, Row(prompt="Why?"))],
    "text": [({"text": " Once upon a time"}, Row(prompt="", chosen=" Once upon a time"))],
    "alpaca": [
        ({"instruction": "Why?", "input": "", "output": "So."}, Row(prompt=ASKED, chosen=" So.")),
        (
            {"instruction": "Sum up.", "input": "A b.", "output": "A."},
            Row(prompt="\n\nHuman: Sum up.\n\nA b.\n\nAssistant:", chosen=" A."),
        ),
    ],
    "messages": [
        (
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": "So."},
                    {"role": "user", "content": [{"type": "text", "text": "And?"}]},
                    {"role": "assistant", "content": "That is all."},
                    {"role": "user", "content": "Thanks"},
                ]
            },
            Row(
                prompt="\n\nSystem: Be kind.\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: And?"
                "\n\nAssistant:",
                chosen=" That is all.",
            ),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "So."},
                ]
            },
            Row(prompt=ASKED, chosen=" So."),
        ),
        ({"messages": [{"role": "user", "content": "Why?"}]}, Row(prompt=ASKED)),
    ],
    "message-pairs": [
        (
            {
                "prompt": "Why?",
                "chosen": [
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": "So."},
                ],
                "rejected": [
                    {"role": "user", "content": "Why?"},
                    {"role": "assistant", "content": "No."},
                ],
            },
            Row(prompt=ASKED, chosen=" So.", rejected=" No."),
        ),
        (
            {
                "prompt": [{"role": "user", "content": "Why?"}],
                "chosen": [{"role": "assistant", "content": "So."}],
                "rejected": [{"role": "assistant", "content": "No."}],
            },
            Row(prompt=ASKED, chosen=" So.", rejected=" No."),
        ),
    ],
    "dialogues": [
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: Some",
            },
            Row(
                prompt="\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:",
                chosen=" So.",
                rejected=" Some",
            ),
        ),
        (  # they part before the last answer
            {
                "chosen": "\n\nHuman: Why?\n\nAssistant: So.\n\nHuman: Ah\n\nAssistant: Yes",
                "rejected": "\n\nHuman: Why?\n\nAssistant: No.\n\nHuman: Oh\n\nAssistant: Yes",
            },
            Row(
                prompt=ASKED,
                chosen=" So.\n\nHuman: Ah\n\nAssistant: Yes",
                rejected=" No.\n\nHuman: Oh\n\nAssistant: Yes",
            ),
        ),
    ],
}
"""Records of each format, written by hand, and their rows under the markers of Anthropic."""

EXAMPLES = [(name, *example) for name, examples in RECORDS.items() for example in examples]


def records(values: list[Any]) -> list[RawRecord]:
    return [
        RawRecord(file="f", row=row, value=value if isinstance(value, dict) else None)
        for row, value in enumerate(values, start=1)
    ]


def test_every_format_has_an_example() -> None:
    assert set(RECORDS) == set(OWN_FORMATS)


@pytest.mark.parametrize(("name", "record", "row"), EXAMPLES)
def test_a_record_is_recognised_and_becomes_its_row(
    name: str, record: dict[str, Any], row: Row
) -> None:
    found = find_format(records([record]), source="s")
    assert (found.name, found.fitting, found.looked_at) == (name, 1, 1)
    assert list(OWN_FORMATS[name].rows(record, HH)) == [row]


@pytest.mark.parametrize(
    ("name", "number", "prompt"),
    [
        ("messages", 1, "<human> Why?<bot>"),
        ("messages", 0, "<sys>Be kind.<human> Why?<bot> So.<human> And?<bot>"),
        ("dialogues", 0, "<human> Hi<bot> Hello<human> Why?<bot>"),
        ("alpaca", 0, "<human> Why?<bot>"),
        ("message-pairs", 0, "<human> Why?<bot>"),
    ],
)
def test_conversations_get_the_markers_of_the_run(name: str, number: int, prompt: str) -> None:
    (row,) = OWN_FORMATS[name].rows(RECORDS[name][number][0], MARKED)
    assert row.prompt == prompt


def test_prompts_that_are_texts_get_markers_where_that_is_asked_for() -> None:
    style = Rendering(chat=ChatConfig(), render=Render.CHAT)
    (row,) = OWN_FORMATS["common"].rows(
        {"prompt": "Why?", "chosen": "So.", "rejected": "No"}, style
    )
    assert row == Row(prompt=ASKED, chosen=" So.", rejected=" No")
    (alone,) = OWN_FORMATS["prompts"].rows({"prompt": "Why?"}, style)
    assert alone.prompt == ASKED


def test_the_first_records_decide_by_their_number() -> None:
    mixed = [pair(0), {"prompt": "x"}, "broken", pair(1), {"text": "y"}]
    found = find_format(records(mixed), source="s")
    assert (found.name, found.fitting, found.looked_at) == ("common", 2, 5)
    assert "2 of the first 5 records have prompt, chosen" in found.reason


def test_unknown_fields_are_named_with_the_way_out() -> None:
    with pytest.raises(
        DataError, match=r"s: unknown format: .* fields question, \\ud83d"
    ) as caught:
        find_format(records([{"question": "x", "\ud83d": "y"}]), source="s")
    assert "columns = {prompt =" in str(caught.value) and "\n" not in str(caught.value)


def test_renamed_columns_take_the_place_of_others() -> None:
    record = {"question": "q", "chosen": "a", "rejected": "b", "id": 1}
    renamed = rename_columns(
        record, {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    )
    assert renamed == {"prompt": "q", "chosen": "b", "rejected": "a", "id": 1}
    with pytest.raises(RowError, match="field answer is missing"):
        rename_columns(record, {"chosen": "answer"})


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "no list of messages"),
        ({"messages": ["hi"]}, "a message is str"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role: 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "NoneType as content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part that is not text",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "nothing said by a user"),
    ],
)
def test_messages_that_cannot_be_used_say_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        OWN_FORMATS["messages"].rows(record, HH)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["user", "assistant", "\n\nAssistant:", "\ud83d"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner
        )
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=40)
@pytest.mark.parametrize(("name", "record", "row"), EXAMPLES)
@given(data=st.data())
def test_any_structure_gives_rows_or_a_reason(
    name: str, record: dict[str, Any], row: Row, data: st.DataObject
) -> None:
    changed = {key: data.draw(JSON | st.just(value), label=key) for key, value in record.items()}
    try:
        rows = list(OWN_FORMATS[name].rows(changed, HH))
    except RowError as reason:
        assert str(reason).encode("utf-8")
    else:
        for each in rows:
            for text in (each.prompt, each.chosen, each.rejected):
                assert (text or "").encode("utf-8") is not None


def convert(tmp_path: Path, **options: Any) -> tuple[list[Any], ConversionReport]:
    """Rows and report of a source of which nothing but these options is said."""
    source = SourceConfig(**options)
    folder = tmp_path / "out"
    folder.mkdir()
    opened = open_source(source, cache=DataCache(tmp_path / "cache"))
    convert_source(source, opened, folder, chat=ChatConfig())
    return open_arrow(folder / "train.arrow").to_list(), read_reports(folder)["train"]


def test_half_a_character_costs_its_row_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The JSON escape of half a surrogate pair is no text; these others are."""
    odd = [" nul\u0000nul", " line\u2028separator", " \U0001f327 rain"]
    rows = [pair(number) | {"chosen": text} for number, text in enumerate(odd)]
    bad = '{"prompt": "x", "chosen": " half \\ud83d", "rejected": " y"}'
    path = write_jsonl(tmp_path / "d.jsonl", [rows[0], bad, *rows[1:], *pairs(20)])
    with caplog.at_level(logging.WARNING):
        made, report = convert(tmp_path, path=path)
    assert [row["chosen"] for row in made[:3]] == odd
    assert (report.records, report.rows, report.bad) == (24, 23, 1)
    assert report.first_problem.startswith(f"{path} row 2: chosen is not valid text: U+D83D")
    assert f"{path} row 2" in caplog.text


def test_a_table_with_other_names_is_read_by_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "faq.csv"
    path.write_text("question,answer,worse\nWhy?, So., No.\nHow?, Thus., Not.\n")
    columns = {"prompt": "question", "chosen": "answer", "rejected": "worse"}
    made, report = convert(tmp_path, path=path, columns=columns)
    assert made == [
        {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
        {"prompt": "How?", "chosen": " Thus.", "rejected": " Not."},
    ]
    assert report.format == "common" and report.serving["reward"] == 2


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"question": "x", "answer": "y"}])
    with pytest.raises(DataError, match="field quesion is missing, .* there are question, answer"):
        convert(tmp_path, path=path, columns={"prompt": "quesion", "chosen": "answer"})


@pytest.mark.parametrize(
    ("record", "stages"),
    [
        (RECORDS["text"][0][0], {"sft"}),
        (RECORDS["prompts"][0][0], {"prompts"}),
        (RECORDS["alpaca"][0][0], {"sft", "prompts"}),
        (RECORDS["dialogues"][0][0], {"sft", "reward", "prompts"}),
    ],
)
def test_a_report_says_which_steps_rows_can_serve(
    tmp_path: Path, record: dict[str, Any], stages: set[str]
) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(record) + "\n")
    _, report = convert(tmp_path, path=path)
    assert {stage for stage, rows in report.serving.items() if rows} == stages
