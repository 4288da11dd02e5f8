"""The rules by which tokens are chosen, against exact distributions computed with numpy."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from megachat.errors import ConfigError
from megachat.generation.config import SamplingConfig
from megachat.generation.sampling import SampledTokens, Sampler, VocabularySlice, request_keys
from megachat.ops.philox import GROUP_TOKENS
from megachat.ops.registry import Backend
from megachat.ops.sample import History
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.harness.pairwise import pairwise
from tests.kernels.emulated import emulated_cuda

VOCAB = 12
LOGITS = torch.tensor([1.2, -0.4, 0.3, 2.1, -1.5, 0.0, 0.7, -0.2, 1.6, -2.2, 0.5, -0.9])
DRAWS = 50_000
P_VALUES = (1e-3, 1 - 1e-3)
"""Of right samplers two in a thousand lie outside."""
WIDE = 700
"""A vocabulary of five whole groups of tokens and a part of a sixth."""
WIDE_CONFIGS = {
    "plain": SamplingConfig(),
    "greedy": SamplingConfig(temperature=0.0),
    "top_k": SamplingConfig(temperature=0.8, top_k=40),
    "large top_k": SamplingConfig(top_k=400),
    "top_p": SamplingConfig(top_p=0.8),
    "all": SamplingConfig(temperature=1.2, top_k=60, top_p=0.7, repetition_penalty=1.5),
    "early": SamplingConfig(min_new_tokens=3, repetition_penalty=0.5, top_p=0.5),
}


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
    """Tokens of probability zero never come, the others as often as they should."""
    counts, expected = _counts(config, LOGITS), DRAWS * _expected(config)
    assert not counts[expected == 0].any()
    _assert_same_distribution(counts, expected)


def test_draws_from_a_large_vocabulary_follow_the_exact_distribution() -> None:
    """Several hundred tokens; those that are expected less than ten times count as one."""
    logits = 2 * torch.randn(300, generator=torch.Generator().manual_seed(8))
    expected = DRAWS * _softmax(logits.double().numpy())
    counts, rare = _counts(SamplingConfig(), logits), expected < 10
    assert 20 < rare.sum() < 200
    _assert_same_distribution(
        np.append(counts[~rare], counts[rare].sum()),
        np.append(expected[~rare], expected[rare].sum()),
    )


def _counts(config: SamplingConfig, logits: Tensor) -> NDArray[np.int64]:
    """How often each token comes in `DRAWS` draws, in pieces that fit a cache."""
    rows = 500
    tokens = [
        _sample(config, logits.expand(rows, -1), seeds=list(range(first, first + rows))).tokens
        for first in range(0, DRAWS, rows)
    ]
    return np.bincount(torch.cat(tokens).numpy(), minlength=len(logits))


def _assert_same_distribution(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> None:
    """Pearson's chi-square: its p-value lies within `P_VALUES`; the draws are fixed by seeds."""
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # The share of chi-square variables above the statistic is the upper incomplete gamma function.
    halves = (torch.tensor(value / 2, dtype=torch.float64) for value in (freedom, statistic))
    p_value = torch.special.gammaincc(*halves).item()
    assert P_VALUES[0] < p_value < P_VALUES[1], p_value


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


def _wide_logits(rows: int, *, scale: float = 1.5) -> Tensor:
    """Logits that differ between rows, with exact ties."""
    generator = torch.Generator().manual_seed(8)
    return (torch.randn(rows, WIDE, generator=generator) * scale).bfloat16().float()


