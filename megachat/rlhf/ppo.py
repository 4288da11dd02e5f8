"""`PPOTrainer`: the two halves of a PPO step, `generate_experience` and `train_rlhf`.

The paper's `DeepSpeedPPOTrainer`, for custom loops:

    for prompts in prompt_loader:
        experience = trainer.generate_experience(prompts)
        for minibatch in trainer.minibatches(experience):
            report = trainer.train_rlhf(minibatch)

Experiences are global records: every rank holds all rows, so that whitening, KL control and reward
statistics are plain arithmetic, equal everywhere and independent of the roles' layouts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from megachat.errors import AgreementError
from megachat.generation.config import SamplingConfig
from megachat.hybrid.engine import HybridEngine
from megachat.ops.finite import require_finite, require_number
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.rng import generator_for, seed_for
from megachat.records import Experience, PromptBatch, Rollout
from megachat.reshard.execute import ReshardReport
from megachat.rlhf.advantages import (
    explained_variance,
    generalized_advantages,
    masked_mean,
    whiten,
)
from megachat.rlhf.config import LogprobTolerance, OldLogprobs, PpoConfig
from megachat.rlhf.engine import RLHFEngine
from megachat.rlhf.kl import KlController, create_kl_controller, estimate_kl
from megachat.rlhf.objectives import PolicyObjective, ValueObjective
from megachat.rlhf.rewards import RewardNormalizer, shape_rewards
from megachat.rlhf.scoring import FinalScores, ResponseLogprobs, ResponseValues
from megachat.telemetry.timers import PhaseTimers
from megachat.training.engine import ForwardEngine, LossReport
from megachat.training.loss import LossTerms, ModelOutput
from megachat.training.zero1 import StepReport


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutStatistics:
    """How a rollout of the actor looks to the reward model and the reference."""

    scores: Tensor
    """[batch] float32, raw scores of the reward model."""
    log_ratios: Tensor
    """[batch, response_len] float32, actor minus reference log-prob of each token; 0 beyond."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoExperience(Experience):
    """An experience together with the scale of its values and returns, and the policy's age.

    Statistics of the scores may go on changing (`running`) while experiences wait to be trained
    on; a row keeps the ones it was standardised with, so old and new values stay comparable.
    """

    score_mean: Tensor
    """[batch] float32, what was subtracted from the row's score and from its critic outputs."""
    score_std: Tensor
    """[batch] float32, what the differences were divided by."""
    policy_steps: Tensor
    """[batch] int64, updates that the actor had behind it when it answered."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PpoReport:
    """What one PPO update did."""

    metrics: dict[str, float]
    """Names as they are written: `ppo/policy_loss`, `ppo/clip_fraction`, ..."""
    approx_kl: float
    """Estimate of KL(sampling policy || the policy that this update started from), nats per token:
    the latter was moved by the updates before it."""


class PPOTrainer:
    """Proximal policy optimisation with KL-shaped rewards."""

    def __init__(
        self,
        engine: RLHFEngine,
        *,
        config: PpoConfig,
        sampling: SamplingConfig,
        seed: int,
        timers: PhaseTimers | None = None,
        old_logprobs: OldLogprobs = OldLogprobs.RECOMPUTE,
        tolerance: LogprobTolerance | None = None,
    ) -> None:
        """Starts with a fresh KL controller and reward normaliser.

        Args:
            engine: The four roles.
            config: PPO's constants.
            sampling: How responses are sampled; log-probs are taken at its temperature.
            seed: Start of the sampling and shuffling streams.
            timers: Where the phases of a step are measured; None makes new ones.
            old_logprobs: Where the log-probs come from that ratios, KL and rewards are made of.
            tolerance: Of those that decoding noted down; None takes the default.
        """
        self.engine = engine
        self.config = config
        self.sampling = sampling
        self.normalizer = RewardNormalizer(config.reward.normalization)
        self.kl_controller: KlController = create_kl_controller(config.kl)
        self._seed = seed
        self._timers = timers if timers is not None else PhaseTimers()
        self._old_logprobs = old_logprobs
        dtype = engine.actor.training.model.options.dtype
        self._tolerance = (tolerance or LogprobTolerance()).of(dtype)
        self._iteration = 0
        self.experience_metrics: dict[str, float] = {}
        """Statistics of the latest experience, by the names they are written under."""

    def calibrate(self, batches: Iterable[PromptBatch]) -> None:
        """Measures the scale of scores on the untrained actor's responses, if the mode needs it.

        Args:
            batches: Prompts to answer; `config.reward.normalization_samples` of them are used, or
                all where they are fewer.
        """
        if not self.normalizer.needs_calibration:
            return
        seed = seed_for(self._seed, "calibration")
        left = self.config.reward.normalization_samples
        for batch in batches:
            prompts = batch if batch.num_rows <= left else batch.select(torch.arange(left))
            rollout = self.generate(prompts, sampling=self.sampling, seed=seed)
            with self.engine.scoring():
                scores = self._scores(rollout)
            self.normalizer.calibrate(scores)
            left -= prompts.num_rows
            if not left:
                return

    def generate(self, prompts: PromptBatch, *, sampling: SamplingConfig, seed: int) -> Rollout:
        """A generation phase of the actor: reshard, sample a response to every prompt, go back."""
        with self._timers.phase("reshard"):
            self.engine.eval()
        try:
            with self._timers.phase("generate"):
                return self.engine.actor.generator.generate(prompts, sampling=sampling, seed=seed)
        finally:
            with self._timers.phase("reshard"):
                self.engine.train()

    def generate_experience(self, prompts: PromptBatch) -> PpoExperience:
        """Samples a response to every prompt and scores it with all four roles.

        The statistics of the rollout are left in `experience_metrics`.

        Raises:
            DivergenceError: A log-prob, value or score is no finite number; names the role.
        """
        seed = seed_for(self._seed, "rollout", self._iteration)
        rollout = self.generate(prompts, sampling=self.sampling, seed=seed)
        with self._timers.phase("score"), self.engine.scoring():
            temperature = self.sampling.temperature
            logprobs = rollout.logprobs
            if self._old_logprobs is OldLogprobs.RECOMPUTE:
                logprobs = self._logprobs(
                    "actor", self.engine.actor.training, rollout, temperature=temperature
                )
            ref_logprobs = self._logprobs(
                "reference", self.engine.reference, rollout, temperature=temperature
            )
            critic_output = self._critic_output(rollout)
            scores = self._scores(rollout)
        self._iteration += 1
        return self._shape(
            rollout,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            critic_output=critic_output,
            scores=scores,
        )

    def measure(self, rollout: Rollout, *, temperature: float) -> RolloutStatistics:
        """Scores a rollout for evaluation; leaves every running statistic alone.

        Args:
            rollout: Responses of the present actor.
            temperature: The one they were sampled at.
        """
        with self.engine.scoring():
            logprobs, ref_logprobs = (
                self._logprobs(role, engine, rollout, temperature=temperature)
                for role, engine in (
                    ("actor", self.engine.actor.training),
                    ("reference", self.engine.reference),
                )
            )
            scores = self._scores(rollout)
        return RolloutStatistics(scores=scores, log_ratios=logprobs - ref_logprobs)

    def minibatches(self, experience: PpoExperience) -> Iterator[PpoExperience]:
        """The mini-batches of `config.epochs` passes, shuffled anew in each pass."""
        rows = self.config.minibatch_rows(experience.num_rows)
        for epoch in range(self.config.epochs):
            generator = generator_for(self._seed, "minibatches", self._iteration, epoch)
            for part in torch.randperm(experience.num_rows, generator=generator).view(-1, rows):
                yield experience.select(part)

    def train_rlhf(self, experience: PpoExperience) -> PpoReport:
        """One update of actor and critic on a mini-batch.

        Raises:
            AgreementError: What decoding noted down is not what training computes; no weight has
                changed since the policy sampled.
            DivergenceError: A loss is no finite number; that model's weights are those of before.
        """
        actor, critic = self.engine.actor.training, self.engine.critic
        with self._timers.phase("train actor"):
            policy = actor.forward_backward(
                experience,
                PolicyObjective.for_batch(
                    experience,
                    self.config,
                    temperature=self.sampling.temperature,
                    group=actor.groups.tensor,
                    vocab_start=actor.vocab_start,
                    backend=self.engine.logprob_backend,
                ),
            )
            require_number(policy.loss, what="loss of the actor")
            gap = self._decoding_gap(experience, policy)
            with self._timers.phase("optimizer"):
                actor_step = actor.step()
        with self._timers.phase("train critic"):
            value = critic.forward_backward(
                experience, StandardizedValueObjective.for_batch(experience, self.config)
            )
            require_number(value.loss, what="loss of the critic")
            with self._timers.phase("optimizer"):
                critic_step = critic.step()
        metrics = {
            "ppo/policy_loss": policy.loss,
            "ppo/value_loss": value.loss,
        }
        metrics |= _update_metrics("actor", actor_step, skipped=actor.skipped_steps)
        metrics |= _update_metrics("critic", critic_step, skipped=critic.skipped_steps)
        metrics |= {f"ppo/{name}": number for name, number in policy.metrics.items()}
        metrics |= {f"ppo/{name}": number for name, number in value.metrics.items()}
        metrics |= gap
        return PpoReport(metrics=metrics, approx_kl=policy.metrics["approx_kl"])

    def should_stop(self, report: PpoReport) -> bool:
        """Whether the rest of this experience should be skipped: the policy has moved too far."""
        return report.approx_kl > self.config.early_stop_kl

    def _shape(
        self,
        rollout: Rollout,
        *,
        logprobs: Tensor,
        ref_logprobs: Tensor,
        critic_output: Tensor,
        scores: Tensor,
    ) -> PpoExperience:
        """Rewards, advantages and returns, computed once per experience."""
        config, mask = self.config, rollout.response_mask
        # The scores come first: the mode `running` absorbs them, and the values of this experience
        # are to be on the scale that its scores, and later its returns, are on.
        standardized = self.normalizer.standardize(scores)
        score_mean = torch.full((rollout.num_rows,), self.normalizer.mean)
        score_std = torch.full((rollout.num_rows,), self.normalizer.std)
        values = (critic_output - score_mean[:, None]) / score_std[:, None]
        values = values.masked_fill(~mask, 0.0)
        kl = estimate_kl(logprobs, ref_logprobs=ref_logprobs, estimator=config.kl.estimator)
        rewards = shape_rewards(
            scores=standardized,
            kl=kl,
            response_mask=mask,
            finished=rollout.finished,
            kl_coefficient=self.kl_controller.coefficient,
            config=config.reward,
        )
        estimates = generalized_advantages(
            rewards=rewards, values=values, response_mask=mask, gamma=config.gamma, lam=config.lam
        )
        advantages = whiten(estimates.advantages, mask=mask, whitening=config.whitening)
        mean_kl = float(masked_mean(logprobs - ref_logprobs, mask=mask))
        self.experience_metrics = _reshard_metrics(self.engine.actor) | {
            "rlhf/score": float(scores.mean()),
            "rlhf/standardized_score": float(standardized.mean()),
            "rlhf/reward": float(rewards.sum(dim=1).mean()),
            "rlhf/kl": mean_kl,
            "rlhf/kl_coefficient": self.kl_controller.coefficient,
            "rlhf/response_length": float(rollout.response_lengths.float().mean()),
            "rlhf/finished_share": float(rollout.finished.float().mean()),
            "rlhf/value_mean": float(masked_mean(values, mask=mask)),
            "rlhf/explained_variance": float(
                explained_variance(values, returns=estimates.returns, mask=mask)
            ),
        }
        if self._old_logprobs is OldLogprobs.RECOMPUTE:
            gap = (logprobs - rollout.logprobs).abs()
            self.experience_metrics |= _gap_metrics(
                mean=float(masked_mean(gap, mask=mask)),
                largest=float(gap.max()) if gap.numel() else 0.0,
            )
        self.kl_controller.update(mean_kl, num_samples=rollout.num_rows)
        return PpoExperience(
            tokens=rollout.tokens,
            lengths=rollout.lengths,
            prompt_lengths=rollout.prompt_lengths,
            response_mask=mask,
            logprobs=logprobs,
            ref_logprobs=ref_logprobs,
            values=values,
            advantages=require_finite(advantages, what="advantages of the actor"),
            returns=require_finite(estimates.returns, what="returns of the critic"),
            scores=scores,
            finished=rollout.finished,
            score_mean=score_mean,
            score_std=score_std,
            policy_steps=torch.full(
                (rollout.num_rows,), self.engine.actor.training.steps_done, dtype=torch.int64
            ),
        )

    def _decoding_gap(self, experience: PpoExperience, policy: LossReport) -> dict[str, float]:
        """How far decoding was from training, if this update starts from the policy that sampled.

        Its log-ratios are then those of one policy on two paths, and no second pass is needed.

        Raises:
            AgreementError: The mean of them is above the tolerance.
        """
        is_measured = self._old_logprobs is OldLogprobs.ROLLOUT and bool(
            (experience.policy_steps == self.engine.actor.training.steps_done).all()
        )
        if not is_measured:
            return {}
        mean, largest = policy.metrics["log_ratio_mean"], policy.metrics["log_ratio_max"]
        if not mean <= self._tolerance:
            raise AgreementError(
                f"decoding and training disagree by {mean:.2g} nats per token on average (at most "
                f"{largest:.2g}), rlhf.logprob_tolerance allows {self._tolerance:g}: look "
                'for the fault in the generation backend, or set rlhf.old_logprobs = "recompute"'
            )
        return _gap_metrics(mean=mean, largest=largest)

    def _logprobs(
        self, role: str, engine: ForwardEngine, rollout: Rollout, *, temperature: float
    ) -> Tensor:
        """`[batch, response_len]` log-probs of the response tokens, on a role's training path."""
        function = ResponseLogprobs(
            response_len=rollout.logprobs.shape[1],
            temperature=temperature,
            group=engine.groups.tensor,
            vocab_start=engine.vocab_start,
            backend=self.engine.logprob_backend,
        )
        with self._timers.phase(role):
            logprobs = engine.score(rollout, function)
        return require_finite(logprobs, what=f"log-probs of the {role}")

    def _critic_output(self, rollout: Rollout) -> Tensor:
        """`[batch, response_len]` raw output of the critic, on the reward model's scale."""
        function = ResponseValues(response_len=rollout.logprobs.shape[1])
        with self._timers.phase("critic"):
            values = self.engine.critic.score(rollout, function)
        return require_finite(values, what="values of the critic")

    def _scores(self, rollout: Rollout) -> Tensor:
        """`[batch]` raw scores of the reward model."""
        with self._timers.phase("reward"):
            scores = self.engine.reward.score(rollout, FinalScores()).squeeze(1)
        return require_finite(scores, what="scores of the reward model")


