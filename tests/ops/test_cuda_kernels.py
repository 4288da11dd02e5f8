"""The CUDA backend as generation and losses call it, with its kernels on the emulator.

What the kernels compute is tested in `tests/kernels`; here it is that the right numbers reach them.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
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
from megachat.ops.registry import Backend, Op, registered_ops
from megachat.ops.sample import DrawRules, sample
from megachat.ops.tiled_linear import (
    FEW_TOKENS_CUDA,
    FEW_TOKENS_FUSED_CUDA,
    tiled_linear,
    tiled_linear_bias_relu,
)
from megachat.ops.token_logprobs import token_logprobs_backward, token_logprobs_forward
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
    """The second slice of a vocabulary, with padding behind it."""
    logits = (_random(6, 400, dtype=dtype) * 3)[:, :389]
    rules = DrawRules(
        suppressed=torch.tensor([1, 130]),
        stops=torch.tensor([2, 300]),
        min_new_tokens=3,
        first_group=4,
        temperature=0.7,
    )
    return logits, torch.arange(6) * 977 - 3, torch.arange(6), rules


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


NOT_SAMPLE = [op for op in DISPATCHED if op is not sample]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", NOT_SAMPLE, ids=lambda op: op.name)
def test_the_backend_computes_what_the_reference_does_in_float64(
    op: Op, dtype: torch.dtype
) -> None:
    _assert_exact(op, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", NOT_SAMPLE, ids=lambda op: op.name)
def test_a_gpu_computes_what_the_reference_does_in_float64(
    op: Op, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(cuda_kernels, "launchers", OF_A_DEVICE)
    _assert_exact(op, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backend_draws_what_the_reference_draws(dtype: torch.dtype) -> None:
    arguments = _sample(dtype)
    found, expected = (sample.on(b)(*arguments) for b in (Backend.CUDA, Backend.REFERENCE))
    assert torch.equal(found.columns, expected.columns)
    torch.testing.assert_close(found.scores, expected.scores, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.chosen, expected.chosen)
    torch.testing.assert_close(found.totals, expected.totals)


def _flat(op: Op, dtype: torch.dtype) -> tuple[Any, ...]:
    """Arguments as the schema has them: a record is its fields."""
    arguments = CASES[op.name](dtype)
    if op is not sample:
        return arguments
    *tensors, rules = arguments
    return (
        *tensors, rules.suppressed, rules.stops,
        rules.min_new_tokens, rules.first_group, rules.temperature,
    )  # fmt: skip


@pytest.mark.parametrize("op", DISPATCHED, ids=lambda op: op.name)
def test_schema_and_fake_tell_what_the_kernel_does(op: Op) -> None:
    """torch's own check: what is written, what aliases, shapes, dtypes and strides of results."""
    torch.library.opcheck(
        getattr(torch.ops.megachat, op.name).default,
        _flat(op, torch.bfloat16),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("op", DISPATCHED, ids=lambda op: op.name)
def test_on_fake_cuda_tensors_an_operation_gives_shapes_without_a_gpu(op: Op) -> None:
    real = _flat(op, torch.bfloat16)
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
        sample.on(Backend.CUDA)(torch.zeros(64, 4).t(), *_sample(torch.float32)[1:])


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
    assert [recipe.flags for recipe in recipes] == [(f"-arch={architecture}",)]
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