def _wide_samples(tensor: int, backend: Backend = Backend.REFERENCE) -> dict[str, SampledTokens]:
    """What every rule chooses on this rank of a vocabulary cut over `tensor` ranks."""
    group = ProcessGroups.create(ParallelLayout(tensor=tensor)).tensor
    width = -(-WIDE // (GROUP_TOKENS * tensor)) * GROUP_TOKENS
    start = group.rank() * width
    logits = torch.full((90, width), torch.finfo(torch.float32).min)
    size = max(0, min(WIDE - start, width))
    logits[:, :size] = _wide_logits(90)[:, start : start + size]
    history = History(
        tokens=torch.randint(0, WIDE, (90, 20), generator=torch.Generator().manual_seed(1)),
        lengths=torch.arange(90) % 20 + 1,
    )
    found = {}
    with emulated_cuda() if backend is Backend.CUDA else contextlib.nullcontext():
        for name, config in WIDE_CONFIGS.items():
            sampler = Sampler(
                config,
                stop_ids=(3, 300, 600),
                suppressed_ids=(1, 200, 699),
                vocabulary=VocabularySlice(start=start, size=size, group=group),
                backend=backend,
            )
            found[name] = sampler.sample(
                logits, keys=torch.arange(90), positions=torch.arange(90) % 5, history=history
            )
    return found


@pytest.fixture(scope="module")
def wide_samples() -> dict[str, SampledTokens]:
    """On one rank."""
    return run_ranks(1, _wide_samples, 1)[0]


@pytest.mark.parametrize(
    ("tensor", "backend"),
    [
        *((tensor, Backend.REFERENCE) for tensor in (2, 4)),
        *((tensor, Backend.CPU) for tensor in (1, 2)),
        *((tensor, Backend.CUDA) for tensor in (1, 2)),
    ],
)
def test_every_backend_and_a_vocabulary_cut_over_ranks_give_the_same_tokens(
    tensor: int, backend: Backend, wide_samples: dict[str, SampledTokens]
) -> None:
    """Also where a rank's slice is partly or, of four, wholly padding; CUDA on the emulator."""
    for found in run_ranks(tensor, _wide_samples, tensor, backend):
        for name, expected in wide_samples.items():
            assert torch.equal(found[name].tokens, expected.tokens), name
            torch.testing.assert_close(found[name].logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_wide_rows_keep_to_the_rules(wide_samples: dict[str, SampledTokens]) -> None:
    logits = _wide_logits(90)
    for name, sampled in wide_samples.items():
        temperature = WIDE_CONFIGS[name].temperature or 1.0
        expected = (logits / temperature).log_softmax(dim=1)
        expected = expected.gather(1, sampled.tokens[:, None])[:, 0]
        torch.testing.assert_close(sampled.logprobs, expected, atol=1e-5, rtol=0)
        assert not set(sampled.tokens.tolist()) & {1, 200, 699}
    assert torch.equal(
        wide_samples["greedy"].tokens,
        logits.index_fill(1, torch.tensor([1, 200, 699]), -torch.inf).argmax(dim=1),
    )
    early = wide_samples["early"].tokens[torch.arange(90) % 5 < 2]
    assert not set(early.tolist()) & {3, 300, 600}


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(top_k=300, top_p=0.9)])
def test_draws_over_several_groups_follow_the_exact_distribution(config: SamplingConfig) -> None:
    """The race of groups and the race within one, over 50,000 draws of 700 tokens."""
    logits = _wide_logits(1, scale=1.0)
    parts = [
        _sample(config, logits.expand(5000, WIDE), seeds=list(range(first, first + 5000))).tokens
        for first in range(0, DRAWS, 5000)
    ]
    counts = np.bincount(torch.cat(parts).numpy(), minlength=WIDE)
    probabilities = _softmax(logits[0].double().numpy())
    if config.top_k:
        order = np.argsort(-probabilities, kind="stable")
        edge = probabilities[order[config.top_k - 1]]
        probabilities = np.where(probabilities < edge, 0.0, probabilities)
        masses = np.cumsum(probabilities[order[: config.top_k]])
        last = int((masses < config.top_p * masses[-1]).sum())
        probabilities = np.where(probabilities < probabilities[order[last]], 0.0, probabilities)
        probabilities /= probabilities.sum()
    expected = DRAWS * probabilities
    assert not counts[expected == 0].any()
    _assert_same_distribution(counts, expected)


def test_positions_and_samples_have_random_streams_of_their_own() -> None:
    keys = request_keys([7, 8], seed=3, num_samples=3)
    assert len(set(keys.tolist())) == 6
    assert torch.equal(keys[::3], request_keys([7, 8], seed=3))
    logits = torch.zeros(40, WIDE)
    first, second = (_sample(SamplingConfig(), logits, position=p).tokens for p in (0, 1))
    assert (first == second).sum() < 4


