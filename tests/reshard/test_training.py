"""Training whose weights live in the arena: the same numbers, and nothing leaves the arena."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megachat.model.config import OptConfig
from megachat.reshard.execute import Resharder
from megachat.rlhf.objectives import SftObjective
from megachat.training.engine import TrainEngine
from megachat.training.schedules import OptimizerConfig
from megachat.training.storage import FlatStorage
from tests.harness import run_ranks
from tests.harness.groups import groups_of
from tests.harness.weights import whole_weights
from tests.reshard.cases import POST_LN, PRE_LN, Actor, Case, build_actor, fill, sha256
from tests.training.tasks import ROWS, sft_batch

OPTIMIZER = OptimizerConfig(learning_rate=0.01, epsilon=1e-3, weight_decay=0.1, clip_norm=0.5)
STEPS = 2
CASES: dict[int, list[tuple[Case, OptConfig]]] = {
    4: [
        (Case(train=(2, 2, 1), generate=1), PRE_LN),
        (Case(train=(1, 2, 2), generate=2), POST_LN),
        (Case(train=(2, 1, 2), generate=1), POST_LN),
    ],
    8: [(Case(train=(2, 2, 2), generate=2), PRE_LN)],
}


@dataclass(frozen=True)
class SeparateMemory:
    """The same parameter groups, in memory of the optimizer's own."""

    parameter_groups: Sequence[Sequence[str]]

    def place(self, index: int, flat: Tensor) -> Tensor:
        del index
        return flat.clone()

    def owns(self, tensor: Tensor) -> bool:
        del tensor
        return True

    def weights_changed(self) -> None:
        pass


def _engine(actor: Actor, storage: FlatStorage) -> TrainEngine:
    return TrainEngine(
        actor.model,
        micro_batch_rows=2,
        optimizer=OPTIMIZER,
        total_steps=STEPS,
        seed=3,
        storage=storage,
    )


def train_step(engine: TrainEngine, step: int) -> tuple[float, float]:
    batch = sft_batch(ROWS, step)
    objective = SftObjective.for_batch(
        batch, group=engine.groups.tensor, vocab_start=engine.vocab_start
    )
    loss = engine.forward_backward(batch, objective).loss
    return loss, engine.step().gradient_norm


def _generation_problems(actor: Actor) -> list[str]:
    """Generation weights that are not the slice of what was trained."""
    wholes, weights = whole_weights(actor.model), actor.arena.weights()
    rank, degree = actor.groups.tensor_rank, actor.plan.placement.tensor
    problems = []
    for spec in actor.model.global_specs():
        found = weights[spec.name]
        found = torch.cat(list(found), dim=1) if spec.shard_dim == 1 else found
        if sha256(found) != sha256(wholes[spec.name][spec.slices(rank, tensor=degree)]):
            problems.append(f"{spec.name} is not what was trained")
    return problems


def _pair(
    case: Case, config: OptConfig, dtype: torch.dtype
) -> tuple[Actor, TrainEngine, TrainEngine]:
    """Equal models: one trained in the arena, one beside it."""
    groups = groups_of(case.source)
    actor, other = (build_actor(case, config, dtype, groups=groups) for _ in range(2))
    for one in (actor, other):
        _calm(one)
    memory = SeparateMemory(other.storage.parameter_groups)
    return actor, _engine(actor, actor.storage), _engine(other, memory)


@torch.no_grad()
def _calm(actor: Actor) -> None:
    """Brings the random weights to a size that trains."""
    for name, parameter in actor.model.named_parameters():
        parameter.mul_(0.05)
        if "norm.weight" in name:
            parameter.add_(1.0)


def _compare(case: Case, config: OptConfig, dtype: torch.dtype) -> list[str]:
    actor, engine, separate = _pair(case, config, dtype)
    resharder = Resharder(actor.arena, actor.groups)
    problems, losses = [], []
    for step in range(STEPS):
        actor.arena.check_aliasing(engine.stored_tensors())
        resharder.gather()
        problems += _generation_problems(actor)
        actor.arena.release()
        found, expected = train_step(engine, step), train_step(separate, step)
        losses.append(found[0])
        if found != expected:
            problems.append(f"step {step}: {found} in the arena, {expected} beside it")
    if not all(map(math.isfinite, losses)) or len(set(losses)) < STEPS:
        problems.append(f"losses {losses} are no training")
    problems += _load_problems(actor, engine, separate)
    actor.arena.check_aliasing(engine.stored_tensors())
    pairs = zip(actor.model.named_parameters(), separate.model.parameters(), strict=True)
    return problems + [f"{name} differs" for (name, one), two in pairs if not torch.equal(one, two)]


def _load_problems(actor: Actor, engine: TrainEngine, separate: TrainEngine) -> list[str]:
    """What goes wrong when weights are loaded while the whole shard is there."""
    Resharder(actor.arena, actor.groups).gather()
    for one in (engine, separate):
        fill(one.model)
        one.weights_loaded()
    problems = ["a load left the generation shard valid"] if actor.arena.is_current else []
    found, expected = train_step(engine, 0), train_step(separate, 0)
    if found != expected:
        problems.append(f"after a load: {found} in the arena, {expected} beside it")
    return problems


def _compare_all(world_size: int) -> list[str]:
    return [
        f"{case} {dtype}: {problem}"
        for case, config in CASES[world_size]
        for dtype in (torch.float32, torch.bfloat16)
        for problem in _compare(case, config, dtype)
    ]


@pytest.mark.parametrize("world_size", CASES)
def test_training_in_the_arena_is_bitwise_equal_to_training_beside_it(world_size: int) -> None:
    assert run_ranks(world_size, _compare_all, world_size) == [[]] * world_size
