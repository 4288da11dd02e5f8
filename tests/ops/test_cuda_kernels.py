"""The CUDA backend as generation and losses call it, with its kernels on the emulator.

What the kernels compute is tested in `tests/kernels`; here it is that the right numbers reach them.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import megachat.ops.epilogues
import megachat.ops.paged_cache
import megachat.ops.tiled_linear
from megachat.errors import KernelError
from megachat.ops import cuda_kernels
from megachat.ops.build import Recipe
from megachat.ops.philox import GROUP_TOKENS
from megachat.ops.registry import Backend, Op, registered_ops
from megachat.ops.sample import (
    DrawRules,
    History,
    choices,
    sample,
    sample_combine,
    scale,
)
from megachat.ops.tiled_linear import (
    FEW_TOKENS_CUDA,
    FEW_TOKENS_FUSED_CUDA,
    tiled_linear,
    tiled_linear_bias_relu,
)
from megachat.ops.token_logprobs import token_logprobs_backward, token_logprobs_forward
from megachat.ops.truncation import lowest_kept
from tests.kernels.build import KERNELS
from tests.kernels.emulated import EmulatedLibrary, emulated_cuda
from tests.ops.pages import make_pages

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DISPATCHED = [op for op in registered_ops().values() if op.cuda is not None]
OF_A_DEVICE = cuda_kernels.launchers
"""As it is where nothing is emulated."""
LENGTHS = [700, 1, 0, 17]
C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


@pytest.fixture(scope="module", autouse=True)
def emulator() -> Iterator[None]:
    with emulated_cuda():
        yield


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def _append(dtype: torch.dtype) -> tuple[Any, ...]:
    keys, values = torch.zeros(2, 3, 16, 2, 64, dtype=dtype)
    qkv, bias = _random(5, 384, dtype=dtype), _random(384, dtype=dtype)
    return qkv, bias, keys, values, torch.tensor([40, 0, 7, 16, 3])


def _decode(dtype: torch.dtype) -> tuple[Any, ...]:
    """Tables of which a wider one is cut, and sequences so long that the work is split."""
    pages = make_pages(LENGTHS, block_size=16, heads=2, head_dim=64, dtype=dtype)
    wide = torch.nn.functional.pad(pages.tables, (0, 3))
    query = _random(len(LENGTHS), 2, 64, dtype=dtype)
    tables = wide[:, : pages.tables.shape[1]]
    return query, pages.keys, pages.values, tables, torch.tensor(LENGTHS)


def _prefill(dtype: torch.dtype) -> tuple[Any, ...]:
    starts, counts = torch.tensor([0, 20, 3]), torch.tensor([9, 40, 1])
    pages = make_pages((starts + counts).tolist(), block_size=16, head_dim=80, dtype=dtype)
    query = _random(int(counts.sum()), 2, 80, dtype=dtype)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return query, pages.keys, pages.values, pages.tables, starts, offsets


def _linear(dtype: torch.dtype) -> tuple[Any, ...]:
    """Tiles that are columns of a wider matrix, and so many columns that the work is split."""
    wide = _random(2, 72, 2064, dtype=dtype)
    return _random(11, 4096, dtype=dtype), wide[..., 8:2056]


def _linear_relu(dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight = _linear(dtype)
    return x, weight, 30 * _random(72, dtype=dtype)


def _relu(dtype: torch.dtype) -> tuple[Any, ...]:
    return _random(3, 264, dtype=dtype), _random(264, dtype=dtype)


def _norm(dtype: torch.dtype) -> tuple[Any, ...]:
    x, residual = _random(2, 3, 136, dtype=dtype)
    return (x, _random(136, dtype=dtype), residual, *_random(2, 136, dtype=dtype), 1e-5)


def _sample(dtype: torch.dtype) -> tuple[Any, ...]:
    """The second slice of a vocabulary, with padding behind it, as the schema has it."""
    logits = (_random(6, 400, dtype=dtype) * 3)[:, :389]
    history = torch.randint(400, 1000, (6, 11), generator=torch.Generator().manual_seed(2))
    return (
        *(logits, torch.arange(6) * 977 - 3, torch.arange(6)),
        *(torch.tensor([1, 130]), torch.tensor([2, 300]), 3, 4, 0.7, 5, 0.9, 1.3),
        *(history, torch.arange(6) + 1, torch.linspace(0, 4, 6)),
    )


def _combine(dtype: torch.dtype) -> tuple[Any, ...]:
    parts = _random(3, 4, 5, dtype=dtype)
    parts[:, 1] = torch.arange(15).view(3, 5) * 3000
    parts[2, 0, 4] = parts[:2, 0, 4].max()
    return (parts,)


def _token_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the second of three slices, with padding; targets in all three."""
    logits = _random(5, 264, dtype=dtype) * 3
    logits[:, 261:] = torch.finfo(dtype).min
    return logits, torch.tensor([264, 3, 524, 600, 300])


