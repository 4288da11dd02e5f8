import importlib.util
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megachat.data import chitchat
from megachat.data.chitchat import Conversation, ConversationRating
from megachat.data.config import DataConfig, SentencePieceConfig, SourceConfig, Stage
from megachat.data.stage_data import build_stage_data, training_texts
from megachat.data.tokenizer import SENTENCEPIECE_FILE, train_sentencepiece
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


def demo_config(tmp_path: Path) -> DataConfig:
    return data_config(
        tmp_path,
        SourceConfig(name="chitchat-upbeat", max_rows=1500),
        max_prompt_tokens=24,
        max_tokens=48,
        max_answer_tokens=24,
        long_answers="drop",
    )


@pytest.fixture(scope="module")
def chats() -> list[Conversation]:
    return list(chitchat.conversations())


@pytest.fixture(scope="module")
def replies() -> list[Mapping[str, Any]]:
    """Held-out rows of the source `chitchat`."""
    return [record.value or {} for record in chitchat.reply_records(held_out=True)]


@pytest.fixture(scope="module")
def upbeat_pairs() -> list[Mapping[str, Any]]:
    """Held-out rows of the source `chitchat-upbeat`."""
    return [record.value or {} for record in chitchat.upbeat_records(held_out=True)]


@needs_chats
def test_conversations_are_those_of_the_package(chats: list[Conversation]) -> None:
    assert len(chats) == 7168
    assert chats == sorted(chats, key=lambda chat: chitchat._stable_number(chat.name))
    share = sum(chitchat.is_held_out(chat.name) for chat in chats) / len(chats)
    assert 0.07 < share < 0.09
    assert all(turn == " ".join(turn.split()) for chat in chats[:200] for turn in chat.turns)


@needs_chats
@needs_vader
def test_held_out_rows_share_no_conversation_with_training(
    chats: list[Conversation],
    replies: list[Mapping[str, Any]],
    upbeat_pairs: list[Mapping[str, Any]],
) -> None:
    """Every held-out prompt and reply, of either source, is a turn of a held-out chat."""
    held_out = {turn for chat in chats if chitchat.is_held_out(chat.name) for turn in chat.turns}
    for row in (*replies, *upbeat_pairs):
        prompt = row["prompt"].removeprefix("<human> ").removesuffix("<bot>")
        assert {prompt, row["chosen"][1:], row.get("rejected", row["chosen"])[1:]} <= held_out


@needs_chats
def test_replies_are_adjacent_turns_of_suitable_length(
    chats: list[Conversation], replies: list[Mapping[str, Any]]
) -> None:
    adjacent = {
        (f"<human> {first}<bot>", f" {second}")
        for chat in chats
        if chitchat.is_held_out(chat.name)
        for first, second in zip(chat.turns, chat.turns[1:], strict=False)
        if 8 <= len(first) < 140 and 8 <= len(second) < 120
    }
    assert {(row["prompt"], row["chosen"]) for row in replies} == adjacent
    assert len(replies) > 6000


@needs_chats
@needs_vader
def test_pairs_prefer_the_more_upbeat_reply_by_the_margin(
    upbeat_pairs: list[Mapping[str, Any]],
) -> None:
    assert len(upbeat_pairs) > 5000
    for row in upbeat_pairs[:500]:
        margin = chitchat.upbeat_score(row["chosen"]) - chitchat.upbeat_score(row["rejected"])
        assert margin >= chitchat.UPBEAT_MARGIN


@needs_chats
@needs_vader
def test_pairs_are_the_same_again(upbeat_pairs: list[Mapping[str, Any]]) -> None:
    again = islice(chitchat.upbeat_records(held_out=True), 500)
    assert [record.value for record in again] == upbeat_pairs[:500]


@needs_chats
@needs_vader
def test_real_reply_is_chosen_about_half_of_the_time(
    replies: list[Mapping[str, Any]], upbeat_pairs: list[Mapping[str, Any]]
) -> None:
    """Or a reward model could learn to tell fitting replies from random ones."""
    real = {(row["prompt"], row["chosen"]) for row in replies}
    share = sum((row["prompt"], row["chosen"]) in real for row in upbeat_pairs) / len(upbeat_pairs)
    assert 0.45 < share < 0.6


@needs_chats
@needs_vader
def test_human_ratings_agree_weakly_with_vader() -> None:
    ratings = chitchat.rated_conversations(limit=80)
    assert len(ratings) == 80
    assert all(1 <= rating.human <= 10 and rating.human != 5 for rating in ratings)
    assert all(-1 <= rating.vader <= 1 for rating in ratings)
    assert -0.4 < chitchat.rating_correlation(ratings) < 0.6


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


@needs_vader
def test_positive_words_are_those_that_raise_the_score() -> None:
    words = chitchat.positive_words()
    assert {"love", "great", "happy"} <= words
    assert not {"sad", "awful", "table"} & words


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
        training_texts(config), SentencePieceConfig(vocab_size=600), tmp_path / "tok"
    )
    for stage in Stage:
        data = build_stage_data(config, stage=stage, tokenizer=tokenizer)
        assert len(data.train) > 50 and len(data.validation) > 50
        for row in data.validation.texts()[:20]:
            assert row.prompt.startswith("<human> ") and row.prompt.endswith("<bot>")
            assert row.chosen.startswith(" ")
            assert row.rejected is not None and row.rejected.startswith(" ")


def test_missing_packages_name_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=r'chitchat-dataset is not .* pip install -e "\.\[demo\]"'):
        chitchat.data_files()
    chitchat._analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(DataError, match=r'vaderSentiment is not .* pip install -e "\.\[demo\]"'):
        chitchat.upbeat_score("nice")
    chitchat._analyzer.cache_clear()
