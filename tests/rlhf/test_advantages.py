import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.rlhf.advantages import explained_variance, generalized_advantages, whiten
from megachat.rlhf.config import Whitening

LENGTHS = st.lists(st.integers(0, 7), min_size=1, max_size=5)


def _case(lengths: list[int], seed: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Rewards and values with garbage beyond each response, and the mask."""
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, len(lengths), 7)).astype(np.float32)
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    rewards[~mask.numpy()], values[~mask.numpy()] = 1e6, np.nan
    return rewards, values, mask


def _loop_gae(rewards, values, lengths, gamma: float, lam: float) -> np.ndarray:
    """A_t = sum_k (gamma lam)^k delta_{t+k}, term by term."""
    advantages = np.zeros_like(rewards)
    for row, length in enumerate(lengths):
        for start in range(length):
            for step in range(start, length):
                following = values[row, step + 1] if step + 1 < length else 0.0
                delta = rewards[row, step] + gamma * following - values[row, step]
                advantages[row, start] += (gamma * lam) ** (step - start) * delta
    return advantages


@given(
    lengths=LENGTHS,
    seed=st.integers(0, 1000),
    gamma=st.sampled_from([1.0, 0.99, 0.5]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
@settings(deadline=None, max_examples=60)
def test_estimates_agree_with_the_sum_of_discounted_deltas(
    lengths: list[int], seed: int, gamma: float, lam: float
) -> None:
    rewards, values, mask = _case(lengths, seed)
    found = generalized_advantages(
        rewards=torch.tensor(rewards),
        values=torch.tensor(values),
        response_mask=mask,
        gamma=gamma,
        lam=lam,
    )
    expected = _loop_gae(rewards, values, lengths, gamma, lam)
    np.testing.assert_allclose(found.advantages.numpy(), expected, rtol=1e-4, atol=1e-5)
    returns = np.where(mask, expected + np.nan_to_num(values), 0.0)
    np.testing.assert_allclose(found.returns.numpy(), returns, rtol=1e-4, atol=1e-5)


@given(lengths=LENGTHS, seed=st.integers(0, 1000), gamma=st.sampled_from([1.0, 0.9]))
@settings(deadline=None, max_examples=40)
def test_with_lambda_one_the_return_is_the_discounted_sum_of_rewards(
    lengths: list[int], seed: int, gamma: float
) -> None:
    rewards, values, mask = _case(lengths, seed)
    found = generalized_advantages(
        rewards=torch.tensor(rewards),
        values=torch.tensor(values),
        response_mask=mask,
        gamma=gamma,
        lam=1.0,
    )
    for row, length in enumerate(lengths):
        for start in range(length):
            discounts = gamma ** np.arange(length - start)
            discounted = (discounts * rewards[row, start:length]).sum()
            assert found.returns[row, start].item() == pytest.approx(discounted, abs=1e-4)


def test_a_single_token_and_no_token_are_well_defined() -> None:
    found = generalized_advantages(
        rewards=torch.tensor([[2.0], [5.0]]),
        values=torch.tensor([[0.5], [7.0]]),
        response_mask=torch.tensor([[True], [False]]),
        gamma=1.0,
        lam=0.95,
    )
    assert found.advantages.tolist() == [[1.5], [0.0]]
    assert found.returns.tolist() == [[2.0], [0.0]]
    nothing = torch.zeros(2, 0)
    empty = generalized_advantages(
        rewards=nothing, values=nothing, response_mask=nothing.bool(), gamma=1.0, lam=0.95
    )
    assert empty.advantages.shape == (2, 0)


@given(lengths=LENGTHS.filter(lambda lengths: sum(lengths) >= 2), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_whitened_entries_have_mean_zero_and_variance_one(lengths: list[int], seed: int) -> None:
    rewards, _, mask = _case(lengths, seed)
    values = torch.tensor(rewards) * 5 + 3
    kept = values[mask].double()
    full = whiten(values, mask=mask, whitening=Whitening.FULL)
    scaled = whiten(values, mask=mask, whitening=Whitening.SCALE)
    assert full[mask].mean().item() == pytest.approx(0.0, abs=1e-4)
    if kept.var(correction=0) > 1e-2:
        assert full[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-3)
        assert scaled[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-3)
        ratio = (scaled[mask] / values[mask]).double()
        std = kept.std(correction=0)
        # The deviations round as the values do, which may be far larger.
        rounding = 4 * torch.finfo(torch.float32).eps * float(kept.abs().max() / std)
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / std), rtol=rounding, atol=0)
    assert not full[~mask].any() and not scaled[~mask].any()


def test_whitening_can_be_left_out_and_survives_too_few_entries() -> None:
    values = torch.tensor([[3.0, 4.0, torch.nan]])
    mask = torch.tensor([[True, True, False]])
    assert whiten(values, mask=mask, whitening=Whitening.NONE).tolist() == [[3.0, 4.0, 0.0]]
    for chosen in ([[True, False, False]], [[False, False, False]]):
        for whitening in (Whitening.FULL, Whitening.SCALE):
            found = whiten(values, mask=torch.tensor(chosen), whitening=whitening)
            assert found.isfinite().all()
    single = whiten(values, mask=torch.tensor([[True, False, False]]), whitening=Whitening.FULL)
    assert single.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-6])
def test_whitening_divides_the_mean_or_takes_it_away_and_leaves_near_equals_near(
    spread: float,
) -> None:
    values = 0.5 + spread * np.random.default_rng(0).normal(size=(40, 7))
    mask = torch.ones(40, 7, dtype=torch.bool)
    variance, mean = values.var(), values.mean()
    kinds = {Whitening.SCALE: mean / np.sqrt(variance + 1e-8), Whitening.FULL: 0.0}
    for whitening, expected in kinds.items():
        found = whiten(torch.tensor(values), mask=mask, whitening=whitening).numpy()
        assert found.var() == pytest.approx(variance / (variance + 1e-8), rel=1e-6)
        assert found.mean() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_explained_variance_of_perfect_constant_and_opposite_values() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, torch.nan]])
    mask = torch.tensor([[True, True, True, False]])

    def explained(values: torch.Tensor) -> float:
        return explained_variance(values, returns=returns, mask=mask).item()

    assert explained(returns + 10) == pytest.approx(1.0)
    assert explained(torch.full_like(returns, 7.0)) == pytest.approx(0.0, abs=1e-6)
    assert explained(-returns) == pytest.approx(-3.0)
    constant = torch.ones(1, 4)
    assert explained_variance(returns, returns=constant, mask=mask).item() == 0.0
    assert explained_variance(returns, returns=returns, mask=~mask & mask).item() == 0.0
