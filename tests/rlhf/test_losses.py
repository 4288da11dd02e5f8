import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megachat.rlhf.losses import (
    BRADLEY_TERRY_METRICS,
    POLICY_MAXIMA,
    POLICY_METRICS,
    TOKEN_METRICS,
    VALUE_METRICS,
    bradley_terry_loss,
    policy_loss,
    token_loss,
    tokenwise_pair_loss,
    value_loss,
)

ROWS, COLUMNS = 3, 5


def _weights(mask: Tensor) -> Tensor:
    return mask.float() / max(1, int(mask.sum()))


def _case(seed: int, count: int) -> tuple[Tensor, ...]:
    """Random `[ROWS, COLUMNS]` tensors and a random mask with at least one token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(ROWS, COLUMNS, generator=generator) < 0.6
    mask[0, 0] = True
    return *torch.randn(count, ROWS, COLUMNS, generator=generator), mask


def _policy(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, **changes):
    arguments = {"clip_range": 0.2, "dual_clip": math.inf, "entropy_coef": 0.0, **changes}
    entropy = arguments.pop("entropy", torch.zeros_like(logprobs))
    return policy_loss(
        logprobs,
        old_logprobs=old,
        advantages=advantages,
        entropy=entropy,
        weights=_weights(mask),
        **arguments,
    )


def _loop_policy(logprobs, old, advantages, mask, dual_clip: float) -> dict[str, float]:
    """The surrogate and its statistics, token by token."""
    names = ("loss", "clip_fraction", "approx_kl", "ratio_mean", "log_ratio_mean")
    sums = dict.fromkeys(names, 0.0)
    largest = furthest = 0.0
    for row, column in zip(*np.nonzero(mask.numpy()), strict=True):
        ratio = math.exp(float(logprobs[row, column] - old[row, column]))
        gain = float(advantages[row, column])
        plain, clipped = -gain * ratio, -gain * min(max(ratio, 0.8), 1.2)
        loss = max(plain, clipped)
        if gain < 0:
            loss = min(loss, -gain * dual_clip)
        sums["loss"] += loss
        sums["clip_fraction"] += clipped > plain
        sums["approx_kl"] += ratio - 1 - math.log(ratio)
        sums["ratio_mean"] += ratio
        sums["log_ratio_mean"] += abs(math.log(ratio))
        largest, furthest = max(largest, ratio), max(furthest, abs(math.log(ratio)))
    means = {name: value / int(mask.sum()) for name, value in sums.items()}
    return means | {"ratio_max": largest, "log_ratio_max": furthest}


@given(seed=st.integers(0, 10_000), dual_clip=st.sampled_from([math.inf, 1.5, 3.0]))
@settings(deadline=None, max_examples=50)
def test_the_policy_loss_agrees_with_a_loop_over_tokens(seed: int, dual_clip: float) -> None:
    logprobs, old, advantages, mask = _case(seed, 3)
    logprobs = old + 0.4 * logprobs
    terms = _policy(logprobs, old, advantages, mask, dual_clip=dual_clip)
    expected = _loop_policy(logprobs, old, advantages, mask, dual_clip)
    assert terms.loss.item() == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5)
    for name in ("clip_fraction", "approx_kl", "ratio_mean", "log_ratio_mean"):
        assert terms.metrics[name].item() == pytest.approx(expected[name], rel=1e-3, abs=1e-5)
    for name in ("ratio_max", "log_ratio_max"):
        assert terms.maxima[name].item() == pytest.approx(expected[name], rel=1e-4)


def test_at_the_old_policy_the_gradient_is_minus_the_weighted_advantage() -> None:
    old, advantages, mask = _case(1, 2)
    logprobs = old.clone().requires_grad_()
    terms = _policy(logprobs, old, advantages, mask)
    terms.loss.backward()
    torch.testing.assert_close(logprobs.grad, -advantages * _weights(mask))
    assert terms.metrics["ratio_mean"].item() == pytest.approx(1.0)
    assert terms.metrics["clip_fraction"].item() == terms.metrics["approx_kl"].item() == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [(1.3, 1.0, False), (0.7, 1.0, True), (1.3, -1.0, True), (0.7, -1.0, False)],
)
def test_the_clip_stops_the_gradient_only_where_the_policy_already_moved_far_enough(
    ratio: float, advantage: float, has_gradient: bool
) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1).bool()
    _policy(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask).loss.backward()
    assert bool(logprobs.grad.any()) is has_gradient


def test_the_approximate_kl_is_that_of_the_old_policy_from_the_new_one() -> None:
    """In expectation over tokens of the old policy, by enumeration; not KL(new || old)."""
    logits = 2 * torch.randn(2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    old, new = logits.log_softmax(dim=1)
    terms = policy_loss(
        new[None],
        old_logprobs=old[None],
        advantages=torch.ones(1, 9),
        entropy=torch.zeros(1, 9),
        weights=old.exp()[None],
        clip_range=0.2,
        dual_clip=math.inf,
        entropy_coef=0.0,
    )
    expected = (old.exp() * (old - new)).sum().item()
    assert terms.metrics["approx_kl"].item() == pytest.approx(expected, rel=1e-5)
    assert abs((new.exp() * (new - old)).sum().item() - expected) > 0.1


def test_the_dual_clip_bounds_the_loss_of_a_bad_token_that_became_likely() -> None:
    logprobs = torch.tensor([[math.log(50.0)]], requires_grad=True)
    mask, bad = torch.ones(1, 1).bool(), torch.tensor([[-2.0]])
    terms = _policy(logprobs, torch.zeros(1, 1), bad, mask, dual_clip=3.0)
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(6.0) and logprobs.grad.item() == 0.0


def test_the_entropy_bonus_lowers_the_loss_and_carries_gradient_only_when_asked_for() -> None:
    old, advantages, mask = _case(2, 2)
    entropy = torch.rand(ROWS, COLUMNS).requires_grad_()
    plain = _policy(old.clone(), old, advantages, mask, entropy=entropy)
    bonus = _policy(old.clone(), old, advantages, mask, entropy=entropy, entropy_coef=0.1)
    mean = entropy.detach()[mask].mean()
    assert not plain.loss.requires_grad
    torch.testing.assert_close(bonus.loss.detach(), plain.loss - 0.1 * mean)
    torch.testing.assert_close(bonus.metrics["entropy"], mean)
    bonus.loss.backward()
    torch.testing.assert_close(entropy.grad, -0.1 * _weights(mask))


def test_extreme_log_ratios_give_finite_losses_and_gradients() -> None:
    logprobs = torch.tensor([[-1e4, 1e4, 90.0, -1e4]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    terms = _policy(logprobs, torch.zeros(1, 4), advantages, torch.ones(1, 4).bool())
    terms.loss.backward()
    assert terms.loss.isfinite() and logprobs.grad.isfinite().all()
    assert all(metric.isfinite() for metric in terms.metrics.values())


@given(seed=st.integers(0, 10_000), clip_range=st.sampled_from([0.2, 1.0, math.inf]))
@settings(deadline=None, max_examples=50)
def test_the_value_loss_agrees_with_a_loop_over_tokens(seed: int, clip_range: float) -> None:
    values, old, returns, mask = _case(seed, 3)
    terms = value_loss(
        values, old_values=old, returns=returns, weights=_weights(mask), clip_range=clip_range
    )
    loss = error = clipped_count = 0.0
    for row, column in zip(*np.nonzero(mask.numpy()), strict=True):
        value, before, target = (float(each[row, column]) for each in (values, old, returns))
        near = before + min(max(value - before, -clip_range), clip_range)
        plain, clipped = (value - target) ** 2, (near - target) ** 2
        loss, error = loss + 0.5 * max(plain, clipped), error + plain
        clipped_count += clipped > plain + 1e-9
    count = int(mask.sum())
    assert terms.loss.item() == pytest.approx(loss / count, rel=1e-4)
    assert terms.metrics["value_error"].item() == pytest.approx(error / count, rel=1e-4)
    fraction = terms.metrics["value_clip_fraction"].item()
    assert fraction == pytest.approx(clipped_count / count, abs=1e-6)
    assert terms.metrics["value_mean"].item() == pytest.approx(values[mask].mean().item(), abs=1e-5)


def test_the_token_loss_is_the_mean_negative_logprob_of_the_targets() -> None:
    logprobs, mask = _case(3, 1)
    logprobs = -logprobs.abs()
    terms = token_loss(logprobs, is_greedy=logprobs > -0.5, weights=_weights(mask))
    assert terms.loss.item() == pytest.approx(-logprobs[mask].mean().item(), rel=1e-5)
    share = (logprobs > -0.5)[mask].float().mean().item()
    assert terms.metrics["token_accuracy"].item() == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("center_coef", [0.0, 0.01])
def test_the_pair_loss_agrees_with_its_formula(center_coef: float) -> None:
    generator = torch.Generator().manual_seed(4)
    chosen, rejected = torch.randn(2, 9, generator=generator)
    weights = torch.full((9,), 1 / 9)
    terms = bradley_terry_loss(
        chosen=chosen, rejected=rejected, weights=weights, center_coef=center_coef
    )
    margins = (chosen - rejected).double().numpy()
    squares = 0.5 * (chosen.square() + rejected.square()).double().numpy()
    expected = np.log1p(np.exp(-margins)).mean() + center_coef * squares.mean()
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)
    assert terms.metrics["accuracy"].item() == pytest.approx((margins > 0).mean())
    assert terms.metrics["margin"].item() == pytest.approx(margins.mean(), rel=1e-4)
    assert terms.metrics["score_square"].item() == pytest.approx(squares.mean(), rel=1e-4)


@pytest.mark.parametrize("margin", [1e4, -1e4, 1e30, -1e30])
def test_extreme_margins_give_finite_losses_and_gradients(margin: float) -> None:
    chosen = torch.tensor([margin], requires_grad=True)
    terms = bradley_terry_loss(chosen=chosen, rejected=torch.zeros(1), weights=torch.ones(1))
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(max(0.0, -margin))
    assert chosen.grad.item() == (0.0 if margin > 0 else -1.0)


def test_a_tie_counts_as_half_right() -> None:
    scores = torch.tensor([1.0, 1.0])
    terms = bradley_terry_loss(chosen=scores, rejected=scores, weights=torch.full((2,), 0.5))
    assert terms.metrics["accuracy"].item() == 0.5
    assert terms.loss.item() == pytest.approx(math.log(2))


def _pair(chosen: list[int], rejected: list[int], width: int) -> tuple[Tensor, Tensor]:
    rows = [row + [1] * (width - len(row)) for row in (chosen, rejected)]
    return torch.tensor([rows]), torch.tensor([[len(chosen), len(rejected)]])


def _loop_tokenwise(values, chosen: list[int], rejected: list[int]) -> float:
    """The definition in words: from the first difference to the longer end, final scores held."""
    end, divergence = max(len(chosen), len(rejected)), None
    for position in range(end):
        here = [row[position] if position < len(row) else None for row in (chosen, rejected)]
        if divergence is None and here[0] != here[1]:
            divergence = position
    divergence = end - 1 if divergence is None else divergence
    losses = []
    for position in range(divergence, end):
        margin = values[0][min(position, len(chosen) - 1)]
        margin -= values[1][min(position, len(rejected) - 1)]
        losses.append(math.log1p(math.exp(-margin)))
    return sum(losses) / len(losses)


ANSWERS = st.lists(st.sampled_from([1, 3, 4]), min_size=0, max_size=5)  # 1 is also the pad


@given(
    first=ANSWERS,
    second=ANSWERS,
    ends=st.booleans(),
    seed=st.integers(0, 100),
    width=st.integers(8, 10),
)
@settings(deadline=None, max_examples=80)
def test_the_tokenwise_loss_agrees_with_its_definition(
    first: list[int], second: list[int], ends: bool, seed: int, width: int
) -> None:
    stop = [2] if ends else []
    chosen, rejected = [2, 5, *first, *stop], [2, 5, *second, *stop]
    tokens, lengths = _pair(chosen, rejected, 9)
    values = torch.randn(1, 2, width, generator=torch.Generator().manual_seed(seed))
    terms = tokenwise_pair_loss(values, tokens=tokens, lengths=lengths, weights=torch.ones(1))
    expected = _loop_tokenwise(values[0].tolist(), chosen, rejected)
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)
    finals = values[0, 0, len(chosen) - 1], values[0, 1, len(rejected) - 1]
    assert terms.metrics["chosen_score"].item() == pytest.approx(finals[0].item())
    assert terms.metrics["rejected_score"].item() == pytest.approx(finals[1].item())


def test_the_tokenwise_loss_does_not_see_padding_or_a_cut_of_it() -> None:
    tokens, lengths = _pair([2, 5, 6, 2], [2, 5, 7, 8, 9, 2], 12)
    values = torch.randn(1, 2, 12)
    poisoned = values.clone()
    poisoned[0, 0, 4:], poisoned[0, 1, 6:] = torch.nan, torch.nan

    def loss(seen: Tensor) -> Tensor:
        return tokenwise_pair_loss(seen, tokens=tokens, lengths=lengths, weights=torch.ones(1)).loss

    # Sums of a wider row may be taken in another order, so equal up to rounding.
    torch.testing.assert_close(loss(poisoned), loss(values), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss(values[..., :6]), loss(values), rtol=1e-6, atol=0)


def test_identical_rows_give_equal_and_opposite_gradients() -> None:
    tokens, lengths = _pair([2, 5, 6, 2], [2, 5, 6, 2], 5)
    values = torch.zeros(1, 2, 5, requires_grad=True)
    tokenwise_pair_loss(
        values, tokens=tokens, lengths=lengths, weights=torch.ones(1)
    ).loss.backward()
    assert torch.equal(values.grad[0, 0], -values.grad[0, 1])
    assert values.grad[0, 0].nonzero().flatten().tolist() == [3]


def _all_losses(poison: float) -> list[tuple[Tensor, Tensor]]:
    """Each loss with its differentiable input, poisoned wherever the weight is zero."""
    mask = torch.tensor([[True, False, True], [False, False, False]])
    weights = _weights(mask)

    def tensor() -> Tensor:
        return torch.full((2, 3), 0.3).masked_fill(~mask, poison)

    logprobs, values, targets = (tensor().requires_grad_() for _ in range(3))
    policy = policy_loss(
        logprobs,
        old_logprobs=tensor(),
        advantages=tensor(),
        entropy=logprobs * 2,
        weights=weights,
        clip_range=0.2,
        dual_clip=3.0,
        entropy_coef=0.1,
    )
    value = value_loss(
        values, old_values=tensor(), returns=tensor(), weights=weights, clip_range=0.2
    )
    sft = token_loss(targets, is_greedy=mask, weights=weights)
    chosen = torch.tensor([0.5, poison], requires_grad=True)
    pairs = bradley_terry_loss(
        chosen=chosen, rejected=chosen * 2, weights=torch.tensor([1.0, 0.0]), center_coef=0.1
    )
    found = [(policy, logprobs), (value, values), (sft, targets), (pairs, chosen)]
    for terms, leaf in found:
        terms.loss.backward()
        masked = leaf.grad[1] if leaf.ndim == 1 else leaf.grad[~mask]
        assert not masked.any()
    return [(terms.loss.detach(), leaf.grad) for terms, leaf in found]


def test_entries_of_weight_zero_have_no_influence_and_no_gradient() -> None:
    for one, other in zip(_all_losses(1e9), _all_losses(-3.0), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_a_batch_without_any_weight_gives_zero() -> None:
    zeros, nothing = torch.zeros(2, 3), torch.zeros(2, 3).bool()
    leaf = torch.randn(2, 3, requires_grad=True)
    for terms in (
        _policy(leaf, zeros, zeros, nothing),
        value_loss(leaf, old_values=zeros, returns=zeros, weights=zeros, clip_range=0.2),
        token_loss(leaf, is_greedy=nothing, weights=zeros),
        bradley_terry_loss(chosen=leaf[0], rejected=leaf[1], weights=zeros[0]),
    ):
        assert terms.loss.item() == 0.0
        assert all(metric.item() == 0.0 for metric in terms.metrics.values())


def test_the_declared_names_are_those_of_the_terms() -> None:
    zeros, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    weights = _weights(mask)
    policy = _policy(zeros, zeros, zeros, mask)
    assert tuple(policy.metrics) == POLICY_METRICS and tuple(policy.maxima) == POLICY_MAXIMA
    value = value_loss(zeros, old_values=zeros, returns=zeros, weights=weights, clip_range=0.2)
    assert tuple(value.metrics) == VALUE_METRICS
    assert tuple(token_loss(zeros, is_greedy=mask, weights=weights).metrics) == TOKEN_METRICS
    pair = bradley_terry_loss(chosen=zeros[0], rejected=zeros[0], weights=weights[0])
    assert tuple(pair.metrics) == BRADLEY_TERRY_METRICS
    assert not any(metric.requires_grad for metric in policy.metrics.values())
