import contextlib
import gc
import io
import math
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megachat.errors import ConfigError, PhaseError
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.training.schedules import OptimizerConfig
from megachat.training.zero1 import Zero1Optimizer
from tests.harness import run_ranks

CONFIG = OptimizerConfig(
    learning_rate=0.1, beta1=0.8, beta2=0.9, epsilon=1e-3, weight_decay=0.3, clip_norm=1.0
)
RATES = (0.1, 0.02, 0.05)


class _Model(nn.Module):
    """Odd sizes, so that the flat buffers need padding and parameters straddle two ranks."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.matrix, self.other, self.bias = (
            nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape in ((5, 3), (7,), (11,))
        )


def _gradients(rank: int, step: int) -> list[Tensor]:
    """One gradient a parameter; small on some steps, so that not every step is clipped."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    size = 0.02 if step == 1 else 1.0
    return [size * torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), (11,))]


def _backward(model: _Model, gradients: list[Tensor]) -> None:
    loss = sum(
        (parameter.float() * gradient).sum()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True)
    )
    assert isinstance(loss, Tensor)
    loss.backward()


def _optimizer(
    model: _Model,
    config: OptimizerConfig = CONFIG,
    parameter_groups: list[list[str]] | None = None,
) -> Zero1Optimizer:
    groups = ProcessGroups.create(ParallelLayout(data=dist.get_world_size()))
    return Zero1Optimizer(
        model,
        groups=groups,
        config=config,
        decayed={"matrix", "other"},
        parameter_groups=parameter_groups,
    )


def _three_steps(
    config: OptimizerConfig, parameter_groups: list[list[str]] | None = None
) -> tuple[list[float], list[Tensor], int]:
    """Norms, final weights, and the number of state elements on this rank."""
    model = _Model()
    optimizer = _optimizer(model, config, parameter_groups)
    norms = []
    for step, rate in enumerate(RATES):
        optimizer.begin_gradients(passes=1)
        _backward(model, _gradients(dist.get_rank(), step))
        optimizer.reduce_gradients()
        report = optimizer.step(rate)
        assert (report.learning_rate, report.skipped) == (rate, False)
        assert all(parameter.grad is None for parameter in model.parameters())
        norms.append(report.gradient_norm)
    kept = optimizer.optimizer_tensors()
    elements = sum(moment.numel() for moment in kept.moments) // 2
    assert elements == sum(master.numel() for master in kept.masters)
    return norms, [parameter.detach().clone() for parameter in model.parameters()], elements


def _expected_steps(world_size: int, config: OptimizerConfig) -> tuple[list[float], list[Tensor]]:
    model = _Model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.matrix, model.other], "weight_decay": config.weight_decay},
            {"params": [model.bias], "weight_decay": 0.0},
        ],
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )
    norms = []
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        parts = [_gradients(rank, step) for rank in range(world_size)]
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = sum((part[index] for part in parts), torch.zeros(()))
        limit = config.clip_norm or math.inf
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
    return norms, list(model.parameters())


@pytest.mark.parametrize(
    ("world_size", "clip_norm", "parameter_groups"),
    [
        (1, 1.0, None),
        (3, 1.0, None),
        (3, 0.0, None),
        (3, 1.0, [["matrix"], [], ["other"], ["bias"]]),
    ],
)
def test_steps_equal_adamw_on_the_sum_of_the_ranks_gradients(
    world_size: int, clip_norm: float, parameter_groups: list[list[str]] | None
) -> None:
    """Also where the gradients take several buffers, one of them empty."""
    config = CONFIG.model_copy(update={"clip_norm": clip_norm})
    expected_norms, expected = _expected_steps(world_size, config)
    assert min(expected_norms) < 1.0 < max(expected_norms)
    for norms, weights, _ in run_ranks(world_size, _three_steps, config, parameter_groups):
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        for found, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_each_rank_keeps_its_share_of_the_optimizer_state() -> None:
    elements = [found for _, _, found in run_ranks(3, _three_steps, CONFIG)]
    assert len(set(elements)) == 1
    assert 33 <= 3 * elements[0] <= 33 + 2 * 6, "both flat buffers are padded to whole shares"


