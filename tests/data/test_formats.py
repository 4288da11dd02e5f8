from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.data.formats import FORMATS, Row, RowError, question, unknown_name

HH = "\n\nHuman: Why is rain wet?\n\nAssistant:"
MKQA_ANSWER = {"type": 5, "entity": "Q1", "text": "42", "aliases": ["forty-two"]}

RECORDS: Mapping[str, tuple[dict[str, Any], Row]] = {
    "Dahoas/rm-static": (
        {"prompt": HH, "response": " Water.", "chosen": " Water.", "rejected": " Fire."},
        Row(prompt=HH, chosen=" Water.", rejected=" Fire."),
    ),
    "Dahoas/full-hh-rlhf": (
        {"prompt": HH, "response": " Water.", "chosen": " Water.", "rejected": " Fire."},
        Row(prompt=HH, chosen=" Water.", rejected=" Fire."),
    ),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        Row(prompt=" Human: Why? Assistant:", chosen=" Because.", rejected=" No."),
    ),
    "yitingxie/rlhf-reward-datasets": (
        {"prompt": "Human: Why? ", "chosen": "Assistant: Because.", "rejected": "Assistant: No."},
        Row(prompt="Human: Why? Assistant:", chosen=" Because.", rejected=" No."),
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"dataset": "triviaqa", "id": "1", "full_text": "Why (really)?"},
            "quotes_0": {"title": ["a"], "extract": ["b"]},
            "answer_0": "Wrong [1].",
            "tokens_0": {"prefix": [1], "completion": [2]},
            "score_0": -0.5,
            "quotes_1": {"title": ["a"], "extract": ["b"]},
            "answer_1": "Right [1, 2] (as said)[3].",
            "tokens_1": {"prefix": [1], "completion": [2]},
            "score_1": 0.5,
        },
        Row(
            prompt=" Human: Why (really)? Assistant:",
            chosen=" Right (as said).",
            rejected=" Wrong.",
        ),
    ),
    "stanfordnlp/SHP": (
        {"history": "Why?", "human_ref_A": "No.", "human_ref_B": "Because.", "labels": 0},
        Row(prompt=" Human: Why? Assistant:", chosen=" Because.", rejected=" No."),
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        {"prompt": "USER: Is USERNAME set? ASSISTANT:", "label": "Yes."},
        Row(prompt="Human: Is USERNAME set? Assistant:", chosen=" Yes."),
    ),
    "wangrui6/Zhihu-KOL": (
        {"INSTRUCTION": "为什么？", "RESPONSE": "因为。", "SOURCE": "Zhihu", "METADATA": "{}"},
        Row(prompt=" Human: 为什么？ Assistant:", chosen=" 因为。"),
    ),
    "Cohere/miracl-zh-queries-22-12": (
        {
            "query_id": "1",
            "query": "为什么？",
            "positive_passages": [
                {"docid": "1", "title": "a", "text": "因为。"},
                {"docid": "2", "title": "a", "text": "也许。"},
            ],
            "negative_passages": [{"docid": "3", "title": "b", "text": "不 是。"}],
        },
        Row(prompt=" Human: 为什么？ Assistant:", chosen=" 因为。", rejected=" 不 是。"),
    ),
    "Cohere/miracl-ja-queries-22-12": (
        {
            "query_id": "1",
            "query": "なぜ？",
            "positive_passages": [{"docid": "1", "title": "a", "text": "だから。"}],
            "negative_passages": [],
        },
        Row(prompt=" Human: なぜ？ Assistant:", chosen=" だから。"),
    ),
    "Hello-SimpleAI/HC3-Chinese": (
        {
            "id": "0",
            "question": "为什么？",
            "human_answers": ["因为。", "也许。"],
            "chatgpt_answers": ["我不知道。"],
        },
        Row(prompt=" Human: 为什么？ Assistant:", chosen=" 因为。"),
    ),
    "mkqa-Chinese": (
        {
            "example_id": 1,
            "query": "why?",
            "queries": {"zh_cn": "为什么？", "ja": "なぜ？"},
            "answers": {"zh_cn": [MKQA_ANSWER], "ja": [MKQA_ANSWER]},
        },
        Row(prompt=" Human: 为什么？ Assistant:", chosen=" 42"),
    ),
    "mkqa-Japanese": (
        {
            "example_id": 1,
            "query": "why?",
            "queries": {"zh_cn": "为什么？", "ja": "なぜ？"},
            "answers": {"zh_cn": [MKQA_ANSWER], "ja": [MKQA_ANSWER]},
        },
        Row(prompt=" Human: なぜ？ Assistant:", chosen=" 42"),
    ),
    "lmqg/qg_jaquad": (
        {
            "question": "なぜ？",
            "answer": "雨",
            "sentence": "雨だから。",
            "paragraph": "雨だから。晴れ。",
        },
        Row(prompt=" Human: なぜ？ Assistant:", chosen=" 雨だから。"),
    ),
    "lmqg/qag_jaquad": (
        {
            "questions": ["なぜ？", "いつ？"],
            "answers": ["雨", "朝"],
            "paragraph": "雨だから。",
            "questions_answers": "question: なぜ？, answer: 雨",
        },
        Row(prompt=" Human: なぜ？ Assistant:", chosen=" 雨だから。"),
    ),
    "local/jsonfile": (
        {"prompt": "Human: Why? Assistant:", "chosen": "Because.", "rejected": "No."},
        Row(prompt=" Human: Why? Assistant:", chosen=" Because.", rejected=" No."),
    ),
}
"""A record in the fields of each data set, and its row."""

