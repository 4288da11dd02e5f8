"""Several devices at once on the emulator: streams, flags between devices, and what goes wrong."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.build import Variant
from tests.kernels.launch import (
    FORWARD,
    LAUNCH_FAILURE,
    ORDERS,
    RANDOM,
    Argument,
    Order,
    run_devices_here,
    run_devices_isolated,
    run_here,
)

PROBE = Path(__file__).with_name("peer_probe.cu")
ORDER_NAMES = [order.name for order in ORDERS]


def world(devices: int, elements: int, fault: int = 0) -> tuple[list[list[Argument]], Tensor]:
    """Arguments of each device, and what each is to get."""
    generator = torch.Generator().manual_seed(devices)
    inputs = [
        torch.randint(-99, 99, (elements,), generator=generator).float() for _ in range(devices)
    ]
    exchange = tuple(torch.full((elements,), torch.nan) for _ in range(devices))
    blocks = -(-elements // 32)
    flags = tuple(torch.zeros(blocks, devices, dtype=torch.int32) for _ in range(devices))
    expected = 4 * torch.stack(inputs).sum(0)
    return [
        [
            d,
            devices,
            elements,
            fault,
            inputs[d],
            torch.full((elements,), torch.nan),
            exchange,
            flags,
        ]
        for d in range(devices)
    ], expected


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_devices_that_wait_for_each_other_all_get_the_sum(devices: int, order: Order) -> None:
    arguments, expected = world(devices, 70)
    outcome = run_devices_here(PROBE, "probe_all_reduce", arguments, order)
    assert (outcome.code, outcome.error) == (0, "")
    assert all(given[5].equal(expected) for given in arguments)


@pytest.mark.parametrize("variant", [Variant.ASAN, Variant.TSAN], ids=lambda v: v.value)
def test_flags_order_memory_between_devices(variant: Variant, tmp_path: Path) -> None:
    arguments, expected = world(3, 40)
    outcome = run_devices_isolated(
        PROBE, "probe_all_reduce", arguments, RANDOM, variant=variant, folder=tmp_path
    )
    assert outcome.complaint == ""
    assert all(given[5].equal(expected) for given in arguments)


@pytest.mark.parametrize("fault", [1, 2], ids=["flags before data", "nobody waits"])
def test_tsan_sees_devices_that_read_too_early(fault: int, tmp_path: Path) -> None:
    arguments, _ = world(3, 40, fault)
    outcome = run_devices_isolated(
        PROBE, "probe_all_reduce", arguments, RANDOM, variant=Variant.TSAN, folder=tmp_path
    )
    assert "data race" in outcome.complaint


def test_reading_without_waiting_gives_a_wrong_result_in_some_random_orders() -> None:
    """In both fixed orders every thread writes before any reads."""
    right = []
    for seed in range(30):
        arguments, expected = world(2, 40, fault=2)
        order = Order(RANDOM.kind, seed, "random")
        assert run_devices_here(PROBE, "probe_all_reduce", arguments, order).code == 0
        right.append(all(given[5].equal(expected) for given in arguments))
    assert not all(right)


@pytest.mark.parametrize("order", ORDERS, ids=ORDER_NAMES)
def test_a_flag_that_nobody_sets_is_an_error_with_its_place(order: Order) -> None:
    arguments, _ = world(2, 40, fault=3)
    outcome = run_devices_here(PROBE, "probe_all_reduce", arguments, order)
    lines = PROBE.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, start=1) if "read_flag(flag)" in text)
    assert outcome.code == LAUNCH_FAILURE
    assert "no progress in kernel all_reduce_kernel" in outcome.error
    assert "8 threads poll a flag, the first is" in outcome.error
    assert f"{PROBE.name}:{line}" in outcome.error
    sound, expected = world(2, 40)
    assert run_devices_here(PROBE, "probe_all_reduce", sound, order).code == 0
    assert all(given[5].equal(expected) for given in sound)


def test_one_device_alone_finds_that_no_other_comes() -> None:
    arguments, _ = world(2, 40)
    outcome = run_here(PROBE, "probe_all_reduce", arguments[0], FORWARD)
    assert outcome.code == LAUNCH_FAILURE
    assert "no progress" in outcome.error
