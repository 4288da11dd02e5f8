"""The one place that judges a policy on held-out prompts, before and after PPO."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from megachat.data.chitchat import positive_words, upbeat_score
from megachat.data.tokenizer import Tokenizer
from megachat.generation.config import SamplingConfig
from megachat.parallel.rng import seed_for
from megachat.records import PromptBatch, Rollout
from megachat.rlhf.ppo import PPOTrainer
from megachat.stages.config import GroundTruth
from megachat.telemetry.quality import describe_texts, paired_mean_difference


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyEvaluation:
    """What one policy says to the held-out prompts, and how that is scored."""

    prompts: list[str]
    replies: list[str]
    scores: list[float]
    """Raw scores of the reward model."""
    judged: list[float]
    """Scores of the ground-truth judge; empty without one."""
    kl: float
    """Mean log-ratio to the reference over the response tokens, nats per token."""
    finished_share: float
    mean_tokens: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Judge:
    """A ground truth outside the reward model."""

    score: Callable[[str], float]
    """Of one reply; larger is better."""
    lexicon: Collection[str]
    """Words whose share would rise if the policy hacked the judge."""


def create_judge(kind: GroundTruth) -> Judge | None:
    """The judge that a configuration names.

    Raises:
        ConfigError: Its package is not installed.
    """
    if kind is GroundTruth.NONE:
        return None
    return Judge(score=upbeat_score, lexicon=positive_words())


def evaluate_policy(
    trainer: PPOTrainer,
    batches: Sequence[PromptBatch],
    *,
    tokenizer: Tokenizer,
    judge: Judge | None,
    seed: int,
) -> PolicyEvaluation:
    """Samples a reply to every held-out prompt at temperature 1 and scores it.

    The same seed makes the draws of two policies comparable: equal policies give equal replies.
    """
    sampling = SamplingConfig(max_new_tokens=trainer.sampling.max_new_tokens)
    rollouts = [
        trainer.generate(batch, sampling=sampling, seed=seed_for(seed, "evaluation"))
        for batch in batches
    ]
    replies = [reply for rollout in rollouts for reply in decode_replies(rollout, tokenizer)]
    statistics = [
        trainer.measure(rollout, temperature=sampling.temperature) for rollout in rollouts
    ]
    num_tokens = sum(int(rollout.response_lengths.sum()) for rollout in rollouts)
    return PolicyEvaluation(
        prompts=[text for batch in batches for text in decode_prompts(batch, tokenizer)],
        replies=replies,
        scores=[score for item in statistics for score in item.scores.tolist()],
        judged=[judge.score(reply) for reply in replies] if judge is not None else [],
        kl=sum(float(item.log_ratios.sum()) for item in statistics) / max(1, num_tokens),
        finished_share=_mean([float(flag) for r in rollouts for flag in r.finished.tolist()]),
        mean_tokens=num_tokens / max(1, len(replies)),
    )


def compare(
    before: PolicyEvaluation, after: PolicyEvaluation, *, judge: Judge | None, seed: int
) -> dict[str, float | None]:
    """The figures that say what PPO changed; `before` is the reference policy.

    None stands for one that does not exist: replies without words have no share of anything.
    """
    spread = _std(before.scores)
    texts = {"before": before.replies, "after": after.replies}
    lexicon = judge.lexicon if judge is not None else frozenset()
    quality = {name: describe_texts(list(value), lexicon=lexicon) for name, value in texts.items()}
    distinct = {name: _defined(value.distinct_2) for name, value in quality.items()}
    figures: dict[str, float | None] = {
        "score_before": _mean(before.scores),
        "score_after": _mean(after.scores),
        "score_std_before": spread,
        "score_gain_in_std": (_mean(after.scores) - _mean(before.scores)) / spread,
        "kl": after.kl,
        "distinct2_before": distinct["before"],
        "distinct2_after": distinct["after"],
        "distinct2_ratio": _ratio(distinct["after"], distinct["before"]),
        "finished_before": before.finished_share,
        "finished_after": after.finished_share,
        "tokens_before": before.mean_tokens,
        "tokens_after": after.mean_tokens,
    }
    if judge is not None:
        gain = paired_mean_difference(before.judged, after.judged, seed=seed)
        figures |= {
            "truth_before": _mean(before.judged),
            "truth_after": _mean(after.judged),
            "truth_gain": gain.estimate,
            "truth_gain_low": gain.low,
            "truth_gain_high": gain.high,
            "positive_share_before": _defined(quality["before"].lexicon_share),
            "positive_share_after": _defined(quality["after"].lexicon_share),
        }
    return figures


def decode_replies(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    """The response texts, control tokens left out."""
    return [
        tokenizer.decode(row[start:end].tolist()).strip()
        for row, start, end in zip(
            rollout.tokens, rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True
        )
    ]


def decode_prompts(batch: PromptBatch, tokenizer: Tokenizer) -> list[str]:
    """The prompt texts."""
    return [
        tokenizer.decode(row[:end].tolist()).strip()
        for row, end in zip(batch.tokens, batch.lengths.tolist(), strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _defined(value: float) -> float | None:
    """A statistic of texts, None where there is none."""
    return None if math.isnan(value) else value


def _ratio(value: float | None, base: float | None) -> float | None:
    """None where a side does not exist (replies of less than two words) or the base is zero."""
    return value / base if value is not None and base else None


def _std(values: Sequence[float]) -> float:
    """Sample standard deviation; 1 where it is not defined."""
    if len(values) < 2:
        return 1.0
    mean = _mean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) or 1.0
