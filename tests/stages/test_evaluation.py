"""The figures that compare two policies, and what a policy is judged by, recomputed."""

from dataclasses import replace

import numpy as np
import pytest

from megachat.stages.config import GroundTruth
from megachat.stages.evaluation import Judge, PolicyEvaluation, compare, create_judge

LEXICON = frozenset({"good", "fine"})
JUDGE = Judge(score=lambda reply: float(len(reply)), lexicon=LEXICON)
BEFORE = PolicyEvaluation(
    prompts=["a", "b", "c", "d"],
    replies=["it is good", "it is bad", "no no no", "it is so so"],
    scores=[0.5, -1.0, 2.0, 0.25],
    judged=[0.1, 0.2, -0.3, 0.4],
    kl=0.0,
    finished_share=0.75,
    mean_tokens=4.5,
)
AFTER = replace(
    BEFORE,
    replies=["it is good", "fine and good", "it is good", "good good"],
    scores=[1.5, 0.0, 2.5, 1.0],
    judged=[0.3, 0.2, 0.5, 0.2],
    kl=0.07,
    finished_share=1.0,
    mean_tokens=3.0,
)


def test_gains_are_differences_of_means_in_standard_deviations_of_the_start() -> None:
    figures = compare(BEFORE, AFTER, judge=JUDGE, seed=1)
    before, after = np.array(BEFORE.scores), np.array(AFTER.scores)
    assert figures["score_before"] == pytest.approx(before.mean())
    assert figures["score_after"] == pytest.approx(after.mean())
    assert figures["score_std_before"] == pytest.approx(before.std(ddof=1))
    gain = (after.mean() - before.mean()) / before.std(ddof=1)
    assert figures["score_gain_in_std"] == pytest.approx(gain)
    assert (figures["kl"], figures["finished_before"], figures["finished_after"]) == (0.07, 0.75, 1)
    assert (figures["tokens_before"], figures["tokens_after"]) == (4.5, 3.0)


def test_diversity_and_the_share_of_rewarded_words_are_counted_over_all_replies() -> None:
    """Bigrams before: it is, is good, it is, is bad, no no, no no, it is, is so, so so."""
    figures = compare(BEFORE, AFTER, judge=JUDGE, seed=1)
    assert figures["distinct2_before"] == pytest.approx(6 / 9)
    # After: it is, is good, fine and, and good, it is, is good, good good.
    assert figures["distinct2_after"] == pytest.approx(5 / 7)
    assert figures["distinct2_ratio"] == pytest.approx((5 / 7) / (6 / 9))
    assert figures["positive_share_before"] == pytest.approx(1 / 13)
    assert figures["positive_share_after"] == pytest.approx(6 / 11)


def test_the_truth_gain_is_paired_and_its_interval_a_bootstrap_over_prompts() -> None:
    figures = compare(BEFORE, AFTER, judge=JUDGE, seed=1)
    differences = np.array(AFTER.judged) - np.array(BEFORE.judged)
    assert figures["truth_gain"] == pytest.approx(differences.mean())
    assert figures["truth_before"] == pytest.approx(np.mean(BEFORE.judged))
    assert figures["truth_after"] == pytest.approx(np.mean(AFTER.judged))
    means = np.random.default_rng(7).choice(differences, size=(20_000, 4)).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert figures["truth_gain_low"] == pytest.approx(low, abs=0.03)
    assert figures["truth_gain_high"] == pytest.approx(high, abs=0.03)


def test_without_a_judge_nothing_is_said_about_a_truth() -> None:
    figures = compare(BEFORE, AFTER, judge=None, seed=1)
    assert not [name for name in figures if name.startswith(("truth", "positive"))]
    assert (
        figures["score_gain_in_std"]
        == compare(BEFORE, AFTER, judge=JUDGE, seed=1)["score_gain_in_std"]
    )


def test_equal_scores_and_one_word_replies_do_not_divide_by_zero() -> None:
    flat = replace(BEFORE, scores=[1.0] * 4, replies=["yes"] * 4)
    figures = compare(flat, replace(AFTER, scores=[3.0] * 4), judge=None, seed=1)
    assert (figures["score_std_before"], figures["score_gain_in_std"]) == (1.0, 2.0)
    assert figures["distinct2_before"] is None and figures["distinct2_ratio"] is None


def test_the_judge_of_upbeat_replies_tells_them_from_sad_ones() -> None:
    pytest.importorskip("vaderSentiment")
    pytest.importorskip("chitchat_dataset")
    assert create_judge(GroundTruth.NONE) is None
    judge = create_judge(GroundTruth.UPBEAT)
    assert judge is not None and "wonderful" in judge.lexicon and "awful" not in judge.lexicon
    assert judge.score("I love it, what a wonderful day!") > 0.5
    assert judge.score("I hate it, what an awful day.") < -0.5
