from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megachat.data.config import SourceConfig, Stage
from megachat.data.inspection import Lengths, limited, look_at, text_examples
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError
from tests.data.samples import data_config, pair, pairs, sentence, write_jsonl


@given(values=st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_a_histogram_counts_every_length_once_in_some_ten_bins(values: list[int]) -> None:
    lengths = Lengths(what="prompt", values=tuple(sorted(values)))
    bins = lengths.histogram()
    assert sum(each.count for each in bins) == len(values)
    assert len(bins) <= 11
    assert bins[0].low <= min(values) and max(values) <= bins[-1].high
    assert all(left.high + 1 == right.low for left, right in zip(bins, bins[1:], strict=False))


@pytest.mark.parametrize(("share", "length"), [(0.5, 5), (0.95, 10), (1.0, 10), (0.1, 1)])
def test_a_quantile_is_the_least_length_that_a_share_does_not_exceed(
    share: float, length: int
) -> None:
    assert Lengths(what="prompt", values=tuple(range(1, 11))).quantile(share) == length


def test_a_source_is_seen_as_training_sees_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {"prompt": sentence(5, words=60), "chosen": " sun rain", "rejected": " snow"}
    path = write_jsonl(tmp_path / "d.jsonl", [*pairs(20), long, {"prompt": "x"}])
    source = SourceConfig(path=path)
    config = data_config(tmp_path, source)
    view = look_at(
        source, config, tokenizer=tokenizer, stages=list(Stage), folder=tmp_path / "scratch"
    )
    assert (view.report.format, view.report.rows, view.report.bad) == ("common", 21, 1)
    assert view.shares == "sft 20%, reward 40%, prompts 40%"
    lengths = {each.what: each.values for each in view.lengths}
    assert lengths["chosen"][-1] == max(
        len(tokenizer.encode(pair(number)["chosen"])) for number in range(20)
    )
    assert [stage.stage for stage in view.stages] == list(Stage)
    for stage in view.stages:
        assert (stage.rows, dict(stage.outcomes)) == (
            20,
            {"dropped: prompt longer than max_prompt_tokens": 1},
        )
    sft, reward, prompts = view.stages
    first = [(segment.text, segment.is_trained) for segment in sft.examples[0].segments]
    assert first == [(pair(0)["prompt"], False), (pair(0)["chosen"] + "</s>", True)]
    assert [example.title for example in reward.examples[:2]] == [
        "row 1, chosen",
        "row 1, rejected",
    ]
    assert reward.examples[1].segments[-1].text == "</s>"
    assert [segment.is_trained for segment in prompts.examples[0].segments] == [False]


def test_without_a_tokenizer_words_are_counted_and_texts_shown(tmp_path: Path) -> None:
    source = SourceConfig(
        path=write_jsonl(tmp_path / "d.jsonl", [{"text": "a b c"}, {"text": "d"}])
    )
    config = data_config(tmp_path, source)
    view = look_at(source, config, tokenizer=None, stages=list(Stage), folder=tmp_path / "scratch")
    assert (view.unit, view.lengths[0].values, view.stages) == ("words", (1, 3), ())
    assert view.shares == "sft 100%"
    (first, _) = text_examples(source, config, folder=tmp_path / "scratch")
    assert [segment.text for segment in first.segments] == ["", "a b c"]


def test_prompts_and_answers_that_touch_are_told(tmp_path: Path) -> None:
    rows = [{"prompt": "Why?", "chosen": "So."}] * 3
    source = SourceConfig(path=write_jsonl(tmp_path / "d.jsonl", rows))
    config = data_config(tmp_path, source)
    view = look_at(source, config, tokenizer=None, stages=(), folder=tmp_path / "scratch")
    assert view.touching == "Why?So."


def test_shares_that_would_waste_rows_are_told_and_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": "a b c"}] * 9)
    source = SourceConfig(path=path, split=(1, 1, 0))
    config = data_config(tmp_path, source)
    view = look_at(source, config, tokenizer=None, stages=(), folder=tmp_path / "scratch")
    assert "its rows can serve sft only" in view.shares


def test_a_look_reads_no_more_than_it_is_asked_to(tmp_path: Path) -> None:
    source = limited(SourceConfig(path=write_jsonl(tmp_path / "d.jsonl", pairs(50))), rows=7)
    config = data_config(tmp_path, source)
    view = look_at(source, config, tokenizer=None, stages=(), folder=tmp_path / "scratch")
    assert view.report.records == 7
    assert limited(source, rows=10) is source


def test_a_source_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    source = SourceConfig(path=tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        look_at(
            source, data_config(tmp_path, source), tokenizer=None, stages=(), folder=tmp_path / "s"
        )
