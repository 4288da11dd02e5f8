"""Log-probabilities of tokens: plain torch, and the CUDA kernels on the emulator, by one oracle."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megachat.errors import ConfigError, KernelError
from megachat.ops import token_logprobs as module
from megachat.ops.registry import Backend
from megachat.ops.token_logprobs import token_logprobs, token_statistics
from tests.harness import run_ranks
from tests.kernels.emulated import emulated_cuda

VOCAB, PADDED_VOCAB = 50, 64
BACKENDS = (Backend.REFERENCE, Backend.CPU, Backend.CUDA)
KERNELS = (Backend.CPU, Backend.CUDA)
DTYPES = {
    Backend.REFERENCE: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    Backend.CPU: (torch.float32, torch.bfloat16),
    Backend.CUDA: (torch.float32, torch.bfloat16, torch.float16),
}
LOW = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in DTYPES[backend]
    if dtype is not torch.float64
]


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[None]:
    with emulated_cuda():
        yield


@contextmanager
def _chunks_of(elements: int) -> Iterator[None]:
    """The reference computes with at most so many elements at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_ELEMENTS", elements)
        yield


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
    with _chunks_of(chunk_tokens * PADDED_VOCAB):
        found = _ours(logits, targets, weights, temperature)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_gradients_agree_with_finite_differences() -> None:
    logits, targets, _ = _inputs(1, batch=2, seq=3)

    def outputs(leaf: Tensor) -> tuple[Tensor, Tensor]:
        found = token_statistics(leaf, targets, group=None, vocab_start=0, temperature=0.8)
        return found.logprobs, found.entropy

    assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(),))


