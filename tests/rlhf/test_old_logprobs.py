"""PPO on the log-probs that decoding noted down: the same step, without a pass of the actor.

The oracle is the step on recomputed log-probs, and for the gap an explicit pass of the actor.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megachat.errors import AgreementError
from megachat.generation.config import SamplingConfig
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch, Rollout
from megachat.rlhf.config import LogprobTolerance, OldLogprobs, PpoConfig
from megachat.rlhf.ppo import PPOTrainer
from megachat.rlhf.scoring import ResponseLogprobs
from megachat.telemetry.timers import PhaseTimers
from tests.harness import run_ranks
from tests.rlhf import tiny

LENGTHS = (3, 7, 5, 2, 9, 4, 6, 8)
SAMPLING = SamplingConfig(
    max_new_tokens=6,
    min_new_tokens=2,
    temperature=0.7,
    top_k=40,
    top_p=0.9,
    repetition_penalty=1.3,
)
"""Everything that makes the distribution of the draw another one than the one of the log-probs."""
ROUND_OFF = 1e-5
"""fp32: sums over the vocabulary, keys and hidden columns in another order on the two paths."""
GAPS = ("rlhf/rollout_logprob_gap", "rlhf/rollout_logprob_gap_mean")


class _Shifted(PPOTrainer):
    """Notes log-probs down that are off by `shift`, a number or `[batch, response_len]`."""

    shift: float | Tensor = 0.0

    def generate(self, prompts: PromptBatch, *, sampling: SamplingConfig, seed: int) -> Rollout:
        rollout = super().generate(prompts, sampling=sampling, seed=seed)
        logprobs = (rollout.logprobs + self.shift).masked_fill(~rollout.response_mask, 0.0)
        return replace(rollout, logprobs=logprobs)


def _trainer(
    old_logprobs: OldLogprobs, *, tolerance: LogprobTolerance | None = None, **changes
) -> _Shifted:
    config = PpoConfig(reward={"normalization": "running"}, minibatches=changes.pop("cuts", 2))
    made = tiny.trainer(config, reference_seed=9, sampling=SAMPLING, **changes)
    return _Shifted(
        made.engine,
        config=config,
        sampling=SAMPLING,
        seed=7,
        timers=PhaseTimers(),
        old_logprobs=old_logprobs,
        tolerance=tolerance,
    )


def _refuse(*_: object) -> Tensor:
    raise AssertionError("the actor was to run no scoring pass")


def _compare_steps(
    policy: ParallelLayout, reward: ParallelLayout, generation_tensor: int
) -> tuple[float, float]:
    """Two steps both ways; returns the largest gap and how far the weights moved."""
    ways = {
        way: _trainer(way, actor=policy, reward=reward, generation_tensor=generation_tensor)
        for way in OldLogprobs
    }
    actor = ways[OldLogprobs.ROLLOUT].engine.actor.training
    vars(actor)["score"] = _refuse
    start = {name: tensor for name, (_, tensor) in tiny.own_weights(actor.model).items()}
    largest = 0.0
    for step in range(2):
        batch = tiny.prompts(LENGTHS, first_id=100 * (step + 1))
        experiences = [trainer.generate_experience(batch) for trainer in ways.values()]
        recomputed, noted = (tiny.fields_of(experience) for experience in experiences)
        for name, tensor in recomputed.items():
            other = noted[name]
            torch.testing.assert_close(other, tensor, atol=ROUND_OFF, rtol=ROUND_OFF, msg=name)
        both = zip(ways.values(), experiences, strict=True)
        parts = [trainer.minibatches(experience) for trainer, experience in both]
        for number, pair in enumerate(zip(*parts, strict=True)):
            reports = [
                dict(trainer.train_rlhf(part).metrics)
                for trainer, part in zip(ways.values(), pair, strict=True)
            ]
            by_way = dict(zip(ways, reports, strict=True))
            measured = {name: by_way[OldLogprobs.ROLLOUT].pop(name, None) for name in GAPS}
            assert (None in measured.values()) == (number > 0)  # the policy has moved since
            largest = max(largest, measured[GAPS[0]] or 0.0)
            wanted = pytest.approx(by_way[OldLogprobs.RECOMPUTE], rel=ROUND_OFF, abs=ROUND_OFF)
            assert by_way[OldLogprobs.ROLLOUT] == wanted
    moved = 0.0
    weights = [tiny.own_weights(trainer.engine.actor.training.model) for trainer in ways.values()]
    for name, (_, tensor) in weights[0].items():
        torch.testing.assert_close(weights[1][name][1], tensor, atol=ROUND_OFF, rtol=0)
        moved = max(moved, (tensor - start[name]).abs().max().item())
    return largest, moved


@pytest.mark.parametrize(
    ("actor", "reward", "generation_tensor"),
    [
        (ParallelLayout(), ParallelLayout(), 1),
        (ParallelLayout(tensor=2), ParallelLayout(data=2), 2),
        (ParallelLayout(pipeline=2), ParallelLayout(pipeline=2), 1),
        (ParallelLayout(tensor=2, pipeline=2), ParallelLayout(data=4), 2),
    ],
    ids=str,
)
def test_a_step_on_noted_log_probs_is_the_step_on_recomputed_ones(
    actor: ParallelLayout, reward: ParallelLayout, generation_tensor: int
) -> None:
    """Experience, losses, statistics and weights, although sampling cuts and penalises."""
    for largest, moved in run_ranks(
        actor.world_size, _compare_steps, actor, reward, generation_tensor
    ):
        assert 0 < largest <= ROUND_OFF
        assert moved > 0.01


def _check_gap() -> None:
    """With one mini-batch the gap of the first update is that of the whole experience."""
    for dtype in (torch.float32, torch.bfloat16):
        trainer = _trainer(OldLogprobs.ROLLOUT, cuts=1, dtype=dtype)
        size = (len(LENGTHS), SAMPLING.max_new_tokens)
        trainer.shift = 5e-5 * torch.randn(size, generator=torch.Generator().manual_seed(0))
        experience = trainer.generate_experience(tiny.prompts(LENGTHS))
        actor = trainer.engine.actor.training
        function = ResponseLogprobs(
            response_len=experience.response_mask.shape[1],
            temperature=SAMPLING.temperature,
            group=actor.groups.tensor,
            vocab_start=actor.vocab_start,
        )
        gaps = (actor.score(experience, function) - experience.logprobs).abs()
        gaps = gaps[experience.response_mask].tolist()
        metrics = trainer.train_rlhf(experience).metrics
        found = [metrics[name] for name in GAPS]
        assert found == pytest.approx([max(gaps), sum(gaps) / len(gaps)], rel=1e-3, abs=1e-7)
        assert found[0] > 1e-4 and found[1] > 2e-5  # what was added


def test_the_gap_is_what_a_second_pass_would_have_found() -> None:
    run_ranks(1, _check_gap)


def _check_faults(dtype: torch.dtype) -> None:
    """The update on a rollout with one wrong token is refused before anything has moved."""
    trainer = _trainer(OldLogprobs.ROLLOUT, cuts=1, dtype=dtype)
    trainer.shift = torch.zeros(len(LENGTHS), SAMPLING.max_new_tokens)
    trainer.shift[2, 0] = -4.0
    models = (trainer.engine.actor.training.model, trainer.engine.critic.model)
    before = [tiny.own_weights(model) for model in models]
    experience = trainer.generate_experience(tiny.prompts(LENGTHS))
    with pytest.raises(AgreementError, match=r"disagree by 0\.\d+ nats.*at most [34]\.?\d*\)"):
        trainer.train_rlhf(experience)
    for model, weights in zip(models, before, strict=True):
        for name, (_, tensor) in tiny.own_weights(model).items():
            assert torch.equal(tensor, weights[name][1]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_token_ends_the_run_before_an_update(dtype: torch.dtype) -> None:
    run_ranks(1, _check_faults, dtype)


def _check_tolerance() -> None:
    batch = tiny.prompts(LENGTHS)
    strict = _trainer(OldLogprobs.ROLLOUT, tolerance=LogprobTolerance(fp32=1e-12))
    experience = strict.generate_experience(batch)
    with pytest.raises(AgreementError, match="allows 1e-12"):
        strict.train_rlhf(experience)
    # The same experience after an update of another one says nothing about decoding any more.
    late = _trainer(OldLogprobs.ROLLOUT, tolerance=LogprobTolerance(fp32=1e-5))
    first = late.generate_experience(batch)
    second = late.generate_experience(batch)
    assert set(GAPS) <= set(late.train_rlhf(first).metrics)
    assert not set(GAPS) & set(late.train_rlhf(second).metrics)


def test_the_tolerance_counts_for_updates_from_the_policy_that_sampled() -> None:
    run_ranks(1, _check_tolerance)
