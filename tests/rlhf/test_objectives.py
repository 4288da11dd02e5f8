import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megachat.records import Batch, Experience, PreferenceBatch, SftBatch
from megachat.rlhf.config import PpoConfig
from megachat.rlhf.objectives import (
    PairwiseObjective,
    PolicyObjective,
    SftObjective,
    TokenwisePairwiseObjective,
    ValueObjective,
    final_spans,
    response_spans,
    response_values,
)
from megachat.training.loss import LossFunction, LossTerms
from tests.rlhf import outputs

VOCAB, SEQ, RESPONSE = 11, 9, 5
TEMPERATURE = 0.7
CONFIG = PpoConfig(entropy_coef=0.01)


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sft_batch(num_rows: int, seed: int) -> SftBatch:
    generator = _random(seed)
    lengths = torch.randint(1, SEQ + 1, (num_rows,), generator=generator)
    real = torch.arange(SEQ)[None] < lengths[:, None]
    return SftBatch(
        tokens=torch.randint(VOCAB, (num_rows, SEQ), generator=generator).masked_fill(~real, 1),
        lengths=lengths,
        loss_mask=real & (torch.rand(num_rows, SEQ, generator=generator) < 0.7),
    )


def _preference_batch(num_rows: int, seed: int) -> PreferenceBatch:
    generator = _random(seed)
    lengths = torch.randint(3, SEQ + 1, (num_rows, 2), generator=generator)
    real = torch.arange(SEQ) < lengths[..., None]
    tokens = torch.randint(VOCAB, (num_rows, 2, SEQ), generator=generator)
    tokens[:, 1, :2] = tokens[:, 0, :2]
    return PreferenceBatch(
        tokens=tokens.masked_fill(~real, 1),
        lengths=lengths,
        prompt_lengths=torch.full((num_rows,), 2),
    )


def _experience(num_rows: int, seed: int) -> Experience:
    """Rows with 0 to RESPONSE response tokens."""
    generator = _random(seed)
    prompt_lengths = torch.randint(1, SEQ - RESPONSE + 1, (num_rows,), generator=generator)
    responses = torch.randint(0, RESPONSE + 1, (num_rows,), generator=generator)
    mask = torch.arange(RESPONSE)[None] < responses[:, None]
    numbers = torch.randn(5, num_rows, RESPONSE, generator=generator).masked_fill(~mask, 0.0)
    real = torch.arange(SEQ)[None] < (prompt_lengths + responses)[:, None]
    return Experience(
        tokens=torch.randint(VOCAB, (num_rows, SEQ), generator=generator).masked_fill(~real, 1),
        lengths=prompt_lengths + responses,
        prompt_lengths=prompt_lengths,
        response_mask=mask,
        logprobs=-2.4 + 0.3 * numbers[0],
        ref_logprobs=numbers[1],
        values=numbers[2],
        advantages=numbers[3],
        returns=numbers[4],
        scores=torch.zeros(num_rows),
        finished=torch.ones(num_rows).bool(),
    )


class _Model:
    """Stands in for a model: a fixed function of token and position, with a gradient to compare."""

    def __init__(self, columns: int, seed: int = 0) -> None:
        shape = (VOCAB, SEQ + 3, columns)
        self.table = torch.randn(shape, generator=_random(seed)).requires_grad_()

    def __call__(self, tokens: Tensor, seq: int) -> Tensor:
        """Output for the rows cut or padded to `seq` columns."""
        tokens = torch.nn.functional.pad(tokens[:, :seq], (0, max(0, seq - tokens.shape[1])))
        output = self.table[tokens, torch.arange(seq)]
        return output if output.shape[-1] > 1 else output.squeeze(-1)


CASES: dict[str, tuple[Callable, Callable, int]] = {
    "sft": (_sft_batch, SftObjective.for_batch, VOCAB),
    "pairwise": (
        _preference_batch,
        lambda batch: PairwiseObjective.for_batch(batch, center_coef=0.1),
        1,
    ),
    "tokenwise": (
        _preference_batch,
        lambda batch: TokenwisePairwiseObjective.for_batch(batch, center_coef=0.1),
        1,
    ),
    "policy": (
        _experience,
        lambda batch: PolicyObjective.for_batch(batch, CONFIG, temperature=TEMPERATURE),
        VOCAB,
    ),
    "value": (_experience, lambda batch: ValueObjective.for_batch(batch, CONFIG), 1),
}


