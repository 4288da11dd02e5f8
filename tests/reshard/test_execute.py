"""The plan, executed on gloo ranks: bytes of every weight, bytes on the wire, aliasing."""

from dataclasses import asdict

import pytest
import torch

from megachat.reshard import HopOrder, execute
from megachat.reshard.execute import Resharder
from tests.harness import run_ranks
from tests.harness.groups import groups_of
from tests.reshard.cases import POST_LN, PRE_LN, Actor, Case, build_actor, wrong_weights

CASES: dict[int, list[Case]] = {
    2: [Case(train=(2, 1, 1), generate=1), Case(train=(2, 1, 1), generate=2)],
    4: [
        Case(train=(2, 2, 1), generate=2),
        Case(train=(2, 2, 1), generate=4),
        Case(train=(2, 2, 1), generate=1),
        Case(train=(1, 2, 2), generate=4),
        Case(train=(1, 4, 1), generate=1),
        Case(train=(1, 4, 1), generate=4),
        Case(train=(1, 1, 4), generate=1),
    ],
    8: [
        Case(train=(4, 2, 1), generate=2),
        Case(train=(2, 2, 2), generate=2),
        Case(train=(2, 2, 2), generate=1),
        Case(train=(4, 1, 2), generate=2),
        Case(train=(2, 4, 1), generate=1),
        Case(train=(2, 4, 1), generate=8),
    ],
}


def _problems(actor: Actor) -> list[str]:
    """Everything that is wrong after a gather, a repeated gather and a release."""
    problems: list[str] = []
    traffic = actor.arena.part.traffic
    resharder = Resharder(actor.arena, actor.groups)
    report = resharder.gather()
    problems += wrong_weights(actor)
    if not report.received_bytes == traffic.received == traffic.lower_bound:
        problems.append(f"{report} does not match {asdict(traffic)}")
    if report.staged_bytes > traffic.staged or bool(report.staged_bytes) != bool(traffic.staged):
        problems.append(f"staged {report.staged_bytes}, planned {traffic.staged}")
    if resharder.gather().received_bytes:
        problems.append("an unchanged shard was fetched again")
    before = {name: p.detach().clone() for name, p in actor.model.named_parameters()}
    actor.arena.release()
    actor.arena.check_aliasing(dict(actor.model.named_parameters()))
    for name, parameter in actor.model.named_parameters():
        if not torch.equal(parameter, before[name]):
            problems.append(f"{name} changed on the way back")
    return problems


def _run_all(cases: list[Case], ranks_per_node: int | None) -> list[str]:
    """All problems of all cases, each in both norms and both dtypes."""
    problems = []
    for case in cases:
        groups = groups_of(case.source)
        for config in (PRE_LN, POST_LN):
            for dtype in (torch.float32, torch.bfloat16):
                actor = build_actor(
                    case, config, dtype, groups=groups, ranks_per_node=ranks_per_node
                )
                problems += [f"{case} {dtype}: {found}" for found in _problems(actor)]
    return problems


@pytest.mark.parametrize("world_size", CASES)
def test_every_generation_weight_is_exact_for_every_layout(world_size: int) -> None:
    assert run_ranks(world_size, _run_all, CASES[world_size], None) == [[]] * world_size


TWO_HOPS = [Case(train=(4, 2, 1), generate=2), Case(train=(2, 2, 2), generate=1)]


def _run_two_hops() -> list[str]:
    """The same with four ranks to a node, and the order in which layers land."""
    problems = []
    for case in TWO_HOPS:
        groups = groups_of(case.source)
        actor = build_actor(case, POST_LN, torch.bfloat16, groups=groups, ranks_per_node=4)
        if actor.plan.order is not HopOrder.STAGES_FIRST:
            problems.append(f"{case} goes {actor.plan.order}")
        problems += [f"{case}: {found}" for found in _problems(actor)]
        landed = [step.layer for step in Resharder(actor.arena, actor.groups).stream()]
        layers = [layer for layer in landed if layer is not None]
        if landed[0] is not None or layers != sorted(layers) or len(set(layers)) != 2:
            problems.append(f"{case}: layers landed in the order {landed}")
        problems += wrong_weights(actor)
    return problems


def test_two_hops_over_nodes_are_exact_and_layers_land_in_order() -> None:
    assert run_ranks(8, _run_two_hops) == [[]] * 8


def _seconds_on_a_slow_device() -> tuple[float, float, int]:
    """Seconds of a gather, and of one that has nothing to do; calls that waited."""
    now, queued, waits = [0.0], [0.0], [0]

    def synchronize() -> None:
        waits[0] += 1
        now[0] += queued[0]
        queued[0] = 0.0

    case = Case(train=(2, 1, 1), generate=1)
    actor = build_actor(case, PRE_LN, torch.float32, groups=groups_of(case.source))
    resharder = Resharder(actor.arena, actor.groups, synchronize=synchronize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute.time, "perf_counter", lambda: now[0])
        acquire = actor.arena.acquire

        def enqueue() -> None:
            queued[0] += 2.0  # what the device has to do for this gather
            acquire()

        patch.setattr(actor.arena, "acquire", enqueue)
        queued[0] = 5.0  # what it was asked before
        first = resharder.gather().seconds
        again = resharder.gather().seconds
    return first, again, waits[0]


def test_the_time_of_a_gather_is_that_of_the_device_and_of_this_gather_only() -> None:
    assert run_ranks(2, _seconds_on_a_slow_device) == [(2.0, 0.0, 4)] * 2