@pytest.mark.parametrize(("backend", "dtype"), LOW)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_low_precision_logits_give_exact_float32_results_of_themselves(
    dtype: torch.dtype, temperature: float, backend: Backend
) -> None:
    logits, targets, weights = _inputs(2)
    logits = _padded(logits, dtype)
    expected = _oracle(logits, targets, weights, temperature)
    found = _ours(logits, targets, weights.float(), temperature, backend=backend)
    assert found[0].dtype == found[1].dtype == torch.float32 and found[2].dtype == dtype
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    eps = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=eps, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_logits_stay_untouched_and_padded_columns_get_no_gradient(backend: Backend) -> None:
    logits, targets, weights = _inputs(3)
    for dtype in (torch.float32, torch.bfloat16):
        padded = _padded(logits, dtype)
        before = padded.clone()
        gradient = _ours(padded, targets, weights.float(), 0.5, backend=backend)[2]
        assert torch.equal(padded, before)
        assert torch.equal(gradient[..., VOCAB:], torch.zeros_like(gradient[..., VOCAB:]))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits_stay_finite(backend: Backend) -> None:
    logits = torch.zeros(1, 3, 8)
    logits[0, 0, 2], logits[0, 1, 2], logits[0, 2] = 3e4, -3e4, 1e30
    targets = torch.tensor([[0, 0, 5]])
    leaf = logits.clone().requires_grad_()
    found = token_statistics(leaf, targets, group=None, vocab_start=0, backend=backend)
    (found.logprobs + found.entropy).sum().backward()
    assert leaf.grad.isfinite().all()
    expected = torch.tensor([[-3e4, -math.log(7), -math.log(8)]])
    torch.testing.assert_close(found.logprobs, expected)
    torch.testing.assert_close(found.entropy, torch.tensor([[0.0, math.log(7), math.log(8)]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_greedy_marks_targets_that_no_token_beats(backend: Backend) -> None:
    logits, _, _ = _inputs(4)
    logits = _padded(logits, torch.bfloat16)
    best = logits.float().argmax(dim=-1)
    worst = logits[..., :VOCAB].float().argmin(dim=-1)
    for temperature in (0.7, 1.0, 1.3):
        where = {"group": None, "vocab_start": 0, "temperature": temperature, "backend": backend}
        assert token_statistics(logits, best, **where).is_greedy.all()
        assert not token_statistics(logits, worst, **where).is_greedy.any()


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_token_that_shares_the_first_place_is_greedy(
    dtype: torch.dtype, temperature: float
) -> None:
    """Each column as the target; logits between which there are many ties."""
    generator = torch.Generator().manual_seed(8)
    logits = torch.randint(-3, 4, (VOCAB, 2, PADDED_VOCAB), generator=generator) * 1.7
    logits = _padded(logits[:1].expand(VOCAB, -1, -1), dtype)
    targets = torch.arange(VOCAB)[:, None].expand(-1, 2)
    best = logits.gather(2, targets[..., None]).squeeze(2) == logits.amax(dim=2)
    assert best.sum() > 4
    for backend in (backend for backend in BACKENDS if dtype in DTYPES[backend]):
        where = {"group": None, "vocab_start": 0, "temperature": temperature, "backend": backend}
        assert torch.equal(token_statistics(logits, targets, **where).is_greedy, best)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_what_is_not_finite_comes_out_of_all_backends_alike(temperature: float) -> None:
    """Rows: NaN at and beside the target, infinities, one token left, nothing but padding."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.linspace(-2, 2, 8).repeat(8, 1)
    logits[0, 3], logits[1, 5] = math.nan, math.nan
    logits[2, 3], logits[3, 5] = math.inf, math.inf
    logits[4, 3], logits[5, 5] = -math.inf, -math.inf
    logits[6, :3], logits[6, 4:] = lowest, -math.inf
    logits[7] = -math.inf
    targets, found = torch.full((1, 8), 3), []
    for backend in BACKENDS:
        leaf = logits.clone()[None].requires_grad_()
        where = {"group": None, "vocab_start": 0, "temperature": temperature, "backend": backend}
        statistics = token_statistics(leaf, targets, **where)
        (statistics.logprobs + statistics.entropy).sum().backward()
        found.append((statistics.logprobs, statistics.entropy, leaf.grad, statistics.is_greedy))
    for plain, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(plain, other, equal_nan=True)
    assert found[0][0][0].isnan().tolist() == [True] * 4 + [False] * 3 + [True]
    assert found[0][3][0].tolist() == [False] * 6 + [True, False]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (Backend.REFERENCE, torch.float64),
        *((backend, torch.float32) for backend in KERNELS),
    ],
)
def test_either_output_alone_gives_its_own_gradient(backend: Backend, dtype: torch.dtype) -> None:
    logits, targets, weights = _inputs(5)
    logits, weights = _padded(logits, dtype), weights.to(dtype)
    for index in (0, 1):
        only = weights.clone()
        only[1 - index] = 0.0
        expected = _oracle(logits, targets, only, 0.9)[2]
        leaf = logits.clone().requires_grad_()
        where = {"group": None, "vocab_start": 0, "temperature": 0.9, "backend": backend}
        if index == 0:
            found = token_logprobs(leaf, targets, **where)
        else:
            found = token_statistics(leaf, torch.zeros_like(targets), **where).entropy
        (weights[index] * found).sum().backward()
        torch.testing.assert_close(leaf.grad, expected.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_first_logits_are_read_in_place(backend: Backend) -> None:
    logits, targets, weights = _inputs(6)
    logits = _padded(logits, torch.float32)
    sequence_first = logits.transpose(0, 1).contiguous().transpose(0, 1)
    straight = _ours(logits, targets, weights.float(), 0.9, backend=backend)
    swapped = _ours(sequence_first, targets, weights.float(), 0.9, backend=backend)
    for one, other in zip(swapped, straight, strict=True):
        torch.testing.assert_close(one, other)
    stored = sequence_first.bfloat16()
    watch = _LargestTensor(besides=stored, dtypes=(torch.float32, torch.bfloat16))
    with _chunks_of(64), watch:
        token_logprobs(stored, targets, group=None, vocab_start=0, backend=backend)
    assert watch.elements <= 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_gives_empty_results(backend: Backend) -> None:
    leaf = torch.zeros(0, 4, 8, requires_grad=True)
    none = torch.zeros(0, 4, dtype=torch.int64)
    found = token_logprobs(leaf, none, group=None, vocab_start=0, backend=backend)
    found.sum().backward()
    assert found.shape == (0, 4) and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    logits, targets, _ = _inputs()
    with pytest.raises(ConfigError, match="temperature above 0, got"):
        token_logprobs(logits, targets, group=None, vocab_start=0, temperature=temperature)


def test_logits_that_kernels_cannot_read_are_refused() -> None:
    logits, targets = torch.zeros(1, 3, 64), torch.zeros(1, 3, dtype=torch.int64)
    where = {"group": None, "vocab_start": 0, "backend": Backend.CPU}
    with pytest.raises(KernelError, match="no CPU kernel for torch.float16: use float32 or bfloat"):
        token_logprobs(logits.half(), targets, **where)
    where["backend"] = Backend.CUDA
    with pytest.raises(KernelError, match="no CPU kernel for torch.float64: use float32 or"):
        token_logprobs(logits.double(), targets, **where)
    with pytest.raises(KernelError, match=r"rows of 248 bytes .* use backend = \"reference\""):
        token_logprobs(logits[..., :62].contiguous(), targets, **where)
    with pytest.raises(KernelError, match="needs contiguous torch.float32 tensors"):
        token_logprobs(logits[..., :32], targets, **where)


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
    watch = _LargestTensor(besides=leaf, dtypes=(torch.float32, torch.float64))
    with _chunks_of(chunk_tokens * vocab), watch:
        found = token_statistics(leaf, targets, group=None, vocab_start=0)
        (found.logprobs + 0.1 * found.entropy).sum().backward()
    # Per-token tensors (4 per token in one) are the only others.
    assert watch.elements <= max(chunk_tokens * vocab, 4 * batch * seq)
    assert leaf.grad.dtype == torch.bfloat16


def _sharded(
    world_size: int, dtype: torch.dtype, backend: Backend
) -> tuple[float, float, float, bool]:
    """Largest deviations of a rank's results from the unsharded float64 oracle."""
    logits, targets, weights = _inputs(7)
    logits = _padded(logits, dtype)
    expected = _oracle(logits, targets, weights, 0.7)
    rank, width = dist.get_rank(), PADDED_VOCAB // world_size
    mine = slice(rank * width, (rank + 1) * width)
    slice_of_mine = logits[..., mine].contiguous()
    where = {"group": dist.group.WORLD, "vocab_start": mine.start, "backend": backend}
    with _chunks_of(width * 4):
        found = _ours(
            slice_of_mine,
            targets,
            weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
            0.7,
            **where,
        )
    best, worst = (
        token_statistics(slice_of_mine, which, **where).is_greedy
        for which in (logits.argmax(dim=-1), logits[..., :VOCAB].argmin(dim=-1))
    )
    return (
        (found[0].double() - expected[0]).abs().max().item(),
        (found[1].double() - expected[1]).abs().max().item(),
        (found[2].double() - expected[2][..., mine]).abs().max().item(),
        bool(best.all() and not worst.any()),
    )


SHARDED_LIMITS = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (2e-5, 1e-5),
    torch.bfloat16: (2e-5, 2e-2),
    torch.float16: (2e-5, 2e-3),
}
"""Largest errors of results and of gradients."""


def _sharded_in_all_dtypes(
    world_size: int, backend: Backend
) -> dict[torch.dtype, tuple[float, float, float, bool]]:
    with emulated_cuda():
        return {dtype: _sharded(world_size, dtype, backend) for dtype in DTYPES[backend]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_vocabulary_cut_over_ranks_gives_the_same_results(
    world_size: int, backend: Backend
) -> None:
    for rank_results in run_ranks(world_size, _sharded_in_all_dtypes, world_size, backend):
        for dtype, (logprob, entropy, gradient, greedy) in rank_results.items():
            limit = SHARDED_LIMITS[dtype]
            assert logprob < limit[0] and entropy < limit[0] and gradient < limit[1], dtype
            assert greedy


def _nan_on_one_rank(backend: Backend) -> tuple[list[bool], list[bool], list[bool]]:
    """Which log-probabilities and entropies are NaN, and which targets are greedy."""
    rank = dist.get_rank()
    logits = torch.zeros(1, 2, 16)
    logits[0, :, 3] = 4.0
    if rank == 1:
        logits[0, 0, 5] = math.nan
        logits[0, :, 3] = 0.0
    targets = torch.tensor([[3, 3]])
    where = {"group": dist.group.WORLD, "vocab_start": 16 * rank, "backend": backend}
    with emulated_cuda():
        found = token_statistics(logits, targets, **where)
    return (
        found.logprobs[0].isnan().tolist(),
        found.entropy[0].isnan().tolist(),
        found.is_greedy[0].tolist(),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_of_another_rank_is_not_hidden(backend: Backend) -> None:
    for found in run_ranks(2, _nan_on_one_rank, backend):
        assert found == ([True, False], [True, False], [False, True])


def _slice_of_padding_alone(dtype: torch.dtype, backend: Backend) -> tuple[bool, float]:
    rank = dist.get_rank()
    logits = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mine = logits if rank == 0 else torch.full_like(logits, torch.finfo(dtype).min)
    targets = torch.tensor([[3, 5]])
    with emulated_cuda():
        found = token_statistics(
            mine.requires_grad_(), targets, group=dist.group.WORLD, vocab_start=8 * rank,
            temperature=0.5, backend=backend,
        )  # fmt: skip
        (found.logprobs + found.entropy).sum().backward()
    expected = (logits.detach().float() / 0.5).log_softmax(-1).gather(2, targets[..., None])
    error = (found.logprobs - expected.squeeze(2)).abs().max().item()
    return bool(mine.grad.isfinite().all()) and (rank == 0 or not mine.grad.any()), error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rank_whose_slice_is_padding_alone_changes_nothing(
    dtype: torch.dtype, backend: Backend
) -> None:
    """Divided by 0.5, float32's lowest number overflows."""
    for finite_and_zero, error in run_ranks(2, _slice_of_padding_alone, dtype, backend):
        assert finite_and_zero and error < 1e-5