def _tensors_that_may_leave(dtype: torch.dtype) -> list[tuple[int, int]]:
    """(elements of state, elements of gradients) before and after the first step."""
    model = _Model(dtype)
    optimizer = _optimizer(model)
    found = []
    for step in range(2):
        kept = optimizer.optimizer_tensors()
        gradients, state = kept.gradients, [*kept.masters, *kept.moments]
        assert all(not gradient.any() for gradient in gradients)
        assert {tensor.dtype for tensor in [*state, *gradients]} == {torch.float32}
        found.append((sum(map(Tensor.numel, state)), sum(map(Tensor.numel, gradients))))
        optimizer.begin_gradients(passes=1)
        _backward(model, _gradients(dist.get_rank(), step))
        optimizer.reduce_gradients()
        optimizer.step(0.1)
    return found


def test_state_and_dead_gradients_are_those_of_adamw_and_of_bf16_training() -> None:
    """22 and 11 elements, each padded to two for every one of two ranks: 24 and 12."""
    for found in run_ranks(2, _tensors_that_may_leave, torch.bfloat16):
        assert found == [(18, 36), (54, 36)]
    for found in run_ranks(2, _tensors_that_may_leave, torch.float32):
        assert found == [(18, 0), (54, 0)]


class _ReceivedBytes(TorchDispatchMode):
    """Counts below torch.distributed what this rank must get from others, by collective."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            size = dist.get_world_size()
            moved = {
                "recv_": lambda: args[0][0].nbytes,
                "send": lambda: 0,
                "_allgather_base_": lambda: args[0].nbytes - args[1].nbytes,
                # A ring's reduce-scatter and all-gather.
                "allreduce_": lambda: 2 * (size - 1) * args[0][0].nbytes // size,
            }
            name = func.overloadpacket.__name__
            self.by_name[name] += moved[name]()
        return func(*args, **(kwargs or {}))


def _bytes_of_a_step(dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Bytes by collective, and the largest of what both flat buffers hold together."""
    model = _Model(dtype)
    optimizer = _optimizer(model)
    for _ in range(2):  # the first step makes the moments
        with _ReceivedBytes() as received:
            optimizer.begin_gradients(passes=1)
            _backward(model, _gradients(dist.get_rank(), 0))
            optimizer.reduce_gradients()
            assert not optimizer.step(0.1).skipped
    elements = sum(master.numel() for master in optimizer.optimizer_tensors().masters)
    return dict(received.by_name), elements * dist.get_world_size()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_moves_each_gradient_and_each_weight_once(
    world_size: int, dtype: torch.dtype
) -> None:
    """(d - 1) / d of both, which no algorithm goes below; norms take a few bytes more."""
    for found, elements in run_ranks(world_size, _bytes_of_a_step, dtype):
        others = elements * (world_size - 1) // world_size
        norms = found.pop("allreduce_")
        assert found == {
            "recv_": others * 4,
            "send": 0,
            "_allgather_base_": others * dtype.itemsize,
        }
        assert norms <= 32


def _accumulate_in_bf16_model() -> dict[str, float]:
    """On every rank 1 + 256 x 2^-9: in bf16 the small terms would vanish beside the 1."""
    model = _Model(torch.bfloat16)
    optimizer = _optimizer(model, CONFIG.model_copy(update={"clip_norm": 0.0}))
    ones = [torch.ones_like(parameter).float() for parameter in model.parameters()]
    optimizer.begin_gradients(passes=257)
    for size in (1.0, *[2.0**-9] * 256):
        _backward(model, [size * one for one in ones])
    local = optimizer.gradient(model.bias).clone()
    optimizer.reduce_gradients()
    flats = optimizer.optimizer_tensors().gradients
    own = torch.cat([flat.chunk(dist.get_world_size())[dist.get_rank()] for flat in flats])
    summed = own[own != 0].clone()
    norm = optimizer.step(0.0).gradient_norm
    return {
        "local": local.unique().item(),
        "summed": summed.unique().item(),
        "elements": summed.numel(),
        "norm": norm,
        "cleared": optimizer.gradient(model.bias).abs().max().item(),
    }