def _run(
    objective: LossFunction, model: _Model, batch: Batch, cuts: list[list[int]], fillers: int
) -> tuple[LossTerms, Tensor]:
    """Drives an objective as an engine does: cut, fill up, pick what is read, sum, backward."""
    model.table.grad = None
    total, metrics, maxima = torch.zeros(()), {}, {}
    for index, rows in enumerate(cuts):
        part = batch.select(torch.tensor(rows + [rows[0]] * fillers))
        weights = torch.tensor([1.0] * len(rows) + [0.0] * fillers)
        longest = int(objective.row_lengths(part).max())
        output = model(objective.model_input(part), longest if index % 2 else SEQ + 3)
        terms = objective(outputs.asked_for(objective, output, part), part, weights)
        terms.loss.backward()
        total = total + terms.loss.detach()
        for name, value in terms.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
        for name, value in terms.maxima.items():
            maxima[name] = torch.maximum(maxima.get(name, value), value)
    return LossTerms(loss=total, metrics=metrics, maxima=maxima), model.table.grad


@pytest.mark.parametrize("case", list(CASES))
@given(
    order=st.permutations(range(5)),
    edges=st.sets(st.integers(1, 4)),
    fillers=st.integers(0, 2),
    seed=st.integers(0, 50),
)
@settings(deadline=None, max_examples=15)
def test_loss_metrics_and_gradient_do_not_depend_on_the_cut(
    case: str, order: list[int], edges: set[int], fillers: int, seed: int
) -> None:
    make_batch, make_objective, columns = CASES[case]
    batch, model = make_batch(5, seed), _Model(columns)
    objective = make_objective(batch)
    bounds = [0, *sorted(edges), 5]
    cuts = [list(order[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    whole, whole_gradient = _run(objective, model, batch, [list(range(5))], 0)
    found, gradient = _run(objective, model, batch, cuts, fillers)
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-4, atol=1e-6)
    assert tuple(found.metrics) == tuple(objective.metric_names)
    assert tuple(found.maxima) == tuple(objective.maximum_names)
    for name in objective.metric_names:
        torch.testing.assert_close(
            found.metrics[name], whole.metrics[name], rtol=1e-4, atol=1e-5, msg=name
        )
    for name in objective.maximum_names:
        torch.testing.assert_close(found.maxima[name], whole.maxima[name])


def test_the_sft_loss_is_cross_entropy_over_the_masked_targets() -> None:
    batch, model = _sft_batch(6, 1), _Model(VOCAB)
    terms, _ = _run(SftObjective.for_batch(batch), model, batch, [list(range(6))], 0)
    losses = []
    log_p = model(batch.tokens, SEQ).detach().log_softmax(dim=-1)
    for row in range(6):
        for position in range(1, SEQ):
            if batch.loss_mask[row, position]:
                losses.append(-log_p[row, position - 1, batch.tokens[row, position]].item())
    assert terms.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_batch_without_targets_has_loss_zero() -> None:
    batch = _sft_batch(2, 0)
    batch = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    terms, gradient = _run(SftObjective.for_batch(batch), _Model(VOCAB), batch, [[0, 1]], 0)
    assert terms.loss.item() == 0.0 and not gradient.any()


def test_pairs_become_adjacent_model_rows_chosen_first() -> None:
    batch = _preference_batch(3, 2)
    objective = PairwiseObjective.for_batch(batch)
    rows = objective.model_input(batch)
    assert rows.shape == (6, SEQ)
    assert torch.equal(rows[2], batch.tokens[1, 0]) and torch.equal(rows[3], batch.tokens[1, 1])
    assert objective.row_lengths(batch).tolist() == batch.lengths.flatten().tolist()


def test_the_pair_loss_reads_the_scores_at_the_last_real_tokens() -> None:
    batch, model = _preference_batch(4, 3), _Model(1)
    objective = PairwiseObjective.for_batch(batch)
    terms, _ = _run(objective, model, batch, [[0, 1, 2, 3]], 0)
    values = model(objective.model_input(batch), SEQ).detach()
    losses = []
    for pair in range(4):
        chosen, rejected = (
            values[2 * pair + side, batch.lengths[pair, side] - 1].item() for side in (0, 1)
        )
        losses.append(math.log1p(math.exp(rejected - chosen)))
    assert terms.loss.item() == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_positions_and_gathering_follow_the_alignment_of_the_records() -> None:
    batch = _experience(6, 4)
    spans = response_spans(prompt_lengths=batch.prompt_lengths, lengths=batch.lengths)
    values = torch.randn(6, SEQ)
    gathered = response_values(
        outputs.read(values, spans),
        prompt_lengths=batch.prompt_lengths,
        response_mask=batch.response_mask,
    )
    logits = torch.randn(6, SEQ, VOCAB)
    logprobs = outputs.sampled_logprobs(logits, batch, temperature=TEMPERATURE)
    log_p = (logits / TEMPERATURE).log_softmax(dim=-1)
    for row in range(6):
        for column in range(RESPONSE):
            if not batch.response_mask[row, column]:
                assert gathered[row, column] == logprobs[row, column] == 0.0
                continue
            token_at = int(batch.prompt_lengths[row]) + column
            assert spans[row, 0] <= token_at - 1 < spans[row, 1]
            assert gathered[row, column] == values[row, token_at - 1]
            expected = log_p[row, token_at - 1, batch.tokens[row, token_at]].item()
            assert logprobs[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_final_scores_stand_at_the_last_real_token() -> None:
    values = torch.arange(12.0).view(3, 4)
    read = outputs.read(values, final_spans(torch.tensor([1, 4, 2])))
    assert read.values.tolist() == [0.0, 7.0, 9.0]


def test_the_policy_that_sampled_has_ratio_one_at_the_sampling_temperature() -> None:
    batch, model = _experience(5, 6), _Model(VOCAB)
    logits = model(batch.tokens, SEQ).detach()
    sampled = outputs.sampled_logprobs(logits, batch, temperature=TEMPERATURE)
    batch = dataclasses.replace(batch, logprobs=sampled)
    objective = PolicyObjective.for_batch(batch, CONFIG, temperature=TEMPERATURE)
    terms, _ = _run(objective, model, batch, [[0, 1, 2, 3, 4]], 0)
    assert terms.metrics["ratio_mean"].item() == pytest.approx(1.0, abs=1e-5)
    assert terms.metrics["approx_kl"].item() == pytest.approx(0.0, abs=1e-6)
    count = batch.response_mask.sum()
    surrogate = -(batch.advantages * batch.response_mask).sum() / count
    assert terms.metrics["surrogate"].item() == pytest.approx(surrogate.item(), abs=1e-5)


def test_the_entropy_metric_is_that_of_the_tempered_distribution() -> None:
    batch, model = _experience(5, 7), _Model(VOCAB)
    objective = PolicyObjective.for_batch(batch, CONFIG, temperature=TEMPERATURE)
    terms, _ = _run(objective, model, batch, [[0, 1, 2, 3, 4]], 0)
    log_p = (model(batch.tokens, SEQ).detach() / TEMPERATURE).log_softmax(dim=-1)
    spans = response_spans(prompt_lengths=batch.prompt_lengths, lengths=batch.lengths)
    entropy = response_values(
        outputs.read(-(log_p.exp() * log_p).sum(dim=-1), spans),
        prompt_lengths=batch.prompt_lengths,
        response_mask=batch.response_mask,
    )
    expected = entropy.sum() / batch.response_mask.sum()
    torch.testing.assert_close(terms.metrics["entropy"], expected, rtol=1e-4, atol=1e-5)


def test_responses_that_are_all_empty_give_loss_zero_and_no_gradient() -> None:
    batch = _experience(3, 8)
    nothing = torch.zeros_like(batch.response_mask)
    batch = dataclasses.replace(batch, response_mask=nothing, lengths=batch.prompt_lengths)
    for case in ("policy", "value"):
        _, make_objective, columns = CASES[case]
        terms, gradient = _run(make_objective(batch), _Model(columns), batch, [[0, 1, 2]], 0)
        assert terms.loss.item() == 0.0 and not gradient.any()
