"""Choosing tokens: the fused kernel chooses what plain torch chooses, and says the same of it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megachat.errors import KernelError
from megachat.ops.registry import Backend
from megachat.ops.sample import GROUP_TOKENS, Drawn, DrawRules, sample

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


def _both(logits: Tensor, rules: DrawRules) -> tuple[Drawn, Drawn]:
    keys = torch.randint(-(2**63), 2**63 - 1, (len(logits),), generator=torch.Generator())
    positions = torch.arange(len(logits)) % 6
    found, expected = (
        sample.on(backend)(logits, keys, positions, rules)
        for backend in (Backend.CPU, Backend.REFERENCE)
    )
    return found, expected


def _assert_equal(found: Drawn, expected: Drawn) -> None:
    assert torch.equal(found.columns, expected.columns)
    torch.testing.assert_close(found.scores, expected.scores, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.chosen, expected.chosen, atol=0, rtol=0)
    torch.testing.assert_close(found.totals, expected.totals, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("columns", [301, 3 * GROUP_TOKENS, 1037])
def test_the_kernel_chooses_what_torch_chooses(
    columns: int, temperature: float, dtype: torch.dtype
) -> None:
    """Largest or drawn, with suppressed and early stop tokens, whole groups and part of one."""
    found, expected = _both(_logits(columns, dtype), replace(RULES, temperature=temperature))
    _assert_equal(found, expected)
    assert len(set(found.columns.tolist())) > 100


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
    assert int(found.columns.min()) >= GROUP_TOKENS


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_slice_without_mass_loses_to_every_other(temperature: float) -> None:
    """One column of padding, as on a rank behind the end of the vocabulary."""
    logits = torch.full((4, 1), torch.finfo(torch.float32).min)
    nothing = torch.tensor([], dtype=torch.int64)
    rules = replace(RULES, temperature=temperature, suppressed=nothing, stops=nothing)
    found, expected = _both(logits, rules)
    assert torch.equal(found.columns, expected.columns)
    assert float(found.scores.max()) < -1e38 and float(found.totals.max()) < -1e38


def test_a_nan_among_the_logits_shows_in_the_row_s_total_and_in_no_other() -> None:
    logits = _logits(500, torch.float32).clone()
    logits[3, 200] = torch.nan
    found, _ = _both(logits, RULES)
    assert found.totals.isnan().nonzero().flatten().tolist() == [3]


def test_what_the_kernel_would_misread_is_refused() -> None:
    keys, positions = torch.arange(2), torch.arange(2)
    with pytest.raises(KernelError, match="contiguous rows"):
        sample.on(Backend.CPU)(torch.zeros(9, 2).t(), keys, positions, RULES)
    with pytest.raises(KernelError, match=r"needs contiguous torch.int64"):
        sample.on(Backend.CPU)(torch.zeros(2, 9), keys.int(), positions, RULES)
