"""`sample` on the emulator against the rules in numpy, the operation, and the sampler that runs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megachat.generation.config import SamplingConfig
from megachat.generation.sampling import Sampler
from megachat.ops.sample import GROUP_TOKENS, DrawRules, History, sample
from tests.kernels.launch import FORMATS, FORWARD, INVALID_VALUE, ORDERS, RANDOM, Order, run_here
from tests.kernels.sample_cases import (
    Inputs,
    SampleCase,
    case_of,
    combine_case,
    edges_case,
    sample_case,
)

CONFIGS = {
    "plain": SamplingConfig(),
    "greedy": SamplingConfig(temperature=0.0, top_k=3, repetition_penalty=1.3),
    "top_k": SamplingConfig(temperature=0.7, top_k=40),
    "more than there are": SamplingConfig(top_k=5000),
    "top_p": SamplingConfig(top_p=0.8),
    "all": SamplingConfig(temperature=1.2, top_k=60, top_p=0.7, repetition_penalty=1.5),
    "early": SamplingConfig(min_new_tokens=3, repetition_penalty=0.5, top_p=0.5),
}
"""Positions are 0, 3 and 2**32 - 1, so that of `early` the first row may not stop."""
FORBIDDEN = ((1, 17), (2, 40, 699))
WIDE = 700
"""Five whole groups of tokens and a part of a sixth, no whole number of packs."""


def drawn(case: SampleCase, order: Order = FORWARD) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities of one rank."""
    assert run_here(case.source, case.function, case.arguments, order).code == 0
    return combined([case.parts])


