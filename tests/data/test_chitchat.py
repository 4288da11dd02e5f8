import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece

from megachat.data import chitchat
from megachat.data.chitchat import Conversation, ConversationRating
from megachat.data.config import SourceConfig, Stage
from megachat.data.stage_data import build_stage_data, training_texts
from megachat.data.tokenizer import SENTENCEPIECE_FILE, SentencePieceConfig, train_sentencepiece
from megachat.errors import DataError
from tests.data.samples import data_config

needs_chats = pytest.mark.skipif(
    importlib.util.find_spec("chitchat_dataset") is None,
    reason="chitchat-dataset is not installed (extra 'demo')",
)
needs_vader = pytest.mark.skipif(
    importlib.util.find_spec("vaderSentiment") is None,
    reason="vaderSentiment is not installed (extra 'demo')",
)


def demo_config(tmp_path: Path, **changes: object) -> object:
    return data_config(
        tmp_path,
        SourceConfig(name="chitchat", split=(10, 0, 0), max_rows=2000),
        SourceConfig(name="chitchat-upbeat", split=(0, 5, 5), max_rows=2000),
        max_prompt_tokens=24,
        max_tokens=48,
        max_answer_tokens=24,
        long_answers="drop",
        **changes,
    )


@pytest.fixture(scope="module")
def chats() -> list[Conversation]:
    return chitchat.conversations()


@needs_chats
def test_conversations_are_those_of_the_package(chats: list[Conversation]) -> None:
    assert len(chats) == 7168
    assert chats == sorted(chats, key=lambda chat: chitchat._stable_number(chat.name))
    share = sum(chat.held_out for chat in chats) / len(chats)
    assert 0.07 < share < 0.09
    assert all(turn == " ".join(turn.split()) for chat in chats[:200] for turn in chat.turns)


@needs_chats
@needs_vader
def test_held_out_rows_share_no_conversation_with_training(chats: list[Conversation]) -> None:
    """Every held-out prompt and reply, of either source, is a turn of a held-out chat."""
    held_out = {turn for chat in chats if chat.held_out for turn in chat.turns}
    for records in (chitchat.reply_records, chitchat.upbeat_records):
        for record in records(held_out=True):
            assert record.value is not None
            prompt = record.value["prompt"].removeprefix("<human> ").removesuffix("<bot>")
            replies = [record.value["chosen"], record.value.get("rejected", record.value["chosen"])]
            assert {prompt, *(reply[1:] for reply in replies)} <= held_out


@needs_chats
def test_replies_are_adjacent_turns_of_suitable_length(chats: list[Conversation]) -> None:
    adjacent = {
        (f"<human> {first}<bot>", f" {second}")
        for chat in chats
        if chat.held_out
        for first, second in zip(chat.turns, chat.turns[1:], strict=False)
        if 8 <= len(first) < 140 and 8 <= len(second) < 120
    }
    rows = [record.value for record in chitchat.reply_records(held_out=True)]
    assert {(row["prompt"], row["chosen"]) for row in rows if row} == adjacent
    assert len(rows) > 6000


@needs_chats
@needs_vader
def test_pairs_prefer_the_more_upbeat_reply_by_the_margin() -> None:
    rows = [record.value for record in chitchat.upbeat_records(held_out=True)]
    assert len(rows) > 5000
    for row in rows[:500]:
        assert row is not None
        margin = chitchat.upbeat_score(row["chosen"]) - chitchat.upbeat_score(row["rejected"])
        assert margin >= chitchat.UPBEAT_MARGIN
    assert rows == [record.value for record in chitchat.upbeat_records(held_out=True)]


@needs_chats
@needs_vader
def test_real_reply_is_chosen_about_half_of_the_time() -> None:
    """Or a reward model could learn to tell fitting replies from random ones."""
    real = {
        (record.value["prompt"], record.value["chosen"])
        for record in chitchat.reply_records(held_out=True)
        if record.value
    }
    rows = [record.value for record in chitchat.upbeat_records(held_out=True) if record.value]
    share = sum((row["prompt"], row["chosen"]) in real for row in rows) / len(rows)
    assert 0.45 < share < 0.6


@needs_chats
@needs_vader
def test_human_ratings_agree_weakly_with_vader() -> None:
    ratings = chitchat.rated_conversations(limit=150)
    assert len(ratings) == 150
    assert all(1 <= rating.human <= 10 and rating.human != 5 for rating in ratings)
    assert all(-1 <= rating.vader <= 1 for rating in ratings)
    assert -0.3 < chitchat.rating_correlation(ratings) < 0.6


def test_correlation_is_that_of_pearson() -> None:
    ratings = [
        ConversationRating(name="a", human=1.0, vader=0.5),
        ConversationRating(name="b", human=2.0, vader=0.3),
        ConversationRating(name="c", human=3.0, vader=0.1),
    ]
    assert chitchat.rating_correlation(ratings) == pytest.approx(-1.0)
    with pytest.raises(DataError, match="2 conversations, at least 3"):
        chitchat.rating_correlation(ratings[:2])


@needs_vader
def test_upbeat_score_is_the_compound_score() -> None:
    assert chitchat.upbeat_score(" I love this, it is great!") > 0.8
    assert chitchat.upbeat_score("this is awful and sad") < -0.5
    assert chitchat.upbeat_score("a table") == 0.0


@needs_chats
def test_ids_equal_those_of_sentencepiece_on_real_chats(
    tmp_path: Path, chats: list[Conversation]
) -> None:
    """Four thousand lines as people type them, plain and with markers."""
    lines = [turn for chat in chats[:400] for turn in chat.turns][:4000]
    trained = train_sentencepiece(
        (f"<human> {line}<bot>" for line in lines),
        SentencePieceConfig(vocab_size=1024, character_coverage=0.9995),
        tmp_path,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / SENTENCEPIECE_FILE))
    texts = [f" {line}" for line in lines] + [chitchat.prompt_text(line) for line in lines]
    wrong = Counter(
        ours != theirs
        for ours, theirs in zip(trained.encode_batch(texts), oracle.encode(texts), strict=True)
    )
    assert wrong[True] == 0, f"{wrong[True]} of {len(texts)} lines differ"


@needs_chats
@needs_vader
def test_demo_data_serves_the_three_stages(tmp_path: Path) -> None:
    config = demo_config(tmp_path)
    tokenizer = train_sentencepiece(
        training_texts(config, limit=1000), SentencePieceConfig(vocab_size=600), tmp_path / "tok"
    )
    for stage, sources in ((Stage.SFT, 0), (Stage.REWARD, 1), (Stage.PROMPTS, 1)):
        data = build_stage_data(config, stage=stage, tokenizer=tokenizer)
        assert [part.num_rows > 0 for part in data.train.parts] == [
            place == sources for place in (0, 1)
        ]
        assert len(data.validation) > 50
        for row in data.validation.texts()[:20]:
            assert row.prompt.startswith("<human> ") and row.prompt.endswith("<bot>")
            assert row.chosen.startswith(" ")
            assert (row.rejected is None) == (stage is Stage.SFT)


def test_missing_packages_name_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r'chitchat-dataset is not .* pip install -e "\.\[demo\]"'):
        chitchat.data_files()
    chitchat._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(DataError, match=r'vaderSentiment is not .* pip install -e "\.\[demo\]"'):
        chitchat.upbeat_score("nice")
    chitchat._analyzer.cache_clear()
