"""Text statistics against small cases counted by hand and against independent computations."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.telemetry.quality import (
    correlation,
    describe_texts,
    distinct,
    length_stats,
    paired_mean_difference,
    repetition,
    share_in_lexicon,
    words,
)

FLOATS = st.floats(-100, 100, allow_nan=False)


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("I'm GLAD, really -- glad! 42 :)") == ["i'm", "glad", "really", "glad", "42"]


def test_distinct_counts_ngrams_over_all_texts_and_not_across_them() -> None:
    texts = ["a b a b", "a b c", ""]
    assert distinct(texts, n=1) == 3 / 7
    assert distinct(texts, n=2) == 3 / 5  # ab ba ab | ab bc
    assert math.isnan(distinct(["", "a"], n=2))


def test_repetition_is_within_one_text() -> None:
    looping = "we can go we can go we can go"  # 7 trigrams, 3 different ones
    assert repetition([looping]) == pytest.approx(1 - 3 / 7)
    assert repetition([looping, "we can go", "we"]) == pytest.approx((1 - 3 / 7) / 3)
    assert repetition(["we can go", "we can go"]) == 0.0
    assert math.isnan(repetition([]))


def test_share_in_lexicon_counts_every_occurrence() -> None:
    assert share_in_lexicon(["Great, great day", "no"], lexicon={"great", "good"}) == 2 / 4
    assert math.isnan(share_in_lexicon(["..."], lexicon={"great"}))


def test_lengths_agree_with_the_statistics_module() -> None:
    texts = ["a b c", "", "a", "a b c d e f", "a b"]
    counts = [len(text.split()) for text in texts]
    stats = length_stats(texts)
    assert stats.mean == pytest.approx(statistics.mean(counts))
    assert stats.std == pytest.approx(statistics.pstdev(counts))
    assert stats.median == statistics.median(counts)
    assert (stats.shortest, stats.longest, stats.num_empty) == (0, 6, 1)
    with pytest.raises(ValueError, match="no texts"):
        length_stats([])


def test_describe_gathers_the_single_statistics() -> None:
    texts = ["good good day", "a good good day"]
    described = describe_texts(texts, lexicon={"good"})
    assert described.num_texts == 2
    assert described.distinct_1 == distinct(texts, n=1)
    assert described.distinct_2 == distinct(texts, n=2)
    assert described.repetition == repetition(texts)
    assert described.lexicon_share == 4 / 7
    assert described.lengths == length_stats(texts)


def test_bootstrap_interval_is_that_of_all_possible_resamples() -> None:
    """Five pairs have 5^5 resamples, few enough to enumerate."""
    before = [0.0, 1.0, 2.0, 3.0, 4.0]
    after = [1.0, 1.5, 4.0, 2.0, 8.0]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    exact = [statistics.mean(sample) for sample in itertools.product(differences, repeat=5)]
    interval = paired_mean_difference(before, after, seed=0, resamples=40_000, confidence=0.8)
    assert interval.estimate == pytest.approx(statistics.mean(differences))
    # The exact distribution is made of steps of at most 0.1, and so are the ends of the interval.
    assert interval.low == pytest.approx(np.quantile(exact, 0.1), abs=0.11)
    assert interval.high == pytest.approx(np.quantile(exact, 0.9), abs=0.11)


def test_bootstrap_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        before = rng.normal(0.0, 1.0, size=60)
        after = before + rng.normal(0.3, 0.5, size=60)
        interval = paired_mean_difference(
            before.tolist(), after.tolist(), seed=trial, resamples=500, confidence=0.9
        )
        held += interval.low <= 0.3 <= interval.high
    assert 0.83 <= held / 200 <= 0.96


def test_pairing_removes_what_both_sides_share() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(0.0, 100.0, size=50)
    interval = paired_mean_difference(shared.tolist(), (shared + 1.0).tolist(), seed=0)
    assert interval.low == pytest.approx(1.0)
    assert interval.high == pytest.approx(1.0)


def test_bootstrap_is_repeatable_and_depends_on_the_seed() -> None:
    before, after = [0.0] * 30, [float(i % 7) for i in range(30)]
    first = paired_mean_difference(before, after, seed=3, resamples=200)
    assert first == paired_mean_difference(before, after, seed=3, resamples=200)
    assert first != paired_mean_difference(before, after, seed=4, resamples=200)


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(FLOATS, FLOATS), min_size=2, max_size=20))
def test_correlation_is_that_of_numpy(pairs: list[tuple[float, float]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    if np.std(first) < 1e-3 or np.std(second) < 1e-3:
        return
    assert correlation(first, second) == pytest.approx(np.corrcoef(first, second)[0, 1], abs=1e-9)


def test_correlation_with_a_constant_is_not_a_number() -> None:
    assert math.isnan(correlation([1.0, 1.0], [1.0, 2.0]))


def test_unpaired_values_are_refused() -> None:
    with pytest.raises(ValueError, match="1 values before and 2 after"):
        paired_mean_difference([1.0], [1.0, 2.0], seed=0)
    with pytest.raises(ValueError, match="0 values before and 0 after"):
        paired_mean_difference([], [], seed=0)
    with pytest.raises(ValueError, match="1 and 1 values"):
        correlation([1.0], [1.0])
