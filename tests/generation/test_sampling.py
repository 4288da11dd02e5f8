"""The rules by which tokens are chosen, against exact distributions computed with numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from megachat.config import build_config
from megachat.errors import ConfigError
from megachat.generation.sampling import SampledTokens, Sampler, SamplingConfig

VOCAB = 12
LOGITS = torch.tensor([1.2, -0.4, 0.3, 2.1, -1.5, 0.0, 0.7, -0.2, 1.6, -2.2, 0.5, -0.9])
DRAWS = 50_000


def _sample(
    config: SamplingConfig,
    logits: Tensor,
    *,
    seeds: list[int] | None = None,
    position: int = 0,
    stop_ids: tuple[int, ...] = (),
    suppressed_ids: tuple[int, ...] = (),
) -> SampledTokens:
    """One token for each row of `logits`, whose random streams are 0, 1, ... or `seeds`."""
    keys = torch.arange(len(logits)) if seeds is None else torch.tensor(seeds)
    sampler = Sampler(config, stop_ids=stop_ids, suppressed_ids=suppressed_ids)
    positions = torch.full((len(logits),), position)
    return sampler.sample(logits, keys=keys, positions=positions)


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def _expected(config: SamplingConfig) -> NDArray[np.float64]:
    """The distribution that the configuration describes, token by token in plain numpy."""
    scaled = LOGITS.double().numpy() / config.temperature
    kept = set(range(VOCAB))
    if config.top_k:
        kept = set(np.argsort(-scaled)[: config.top_k].tolist())
    allowed = np.where([token in kept for token in range(VOCAB)], scaled, -np.inf)
    probabilities = _softmax(allowed)
    nucleus, mass = [], 0.0
    for token in np.argsort(-probabilities).tolist():
        if mass >= config.top_p or probabilities[token] == 0:
            break
        nucleus.append(token)
        mass += probabilities[token]
    inside = np.isin(np.arange(VOCAB), nucleus)
    return np.where(inside, probabilities, 0.0) / probabilities[inside].sum()


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.6),
        SamplingConfig(temperature=1.7),
        SamplingConfig(top_k=4),
        SamplingConfig(top_p=0.7),
        SamplingConfig(temperature=1.3, top_k=6, top_p=0.8),
    ],
    ids=["plain", "cold", "hot", "top_k", "top_p", "all"],
)
def test_draws_follow_the_exact_distribution(config: SamplingConfig) -> None:
    """Pearson's chi-square over 50,000 draws; tokens of probability zero never come."""
    tokens = _sample(config, LOGITS.expand(DRAWS, VOCAB)).tokens
    counts = np.bincount(tokens.numpy(), minlength=VOCAB)
    expected = DRAWS * _expected(config)
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # Mean `freedom`, variance twice that; the seed is fixed.
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


def test_log_probs_are_of_the_untruncated_distribution_at_the_temperature() -> None:
    config = SamplingConfig(temperature=0.7, top_k=3, top_p=0.9)
    sampled = _sample(config, LOGITS.expand(200, VOCAB), suppressed_ids=(8,))
    expected = np.log(_softmax(LOGITS.double().numpy() / 0.7))[sampled.tokens.numpy()]
    np.testing.assert_allclose(sampled.logprobs.numpy(), expected, atol=1e-6)


def test_temperature_zero_takes_the_most_likely_token_with_its_log_prob_at_one() -> None:
    logits = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(3))
    sampled = _sample(SamplingConfig(temperature=0.0), logits, seeds=list(range(50)))
    assert torch.equal(sampled.tokens, logits.argmax(dim=1))
    torch.testing.assert_close(sampled.logprobs, logits.log_softmax(dim=1).amax(dim=1))


def test_bf16_logits_are_sampled_in_fp32() -> None:
    sampled = _sample(SamplingConfig(), LOGITS.bfloat16().expand(20, VOCAB))
    assert sampled.logprobs.dtype is torch.float32
    expected = LOGITS.bfloat16().float().log_softmax(dim=0)[sampled.tokens]
    torch.testing.assert_close(sampled.logprobs, expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_tokens_are_never_chosen_however_likely(temperature: float) -> None:
    logits = LOGITS.clone()
    logits[[3, 8]] = 50.0
    config = SamplingConfig(temperature=temperature)
    tokens = _sample(config, logits.expand(2000, VOCAB), suppressed_ids=(3, 8)).tokens
    assert not set(tokens.tolist()) & {3, 8}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_token_comes_before_the_shortest_length(temperature: float) -> None:
    """With `min_new_tokens` 3 the third token is the first that may stop, and may it does."""
    logits = torch.zeros(500, VOCAB)
    logits[:, 2] = 30.0
    config = SamplingConfig(temperature=temperature, min_new_tokens=3, max_new_tokens=5)
    for position, stops in ((0, False), (1, False), (2, True), (3, True)):
        tokens = _sample(config, logits, position=position, stop_ids=(2,)).tokens
        assert bool((tokens == 2).all()) is stops
        assert bool((tokens == 2).any()) is stops


def test_a_row_depends_on_its_own_stream_alone() -> None:
    """Chosen together, in another order or alone, a row gets the same token."""
    logits = torch.randn(9, VOCAB, generator=torch.Generator().manual_seed(5))
    config = SamplingConfig(top_p=0.95)
    together = _sample(config, logits, seeds=list(range(9)))
    order = [4, 0, 8, 2]
    reordered = _sample(config, logits[order], seeds=order)
    assert torch.equal(reordered.tokens, together.tokens[order])
    torch.testing.assert_close(reordered.logprobs, together.logprobs[order])
    assert _sample(config, logits[6:7], seeds=[6]).tokens == together.tokens[6]
    assert not torch.equal(_sample(config, logits, seeds=[20] * 9).tokens, together.tokens)


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.floats(-6, 6, width=16), min_size=3, max_size=9, unique=True),
    top_p=st.floats(0.05, 1.0),
    top_k=st.integers(0, 9),
)
def test_the_nucleus_is_the_smallest_set_whose_mass_reaches_p(
    logits: list[float], top_p: float, top_k: int
) -> None:
    """At a high temperature every kept token comes in 400 draws; what is cut never does."""
    vocab = len(logits)
    config = SamplingConfig(temperature=40.0, top_k=top_k, top_p=top_p)
    tokens = _sample(config, torch.tensor(logits).expand(400, vocab)).tokens
    scaled = np.asarray(logits) / 40.0
    order = np.argsort(-scaled)[: top_k or vocab]
    masses = np.cumsum(_softmax(scaled[order]))
    first = int((masses < top_p - 1e-5).sum())  # kept tokens before the one that reaches p
    last = int((masses < top_p + 1e-5).sum())  # the same where rounding may tip the balance
    kept = set(tokens.tolist())
    assert set(order[: first + 1].tolist()) <= kept
    assert kept <= set(order[: last + 1].tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 exceeds max_new_tokens 8"),
        ({"max_new_tokens": 0}, "max_new_tokens: input should be greater than or equal to 1"),
        ({"temperature": -0.1}, "temperature: input should be greater than or equal to 0"),
        ({"top_p": 0.0}, "top_p: input should be greater than 0"),
        ({"top_p": 1.1}, "top_p: input should be less than or equal to 1"),
        ({"top_k": -1}, "top_k: input should be greater than or equal to 0"),
        ({"temperatur": 1.0}, "temperatur: unknown key (did you mean 'temperature'?)"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    values: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(SamplingConfig, values, source="run.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
