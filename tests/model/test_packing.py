"""Packed rows say what padded rows say, and nothing is computed for padding."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megachat.model import Head, Recompute, packing
from megachat.model.packing import RowPacking, take_rows
from megachat.parallel.collectives import all_reduce_sum
from megachat.parallel.layout import ParallelLayout
from megachat.records import Rollout
from megachat.rlhf.scoring import FinalScores, ResponseLogprobs
from megachat.training.engine import ForwardEngine
from tests.harness import run_ranks
from tests.model import reference as ref

LENGTHS = (7, 3, 6, 1)
SPANS = ((2, 6), (0, 3), (5, 5), (0, 1))
TOLERANCE = 1e-6
"""fp32: each row attends in the same rectangle; products are over other numbers of rows."""


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    multiple=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_every_token_has_its_place_and_every_span_its_tokens(
    lengths: list[int], multiple: int, data: st.DataObject
) -> None:
    """Against lists: (row, position) of all tokens, in order."""
    bounds = [
        sorted(data.draw(st.tuples(st.integers(0, length), st.integers(0, length))))
        for length in lengths
    ]
    everywhere = RowPacking.of(lengths, multiple=multiple)
    packed = RowPacking.of(lengths, spans=bounds, multiple=multiple)
    tokens = [(row, at) for row, length in enumerate(lengths) for at in range(length)]
    read = [(row, at) for row, at in tokens if bounds[row][0] <= at < bounds[row][1]]

    def found(places: Tensor) -> list[tuple[int, int]]:
        return [divmod(place, packed.seq) for place in places.tolist()]

    assert packed.num_tokens % multiple == 0
    assert 0 <= packed.num_tokens - len(tokens) < multiple
    assert found(packed.places)[: len(tokens)] == tokens
    assert found(packed.output_places) == (read or tokens[-1:])
    assert found(everywhere.output_places) == tokens
    assert packed.longest == max(lengths)
    extra = [(len(lengths) - 1, lengths[-1] + n) for n in range(packed.num_tokens - len(tokens))]
    assert found(packed.places)[len(tokens) :] == extra
    assert packed.positions.tolist() == [at for _, at in [*tokens, *extra]]


@pytest.mark.parametrize("few", [0, packing.FEW_ELEMENTS], ids=["run by run", "at once"])
@pytest.mark.parametrize("lengths", [LENGTHS, (5, 5, 2, 2, 2, 1), (4, 4, 4)])
def test_a_function_of_rows_sees_each_row_alone_in_value_and_gradient(
    lengths: tuple[int, ...], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop over rows: sums over what precedes a position, weighted by a second part."""
    monkeypatch.setattr(packing, "FEW_ELEMENTS", few)
    calls: list[tuple[int, ...]] = []

    def causal(x: Tensor, y: Tensor) -> Tensor:
        calls.append(tuple(x.shape[:2]))
        return (x * y).cumsum(dim=1) + y

    rows = RowPacking.of(lengths)
    parts = torch.randn(2, sum(lengths), 2, 3, dtype=torch.float64, requires_grad=True)
    found = rows.by_rows(causal, *parts)
    runs = {LENGTHS: 4, (5, 5, 2, 2, 2, 1): 3, (4, 4, 4): 1}[lengths]
    rectangle = (len(lengths), max(lengths))
    assert (calls == [rectangle]) == (few > 0 or runs == 1)
    assert len(calls) == (1 if few else runs)
    alone = zip(parts[0].split(lengths), parts[1].split(lengths), strict=True)
    expected = torch.cat([(x * y).cumsum(dim=0) + y for x, y in alone])
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), parts)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients)
    rows.by_rows(causal, *parts, at_once=True)
    assert calls[-1] == rectangle


def test_rows_that_are_taken_have_their_gradient_and_the_others_none() -> None:
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([1, 4, 5])
    assert torch.equal(take_rows(x, places), x[places])
    torch.autograd.gradcheck(lambda tokens: take_rows(tokens, places), x)


def _tokens() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(4, ref.PRE_LN.vocab_size, (4, 7), generator=generator)


