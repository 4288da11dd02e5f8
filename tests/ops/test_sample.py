"""Choosing tokens: the fused kernel chooses what plain torch chooses, and says the same of it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megachat.errors import ConfigError, KernelError
from megachat.ops.registry import Backend
from megachat.ops.sample import (
    GROUP_TOKENS,
    DrawRules,
    History,
    choices,
    sample,
    sample_combine,
    scale,
)
from megachat.ops.truncation import lowest_kept
from tests.kernels.emulated import emulated_cuda

RULES = DrawRules(
    temperature=1.0,
    suppressed=torch.tensor([1, 130, 131]),
    stops=torch.tensor([2, 300]),
    min_new_tokens=3,
    first_group=5,
)
DTYPES = (torch.float32, torch.bfloat16)
ROWS = 400


def _logits(columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of a wider matrix, as where padding follows; in bf16 many are equal."""
    generator = torch.Generator().manual_seed(columns)
    return (torch.randn(ROWS, columns + 9, generator=generator) * 3).to(dtype)[:, :columns]


def _both(logits: Tensor, rules: DrawRules) -> tuple[Tensor, Tensor]:
    keys = torch.randint(-(2**63), 2**63 - 1, (len(logits),), generator=torch.Generator())
    positions = torch.arange(len(logits)) % 6
    found, expected = (
        sample.on(backend)(logits, keys=keys, positions=positions, rules=rules)
        for backend in (Backend.CPU, Backend.REFERENCE)
    )
    return found, expected