def combined(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    rows = parts[0].shape[1]
    tokens, logprobs = torch.full((rows,), -1), torch.full((rows,), torch.nan)
    arguments = (torch.stack(parts), tokens, logprobs, len(parts), rows, None)
    source = combine_case(ranks=1, rows=1).source
    assert run_here(source, "megachat_sample_combine", arguments, FORWARD).code == 0
    return tokens, logprobs


def reference(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """What `Sampler` chooses."""
    sampler = Sampler(inputs.config, stop_ids=inputs.stops, suppressed_ids=inputs.suppressed)
    history = History(tokens=inputs.history, lengths=inputs.history_lengths)
    found = sampler.sample(
        inputs.logits[:, : inputs.columns],
        keys=inputs.keys,
        positions=inputs.positions,
        history=history,
    )
    return found.tokens, found.logprobs


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_token_that_wins_in_float64_is_chosen(
    name: str, dtype: torch.dtype, order: Order
) -> None:
    suppressed, stops = FORBIDDEN
    case = sample_case(
        dtype, columns=WIDE, config=CONFIGS[name], suppressed=suppressed, stops=stops
    )
    assert case.fault_here(order) == ""
    assert not case.tied_rows, "in these rows fp32 decides nothing"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sampler_that_runs_chooses_the_same_tokens(name: str) -> None:
    suppressed, stops = FORBIDDEN
    case = sample_case(
        torch.float32,
        columns=500,
        config=CONFIGS[name],
        rows=24,
        suppressed=suppressed,
        stops=stops,
    )
    assert case.fault_here(FORWARD) == ""
    tokens, logprobs = drawn(case)
    expected, exact = reference(case.inputs)
    assert not case.tied_rows
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_rank_leaves_what_the_operation_says_of_its_slice(
    temperature: float, dtype: torch.dtype
) -> None:
    start, suppressed, stops = 10 * GROUP_TOKENS, (1281, 1297), (1282, 1500)
    case = sample_case(
        dtype,
        columns=300,
        config=SamplingConfig(temperature=temperature, min_new_tokens=3),
        rows=24,
        suppressed=suppressed,
        stops=stops,
        vocab_start=start,
    )
    assert case.fault_here(FORWARD) == ""
    assert not case.tied_rows
    rules = DrawRules(
        suppressed=torch.tensor(suppressed) - start,
        stops=torch.tensor(stops) - start,
        min_new_tokens=3,
        first_group=10,
        temperature=temperature,
    )
    inputs = case.inputs
    expected = sample.reference(
        inputs.logits[:, :300], keys=inputs.keys, positions=inputs.positions, rules=rules
    )
    assert torch.equal(case.parts[1:3], expected[1:3])  # tokens, their logits
    torch.testing.assert_close(case.parts[0], expected[0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(case.parts[3], expected[3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [1, 7, 8, 127, 128, 129, 4104, 50272])
def test_any_vocabulary_up_to_opts_will_do(columns: int) -> None:
    config = SamplingConfig(top_k=min(columns, 900), top_p=0.9)
    case = sample_case(torch.bfloat16, columns=columns, config=config, rows=1)
    assert case.fault_here(FORWARD) == ""


def test_equally_likely_tokens_at_an_edge_are_all_kept() -> None:
    """Of 4, 3 x 100, 2 x 100 top-k 50 keeps 101; a nucleus of their mass, too."""
    logits = torch.full((64, 208), 2.0)
    logits[:, 100:200] = 3.0
    logits[:, 50] = 4.0
    for config in (SamplingConfig(top_k=50), SamplingConfig(top_p=0.6), SamplingConfig(top_k=1)):
        base = sample_case(torch.float32, columns=200, config=config, rows=64).inputs
        inputs = replace(base, logits=logits)
        case = case_of(inputs)
        tokens, _ = drawn(case)
        assert case.wrong_result() == ""
        assert torch.equal(tokens, reference(inputs)[0])
        kept = {50} if config.top_k == 1 else {50, *range(100, 200)}
        assert set(tokens.tolist()) <= kept
        assert config.top_k == 1 or len(set(tokens.tolist())) > 20


def test_top_p_is_of_the_mass_of_exactly_k_tokens() -> None:
    """Three of five equal tokens are the k largest; the first holds more than half of their mass,
    and less than half of that of all five."""
    logits = torch.full((32, 8), -9.0)
    logits[:, :6] = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    config = SamplingConfig(top_k=3, top_p=0.55)
    base = sample_case(torch.float32, columns=8, config=config, rows=32).inputs
    case = case_of(replace(base, logits=logits))
    tokens, _ = drawn(case)
    assert case.wrong_result() == ""
    assert (tokens == 0).all()
    assert torch.equal(tokens, reference(case.inputs)[0])


def test_negative_zero_is_as_likely_as_zero() -> None:
    logits = torch.full((16, 8), -5.0)
    logits[:, :4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    base = sample_case(torch.float32, columns=8, config=SamplingConfig(top_k=2), rows=16).inputs
    case = case_of(replace(base, logits=logits))
    tokens, _ = drawn(case)
    assert torch.equal(tokens, reference(case.inputs)[0])
    assert {1, 3} & set(tokens.tolist())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_ranks_with_slices_choose_what_one_with_everything_does(temperature: float) -> None:
    """One slice is a whole number of groups, one ends within a group, one has hardly any mass."""
    config = SamplingConfig(temperature=temperature, min_new_tokens=2, repetition_penalty=1.2)
    whole = sample_case(
        torch.float32, columns=600, config=config, rows=16, suppressed=(5, 300), stops=(299, 599)
    )
    whole.inputs.logits[:, 512:600] = -torch.inf
    expected, exact = drawn(whole)
    assert whole.wrong_result() == ""
    parts = []
    for start, columns in ((0, 256), (256, 256), (512, 88)):
        logits = torch.full((16, 256), torch.nan)
        logits[:, :columns] = whole.inputs.logits[:, start : start + columns]
        inputs = replace(whole.inputs, logits=logits, columns=columns, vocab_start=start)
        case = case_of(inputs)
        assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0
        parts.append(case.parts)
    tokens, logprobs = combined(parts)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, exact, rtol=0, atol=1e-6)


def test_a_slice_of_a_rank_is_scored_with_its_own_groups_noise() -> None:
    case = sample_case(torch.bfloat16, columns=300, vocab_start=1280)
    assert case.fault_here(FORWARD) == ""


@pytest.mark.parametrize("dtype", FORMATS)
def test_edges_say_what_is_kept_whatever_top_k_and_top_p_are(dtype: torch.dtype) -> None:
    """The first row has but one token to choose, which is the edge itself."""
    case = edges_case(dtype, columns=WIDE, keep=1, rows=24)
    assert case.fault_here(FORWARD) == ""
    assert not case.tied_rows
    assert case.inputs.edges is not None
    assert (case.parts[2] >= case.inputs.edges).all()


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.name)
@pytest.mark.parametrize(("ranks", "rows"), [(1, 1), (2, 5), (4, 130)])
def test_the_best_rank_wins_and_of_equal_ones_the_lowest(
    ranks: int, rows: int, order: Order
) -> None:
    assert combine_case(ranks=ranks, rows=rows).fault_here(order) == ""


def test_the_order_of_threads_does_not_change_a_bit() -> None:
    results = []
    for order in (*ORDERS, RANDOM):
        case = sample_case(torch.float32, columns=WIDE, config=CONFIGS["all"], rows=8)
        assert case.fault_here(order) == ""
        results.append(case.parts)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_nan_logit_is_not_hidden_and_the_token_stays_in_the_vocabulary() -> None:
    for name in CONFIGS:
        case = sample_case(torch.float32, columns=WIDE, config=CONFIGS[name])
        case.inputs.logits[1, 33] = torch.nan
        case.inputs.logits[2, :] = torch.nan
        tokens, logprobs = drawn(case)
        assert logprobs.isnan().tolist() == [False, True, True], name
        assert ((tokens >= 0) & (tokens < WIDE)).all(), name


def test_where_every_token_is_forbidden_the_first_is_chosen_as_the_sampler_does() -> None:
    for name in ("plain", "greedy", "top_k", "top_p"):
        case = sample_case(
            torch.float32, columns=130, config=CONFIGS[name], suppressed=tuple(range(130))
        )
        assert drawn(case)[0].tolist() == [0, 0, 0], name


def test_no_rows_are_no_launch() -> None:
    case = sample_case(torch.float32, columns=8, rows=0)
    assert run_here(case.source, case.function, case.arguments, FORWARD).code == 0
    combine = combine_case(ranks=1, rows=1)
    arguments = (None, None, None, 1, 0, None)
    assert run_here(combine.source, combine.function, arguments, FORWARD).code == 0


NAMES = (
    "format logits keys positions history history_lengths edges suppressed stops parts rows width "
    "columns history_width num_suppressed num_stops min_new_tokens vocab_start top_k "
    "temperature top_p penalty stream"
).split()


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 3},
        {"rows": -1},
        {"width": 0},
        {"width": 84},
        {"columns": 0},
        {"columns": 200},
        {"width": 65544, "columns": 65537},
        {"vocab_start": 64},
        {"vocab_start": -128},
        {"top_k": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"penalty": 0.0},
        {"penalty": 1.5, "history": None},
        {"penalty": 1.5, "history_lengths": None},
        {"penalty": 1.5, "history_width": 0},
        {"num_suppressed": 1},
        {"num_stops": 1},
        {"num_stops": -1},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_arguments_outside_the_contract_are_refused(changes: dict[str, float | None]) -> None:
    case = sample_case(torch.bfloat16, columns=80)
    arguments = dict(zip(NAMES, case.arguments, strict=True)) | changes
    outcome = run_here(case.source, case.function, list(arguments.values()), FORWARD)
    assert outcome.code == INVALID_VALUE


@pytest.mark.parametrize(("ranks", "rows"), [(0, 1), (1, -1)])
def test_parts_of_nobody_are_refused(ranks: int, rows: int) -> None:
    case = combine_case(ranks=1, rows=1)
    arguments = (*case.arguments[:3], ranks, rows, None)
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE


def test_logits_that_are_not_aligned_are_refused() -> None:
    case = sample_case(torch.bfloat16, columns=80)
    arguments = list(case.arguments)
    arguments[1] = torch.zeros(300, dtype=torch.bfloat16)[1:]
    assert run_here(case.source, case.function, arguments, FORWARD).code == INVALID_VALUE