class StandardizedValueObjective:
    """The value loss of a critic whose raw output is on the reward model's scale.

    The critic starts as a copy of the reward model; shifting and scaling its output like the
    scores makes it start as a prediction of the standardised outcome.
    """

    metric_names = ValueObjective.metric_names
    maximum_names = ValueObjective.maximum_names

    def __init__(self, standardized: ValueObjective) -> None:
        """Wraps the loss that takes output on the standardised scale."""
        self._standardized = standardized

    @classmethod
    def for_batch(cls, batch: PpoExperience, config: PpoConfig) -> Self:
        """The objective whose denominator is the number of response tokens in this mini-batch."""
        return cls(ValueObjective.for_batch(batch, config))

    def model_input(self, batch: PpoExperience) -> Tensor:
        """Prompt and response, `[batch, seq]`."""
        return self._standardized.model_input(batch)

    def row_lengths(self, batch: PpoExperience) -> Tensor:
        """Prompt and response tokens per row, `[batch]`."""
        return self._standardized.row_lengths(batch)

    def output_spans(self, batch: PpoExperience) -> Tensor:
        """Where the response tokens are chosen, `[batch, 2]`."""
        return self._standardized.output_spans(batch)

    def __call__(self, output: ModelOutput, batch: PpoExperience, row_weights: Tensor) -> LossTerms:
        """As `ValueObjective`, on the scale that each row's values and returns are on."""
        rows = output.rows
        values = (output.values - batch.score_mean[rows]) / batch.score_std[rows]
        return self._standardized(replace(output, values=values), batch, row_weights)