def _gradients(output: Tensor, weights: Tensor, model: Any) -> list[Tensor]:
    model.zero_grad()
    (output.float().clamp(min=-1e4) * weights).sum().backward()
    for parameter in model.tensor_reduced_parameters():
        all_reduce_sum(parameter.grad, model.groups.tensor)
    return [parameter.grad.clone() for parameter in model.parameters()]


def _compare(head: Head, options: dict[str, Any]) -> tuple[float, float]:
    """Largest relative differences of outputs and gradients, padded against packed."""
    layout = ParallelLayout(tensor=2)
    config = ref.POST_LN if head is Head.LANGUAGE_MODEL else ref.PRE_LN
    model = ref.build_model(
        config, layout, head=head, reference=ref.huggingface_model(config, head), **options
    )
    tokens = _tokens()
    packed = RowPacking.of(LENGTHS, spans=SPANS, multiple=2)
    places = [(row, at) for row, span in enumerate(SPANS) for at in range(*span)]
    rows, positions = torch.tensor(places).unbind(dim=1)
    padded = model(tokens)[rows, positions]
    weights = torch.linspace(-1.0, 2.0, padded.shape[0]).view(-1, *[1] * (padded.ndim - 1))
    expected = _gradients(padded, weights, model)
    noise = torch.where(torch.arange(7) < torch.tensor(LENGTHS)[:, None], tokens, 5)
    found = model(noise, packed)
    assert found.shape == padded.shape
    gradients = _gradients(found, weights, model)
    differences = [
        ref.relative_error(one, other) for one, other in zip(gradients, expected, strict=True)
    ]
    return ref.relative_error(found.detach(), padded.detach()), max(differences)


@pytest.mark.parametrize("head", list(Head))
@pytest.mark.parametrize(
    "options",
    [{}, {"sequence_parallel": True}, {"sequence_parallel": True, "recompute": Recompute.FULL}],
    ids=["whole", "sequence_shards", "recomputed"],
)
def test_packed_rows_give_the_outputs_and_gradients_of_padded_ones(
    head: Head, options: dict[str, Any]
) -> None:
    """17 tokens over two ranks of a sequence-parallel model: one filler evens them out."""
    for output, gradient in run_ranks(2, _compare, head, options):
        assert output <= TOLERANCE
        assert gradient <= TOLERANCE


def _count() -> dict[str, list[int]]:
    """Tokens that layers and heads see while a ragged rollout is scored."""
    prompts, lengths = torch.tensor([5, 2, 4, 1]), torch.tensor(LENGTHS)
    rollout = Rollout(
        tokens=_tokens(),
        lengths=lengths,
        prompt_lengths=torch.minimum(prompts, lengths),
        logprobs=torch.zeros(4, 6),
        finished=torch.zeros(4, dtype=torch.bool),
    )
    seen: dict[str, list[int]] = {}
    for head in Head:
        model = ref.build_model(ref.PRE_LN, ParallelLayout(), head=head, seed=0)
        engine = ForwardEngine(model, micro_batch_rows=4)
        counts = seen.setdefault(str(head), [])
        layer, output = model.decoder.layers[0], model.output
        layer.register_forward_hook(lambda *call, counts=counts: counts.append(call[2][0].numel()))
        output.register_forward_hook(lambda *call, counts=counts: counts.append(len(call[2])))
        if head is Head.LANGUAGE_MODEL:
            function = ResponseLogprobs(
                response_len=6, temperature=1.0, group=engine.groups.tensor, vocab_start=0
            )
            engine.score(rollout, function)
        else:
            engine.score(rollout, FinalScores())
    return seen


def test_layers_see_real_tokens_only_and_heads_those_that_are_read() -> None:
    (seen,) = run_ranks(1, _count)
    hidden = ref.PRE_LN.hidden
    responses = (7 - 5) + (3 - 2) + (6 - 4) + 0
    assert seen[str(Head.LANGUAGE_MODEL)] == [sum(LENGTHS) * hidden, responses]
    assert seen[str(Head.SCALAR)] == [sum(LENGTHS) * hidden, len(LENGTHS)]