def test_a_repetition_penalty_makes_said_tokens_less_likely_in_the_choice_alone() -> None:
    """Divides positive and multiplies negative logits, once however often a token was said."""
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.2]])
    history = History(tokens=torch.tensor([[0, 2, 0, 0, 1]]), lengths=torch.tensor([4]))
    config = SamplingConfig(temperature=0.0, repetition_penalty=2.0)
    sampler = Sampler(config, stop_ids=(), suppressed_ids=())
    arguments = {"keys": torch.tensor([0]), "positions": torch.tensor([0])}
    sampled = sampler.sample(logits, **arguments, history=history)
    assert sampled.tokens.tolist() == [1]  # 1.0, 1.5, -2.0, -1.2
    torch.testing.assert_close(sampled.logprobs, logits.log_softmax(dim=1)[:, 1])
    config = SamplingConfig(repetition_penalty=2.0)
    sampler = Sampler(config, stop_ids=(), suppressed_ids=())
    tokens = sampler.sample(
        logits.expand(20_000, 4),
        keys=torch.arange(20_000),
        positions=torch.zeros(20_000, dtype=torch.int64),
        history=History(
            tokens=history.tokens.expand(20_000, 5), lengths=history.lengths.expand(20_000)
        ),
    ).tokens
    shares = np.bincount(tokens.numpy(), minlength=4) / 20_000
    np.testing.assert_allclose(shares, _softmax(np.array([1.0, 1.5, -2.0, -1.2])), atol=0.015)
    with pytest.raises(ConfigError, match="repetition_penalty 2.0 needs the tokens so far"):
        sampler.sample(logits, **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_cuda_backend_chooses_by_every_two_rules_what_torch_does(
    temperature: float, dtype: torch.dtype
) -> None:
    """Each rule alone, every two, all: on the emulator, 389 columns with padding behind them."""
    rows = 8
    generator = torch.Generator().manual_seed(4)
    logits = (2 * torch.randn(rows, 400, generator=generator)).to(dtype)[:, :389]
    history = History(
        tokens=torch.cat([logits.topk(7, dim=1).indices, torch.full((rows, 3), 388)], dim=1),
        lengths=torch.arange(rows) + 1,
    )
    keys, positions = torch.arange(rows) * 7919, torch.arange(rows) % 3
    likely = logits.float().argmax(dim=1).tolist()
    tokens = {}
    alone = [
        (1.0, 0, 1.0, 1),
        (1.6, 0, 1.0, 1),
        (1.0, 5, 1.0, 1),
        (1.0, 0, 0.5, 1),
        (1.0, 0, 1.0, 3),
    ]
    together = pairwise((1.6, 1.0), (5, 0), (0.5, 1.0), (3, 1), first=(1.6, 5, 0.5, 3))
    for rules in dict.fromkeys([*alone, *together]):
        penalty, top_k, top_p, min_new_tokens = rules
        config = SamplingConfig(
            temperature=temperature,
            repetition_penalty=penalty,
            top_k=top_k,
            top_p=top_p,
            min_new_tokens=min_new_tokens,
        )
        found = []
        with emulated_cuda():
            for backend in (Backend.CUDA, Backend.REFERENCE):
                sampler = Sampler(
                    config, stop_ids=likely[:4], suppressed_ids=likely[4:6], backend=backend
                )
                found.append(
                    sampler.sample(logits, keys=keys, positions=positions, history=history)
                )
        assert torch.equal(found[0].tokens, found[1].tokens), config
        torch.testing.assert_close(found[0].logprobs, found[1].logprobs, atol=2e-6, rtol=1e-6)
        tokens[rules] = found[0].tokens.tolist()
    plain = tokens[1.0, 0, 1.0, 1]
    assert plain != tokens[1.6, 0, 1.0, 1] and plain != tokens[1.0, 0, 1.0, 3]
    # Each rule alone moves the token of some row; truncation is nothing to the largest logit.
    for top_k, top_p in ((5, 1.0), (0, 0.5)):
        assert (plain == tokens[1.0, top_k, top_p, 1]) == (temperature == 0)


def test_a_slice_that_does_not_start_at_a_group_is_refused() -> None:
    run_ranks(1, _refuse_slice)


def _refuse_slice() -> None:
    group = ProcessGroups.create(ParallelLayout()).tensor
    with pytest.raises(ConfigError, match="starts at 100, which is no multiple of 128"):
        Sampler(
            SamplingConfig(),
            stop_ids=(),
            suppressed_ids=(),
            vocabulary=VocabularySlice(start=100, size=5, group=group),
        )
