import decimal
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.errors import CheckpointError, ConfigError, DataError
from megachat.rlhf.config import KlConfig, KlControl, KlEstimator
from megachat.rlhf.kl import (
    AdaptiveKlController,
    FixedKlController,
    create_kl_controller,
    estimate_kl,
    k3,
)


def _categorical_pair(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, size, generator=generator, dtype=torch.float64)
    policy, reference = logits.log_softmax(dim=1)
    return policy, reference


def _expected(estimator: KlEstimator, policy: torch.Tensor, reference: torch.Tensor) -> float:
    """Expectation of the estimate over the policy by enumeration of all its tokens."""
    estimate = estimate_kl(policy, ref_logprobs=reference, estimator=estimator)
    return (policy.exp() * estimate).sum().item()


@given(seed=st.integers(0, 10_000), size=st.integers(2, 8))
@settings(deadline=None, max_examples=50)
def test_k1_and_k3_are_unbiased_over_a_categorical_distribution(seed: int, size: int) -> None:
    policy, reference = _categorical_pair(seed, size)
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert _expected(KlEstimator.K1, policy, reference) == pytest.approx(exact, abs=1e-12)
    assert _expected(KlEstimator.K3, policy, reference) == pytest.approx(exact, abs=1e-10)


def test_k2_is_close_to_the_exact_kl_between_near_distributions() -> None:
    policy, reference = _categorical_pair(3, 6)
    near = (policy + 0.02 * reference).log_softmax(dim=0)
    exact = (policy.exp() * (policy - near)).sum().item()
    assert _expected(KlEstimator.K2, policy, near) == pytest.approx(exact, rel=0.05)


