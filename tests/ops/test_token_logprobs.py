import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megachat.errors import ConfigError
from megachat.ops.token_logprobs import token_logprobs, token_statistics
from tests.harness import run_ranks

VOCAB, PADDED_VOCAB = 50, 64


def _inputs(seed: int = 0, *, batch: int = 3, seq: int = 5, scale: float = 3.0) -> tuple:
    """Padded float64 logits, targets and two weight tensors that make a scalar of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, seq, PADDED_VOCAB, generator=generator, dtype=torch.float64)
    logits = logits * scale
    targets = torch.randint(VOCAB, (batch, seq), generator=generator)
    weights = torch.randn(2, batch, seq, generator=generator, dtype=torch.float64)
    return logits, targets, weights


def _padded(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits in `dtype` with the lowest number in the padded columns, as the model has it."""
    padded = logits.to(dtype).clone()
    padded[..., VOCAB:] = torch.finfo(dtype).min
    return padded


def _oracle(logits: Tensor, targets: Tensor, weights: Tensor, temperature: float) -> tuple:
    """log_softmax over the unpadded columns; log-probs, entropy and the gradient of their sum."""
    leaf = logits.detach().double().clone().requires_grad_()
    log_p = (leaf[..., :VOCAB] / temperature).log_softmax(dim=-1)
    logprobs = log_p.gather(2, targets[..., None]).squeeze(2)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    (weights[0] * logprobs + weights[1] * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), leaf.grad


def _ours(logits: Tensor, targets: Tensor, weights: Tensor, temperature: float, **where) -> tuple:
    leaf = logits.detach().clone().requires_grad_()
    where = {"group": None, "vocab_start": 0, **where}
    found = token_statistics(leaf, targets, temperature=temperature, **where)
    (weights[0] * found.logprobs + weights[1] * found.entropy).sum().backward()
    return found.logprobs.detach(), found.entropy.detach(), leaf.grad


@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 4),
    seq=st.integers(1, 6),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    chunk_tokens=st.integers(1, 9),
)
@settings(deadline=None, max_examples=40)
def test_matches_log_softmax_in_float64_for_every_chunk_size(
    seed: int, batch: int, seq: int, temperature: float, chunk_tokens: int
) -> None:
    logits, targets, weights = _inputs(seed, batch=batch, seq=seq)
    logits = _padded(logits, torch.float64)
    expected = _oracle(logits, targets, weights, temperature)
    chunk_elements = chunk_tokens * PADDED_VOCAB
    found = _ours(logits, targets, weights, temperature, chunk_elements=chunk_elements)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_agree_with_finite_differences() -> None:
    logits, targets, _ = _inputs(1, batch=2, seq=3)

    def outputs(leaf: Tensor) -> tuple[Tensor, Tensor]:
        found = token_statistics(leaf, targets, group=None, vocab_start=0, temperature=0.8)
        return found.logprobs, found.entropy

    assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_low_precision_logits_give_exact_float32_results_of_themselves(
    dtype: torch.dtype, temperature: float
) -> None:
    logits, targets, weights = _inputs(2)
    logits = _padded(logits, dtype)
    expected = _oracle(logits, targets, weights, temperature)
    found = _ours(logits, targets, weights.float(), temperature)
    assert found[0].dtype == found[1].dtype == torch.float32 and found[2].dtype == dtype
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=eps, atol=1e-6)


def test_the_logits_stay_untouched_and_padded_columns_get_no_gradient() -> None:
    logits, targets, weights = _inputs(3)
    for dtype in (torch.float32, torch.bfloat16):
        padded = _padded(logits, dtype)
        before = padded.clone()
        gradient = _ours(padded, targets, weights.float(), 0.5)[2]
        assert torch.equal(padded, before)
        assert torch.equal(gradient[..., VOCAB:], torch.zeros_like(gradient[..., VOCAB:]))
        assert gradient.isfinite().all()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.zeros(1, 3, 8)
    logits[0, 0, 2], logits[0, 1, 2], logits[0, 2] = 3e4, -3e4, 1e30
    targets = torch.tensor([[0, 0, 5]])
    leaf = logits.clone().requires_grad_()
    found = token_statistics(leaf, targets, group=None, vocab_start=0)
    (found.logprobs + found.entropy).sum().backward()
    assert leaf.grad.isfinite().all()
    expected = torch.tensor([[-3e4, -math.log(7), -math.log(8)]])
    torch.testing.assert_close(found.logprobs, expected)
    torch.testing.assert_close(found.entropy, torch.tensor([[0.0, math.log(7), math.log(8)]]))


def test_is_greedy_marks_targets_that_no_token_beats() -> None:
    logits, _, _ = _inputs(4)
    logits = _padded(logits, torch.bfloat16)
    best = logits.float().argmax(dim=-1)
    worst = logits[..., :VOCAB].float().argmin(dim=-1)
    for temperature in (0.7, 1.0, 1.3):
        where = {"group": None, "vocab_start": 0, "temperature": temperature}
        assert token_statistics(logits, best, **where).is_greedy.all()
        assert not token_statistics(logits, worst, **where).is_greedy.any()


def test_either_output_alone_gives_its_own_gradient() -> None:
    logits, targets, weights = _inputs(5)
    logits = _padded(logits, torch.float64)
    for index in (0, 1):
        only = weights.clone()
        only[1 - index] = 0.0
        expected = _oracle(logits, targets, only, 0.9)[2]
        leaf = logits.clone().requires_grad_()
        where = {"group": None, "vocab_start": 0, "temperature": 0.9}
        if index == 0:
            found = token_logprobs(leaf, targets, **where)
        else:
            found = token_statistics(leaf, torch.zeros_like(targets), **where).entropy
        (weights[index] * found).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)