def _log_forward(dtype: torch.dtype) -> tuple[Any, ...]:
    return *_token_logits(dtype), 264, 0.7


def _log_backward(dtype: torch.dtype) -> tuple[Any, ...]:
    """The gradient of a sum is one number, expanded."""
    logits, targets = _token_logits(dtype)
    logsumexp = (logits.float() / 0.7).logsumexp(1) + 0.5  # the other slices hold as much again
    entropy, gradient = torch.linspace(0.5, 4.0, 5), torch.tensor(1.5).expand(5)
    return logits, targets, logsumexp, entropy, gradient, _random(5, dtype=torch.float32), 264, 0.7


CASES: dict[str, Callable[[torch.dtype], tuple[Any, ...]]] = {
    "bias_relu": _relu,
    "bias_residual_layer_norm": _norm,
    "kv_append": _append,
    "paged_attention_decode": _decode,
    "paged_attention_prefill": _prefill,
    "sample": _sample,
    "sample_combine": _combine,
    "tiled_linear": _linear,
    "tiled_linear_bias_relu": _linear_relu,
    "token_logprobs_backward": _log_backward,
    "token_logprobs_forward": _log_forward,
}


def _copies(
    arguments: tuple[Any, ...], dtype: torch.dtype | None = None, device: str = "cpu"
) -> list[Any]:
    """Arguments on a device, floating ones in another dtype if asked."""
    return [
        argument.to(device, dtype if dtype and argument.is_floating_point() else argument.dtype)
        if isinstance(argument, Tensor)
        else argument
        for argument in arguments
    ]


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in tree for leaf in _tensors(part)] if isinstance(tree, tuple) else []


def _assert_exact(op: Op, dtype: torch.dtype, device: str) -> None:
    """Results, and what the operation writes, against the reference in float64."""
    arguments = CASES[op.name](dtype)
    exact = _copies(arguments, torch.float64)
    expected = _tensors(op.reference(*exact)) + _tensors(tuple(exact))
    there = tuple(_copies(arguments, device=device))
    found = _tensors(op.on(Backend.CUDA)(*there)) + _tensors(there)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape
        scale = other.abs().max().clamp(min=1)
        assert ((mine.cpu().double() - other).abs().max() / scale).item() <= op.tolerance[dtype]


EXACT = [(op, dtype) for op in DISPATCHED if op is not sample for dtype in op.tolerance]
"""Not `sample`, of which rounding may decide: it has tests of its own."""


def _name(value: Any) -> str:
    return value.name if isinstance(value, Op) else str(value)


@pytest.mark.parametrize(("op", "dtype"), EXACT, ids=_name)
def test_the_backend_computes_what_the_reference_does_in_float64(
    op: Op, dtype: torch.dtype
) -> None:
    _assert_exact(op, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "dtype"), EXACT, ids=_name)