@given(d=st.floats(-60, 60, width=32))
@settings(deadline=None)
def test_estimates_follow_their_formulas_and_k2_and_k3_are_never_negative(d: float) -> None:
    def estimate(kind: KlEstimator) -> float:
        value = torch.tensor([d])
        return estimate_kl(value, ref_logprobs=torch.zeros(1), estimator=kind).item()

    assert estimate(KlEstimator.K1) == d
    assert estimate(KlEstimator.K2) == pytest.approx(d * d / 2, rel=1e-6) and d * d >= 0
    assert estimate(KlEstimator.K3) >= 0
    if d > -20:
        assert estimate(KlEstimator.K3) == pytest.approx(math.expm1(-d) + d, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_k3_is_exact_to_rounding_down_to_the_smallest_log_ratios(dtype: torch.dtype) -> None:
    """Against 60 decimal digits, over both sides of where its two forms meet."""
    sizes = [10**exponent for exponent in np.linspace(-8, 1, 300)] + [0.49999, 0.5, 0.50001, 1e-15]
    log_ratios = torch.tensor([*sizes, *(-size for size in sizes)], dtype=dtype)
    with decimal.localcontext(prec=60):
        exact = [(-Decimal(d)).exp() - 1 + Decimal(d) for d in log_ratios.tolist()]
        errors = [
            abs(Decimal(found) / value - 1)
            for found, value in zip(k3(log_ratios).tolist(), exact, strict=True)
        ]
    assert float(max(errors)) < 4 * torch.finfo(dtype).eps
    assert k3(torch.tensor([torch.nan])).isnan()


def test_k3_has_the_lower_variance_at_equal_expectation() -> None:
    policy, reference = _categorical_pair(1, 8)
    near = (policy + 0.1 * reference).log_softmax(dim=0)
    variances = []
    for kind in (KlEstimator.K1, KlEstimator.K3):
        estimate = estimate_kl(policy, ref_logprobs=near, estimator=kind)
        mean = (policy.exp() * estimate).sum()
        variances.append((policy.exp() * (estimate - mean).square()).sum().item())
    assert variances[1] < 0.2 * variances[0]


@pytest.mark.parametrize("kind", list(KlEstimator))
def test_extreme_log_ratios_stay_finite_and_equal_ones_give_zero(kind: KlEstimator) -> None:
    extreme = torch.tensor([-1e4, 1e4, 0.0])
    estimate = estimate_kl(extreme, ref_logprobs=torch.zeros(3), estimator=kind)
    assert estimate.isfinite().all() and estimate[2] == 0


def _adaptive(**changes: float) -> AdaptiveKlController:
    settings_ = {"coefficient": 0.2, "target": 0.1, "horizon": 1000, "error_clip": 0.2, **changes}
    return AdaptiveKlController(KlConfig.model_validate(settings_))


def test_the_fixed_controller_never_moves() -> None:
    controller = create_kl_controller(KlConfig(control=KlControl.FIXED, coefficient=0.3))
    assert isinstance(controller, FixedKlController)
    controller.update(50.0, num_samples=10**9)
    assert controller.coefficient == 0.3 and controller.state_dict() == {}


@pytest.mark.parametrize(
    ("observed", "factor"),
    [(0.1, 1.0), (0.11, 1 + 0.1 * 0.1), (5.0, 1 + 0.2 * 0.1), (0.0, 1 - 0.2 * 0.1), (-1.0, 0.98)],
)
def test_the_adaptive_controller_takes_a_clipped_proportional_step(
    observed: float, factor: float
) -> None:
    controller = _adaptive()
    controller.update(observed, num_samples=100)
    assert controller.coefficient == pytest.approx(0.2 * factor)


def test_a_tenth_an_iteration_from_the_fifth_on_is_a_parametrisation() -> None:
    """beta *= 1 + 0.1 clip(kl / target - 1, +-1) with batches of 96, first four left out."""
    controller = _adaptive(target=0.17, coefficient=0.4, horizon=960, error_clip=1.0,
                           warmup_updates=4)  # fmt: skip
    beta = 0.4
    for iteration, observed in enumerate(np.linspace(0.0, 0.6, 20)):
        if iteration >= 4:
            beta *= 1 + 0.1 * max(-1, min(1, observed / 0.17 - 1))
        controller.update(float(observed), num_samples=96)
        assert controller.coefficient == pytest.approx(beta)


def test_the_adaptive_controller_settles_at_its_target() -> None:
    """A policy whose KL is inversely proportional to the coefficient."""
    controller = _adaptive(horizon=200)
    for _ in range(400):
        controller.update(0.05 / controller.coefficient, num_samples=100)
    assert 0.05 / controller.coefficient == pytest.approx(0.1, rel=1e-3)


@given(observed=st.floats(-100, 100), num_samples=st.integers(1, 4000))
@settings(deadline=None)
def test_the_coefficient_stays_positive(observed: float, num_samples: int) -> None:
    controller = _adaptive()
    for _ in range(5):
        controller.update(observed, num_samples=num_samples)
        assert controller.coefficient > 0


def test_steps_that_could_reach_zero_and_a_diverged_kl_are_refused() -> None:
    controller = _adaptive()
    with pytest.raises(ConfigError, match="ppo.kl.horizon: 1000 samples"):
        controller.update(0.1, num_samples=5000)
    for observed in (math.nan, math.inf):
        with pytest.raises(DataError, match="policy has diverged"):
            controller.update(observed, num_samples=10)
    assert controller.coefficient == 0.2


def test_a_resumed_controller_continues_where_it_was() -> None:
    first, straight = _adaptive(warmup_updates=3), _adaptive(warmup_updates=3)
    for observed in (0.3, 0.4):
        first.update(observed, num_samples=50)
        straight.update(observed, num_samples=50)
    resumed = _adaptive(warmup_updates=3)
    resumed.load_state_dict(first.state_dict())
    for observed in (0.5, 0.2, 0.7):
        resumed.update(observed, num_samples=50)
        straight.update(observed, num_samples=50)
    assert resumed.state_dict() == straight.state_dict()


def test_a_state_of_the_other_kind_is_refused() -> None:
    fixed, adaptive = FixedKlController(KlConfig(control=KlControl.FIXED)), _adaptive()
    with pytest.raises(CheckpointError, match="ppo.kl.control 'fixed'"):
        fixed.load_state_dict(adaptive.state_dict())
    with pytest.raises(CheckpointError, match="ppo.kl.control 'adaptive'"):
        adaptive.load_state_dict(fixed.state_dict())
    fixed.load_state_dict({})
