import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.errors import CheckpointError, ConfigError, DataError
from megachat.rlhf.config import MissingEos, RewardConfig, RewardNormalization
from megachat.rlhf.rewards import RewardNormalizer, outcome_scores, shape_rewards


def _mask(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def _loop_rewards(scores, kl, lengths, finished, coefficient, config) -> np.ndarray:
    """The same in plain loops over rows and tokens."""
    rewards = np.zeros_like(kl)
    for row, length in enumerate(lengths):
        score = min(max(scores[row], -config.clip), config.clip)
        if not finished[row] and config.missing_eos is MissingEos.PENALIZE:
            score += config.missing_eos_value
        if not finished[row] and config.missing_eos is MissingEos.REPLACE:
            score = config.missing_eos_value
        for token in range(length):
            rewards[row, token] = -coefficient * kl[row, token]
            if token == length - 1:
                rewards[row, token] += score
    return rewards


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    rule=st.sampled_from(list(MissingEos)),
    clip=st.sampled_from([0.5, 5.0, float("inf")]),
)
@settings(deadline=None, max_examples=60)
def test_rewards_agree_with_plain_loops(
    lengths: list[int], seed: int, rule: MissingEos, clip: float
) -> None:
    random = np.random.default_rng(seed)
    scores = random.normal(size=len(lengths)).astype(np.float32) * 4
    kl = random.normal(size=(len(lengths), 6)).astype(np.float32)
    finished = random.random(len(lengths)) < 0.5
    config = RewardConfig(clip=clip, missing_eos=rule, missing_eos_value=-1.5)
    found = shape_rewards(
        scores=torch.tensor(scores),
        kl=torch.tensor(kl),
        response_mask=_mask(lengths, 6),
        finished=torch.tensor(finished),
        kl_coefficient=0.3,
        config=config,
    )
    expected = _loop_rewards(scores, kl, lengths, finished, 0.3, config)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_score_stands_on_the_eos_token_and_nothing_beyond() -> None:
    found = shape_rewards(
        scores=torch.tensor([2.0, 9.0]),
        kl=torch.full((2, 4), 0.5),
        response_mask=_mask([3, 4], 4),
        finished=torch.tensor([True, False]),
        kl_coefficient=0.1,
        config=RewardConfig(),
    )
    expected = [[-0.05, -0.05, 1.95, 0.0], [-0.05, -0.05, -0.05, 5.0 - 1.0 - 0.05]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_an_empty_response_earns_nothing_whatever_its_row_holds() -> None:
    found = shape_rewards(
        scores=torch.tensor([3.0, 3.0]),
        kl=torch.full((2, 2), torch.nan),
        response_mask=_mask([0, 0], 2),
        finished=torch.tensor([False, True]),
        kl_coefficient=0.1,
        config=RewardConfig(),
    )
    assert torch.equal(found, torch.zeros(2, 2))


def test_a_penalty_bites_below_the_clip_and_a_fixed_score_ignores_it() -> None:
    scores, finished = torch.tensor([-99.0, 2.0, 2.0]), torch.tensor([False, False, True])

    def outcome(rule: MissingEos) -> list[float]:
        config = RewardConfig(missing_eos=rule, missing_eos_value=-1.0)
        return outcome_scores(scores, finished=finished, config=config).tolist()

    assert outcome(MissingEos.KEEP) == [-5.0, 2.0, 2.0]
    assert outcome(MissingEos.PENALIZE) == [-6.0, 1.0, 2.0]
    assert outcome(MissingEos.REPLACE) == [-1.0, -1.0, 2.0]


@given(
    parts=st.lists(
        st.lists(st.floats(-1e3, 1e3, width=32), min_size=0, max_size=7), min_size=1, max_size=5
    )
)
@settings(deadline=None)
def test_statistics_are_those_of_all_samples_however_they_arrive(parts: list[list[float]]) -> None:
    normalizer = RewardNormalizer(RewardNormalization.REFERENCE)
    for part in parts:
        normalizer.calibrate(torch.tensor(part))
    samples = np.array([value for part in parts for value in part])
    if len(samples):
        assert normalizer.mean == pytest.approx(samples.mean(), abs=1e-6)
    if len(samples) > 1 and samples.std(ddof=1) > 1e-2:
        assert normalizer.std == pytest.approx(samples.std(ddof=1), rel=1e-6)


def test_reference_statistics_are_measured_once_and_kept() -> None:
    normalizer = RewardNormalizer(RewardNormalization.REFERENCE)
    assert normalizer.needs_calibration
    normalizer.calibrate(torch.tensor([1.0, 3.0, 5.0]))
    assert not normalizer.needs_calibration
    assert (normalizer.mean, normalizer.std) == (3.0, 2.0)
    assert normalizer.standardize(torch.tensor([7.0, 100.0])).tolist() == [2.0, 48.5]
    assert (normalizer.mean, normalizer.std) == (3.0, 2.0)


def test_running_statistics_absorb_each_batch_before_it_is_normalised() -> None:
    normalizer = RewardNormalizer(RewardNormalization.RUNNING)
    assert not normalizer.needs_calibration
    first, second = torch.randn(16) * 3 + 7, torch.randn(8)
    found = normalizer.standardize(first)
    assert found.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert found.std().item() == pytest.approx(1.0, abs=1e-5)
    together = torch.cat([first, second])
    expected = (second - together.mean()) / together.std()
    torch.testing.assert_close(normalizer.standardize(second), expected)


def test_without_normalisation_scores_pass_through() -> None:
    normalizer = RewardNormalizer(RewardNormalization.NONE)
    assert normalizer.standardize(torch.tensor([1.0, -200.0])).tolist() == [1.0, -200.0]
    assert not normalizer.needs_calibration


@pytest.mark.parametrize("samples", [[4.0], [4.0, 4.0, 4.0], [1e4] * 9])
def test_constant_scores_are_shifted_but_not_blown_up(samples: list[float]) -> None:
    normalizer = RewardNormalizer(RewardNormalization.REFERENCE)
    normalizer.calibrate(torch.tensor(samples))
    assert normalizer.std == 1.0
    assert normalizer.standardize(torch.tensor([samples[0] + 2])).item() == pytest.approx(2.0)


def test_a_score_that_is_no_number_is_refused_in_every_mode() -> None:
    for mode in RewardNormalization:
        normalizer = RewardNormalizer(mode)
        if normalizer.needs_calibration:
            normalizer.calibrate(torch.tensor([0.0, 1.0]))
        with pytest.raises(DataError, match="1 of 2 scores of the reward model are not finite"):
            normalizer.standardize(torch.tensor([0.5, math.nan]))


def test_missing_calibration_and_scores_that_are_not_finite_are_refused() -> None:
    reference = RewardNormalizer(RewardNormalization.REFERENCE)
    with pytest.raises(ConfigError, match="has measured 0 samples"):
        reference.standardize(torch.zeros(2))
    with pytest.raises(DataError, match="1 of 3 scores of the reward model are not finite"):
        reference.calibrate(torch.tensor([0.0, torch.nan, 1.0]))
    with pytest.raises(ConfigError, match="'running' measures no reference samples"):
        RewardNormalizer(RewardNormalization.RUNNING).calibrate(torch.zeros(2))


def test_a_resumed_normalizer_continues_where_it_was() -> None:
    first = RewardNormalizer(RewardNormalization.RUNNING)
    first.standardize(torch.tensor([1.0, 2.0, 6.0]))
    resumed = RewardNormalizer(RewardNormalization.RUNNING)
    resumed.load_state_dict(first.state_dict())
    scores = torch.tensor([3.0, -1.0])
    assert torch.equal(resumed.standardize(scores), first.standardize(scores))
    with pytest.raises(CheckpointError, match="saved with normalization 'running'"):
        RewardNormalizer(RewardNormalization.REFERENCE).load_state_dict(first.state_dict())