def test_a_gpu_computes_what_the_reference_does_in_float64(
    op: Op, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_kernels, "launchers", OF_A_DEVICE)
    _assert_exact(op, dtype, "cuda")


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Rows of a slice of the vocabulary, and all that a draw is told of them."""

    logits: Tensor
    """[rows, columns], with padding behind each row."""
    keys: Tensor
    positions: Tensor
    history: History
    rules: DrawRules

    def on(self, backend: Backend, *, device: str = "cpu", edges: bool = False) -> Tensor:
        """The parts as a backend computes them, with edges that torch has found if asked."""
        rules, history = self.rules, self.history
        there = {
            "keys": self.keys.to(device),
            "positions": self.positions.to(device),
            "history": History(
                tokens=history.tokens.to(device), lengths=history.lengths.to(device)
            ),
            "rules": replace(
                rules, suppressed=rules.suppressed.to(device), stops=rules.stops.to(device)
            ),
        }
        # The rows keep their padding, as those that a model computes.
        width = self.logits.stride(0)
        padded = self.logits.as_strided((len(self.logits), width), (width, 1)).to(device)
        logits, given = padded[:, : self.logits.shape[1]], None
        if edges and rules.truncates:
            choice = choices(
                scale(logits, rules.temperature),
                positions=there["positions"],
                rules=there["rules"],
                history=there["history"],
            )
            given = lowest_kept(choice, top_k=rules.top_k, top_p=rules.top_p)
        return sample.on(backend)(logits, **there, edges=given).cpu()


def _draws(
    dtype: torch.dtype,
    *,
    temperature: float,
    penalty: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 3,
) -> Draws:
    """Twelve rows with histories of one token to all, some of it outside of the slice.

    What is suppressed, may not stop yet or was said is among the likely tokens of some rows.
    """
    rows, columns, start = 12, 389, 4 * GROUP_TOKENS
    logits = (_random(rows, 400, dtype=dtype) * 3)[:, :columns]
    likely = logits.topk(3, dim=1).indices
    elsewhere = torch.tensor([start - 1, start + columns]).expand(rows, 2)
    history = torch.cat([likely + start, elsewhere, likely[:1].expand(rows, 3) + start], dim=1)
    return Draws(
        logits=logits,
        keys=torch.arange(rows) * 977 - 3,
        positions=torch.arange(rows) % 5,
        history=History(tokens=history, lengths=torch.arange(rows) % history.shape[1] + 1),
        rules=DrawRules(
            suppressed=torch.cat([likely[1, :1], torch.tensor([388])]),
            stops=torch.cat([likely[5:8, 0], torch.tensor([300])]),
            min_new_tokens=min_new_tokens,
            first_group=4,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=penalty,
        ),
    )


def _assert_same_draws(found: Tensor, expected: Tensor) -> None:
    """Scores and logsumexps to rounding, tokens and their logits to the last bit."""
    torch.testing.assert_close(found[0], expected[0], atol=2e-6, rtol=1e-6)
    assert torch.equal(found[1:3], expected[1:3])
    torch.testing.assert_close(found[3], expected[3], atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("top_k", [0, 1, 40, 5000])
@pytest.mark.parametrize("penalty", [0.6, 1.0, 1.7])
def test_the_backend_draws_what_the_reference_draws_by_all_rules(
    penalty: float, top_k: int, top_p: float, temperature: float, dtype: torch.dtype
) -> None:
    draws = _draws(dtype, temperature=temperature, penalty=penalty, top_k=top_k, top_p=top_p)
    expected = draws.on(Backend.REFERENCE)
    _assert_same_draws(draws.on(Backend.CUDA), expected)
    _assert_same_draws(draws.on(Backend.CUDA, edges=True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (1, 1.0), (40, 1.0), (0, 0.8), (40, 0.8)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_gpu_draws_what_the_reference_draws_on_it(
    temperature: float,
    top_k: int,
    top_p: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An edge of top-k 1 is the kernel's own logit, or none is."""
    monkeypatch.setattr(cuda_kernels, "launchers", OF_A_DEVICE)
    draws = _draws(dtype, temperature=temperature, penalty=1.7, top_k=top_k, top_p=top_p)
    expected = draws.on(Backend.REFERENCE, device="cuda")
    for edges in (False, True):
        _assert_same_draws(draws.on(Backend.CUDA, device="cuda", edges=edges), expected)