INSTALLED = {"chitchat", "chitchat-upbeat"}


def test_every_named_data_set_has_an_example() -> None:
    assert set(RECORDS) | INSTALLED == set(FORMATS)
    assert len([name for name in RECORDS if name != "local/jsonfile"]) == 15


@pytest.mark.parametrize("name", RECORDS)
def test_record_becomes_its_row(name: str) -> None:
    record, row = RECORDS[name]
    assert list(FORMATS[name].rows(record)) == [row]


@pytest.mark.parametrize("name", RECORDS)
def test_missing_fields_are_named(name: str) -> None:
    with pytest.raises(RowError, match=r"field \w+ is missing"):
        FORMATS[name].rows({"something": "else"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["text", "zh_cn", "ja", "full_text"]), inner)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("name", RECORDS)
@given(data=st.data())
def test_any_structure_gives_rows_or_a_reason(name: str, data: st.DataObject) -> None:
    """Whatever stands in the fields, a record is counted as bad and never stops the run."""
    record = {
        key: data.draw(JSON | st.just(value), label=key) for key, value in RECORDS[name][0].items()
    }
    try:
        rows = FORMATS[name].rows(record)
    except RowError as reason:
        assert str(reason)
    else:
        assert all(isinstance(row, Row) for row in rows)


def test_label_one_of_shp_prefers_answer_a() -> None:
    record = RECORDS["stanfordnlp/SHP"][0] | {"labels": 1}
    assert FORMATS["stanfordnlp/SHP"].rows(record)[0].chosen == " No."


def test_tie_of_webgpt_is_no_preference() -> None:
    record = RECORDS["openai/webgpt_comparisons"][0] | {"score_0": 0.0, "score_1": 0.0}
    (row,) = FORMATS["openai/webgpt_comparisons"].rows(record)
    assert (row.chosen, row.rejected) == (" Wrong.", None)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mkqa-Japanese", {"answers": {"ja": [{"type": 6, "text": None}]}}),
        ("mkqa-Chinese", {"answers": {"zh_cn": []}}),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": []}),
        ("Cohere/miracl-ja-queries-22-12", {"positive_passages": []}),
    ],
)
def test_questions_without_an_answer_give_no_row(name: str, change: dict[str, Any]) -> None:
    assert list(FORMATS[name].rows(RECORDS[name][0] | change)) == []


def test_lists_of_structures_may_be_structures_of_lists() -> None:
    """`datasets` stores a sequence of structures as a structure of sequences."""
    record = RECORDS["Cohere/miracl-zh-queries-22-12"][0] | {
        "positive_passages": {"docid": ["1"], "text": ["因为。"]},
        "negative_passages": {"docid": [], "text": []},
    }
    (row,) = FORMATS["Cohere/miracl-zh-queries-22-12"].rows(record)
    assert (row.chosen, row.rejected) == (" 因为。", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"chosen": ""}, "chosen is empty"),
        ({"chosen": 3}, "chosen is int, not text"),
        ({"rejected": "\n"}, "rejected is empty"),
        ({"rejected": ["no"]}, "rejected is list, not text"),
        ({"rejected": " yes"}, "chosen and rejected are equal"),
    ],
)
def test_useless_rows_are_refused(change: dict[str, Any], reason: str) -> None:
    fields: dict[str, Any] = {"prompt": "why", "chosen": " yes", "rejected": " no"}
    with pytest.raises(RowError, match=reason):
        Row(**(fields | change))


def test_unknown_name_suggests_near_ones() -> None:
    assert "did you mean Dahoas/rm-static?" in unknown_name("name", "rm-static")
    assert "stanfordnlp/SHP" in unknown_name("name", "stanford/SHP")
    assert "known: " in unknown_name("name", "zzzzzzzz")


def test_template_is_that_of_the_reference() -> None:
    assert question("Why?") + " Because." == " Human: Why? Assistant: Because."
