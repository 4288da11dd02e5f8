"""`PPOTrainer` with real models: layouts, exact alignment, statistics, and a task it solves."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megachat.errors import ConfigError, PhaseError
from megachat.generation.config import SamplingConfig
from megachat.hybrid.phases import MemoryMeasures
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch
from megachat.rlhf.advantages import generalized_advantages, whiten
from megachat.rlhf.config import PpoConfig
from megachat.rlhf.objectives import ValueObjective
from megachat.rlhf.ppo import StandardizedValueObjective
from megachat.rlhf.rewards import shape_rewards
from megachat.rlhf.scoring import FinalScores, ResponseLogprobs, ResponseValues
from megachat.telemetry.timers import PhaseTimers
from megachat.training.schedules import OptimizerConfig, ScheduleKind
from tests.harness import run_ranks
from tests.rlhf import tiny

LENGTHS = (3, 7, 5, 2, 9, 4, 6, 8, 12, 1, 3, 5)
RAW = {"reward": {"normalization": "none"}}


@dataclass(frozen=True, kw_only=True)
class Step:
    """Everything that one PPO step made."""

    experience: Mapping[str, Tensor]
    statistics: Mapping[str, float]
    reports: list[Mapping[str, float]]
    """Of each mini-batch, in order."""
    weights: Mapping[str, Mapping[str, tuple[tuple[slice, ...], Tensor]]]
    """By model, the parts that this rank holds afterwards."""


def _step(
    actor: ParallelLayout,
    reward: ParallelLayout,
    generation_tensor: int,
    dtype: torch.dtype = torch.float32,
    measures: MemoryMeasures | None = None,
) -> tuple[Step, Step]:
    """Two whole PPO steps of two epochs of two mini-batches, the reference another model."""
    config = PpoConfig(reward={"normalization": "running"})
    trainer = tiny.trainer(
        config,
        actor=actor,
        reward=reward,
        reference_seed=9,
        generation_tensor=generation_tensor,
        dtype=dtype,
        measures=measures,
    )
    steps = []
    for first_id in (100, 200):
        experience = trainer.generate_experience(tiny.prompts(LENGTHS, first_id=first_id))
        reports = [trainer.train_rlhf(part).metrics for part in trainer.minibatches(experience)]
        steps.append(
            Step(
                experience=tiny.fields_of(experience),
                statistics={
                    name: value
                    for name, value in trainer.experience_metrics.items()
                    if not name.startswith("perf/")
                },
                reports=reports,
                weights={
                    "actor": tiny.own_weights(trainer.engine.actor.training.model),
                    "critic": tiny.own_weights(trainer.engine.critic.model),
                },
            )
        )
    return steps[0], steps[1]


def _assert_same_step(found: Step, expected: Step, *, tolerance: float) -> None:
    for name, tensor in found.experience.items():
        other = expected.experience[name]
        if tensor.dtype.is_floating_point:
            torch.testing.assert_close(tensor, other, atol=tolerance, rtol=tolerance, msg=name)
        else:
            assert torch.equal(tensor, other), name
    assert found.statistics == pytest.approx(expected.statistics, rel=tolerance, abs=tolerance)
    assert len(found.reports) == len(expected.reports) == 4
    for report, other in zip(found.reports, expected.reports, strict=True):
        assert report == pytest.approx(other, rel=tolerance, abs=tolerance)
    for role, parts in found.weights.items():
        for name, (where, part) in parts.items():
            whole = expected.weights[role][name][1]
            gap = (part - whole[where]).abs().max().item()
            assert gap <= tolerance / 10, f"{role} {name}"


@pytest.fixture(scope="module")
def single() -> tuple[Step, Step]:
    """The two steps in a single process."""
    layout = ParallelLayout()
    return run_ranks(1, _step, layout, layout, 1)[0]


@pytest.mark.parametrize(
    ("actor", "reward", "generation_tensor"),
    [
        (ParallelLayout(tensor=2), ParallelLayout(data=2), 2),
        (ParallelLayout(tensor=2), ParallelLayout(data=2), 1),
        (ParallelLayout(tensor=2, data=2), ParallelLayout(pipeline=2, data=2), 2),
        (ParallelLayout(tensor=2, pipeline=2), ParallelLayout(data=4), 2),
    ],
    ids=str,
)
def test_roles_under_layouts_of_their_own_make_the_step_of_a_single_process(
    actor: ParallelLayout,
    reward: ParallelLayout,
    generation_tensor: int,
    single: tuple[Step, Step],
) -> None:
    """Experience, statistics, losses and the weights after eight updates."""
    ranks = run_ranks(actor.world_size, _step, actor, reward, generation_tensor)
    for steps in ranks:
        for found, expected in zip(steps, single, strict=True):
            _assert_same_step(found, expected, tolerance=1e-5)
    moved = [
        (part - first.weights["actor"][name][1]).abs().max().item()
        for first, second in [single]
        for name, (_, part) in second.weights["actor"].items()
    ]
    assert max(moved) > 0.01  # the tolerance says something about the updates


def _step_with_and_without_measures(dtype: torch.dtype) -> None:
    measures = MemoryMeasures(
        offload_optimizer=True, reuse_gradients=True, offload_critic=True, offload_scorers=True
    )
    layouts = ParallelLayout(tensor=2), ParallelLayout(data=2)
    plain = _step(*layouts, 1, dtype)
    for step, expected in zip(_step(*layouts, 1, dtype, measures), plain, strict=True):
        assert all(map(torch.equal, step.experience.values(), expected.experience.values()))
        assert (step.statistics, step.reports) == (expected.statistics, expected.reports)
        for role, parts in step.weights.items():
            for name, (_, part) in parts.items():
                assert torch.equal(part, expected.weights[role][name][1]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_leaves_the_device_for_generation_changes_no_bit_of_a_step(dtype: torch.dtype) -> None:
    run_ranks(2, _step_with_and_without_measures, dtype)


def _check_scorers_away() -> None:
    trainer = tiny.trainer(PpoConfig(), measures=MemoryMeasures(offload_scorers=True))
    engine = trainer.engine
    scorers = (engine.reference, engine.reward)

    def resident() -> int:
        return sum(
            weight.untyped_storage().nbytes()
            for scorer in scorers
            for weight in scorer.model.parameters()
        )

    assert resident() == 0
    rollout = trainer.generate(tiny.prompts(LENGTHS), sampling=tiny.SAMPLING, seed=0)
    with pytest.raises(PhaseError, match="host memory"):
        engine.reward.score(rollout, FinalScores())
    with engine.scoring():
        assert resident() > 0
        scores = engine.reward.score(rollout, FinalScores())
    assert resident() == 0
    assert torch.equal(trainer.measure(rollout, temperature=1.0).scores, scores[:, 0])
    assert resident() == 0


def test_scorers_are_in_host_memory_except_while_they_score() -> None:
    run_ranks(1, _check_scorers_away)


def _check_critic_away() -> None:
    config = PpoConfig(reward={"normalization": "none"})
    trainer = tiny.trainer(config, measures=MemoryMeasures(offload_critic=True))
    experience = trainer.generate_experience(tiny.prompts(LENGTHS))
    trainer.engine.eval()
    critic = trainer.engine.critic
    with pytest.raises(PhaseError, match="given away"):
        critic.forward_backward(experience, ValueObjective.for_batch(experience, trainer.config))
    trainer.engine.train()
    assert critic.forward_backward(
        experience, StandardizedValueObjective.for_batch(experience, trainer.config)
    ).loss
    critic.step()


def test_the_critic_cannot_train_while_its_state_is_away() -> None:
    run_ranks(1, _check_critic_away)


def test_f7_old_and_new_log_probs_are_the_same_function_of_the_weights() -> None:
    run_ranks(1, _check_ratio_before_any_update)


def _check_ratio_before_any_update() -> None:
    """Exactly 1 where scoring and training cut the rows alike.

    Other cuts pad to other lengths, which changes the order of sums in attention: an ulp in fp32,
    and in bf16 the rounding of an activation to 8 bits (here up to 2 % of a probability).
    """
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        for minibatches in (1, 2):
            trainer = tiny.trainer(PpoConfig(**RAW, minibatches=minibatches), dtype=dtype)
            experience = trainer.generate_experience(tiny.prompts(LENGTHS))
            report = trainer.train_rlhf(next(iter(trainer.minibatches(experience))))
            assert abs(report.metrics["ppo/ratio_max"] - 1) <= (bound if minibatches > 1 else 1e-6)
            assert report.approx_kl <= bound**2
            assert minibatches > 1 or report.metrics["ppo/clip_fraction"] == 0


def test_f2_pads_and_control_ids_in_prompts_shift_nothing() -> None:
    run_ranks(1, _check_alignment)


def _check_alignment() -> None:
    """Sampling and scoring agree on rows full of pad, BOS and EOS ids, however wide the batch."""
    trainers = [tiny.trainer(PpoConfig(**RAW), reference_seed=9) for _ in range(2)]
    batches = [tiny.prompts(LENGTHS), tiny.prompts(LENGTHS, width=25)]
    for batch in batches:
        batch.tokens[:, 0], batch.tokens[4, 2:5] = tiny.EOS, tiny.PAD
        batch.tokens[6, 1] = tiny.EOS
    narrow, wide = (
        trainer.generate_experience(batch) for trainer, batch in zip(trainers, batches, strict=True)
    )
    assert trainers[0].experience_metrics["rlhf/rollout_logprob_gap"] < 1e-5
    for row, length in enumerate(narrow.lengths.tolist()):
        assert torch.equal(narrow.tokens[row, :length], wide.tokens[row, :length])
    for name, tensor in tiny.fields_of(replace(narrow, tokens=wide.tokens)).items():
        assert torch.equal(tensor, tiny.fields_of(wide)[name]), name


def test_f3_the_eos_step_is_trained_and_valued() -> None:
    run_ranks(1, _check_eos_step)


def _check_eos_step() -> None:
    """With everything else already right, the step that ends a response alone moves both models."""
    trainer = tiny.trainer(PpoConfig(**RAW))
    experience = trainer.generate_experience(tiny.prompts(LENGTHS))
    mask, rows = experience.response_mask, torch.arange(experience.num_rows)
    last = experience.lengths - experience.prompt_lengths - 1
    assert torch.equal(mask.sum(dim=1) - 1, last)
    ends = torch.zeros_like(mask)
    ends[rows, last] = experience.finished
    final = experience.tokens[rows, experience.lengths - 1]
    assert torch.equal(torch.isin(final, torch.tensor(tiny.STOPS)), experience.finished)
    assert ends.any() and not ends.all(dim=1).any()
    assert experience.values[ends].ne(0).all() and experience.logprobs[ends].ne(0).all()
    nothing = replace(
        experience, advantages=torch.zeros_like(mask).float(), returns=experience.values
    )
    only_ends = replace(nothing, advantages=ends.float(), returns=experience.values + ends)
    still, moved = trainer.train_rlhf(nothing), trainer.train_rlhf(only_ends)
    for role in ("actor", "critic"):
        assert still.metrics[f"ppo/{role}_gradient_norm"] < 1e-5
        assert moved.metrics[f"ppo/{role}_gradient_norm"] > 1e-2


def test_f10_and_f12_no_row_is_dropped_and_targets_are_computed_once() -> None:
    run_ranks(1, _check_minibatches)


def _check_minibatches() -> None:
    """Each epoch is a new order of the same rows, answers of a single token included."""
    trainer = tiny.trainer(PpoConfig(**RAW, epochs=3, minibatches=4))
    lengths = LENGTHS * 3
    experience = trainer.generate_experience(tiny.prompts(lengths))
    assert experience.num_rows == len(lengths)
    assert int(experience.response_mask.sum(dim=1).min()) == 1
    parts = list(trainer.minibatches(experience))
    assert [part.num_rows for part in parts] == [9] * 12
    for part in parts:
        trainer.train_rlhf(part)  # nothing that training does changes the targets of later parts
    orders = []
    for epoch in range(3):
        gathered = {
            name: torch.cat([tiny.fields_of(part)[name] for part in parts[4 * epoch :][:4]])
            for name in tiny.fields_of(experience)
        }
        order = [experience.scores.tolist().index(score) for score in gathered["scores"].tolist()]
        assert sorted(order) == list(range(len(lengths)))
        for name, tensor in tiny.fields_of(experience).items():
            assert torch.equal(gathered[name], tensor[order]), name
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]


def test_an_experience_holds_the_rewards_and_advantages_of_its_own_numbers() -> None:
    run_ranks(1, _check_targets)


def _check_targets() -> None:
    """The wiring of score, KL, coefficient, clip and estimator, from the record alone."""
    config = PpoConfig(
        gamma=0.97,
        lam=0.8,
        kl={"control": "adaptive", "coefficient": 0.3, "target": 0.05, "horizon": 100},
        reward={"normalization": "running", "clip": 0.6, "missing_eos_value": -0.4},
    )
    trainer = tiny.trainer(config, reference_seed=9)
    for coefficient_before in (0.3, 0.3 * (1 + 0.2 * 12 / 100)):
        experience = trainer.generate_experience(tiny.prompts(LENGTHS))
        statistics = trainer.experience_metrics
        assert statistics["rlhf/kl_coefficient"] == pytest.approx(coefficient_before)
        scores = (experience.scores - experience.score_mean) / experience.score_std
        mask = experience.response_mask
        rewards = shape_rewards(
            scores=scores,
            kl=experience.logprobs - experience.ref_logprobs,
            response_mask=mask,
            finished=experience.finished,
            kl_coefficient=coefficient_before,
            config=config.reward,
        )
        estimates = generalized_advantages(
            rewards=rewards, values=experience.values, response_mask=mask, gamma=0.97, lam=0.8
        )
        torch.testing.assert_close(experience.returns, estimates.returns)
        whitened = whiten(estimates.advantages, mask=mask, whitening=config.whitening)
        torch.testing.assert_close(experience.advantages, whitened)
        assert statistics["rlhf/reward"] == pytest.approx(rewards.sum(dim=1).mean().item())
        assert statistics["rlhf/kl"] > 2 * config.kl.target  # so the error is clipped to 0.2
    assert trainer.kl_controller.coefficient == pytest.approx(0.3 * (1 + 0.2 * 12 / 100) ** 2)


def test_old_and_new_values_stay_on_one_scale_while_the_running_statistics_move_on() -> None:
    run_ranks(1, _check_value_scale)


def _check_value_scale() -> None:
    """An experience is trained on with the mean and deviation that its scores were given."""
    trainer = tiny.trainer(PpoConfig(reward={"normalization": "running"}, minibatches=1))
    first = trainer.generate_experience(tiny.prompts(LENGTHS))
    trainer.normalizer.standardize(torch.tensor([40.0, -35.0, 90.0]))
    second = trainer.generate_experience(tiny.prompts(LENGTHS, first_id=500))
    assert not torch.equal(first.score_std, second.score_std)
    for experience in (first, second):
        mask = experience.response_mask
        raw = trainer.engine.critic.score(experience, ResponseValues(response_len=mask.shape[1]))
        values = (raw - experience.score_mean[:, None]) / experience.score_std[:, None]
        torch.testing.assert_close(experience.values, values * mask, atol=1e-6, rtol=1e-6)
    untrained = replace(second, returns=second.values)
    assert trainer.train_rlhf(untrained).metrics["ppo/value_loss"] < 1e-9
    report = trainer.train_rlhf(first)
    mean = first.values.sum().item() / int(first.response_mask.sum())
    assert report.metrics["ppo/value_mean"] == pytest.approx(mean, rel=1e-4)
    assert report.metrics["ppo/value_clip_fraction"] == 0


def test_calibration_measures_as_many_reference_samples_as_configured() -> None:
    run_ranks(1, _check_calibration)


def _check_calibration() -> None:
    """Rows are taken batch by batch up to `normalization_samples`, once, before training."""
    config = PpoConfig(reward={"normalization": "reference", "normalization_samples": 14})
    trainer = tiny.trainer(config)
    with pytest.raises(ConfigError, match="measured 0 samples"):
        trainer.generate_experience(tiny.prompts(LENGTHS))
    asked: list[list[int]] = []

    def batches() -> Iterator[PromptBatch]:
        for first_id in (100, 200, 300):
            batch = tiny.prompts(LENGTHS, first_id=first_id)
            asked.append(batch.ids.tolist())
            yield batch

    trainer.calibrate(batches())
    assert len(asked) == 2 and trainer.normalizer.state_dict()["count"] == 14
    before = trainer.normalizer.state_dict()
    trainer.calibrate(batches())
    trainer.generate_experience(tiny.prompts(LENGTHS))
    assert trainer.normalizer.state_dict() == before and len(asked) == 2
    few = tiny.trainer(config)
    few.calibrate([tiny.prompts((3, 4, 5))])
    assert few.normalizer.state_dict()["count"] == 3


def test_an_update_that_goes_too_far_asks_to_stop() -> None:
    run_ranks(1, _check_early_stop)


def _check_early_stop() -> None:
    """The KL from the sampling policy is 0 before the first update, and large after a huge one."""
    optimizer = tiny.OPTIMIZER.model_copy(update={"learning_rate": 0.3})
    trainer = tiny.trainer(PpoConfig(**RAW, early_stop_kl=0.05), optimizer=optimizer)
    experience = trainer.generate_experience(tiny.prompts(LENGTHS))
    reports = [trainer.train_rlhf(part) for part in trainer.minibatches(experience)]
    assert [trainer.should_stop(report) for report in reports[:2]] == [False, True]
    assert reports[0].approx_kl < 1e-9 and reports[1].approx_kl > 0.05


def test_every_step_samples_anew_and_a_seed_repeats_the_run() -> None:
    run_ranks(1, _check_seeds)


def _check_seeds() -> None:
    batch = tiny.prompts(LENGTHS)

    def tokens(seed: int) -> list[list[list[int]]]:
        trainer = tiny.trainer(PpoConfig(**RAW), seed=seed)
        return [trainer.generate_experience(batch).tokens.tolist() for _ in range(2)]

    first, again, other = tokens(1), tokens(1), tokens(2)
    assert first == again
    assert first[0] != first[1] and first[0] != other[0]


def test_measuring_changes_no_statistics_and_takes_log_probs_at_the_given_temperature() -> None:
    run_ranks(1, _check_measure)


def _check_measure() -> None:
    trainer = tiny.trainer(PpoConfig(reward={"normalization": "running"}), reference_seed=9)
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.6)
    rollout = trainer.generate(tiny.prompts(LENGTHS), sampling=sampling, seed=1)
    state, coefficient = trainer.normalizer.state_dict(), trainer.kl_controller.coefficient
    measured = trainer.measure(rollout, temperature=1.6)
    assert trainer.normalizer.state_dict() == state
    assert trainer.kl_controller.coefficient == coefficient
    scores = trainer.engine.reward.score(rollout, FinalScores()).squeeze(1)
    assert torch.equal(measured.scores, scores)
    reference = trainer.engine.reference
    function = ResponseLogprobs(
        response_len=6, temperature=1.6, group=reference.groups.tensor, vocab_start=0
    )
    ratios = rollout.logprobs - reference.score(rollout, function)
    torch.testing.assert_close(measured.log_ratios, ratios, atol=1e-5, rtol=0)


def test_the_phases_of_a_step_are_timed() -> None:
    phases = ["reshard", "generate", "score"]
    phases += [f"score/{role}" for role in ("actor", "reference", "critic", "reward")]
    for role in ("actor", "critic"):
        phases += [f"train {role}", f"train {role}/optimizer"]
    assert run_ranks(1, _phases) == [phases]


def _phases() -> list[str]:
    timers = PhaseTimers()
    trainer = tiny.trainer(PpoConfig(**RAW), timers=timers)
    trainer.train_rlhf(trainer.generate_experience(tiny.prompts(LENGTHS)))
    return list(timers.totals())


GOOD_TOKENS = range(10, 40)
"""A fifth of the vocabulary."""


def _learn() -> tuple[list[float], list[float], float]:
    """(share of good tokens, mean score) by step, and the final KL, of a run of 24 steps."""
    config = PpoConfig(
        kl={"control": "fixed", "coefficient": 0.02},
        reward={"missing_eos": "keep", "normalization": "running"},
    )
    optimizer = OptimizerConfig(learning_rate=1e-2, schedule=ScheduleKind.CONSTANT)
    sampling = SamplingConfig(max_new_tokens=4)
    trainer = tiny.trainer(config, sampling=sampling, optimizer=optimizer, rows=32)
    for engine in (trainer.engine.reward, trainer.engine.critic):
        tiny.prefer(engine.model, GOOD_TOKENS)
    shares, scores = [], []
    for step in range(24):
        batch = tiny.prompts((2, 3, 4, 3) * 8, first_id=1000 * (step + 1))
        experience = trainer.generate_experience(batch)
        for part in trainer.minibatches(experience):
            trainer.train_rlhf(part)
        columns = torch.arange(experience.tokens.shape[1])
        response = (columns >= experience.prompt_lengths[:, None]) & (
            columns < experience.lengths[:, None]
        )
        said = experience.tokens[response]
        good = (said >= GOOD_TOKENS.start) & (said < GOOD_TOKENS.stop)
        shares.append(good.float().mean().item())
        scores.append(trainer.experience_metrics["rlhf/score"])
    return shares, scores, trainer.experience_metrics["rlhf/kl"]


def test_ppo_learns_what_the_reward_model_likes() -> None:
    """A reward model with a known taste: the policy comes to say the tokens it likes."""
    shares, scores, kl = run_ranks(1, _learn)[0]
    assert 0.1 < shares[0] < 0.3
    assert sum(shares[-5:]) / 5 > 0.7
    assert sum(scores[-5:]) / 5 > scores[0] + 0.2
    assert 0 < kl < math.log(150)