def test_stops_may_come_once_it_is_late_enough() -> None:
    """Rows whose most likely token is a stop, at positions 0 to 2 of at least 1, 2 and 3 tokens."""
    tokens = []
    for min_new_tokens in (0, 1, 2, 3):
        draws = _draws(torch.float32, temperature=0.0, min_new_tokens=min_new_tokens)
        found = draws.on(Backend.CUDA)
        _assert_same_draws(found, draws.on(Backend.REFERENCE))
        tokens.append(found[1, 5:8])
    assert [int((found == tokens[0]).sum()) for found in tokens] == [3, 3, 2, 1]


@pytest.mark.parametrize("op", DISPATCHED, ids=lambda op: op.name)
def test_schema_and_fake_tell_what_the_kernel_does(op: Op) -> None:
    """torch's own check: what is written, what aliases, shapes, dtypes and strides of results."""
    torch.library.opcheck(
        getattr(torch.ops.megachat, op.name).default,
        CASES[op.name](next(reversed(op.tolerance))),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("op", DISPATCHED, ids=lambda op: op.name)
def test_on_fake_cuda_tensors_an_operation_gives_shapes_without_a_gpu(op: Op) -> None:
    real = CASES[op.name](next(reversed(op.tolerance)))
    with FakeTensorMode():
        fake = [
            torch.empty(argument.shape, dtype=argument.dtype, device="cuda")
            if isinstance(argument, Tensor)
            else argument
            for argument in real
        ]
        results = _tensors(getattr(torch.ops.megachat, op.name)(*fake))
    assert results and all(result.device.type == "cuda" for result in results)


def test_many_tokens_go_to_a_large_product_that_ignores_the_tiling() -> None:
    x, weight = (
        _random(FEW_TOKENS_CUDA + 1, 64, dtype=torch.bfloat16),
        _random(4, 24, 16, dtype=torch.bfloat16),
    )
    op, with_relu = tiled_linear.on(Backend.CUDA), tiled_linear_bias_relu.on(Backend.CUDA)
    whole = weight.transpose(0, 1).reshape(1, 24, 64)
    bias = torch.ones(24, dtype=torch.bfloat16)
    assert torch.equal(op(x, weight), op(x, whole))
    tolerance = tiled_linear.tolerance[torch.bfloat16]
    few = op(x[:FEW_TOKENS_CUDA], weight)
    error = (op(x, weight)[:FEW_TOKENS_CUDA] - few).abs().max() / few.abs().max()
    assert error <= tolerance
    few = with_relu(x[:FEW_TOKENS_FUSED_CUDA], whole, bias)
    error = (with_relu(x, whole, bias)[:FEW_TOKENS_FUSED_CUDA] - few).abs().max()
    assert error / few.abs().max() <= 2 * tolerance  # the two together round twice


def test_what_a_kernel_would_misread_is_refused() -> None:
    x, bias = torch.zeros(2, 64), torch.zeros(64)
    relu = megachat.ops.epilogues.bias_relu.on(Backend.CUDA)
    with pytest.raises(
        KernelError, match="has no CPU kernel for torch.float64: use float32 or bfl"
    ):
        relu(x.double(), bias.double())
    with pytest.raises(KernelError, match="needs contiguous torch.float32 tensors on cpu"):
        relu(x, bias.half())
    with pytest.raises(KernelError, match=r"rows of 252 bytes .* use backend = \"reference\""):
        relu(x[:, :63].contiguous(), bias[:63].contiguous())
    with pytest.raises(KernelError, match="starts between two such packs"):
        relu(x, torch.zeros(68)[1:65])
    with pytest.raises(KernelError, match="rows must be contiguous"):
        tiled_linear.on(Backend.CUDA)(x, torch.zeros(2, 32, 8).transpose(1, 2))
    logits, targets, *rest = _log_backward(torch.bfloat16)
    with pytest.raises(KernelError, match="no CPU kernel for torch.bfloat16: use float32"):
        token_logprobs_backward.on(Backend.CUDA)(logits, targets, rest[0].bfloat16(), *rest[1:])
    with pytest.raises(KernelError, match="needs contiguous torch.int64 tensors on cpu"):
        token_logprobs_forward.on(Backend.CUDA)(logits, targets.int(), 264, 0.7)
    with pytest.raises(KernelError, match="contiguous rows"):
        torch.ops.megachat.sample(torch.zeros(64, 4).t(), *_sample(torch.float32)[1:])
    *before, tokens, lengths, edges = _sample(torch.float32)
    with pytest.raises(KernelError, match="sample has no CPU kernel for torch.float64: use float3"):
        torch.ops.megachat.sample(*before, tokens, lengths, edges.double())
    with pytest.raises(KernelError, match="needs contiguous torch.int64 tensors"):
        torch.ops.megachat.sample(*before, tokens.t(), lengths, edges)
    with pytest.raises(KernelError, match=r"sample was not launched \(cudaError 1\) for shapes"):
        torch.ops.megachat.sample(*before, None, None, edges)
    with pytest.raises(KernelError, match="needs contiguous torch.float64 tensors"):
        sample_combine.on(Backend.CUDA)(_combine(torch.float64)[0].transpose(0, 2))


def test_a_shape_that_the_kernels_do_not_know_is_named() -> None:
    """Heads of 48 columns: OPT has none."""
    arguments = (
        _random(1, 288, dtype=torch.float32),
        torch.zeros(288),
        *torch.zeros(2, 1, 16, 2, 48),
    )
    with pytest.raises(KernelError, match=r"kv_append was not launched \(cudaError 1\) for shapes"):
        megachat.ops.paged_cache.kv_append.on(Backend.CUDA)(*arguments, torch.tensor([0]))


def test_without_a_gpu_or_with_an_old_one_the_message_says_what_to_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(KernelError, match=r"this one is on the cpu: use backend = \"ref"):
        OF_A_DEVICE(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(KernelError, match=r"capability 8.0 .* this device has 7.5"):
        OF_A_DEVICE(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "architecture"), [((8, 0), "sm_80"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")]
)
def test_the_kernels_are_built_for_the_device_and_a_warning_names_one_that_has_not_run_them(
    capability: tuple[int, int],
    architecture: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipes: list[Recipe] = []

    def load(recipe: Recipe) -> EmulatedLibrary:
        recipes.append(recipe)
        return EmulatedLibrary()

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132)
    )
    monkeypatch.setattr(cuda_kernels, "load_library", load)
    with FakeTensorMode():
        OF_A_DEVICE.__wrapped__(torch.device("cuda", 0))
    assert [recipe.targets for recipe in recipes] == [(architecture,)]
    assert list(recipes[0].sources.glob("*.cu")) and recipes[0].toolchain.compiler == "nvcc"
    warned = f"compute capability 9.0, this one has {'.'.join(map(str, capability))}"
    assert (warned in caplog.text) is (capability != (9, 0))


def _declared(source: Path) -> dict[str, tuple[type, ...]]:
    """Parameters of the functions that a source exports."""
    text = source.read_text(encoding="utf-8")
    found = {}
    for name, parameters in re.findall(r"MEGACHAT_EXPORT \w+ megachat_(\w+)\(([^)]*)\)", text):
        found[name] = tuple(
            ctypes.c_void_p if "*" in parameter else C_TYPES[parameter.split()[-2]]
            for parameter in parameters.split(",")
        )
    return found


def test_launchers_are_called_as_the_sources_declare_them() -> None:
    declared: dict[str, tuple[type, ...]] = {}
    for source in (KERNELS / "cuda").glob("*.cu"):
        declared |= _declared(source)
    assert {name: declared[name] for name in cuda_kernels.LAUNCHERS} == cuda_kernels.LAUNCHERS