def test_bf16_gradients_are_accumulated_and_reduced_in_fp32() -> None:
    results = run_ranks(3, _accumulate_in_bf16_model)
    assert sum(found.pop("elements") for found in results) == 33
    for found in results:
        assert found == {
            "local": 1.5,
            "summed": 4.5,
            "norm": pytest.approx(4.5 * math.sqrt(33)),
            "cleared": 0.0,
        }


def _creep() -> tuple[Tensor, Tensor]:
    """A hundred steps of 2^-11: each is far below what a bf16 weight of 1 can show (2^-8)."""
    model = _Model(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    config = OptimizerConfig(beta1=0.0, beta2=0.0, epsilon=1e-12, clip_norm=0.0)
    optimizer = _optimizer(model, config)
    for _ in range(100):
        optimizer.begin_gradients(passes=1)
        _backward(model, [-torch.ones_like(each).float() for each in model.parameters()])
        optimizer.reduce_gradients()
        optimizer.step(2.0**-11)
    return model.matrix.detach().clone(), model.bias.detach().clone()


def test_bf16_weights_move_by_steps_too_small_for_bf16() -> None:
    wanted = torch.tensor(1.0 + 100 * 2.0**-11, dtype=torch.bfloat16)
    for matrix, bias in run_ranks(2, _creep):
        assert matrix.unique().tolist() == bias.unique().tolist() == [wanted.item()]


def _one_bad_element(dtype: torch.dtype, index: int, bad: float) -> dict[str, bool]:
    """Only the last rank's gradient of one parameter is not finite."""
    model, twin = _Model(dtype), _Model(dtype)
    optimizer, clean = _optimizer(model), _optimizer(twin)
    rank = dist.get_rank()
    outcomes: dict[str, bool] = {}
    for step in range(3):
        gradients = _gradients(rank, step)
        if step != 1:
            clean.begin_gradients(passes=1)
            _backward(twin, gradients)
            clean.reduce_gradients()
            clean.step(0.1)
        elif rank == dist.get_world_size() - 1:
            gradients[index].view(-1)[-1] = bad
        optimizer.begin_gradients(passes=1)
        _backward(model, gradients)
        optimizer.reduce_gradients()
        report = optimizer.step(0.1)
        outcomes[f"step {step} skipped"] = report.skipped
        outcomes[f"step {step} finite"] = math.isfinite(report.gradient_norm)
    outcomes["equal"] = all(
        torch.equal(one, other)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True)
    )
    return outcomes


def _all_bad_elements() -> list[dict[str, bool]]:
    return [
        _one_bad_element(dtype, index, bad)
        for dtype in (torch.float32, torch.bfloat16)
        for index, bad in ((0, math.nan), (2, math.inf), (1, -math.inf))
    ]


def test_one_element_that_is_not_finite_skips_the_step_everywhere_and_leaves_no_trace() -> None:
    for results in run_ranks(3, _all_bad_elements):
        for result in results:
            skipped = [result[f"step {step} skipped"] for step in range(3)]
            finite = [result[f"step {step} finite"] for step in range(3)]
            assert (skipped, finite) == ([False, True, False], [True, False, True])
            assert result["equal"]


