"""The one place for statistics of sampled texts and of paired measurements; pure.

They make the two ways in which PPO goes wrong visible: replies that all become alike (`distinct`,
`repetition`, lengths) and a reward that is gained by a handful of words (`share_in_lexicon`).
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

WORD = re.compile(r"[\w']+")
REPETITION_WORDS = 3
"""Length of the word sequences whose repetition within one text is counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthStats:
    """Lengths of a set of texts, in words."""

    mean: float
    std: float
    """Population standard deviation."""
    median: float
    shortest: int
    longest: int
    num_empty: int
    """Texts without any word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextQuality:
    """What `describe_texts` measures."""

    num_texts: int
    distinct_1: float
    distinct_2: float
    repetition: float
    lexicon_share: float
    lengths: LengthStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with a confidence interval."""

    estimate: float
    low: float
    high: float
    confidence: float


def describe_texts(texts: Sequence[str], *, lexicon: Collection[str]) -> TextQuality:
    """All statistics of one set of texts.

    Args:
        texts: The texts, at least one.
        lexicon: Lower-case words whose share among all words is counted.

    Raises:
        ValueError: There are no texts.
    """
    return TextQuality(
        num_texts=len(texts),
        distinct_1=distinct(texts, n=1),
        distinct_2=distinct(texts, n=2),
        repetition=repetition(texts),
        lexicon_share=share_in_lexicon(texts, lexicon=lexicon),
        lengths=length_stats(texts),
    )


def words(text: str) -> list[str]:
    """The words of a text, in lower case: runs of letters, digits and apostrophes."""
    return WORD.findall(text.lower())


def distinct(texts: Sequence[str], *, n: int) -> float:
    """Different n-grams of words over all n-grams of all texts; NaN where there is none.

    It falls with the amount of text, so compare sets of equal size. Source: Li et al. 2016,
    "A Diversity-Promoting Objective Function for Neural Conversation Models", distinct-1 and -2.
    """
    grams = [gram for text in texts for gram in _ngrams(words(text), n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(texts: Sequence[str], *, n: int = REPETITION_WORDS) -> float:
    """Share of a text's n-grams that occurred earlier in the same text, averaged over the texts.

    Texts too short for an n-gram repeat nothing and count as 0; NaN where there are no texts.
    """
    shares = []
    for text in texts:
        grams = _ngrams(words(text), n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares)) if shares else float("nan")


def share_in_lexicon(texts: Sequence[str], *, lexicon: Collection[str]) -> float:
    """Share of all words that stand in `lexicon`, lower-case words; NaN where there is no word."""
    known = frozenset(lexicon)
    found = [word in known for text in texts for word in words(text)]
    return sum(found) / len(found) if found else float("nan")


def length_stats(texts: Sequence[str]) -> LengthStats:
    """Statistics of the number of words.

    Raises:
        ValueError: There are no texts.
    """
    if not texts:
        raise ValueError("no texts to take lengths of")
    lengths = np.array([len(words(text)) for text in texts])
    return LengthStats(
        mean=float(lengths.mean()),
        std=float(lengths.std()),
        median=float(np.median(lengths)),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        num_empty=int((lengths == 0).sum()),
    )


def paired_mean_difference(
    before: Sequence[float],
    after: Sequence[float],
    *,
    seed: int,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of `after - before` over pairs, with a percentile bootstrap interval.

    Pairs are resampled, not single values: position i of both sequences is the same prompt.

    Args:
        before: One value a prompt.
        after: The value of the same prompt afterwards.
        seed: Seed of the resampling.
        resamples: How many bootstrap samples to draw.
        confidence: Share of the bootstrap distribution inside the interval.

    Raises:
        ValueError: The sequences are empty or differ in length.
    """
    if len(before) != len(after) or not before:
        raise ValueError(
            f"{len(before)} values before and {len(after)} after: expected one pair for each prompt"
        )
    differences = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(differences), size=(resamples, len(differences)))
    means = differences[drawn].mean(axis=1)
    outside = (1 - confidence) / 2
    low, high = np.quantile(means, [outside, 1 - outside])
    return Interval(
        estimate=float(differences.mean()),
        low=float(low),
        high=float(high),
        confidence=confidence,
    )


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation of paired values; NaN where one side is constant.

    Raises:
        ValueError: The sequences differ in length or have fewer than two values.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} values: expected at least two pairs")
    x = np.asarray(first, dtype=np.float64)
    y = np.asarray(second, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