def _columns(parts: Tensor) -> Tensor:
    return parts[1].long() - RULES.first_group * GROUP_TOKENS


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    """Scores and logsumexps to rounding, tokens and their logits to the last bit."""
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=1e-6)
    assert torch.equal(found[1:3], expected[1:3])
    torch.testing.assert_close(found[3], expected[3], atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("columns", [301, 3 * GROUP_TOKENS, 1037])
def test_the_kernel_chooses_what_torch_chooses(
    columns: int, temperature: float, dtype: torch.dtype
) -> None:
    """Largest or drawn, with suppressed and early stop tokens, whole groups and part of one."""
    found, expected = _both(_logits(columns, dtype), replace(RULES, temperature=temperature))
    _assert_equal(found, expected)
    assert len(set(_columns(found).tolist())) > 100


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_group_without_a_possible_token_never_wins(temperature: float) -> None:
    logits = torch.full((ROWS, 2 * GROUP_TOKENS), -3.0)
    logits[:, :GROUP_TOKENS] = 60.0
    rules = replace(
        RULES,
        temperature=temperature,
        suppressed=torch.arange(GROUP_TOKENS),
        stops=torch.tensor([GROUP_TOKENS + 2]),
    )
    found, expected = _both(logits, rules)
    _assert_equal(found, expected)
    assert int(_columns(found).min()) >= GROUP_TOKENS


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_slice_without_mass_loses_to_every_other(temperature: float) -> None:
    """One column of padding, as on a rank behind the end of the vocabulary."""
    logits = torch.full((4, 1), torch.finfo(torch.float32).min)
    nothing = torch.tensor([], dtype=torch.int64)
    rules = replace(RULES, temperature=temperature, suppressed=nothing, stops=nothing)
    found, expected = _both(logits, rules)
    assert torch.equal(found[1], expected[1])
    assert float(found[0].max()) < -1e38 and float(found[3].max()) < -1e38


def test_a_nan_among_the_logits_shows_in_the_row_s_total_and_in_no_other() -> None:
    logits = _logits(500, torch.float32).clone()
    logits[3, 200] = torch.nan
    found, _ = _both(logits, RULES)
    assert found[3].isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_is_in_the_log_prob_whatever_is_drawn(
    value: float, temperature: float, backend: Backend
) -> None:
    """One column, a group of tokens, all tokens; the last group is incomplete."""
    columns = 3 * GROUP_TOKENS + 47
    bad = [
        *(slice(column, column + 1) for column in (0, 1, 17, 200, columns - 1)),
        *(slice(first, first + GROUP_TOKENS) for first in range(0, columns, GROUP_TOKENS)),
        slice(0, columns),
    ]
    logits = torch.randn(len(bad) + 1, columns + 9, generator=torch.Generator())[:, :columns]
    for row, part in enumerate(bad):
        logits[row, part] = value
    with emulated_cuda() if backend is Backend.CUDA else nullcontext():
        parts = sample.on(backend)(
            logits,
            keys=torch.arange(len(logits)),
            positions=torch.zeros(len(logits), dtype=torch.int64),
            rules=replace(RULES, temperature=temperature),
        )
        tokens, logprobs = sample_combine.on(backend)(parts[None])
    assert logprobs.isfinite().tolist() == [False] * len(bad) + [True]
    local = tokens - RULES.first_group * GROUP_TOKENS
    assert 0 <= int(local.min()) and int(local.max()) < columns


def test_what_the_kernel_would_misread_is_refused() -> None:
    keys, positions = torch.arange(2), torch.arange(2)
    with pytest.raises(KernelError, match="contiguous rows"):
        sample.on(Backend.CPU)(torch.zeros(9, 2).t(), keys=keys, positions=positions, rules=RULES)
    with pytest.raises(KernelError, match=r"needs contiguous torch.int64"):
        sample.on(Backend.CPU)(torch.zeros(2, 9), keys=keys.int(), positions=positions, rules=RULES)


HISTORY = History(
    tokens=torch.randint(
        GROUP_TOKENS * (RULES.first_group - 1),
        GROUP_TOKENS * (RULES.first_group + 4),
        (ROWS, 9),
        generator=torch.Generator().manual_seed(3),
    ),
    lengths=torch.arange(ROWS) % 9 + 1,
)
"""Of lengths 1 to 9, in which every other token is of this slice."""


def _masked(rules: DrawRules, logits: Tensor) -> Tensor:
    """What the rules leave of each row's scaled logits, token by token."""
    rows = logits.float().clone() / (rules.temperature or 1.0)
    start = rules.first_group * GROUP_TOKENS
    for number, row in enumerate(rows):
        said = HISTORY.tokens[number, : HISTORY.lengths[number]].tolist()
        for token in set(said) & set(range(start, start + len(row))):
            logit, penalty = row[token - start], rules.repetition_penalty
            row[token - start] = logit / penalty if logit > 0 else logit * penalty
        row[rules.suppressed] = -torch.inf
        if number % 6 + 1 < rules.min_new_tokens:
            row[rules.stops] = -torch.inf
        if rules.top_k and rules.temperature:
            row[row < row.sort(descending=True).values[rules.top_k - 1]] = -torch.inf
    return rows


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("top_k", [0, 1, 30])
@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_penalty_and_top_k_are_as_if_logits_had_been_changed_before(
    penalty: float, top_k: int, temperature: float, backend: Backend
) -> None:
    """The op by all rules, against a draw by the temperature alone from logits they leave."""
    logits = _logits(301, torch.bfloat16)
    rules = replace(RULES, temperature=temperature, top_k=top_k, repetition_penalty=penalty)
    keys, positions = torch.arange(ROWS) * 31, torch.arange(ROWS) % 6
    found = sample.on(backend)(logits, keys=keys, positions=positions, rules=rules, history=HISTORY)
    nothing = torch.tensor([], dtype=torch.int64)
    plain = replace(
        RULES, suppressed=nothing, stops=nothing, temperature=1.0 if temperature else 0.0
    )
    expected = sample.reference(_masked(rules, logits), keys=keys, positions=positions, rules=plain)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=1e-6)
    # Log-probs are of what was there before.
    scaled = logits.float() / (temperature or 1.0)
    assert torch.equal(found[2].float(), scaled.gather(1, _columns(found)[:, None])[:, 0])
    torch.testing.assert_close(found[3], scaled.logsumexp(dim=1).double(), atol=0, rtol=1e-6)


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
@pytest.mark.parametrize(("top_k", "top_p"), [(40, 1.0), (0, 0.8), (40, 0.6)])
def test_edges_that_others_found_take_the_place_of_top_k_and_top_p(
    top_k: int, top_p: float, backend: Backend
) -> None:
    logits = _logits(301, torch.float32)
    rules = replace(RULES, top_k=top_k, top_p=top_p)
    keys, positions = torch.arange(ROWS) * 31, torch.arange(ROWS) % 6
    choice = choices(
        scale(logits, rules.temperature), positions=positions, rules=rules, history=None
    )
    edges = lowest_kept(choice, top_k=top_k, top_p=top_p)
    assert edges.shape == (ROWS,)
    found, whole, other = (
        sample.on(backend)(logits, keys=keys, positions=positions, rules=by, edges=given)
        for by, given in (
            (rules, None),
            (replace(rules, top_k=0, top_p=1.0), edges),
            (replace(rules, top_k=1), edges),
        )
    )
    assert torch.equal(found, whole) and torch.equal(found, other)
    plain = replace(rules, top_k=0, top_p=1.0)
    without = sample.reference(logits, keys=keys, positions=positions, rules=plain)
    assert not torch.equal(found, without)


@pytest.mark.parametrize("backend", Backend)
def test_a_penalty_without_a_history_is_refused(backend: Backend) -> None:
    rules = replace(RULES, repetition_penalty=2.0)
    keys = torch.arange(2)
    with pytest.raises(ConfigError, match="repetition_penalty 2.0 needs the tokens so far"):
        sample.on(backend)(torch.zeros(2, 304), keys=keys, positions=keys, rules=rules)


def test_of_equal_scores_the_lowest_rank_wins_and_masses_add_up() -> None:
    parts = torch.tensor(
        [
            [[1.0, 2.0], [5, 6], [0.5, 0.25], [1.0, -torch.inf]],
            [[1.0, 3.0], [200, 300], [0.0, 1.5], [2.0, 4.0]],
        ],
        dtype=torch.float64,
    )
    tokens, logprobs = sample_combine.reference(parts)
    assert tokens.tolist() == [5, 300] and tokens.dtype is torch.int64
    total = torch.tensor([1.0, 2.0], dtype=torch.float64).logsumexp(0)
    torch.testing.assert_close(logprobs, torch.stack([0.5 - total, total.new_tensor(-2.5)]).float())