def _fault_in_a_copy(dtype: torch.dtype) -> dict[str, bool]:
    """Two tensor ranks hold the same bias; only the one whose copy is not counted has a NaN."""
    groups = ProcessGroups.create(ParallelLayout(tensor=2, data=dist.get_world_size() // 2))
    model = _Model(dtype)
    vars(model.matrix)["tensor_model_parallel"] = True
    vars(model.other)["tensor_model_parallel"] = True
    optimizer = Zero1Optimizer(model, groups=groups, config=CONFIG, decayed={"matrix", "other"})
    outcomes = {}
    for step in range(3):
        before = _everything(model, optimizer)
        gradients = _gradients(groups.coordinate.data, step)
        if step == 1 and dist.get_rank() == dist.get_world_size() - 1:
            gradients[2][3] = math.nan
        optimizer.begin_gradients(passes=1)
        _backward(model, gradients)
        optimizer.reduce_gradients()
        outcomes[f"step {step} skipped"] = optimizer.step(0.1).skipped
        after = _everything(model, optimizer)
        outcomes[f"step {step} changed"] = not all(map(torch.equal, before, after))
    return outcomes


def _everything(model: nn.Module, optimizer: Zero1Optimizer) -> list[Tensor]:
    """Copies of weights, masters and moments."""
    kept = optimizer.optimizer_tensors()
    return [each.detach().clone() for each in (*model.parameters(), *kept.masters, *kept.moments)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_fault_in_a_copy_that_the_norm_leaves_out_skips_the_step_too(world_size: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for found in run_ranks(world_size, _fault_in_a_copy, dtype):
            assert [found[f"step {step} skipped"] for step in range(3)] == [False, True, False]
            assert [found[f"step {step} changed"] for step in range(3)] == [True, False, True]


def _build_quietly() -> tuple[str, str]:
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        pytest.raises(ConfigError) as mixed,
    ):
        _optimizer(_Model())
        model = _Model()
        model.bias.data = model.bias.data.bfloat16()
        _optimizer(model)
    return printed.getvalue(), str(mixed.value)


def test_building_prints_nothing_and_mixed_dtypes_are_refused() -> None:
    printed, message = run_ranks(1, _build_quietly)[0]
    assert printed == ""
    assert "float32" in message
    assert "bfloat16" in message


def _end_and_go_on() -> None:
    """An optimizer that has ended leaves weights and nothing else; the next one trains on."""
    for dtype in (torch.float32, torch.bfloat16):
        model = _Model(dtype)
        own_hook = model.bias.register_hook(lambda gradient: gradient)
        bare = {name: set(vars(parameter)) for name, parameter in model.named_parameters()}
        for step in range(2):  # with the second one, what the first one left would show
            optimizer = _optimizer(model)
            optimizer.begin_gradients(passes=1)
            _backward(model, _gradients(dist.get_rank(), step))
            optimizer.reduce_gradients()
            optimizer.step(0.1)
            _check_end(model, optimizer, bare)
        assert len(model.bias._backward_hooks) == 1, "a hook of the model's own stays"
        own_hook.remove()


def _check_end(model: _Model, optimizer: Zero1Optimizer, bare: dict[str, set[str]]) -> None:
    kept = optimizer.optimizer_tensors()
    memory = [
        StorageWeakRef(tensor.untyped_storage())
        for tensor in (*kept.masters, *kept.moments, *kept.gradients)
    ]
    inner: weakref.ref[Any] = weakref.ref(optimizer._optimizer)
    del kept
    before = [parameter.detach().clone() for parameter in model.parameters()]
    gc.disable()  # the end itself frees
    try:
        for _ in range(2):
            optimizer.close()
        assert inner() is None and all(ref.expired() for ref in memory)
    finally:
        gc.enable()
    for (name, parameter), value in zip(model.named_parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None and not parameter._post_accumulate_grad_hooks
        assert set(vars(parameter)) == bare[name]
    for use in (lambda: optimizer.step(0.1), optimizer.reduce_gradients, optimizer.weights_loaded):
        with pytest.raises(PhaseError, match="Zero1Optimizer was closed"):
            use()


def test_an_optimizer_that_has_ended_leaves_the_weights_and_nothing_else() -> None:
    run_ranks(2, _end_and_go_on)