def _reshard_metrics(actor: HybridEngine) -> dict[str, float]:
    """The latest phase change of the actor, the slowest and largest of all ranks."""
    mine = actor.last_reshard
    assert mine is not None, "a rollout comes out of a generation phase"
    report = ReshardReport.of_all_ranks(all_gather_objects(mine))
    return {
        "perf/reshard_seconds": report.seconds,
        "perf/reshard_received_bytes": report.received_bytes,
        "perf/reshard_redundant_bytes": report.redundant_bytes,
        "perf/offloaded_bytes": actor.last_pause.offloaded_bytes,
        "perf/lent_bytes": actor.last_pause.lent_bytes,
    }


def _update_metrics(role: str, step: StepReport, *, skipped: int) -> dict[str, float]:
    """What the optimizer of one role did, and how many of its steps have been skipped so far."""
    return {
        f"ppo/{role}_gradient_norm": step.gradient_norm,
        f"ppo/{role}_learning_rate": step.learning_rate,
        f"ppo/{role}_skipped_steps": skipped,
    }


def _gap_metrics(*, mean: float, largest: float) -> dict[str, float]:
    """Absolute differences of decoding's log-probs from the training path's, nats."""
    return {"rlhf/rollout_logprob_gap": largest, "rlhf/rollout_logprob_gap_mean": mean}