def test_sequence_first_logits_are_read_in_place() -> None:
    logits, targets, weights = _inputs(6)
    logits = _padded(logits, torch.float32)
    sequence_first = logits.transpose(0, 1).contiguous().transpose(0, 1)
    straight = _ours(logits, targets, weights.float(), 0.9)
    swapped = _ours(sequence_first, targets, weights.float(), 0.9)
    for one, other in zip(swapped, straight, strict=True):
        torch.testing.assert_close(one, other)
    stored = sequence_first.bfloat16()
    with _LargestTensor(besides=stored, dtypes=(torch.float32, torch.bfloat16)) as watch:
        token_logprobs(stored, targets, group=None, vocab_start=0, chunk_elements=64)
    assert watch.elements <= 64


def test_an_empty_batch_gives_empty_results() -> None:
    leaf = torch.zeros(0, 4, 8, requires_grad=True)
    found = token_logprobs(leaf, torch.zeros(0, 4, dtype=torch.int64), group=None, vocab_start=0)
    found.sum().backward()
    assert found.shape == (0, 4) and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    logits, targets, _ = _inputs()
    with pytest.raises(ConfigError, match="temperature above 0, got"):
        token_logprobs(logits, targets, group=None, vocab_start=0, temperature=temperature)


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, views of `besides` left out."""

    def __init__(self, *, besides: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self.elements = 0
        self._storage = besides.untyped_storage().data_ptr()
        self._dtypes = dtypes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype in self._dtypes:
                if leaf.untyped_storage().data_ptr() != self._storage:
                    self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("chunk_tokens", [1, 7, 16])
def test_no_float32_tensor_is_larger_than_a_chunk(chunk_tokens: int) -> None:
    batch, seq, vocab = 4, 32, 512
    leaf = torch.randn(batch, seq, vocab).bfloat16().requires_grad_()
    targets = torch.randint(vocab, (batch, seq))
    with _LargestTensor(besides=leaf, dtypes=(torch.float32, torch.float64)) as watch:
        found = token_statistics(
            leaf, targets, group=None, vocab_start=0, chunk_elements=chunk_tokens * vocab
        )
        (found.logprobs + 0.1 * found.entropy).sum().backward()
    # Per-token tensors (3 per token in one) are the only others.
    assert watch.elements <= max(chunk_tokens * vocab, 3 * batch * seq)
    assert leaf.grad.dtype == torch.bfloat16


def _sharded(world_size: int, dtype: torch.dtype) -> tuple[float, float, float, bool]:
    """Largest deviations of a rank's results from the unsharded float64 oracle."""
    logits, targets, weights = _inputs(7)
    logits = _padded(logits, dtype)
    expected = _oracle(logits, targets, weights, 0.7)
    rank, width = dist.get_rank(), PADDED_VOCAB // world_size
    mine = slice(rank * width, (rank + 1) * width)
    found = _ours(
        logits[..., mine].contiguous(),
        targets,
        weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
        0.7,
        group=dist.group.WORLD,
        vocab_start=mine.start,
        chunk_elements=width * 4,
    )
    greedy = token_statistics(
        logits[..., mine].contiguous(),
        logits.argmax(dim=-1),
        group=dist.group.WORLD,
        vocab_start=mine.start,
    )
    return (
        (found[0].double() - expected[0]).abs().max().item(),
        (found[1].double() - expected[1]).abs().max().item(),
        (found[2].double() - expected[2][..., mine]).abs().max().item(),
        bool(greedy.is_greedy.all()),
    )


def _sharded_in_three_dtypes(world_size: int) -> list[tuple[float, float, float, bool]]:
    return [_sharded(world_size, d) for d in (torch.float64, torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_vocabulary_cut_over_ranks_gives_the_same_results(world_size: int) -> None:
    for rank_results in run_ranks(world_size, _sharded_in_three_dtypes, world_size):
        limits = [(1e-10, 1e-10), (2e-5, 1e-5), (2e-5, 2e-2)]
        for (logprob, entropy, gradient, greedy), limit in zip(rank_results, limits, strict=True):
            assert logprob < limit[0] and entropy < limit[0] and gradient < limit[1]
            assert greedy


def _slice_of_padding_alone() -> tuple[bool, float]:
    rank = dist.get_rank()
    logits = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mine = logits if rank == 0 else torch.full_like(logits, torch.finfo(torch.bfloat16).min)
    targets = torch.tensor([[3, 5]])
    found = token_statistics(
        mine.requires_grad_(), targets, group=dist.group.WORLD, vocab_start=8 * rank,
        temperature=0.5,
    )  # fmt: skip
    (found.logprobs + found.entropy).sum().backward()
    expected = (logits.detach().float() / 0.5).log_softmax(-1).gather(2, targets[..., None])
    error = (found.logprobs - expected.squeeze(2)).abs().max().item()
    return bool(mine.grad.isfinite().all()) and (rank == 0 or not mine.grad.any()), error


def test_a_rank_whose_slice_is_padding_alone_changes_nothing() -> None:
    for finite_and_zero, error in run_ranks(2, _slice_of_padding_alone):
        assert finite_and_zero and error < 1e-5
