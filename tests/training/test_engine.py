import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megachat.errors import CapacityError
from megachat.model import Head, Recompute
from megachat.parallel.layout import ParallelLayout
from megachat.records import Rollout, SftBatch
from megachat.rlhf.scoring import FinalScores, ResponseLogprobs, ResponseValues
from megachat.training.engine import ForwardEngine, ScoreFunction, TrainEngine
from megachat.training.schedules import OptimizerConfig, ScheduleKind
from tests.harness import run_ranks
from tests.model import reference as ref
from tests.training import tasks
from tests.training.tasks import TASKS, Trajectory

TOLERANCE = 1e-6
"""fp32 against the float64 oracle over all steps: losses and weights absolute, norms relative."""

BF16_ROUNDINGS = 40
"""Roundings between a token and the loss of a two-layer model: of ten results and six matrices in
each layer, and of the embeddings, the final norm, the head and its output."""
BF16_TOLERANCE = math.sqrt(2 * BF16_ROUNDINGS) * 2.0**-9
"""Each rounding is off by at most 2^-9 of its value, in a random direction, so a run is off by
about sqrt(roundings) x 2^-9 of the outputs' size (about 1), and two runs differ by sqrt(2) times
that: 1.7 %."""

SEQUENCE = {"sequence_parallel": True}
ALL = tuple(TASKS)
Case = tuple[dict[str, int], dict[str, Any], tuple[str, ...]]
"""Degrees of a layout, model options, tasks."""
WORLDS: Mapping[int, Sequence[Case]] = {
    1: [({}, {}, ALL)],
    2: [
        ({"tensor": 2}, {}, ("policy",)),
        ({"tensor": 2}, SEQUENCE, ("sft",)),
        ({"pipeline": 2}, {}, ("value",)),
        ({}, {}, ("reward",)),
    ],
    8: [({"tensor": 2, "pipeline": 2}, {}, ("policy", "value"))],
}
"""World size -> what is trained there: each task under one axis, both kinds of head under all."""
BF16_WORLDS: Mapping[int, Sequence[Case]] = {
    1: [({}, {}, ALL)],
    2: [({"tensor": 2}, SEQUENCE, ("sft", "value")), ({}, {}, ("reward",))],
    8: [({"tensor": 2, "pipeline": 2}, {}, ("policy",))],
}


def _layout(degrees: Mapping[str, int]) -> ParallelLayout:
    return ParallelLayout.for_world(dist.get_world_size(), **degrees)


def _largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def _relative_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(one / other - 1) for one, other in zip(found, expected, strict=True))


def _follow(
    cases: Sequence[Case], options: dict[str, Any], weights: Path | None = None
) -> list[tuple[str, str, Trajectory]]:
    """Twenty steps of each case."""
    found = []
    for degrees, more, names in cases:
        layout = _layout(degrees)
        for name in names:
            engine = tasks.make_engine(name, layout, **options, **more)
            path = None if weights is None else weights / name
            found.append((f"{name} {layout} {more}", name, tasks.train(engine, name, weights=path)))
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the oracle leaves its final weights."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def expected(weights: Path) -> dict[str, Trajectory]:
    return {name: tasks.expected_trajectory(name, weights=weights / name) for name in TASKS}


@pytest.mark.parametrize("world_size", WORLDS)
def test_twenty_steps_follow_single_process_adamw(
    world_size: int, expected: dict[str, Trajectory], weights: Path
) -> None:
    for rank, rows in enumerate(run_ranks(world_size, _follow, WORLDS[world_size], {}, weights)):
        for case, name, found in rows:
            loss = _largest_difference(found.losses, expected[name].losses)
            norm = _relative_difference(found.norms, expected[name].norms)
            assert max(loss, norm) <= TOLERANCE, f"rank {rank}: {case}"
            assert found.weight_error <= TOLERANCE, f"rank {rank}: {case}"


def test_the_trajectories_clip_some_gradients_and_not_others(
    expected: dict[str, Trajectory],
) -> None:
    norms = [norm for trajectory in expected.values() for norm in trajectory.norms]
    assert min(norms) < 0.9 < 1.1 < max(norms)


def test_twenty_bf16_steps_differ_from_one_rank_by_round_off_only(
    expected: dict[str, Trajectory],
) -> None:
    options = {"dtype": torch.bfloat16}
    alone = {name: found for _, name, found in run_ranks(1, _follow, BF16_WORLDS[1], options)[0]}
    for name, found in alone.items():
        assert _largest_difference(found.losses, expected[name].losses) <= BF16_TOLERANCE, name
    for world_size in (2, 8):
        for case, name, found in run_ranks(world_size, _follow, BF16_WORLDS[world_size], options)[
            0
        ]:
            loss = _largest_difference(found.losses, alone[name].losses)
            assert loss <= BF16_TOLERANCE, case
            # At the median step: where round-off takes one of the few tokens across the kink of a
            # clipped loss, the gradient jumps.
            norm = statistics.median(
                abs(one / other - 1)
                for one, other in zip(found.norms, alone[name].norms, strict=True)
            )
            assert norm <= BF16_TOLERANCE, case
            if "tp1.pp1" in case:  # the same products; sums over data ranks are in fp32
                assert loss <= BF16_TOLERANCE / 10, case


DROPOUT_STEPS = range(4)
DROPOUT_CASES: Sequence[tuple[str, dict[str, Any]]] = (
    ("sft", {"hidden_dropout": 0.1}),
    (
        "reward",
        {"hidden_dropout": 0.1, "attention_dropout": 0.1, "recompute": Recompute.FULL},
    ),
    ("policy", {"hidden_dropout": 0.1, "attention_dropout": 0.1, **SEQUENCE}),
)


def _train_with_dropout(degrees: dict[str, int]) -> list[Trajectory]:
    return [
        tasks.train(tasks.make_engine(name, _layout(degrees), **options), name, steps=DROPOUT_STEPS)
        for name, options in DROPOUT_CASES
    ]


def test_dropout_is_the_same_for_all_layouts_of_one_tensor_degree(
    expected: dict[str, Trajectory],
) -> None:
    """Ragged rows: what shares a micro-batch or a data rank with a row must not matter."""
    two = run_ranks(2, _train_with_dropout, {"tensor": 2})[0]
    eight = run_ranks(8, _train_with_dropout, {"tensor": 2, "pipeline": 2})[0]
    for (name, options), found, other in zip(DROPOUT_CASES, two, eight, strict=True):
        assert _largest_difference(found.losses, other.losses) <= TOLERANCE, f"{name} {options}"
        assert _relative_difference(found.norms, other.norms) <= 2 * TOLERANCE, f"{name} {options}"
        without = expected[name].losses[: len(DROPOUT_STEPS)]
        assert _largest_difference(found.losses, without) > 1e-3, f"{name} {options}"


CUT_LAYOUTS: Sequence[tuple[dict[str, int], dict[str, Any]]] = (
    ({}, {}),
    ({"tensor": 2}, {}),
    ({"tensor": 2, "pipeline": 2}, SEQUENCE),
)


def _reports_of_cuts(
    rows: int,
    cuts: Sequence[int],
    layouts: Sequence[tuple[dict[str, int], dict[str, Any]]] = CUT_LAYOUTS,
) -> list[tuple[str, str, dict[str, float]]]:
    """Everything that is reported about one batch of `rows` rows, for many cuts of it."""
    found = []
    for name, task in TASKS.items():
        batch = task.make_batch(rows, 11)
        for degrees, options in layouts:
            for cut in cuts:
                layout = _layout(degrees)
                engine = tasks.make_engine(name, layout, micro_batch_rows=cut, **options)
                objective = task.objective(engine, batch)
                evaluated = engine.evaluate(batch, objective)
                trained = engine.forward_backward(batch, objective)
                norm = engine.step().gradient_norm
                after = engine.evaluate(batch, objective)
                numbers = {"loss": trained.loss, "evaluated": evaluated.loss, "norm": norm}
                numbers |= {"after": after.loss} | trained.metrics
                numbers |= {f"evaluated {key}": each for key, each in evaluated.metrics.items()}
                found.append((f"{name} {layout} rows {cut}", name, numbers))
    return found


@pytest.mark.parametrize(("rows", "cuts"), [(7, (1, 3)), (1, (2,))])
def test_losses_metrics_and_gradients_do_not_depend_on_the_cut(
    rows: int, cuts: Sequence[int]
) -> None:
    """A single row leaves all data ranks but one with filler only."""
    alone = run_ranks(1, _reports_of_cuts, rows, (rows,), CUT_LAYOUTS[:1])[0]
    wholes = {name: numbers for _, name, numbers in alone}
    results = run_ranks(4, _reports_of_cuts, rows, cuts)
    assert all(other == results[0] for other in results)
    for case, name, numbers in results[0]:
        assert numbers.keys() == wholes[name].keys()
        for key, number in numbers.items():
            wanted = pytest.approx(wholes[name][key], abs=TOLERANCE, rel=TOLERANCE)
            assert number == wanted, f"{case}: {key}"


FLAT = OptimizerConfig(learning_rate=0.01, schedule=ScheduleKind.CONSTANT, epsilon=1e-3)
ROLES: Mapping[str, dict[str, int]] = {
    "policy": {"tensor": 2, "pipeline": 2},
    "value": {},
    "sft": {"tensor": 2},
}
"""Three roles under three layouts of four ranks."""


def _role_engine(name: str, dtype: torch.dtype) -> TrainEngine:
    return tasks.make_engine(name, _layout(ROLES[name]), optimizer=FLAT, dtype=dtype)


def _weights_of(engine: TrainEngine) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in engine.model.parameters()]


def _equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def _interleave(dtype: torch.dtype) -> dict[str, bool]:
    """Whether each role trains among others, step by step, exactly as it does alone."""
    steps = range(3)
    alone = {}
    for name in ROLES:
        engine = _role_engine(name, dtype)
        alone[name] = (tasks.train(engine, name, steps=steps), _weights_of(engine))
    engines = {name: _role_engine(name, dtype) for name in ROLES}
    together: dict[str, list[Trajectory]] = {name: [] for name in ROLES}
    for step in steps:
        for name, engine in engines.items():
            together[name].append(tasks.train(engine, name, steps=range(step, step + 1)))
    return {
        name: _equal(_weights_of(engine), alone[name][1])
        and [norm for part in together[name] for norm in part.norms] == alone[name][0].norms
        and [loss for part in together[name] for loss in part.losses] == alone[name][0].losses
        for name, engine in engines.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_of_three_layouts_train_interleaved_as_they_do_alone(dtype: torch.dtype) -> None:
    """DeepSpeed keeps the groups of the engine made last in a module-global `mpu`."""
    for result in run_ranks(4, _interleave, dtype):
        assert result == dict.fromkeys(ROLES, True)


def _meet_a_bad_batch(dtype: torch.dtype, degrees: dict[str, int], bad: float) -> dict[str, Any]:
    """One of five rows has a non-finite advantage, so one data rank has such gradients."""
    name, layout = "policy", _layout(degrees)
    clean = tasks.make_engine(name, layout, optimizer=FLAT, dtype=dtype)
    hurt = tasks.make_engine(name, layout, optimizer=FLAT, dtype=dtype)
    tasks.train(clean, name, steps=range(2))
    tasks.train(hurt, name, steps=range(1))
    before = _weights_of(hurt)
    batch = tasks.experience(tasks.ROWS, 5)
    batch.advantages[0, 2] = bad
    hurt.forward_backward(batch, tasks.policy_objective(hurt, batch))
    report = hurt.step()
    unchanged = _equal(_weights_of(hurt), before)
    trajectory = tasks.train(hurt, name, steps=range(1, 2))
    return {
        "skipped": report.skipped,
        "norm is finite": math.isfinite(report.gradient_norm),
        "unchanged": unchanged,
        "goes on as if nothing had been": _equal(_weights_of(hurt), _weights_of(clean)),
        "next norm is finite": math.isfinite(trajectory.norms[0]),
        "steps": hurt.steps_done,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(dtype: torch.dtype) -> None:
    for degrees, bad in (({"pipeline": 2}, math.nan), ({"tensor": 2}, math.inf)):
        for result in run_ranks(4, _meet_a_bad_batch, dtype, degrees, bad):
            assert result == {
                "skipped": True,
                "norm is finite": False,
                "unchanged": True,
                "goes on as if nothing had been": True,
                "next norm is finite": True,
                "steps": 3,
            }


def _rollout(rows: int, seed: int) -> Rollout:
    """Ragged rows, some of them without a response."""
    batch = tasks.experience(rows, seed)
    return Rollout(
        tokens=batch.tokens,
        lengths=batch.lengths,
        prompt_lengths=batch.prompt_lengths,
        logprobs=batch.logprobs,
        finished=batch.finished,
    )


def _score_functions(engine: ForwardEngine, head: Head) -> list[ScoreFunction[Rollout]]:
    if head is Head.LANGUAGE_MODEL:
        return [
            ResponseLogprobs(
                response_len=tasks.RESPONSE,
                temperature=tasks.TEMPERATURE,
                group=engine.groups.tensor,
                vocab_start=engine.vocab_start,
            )
        ]
    return [ResponseValues(response_len=tasks.RESPONSE), FinalScores()]


def _expected_scores(head: Head, batch: Rollout) -> list[Tensor]:
    """Row by row without padding, from HuggingFace's model in float64."""
    model = ref.huggingface_model(tasks.PRE_LN, head).double()
    answers, finals = torch.zeros(batch.num_rows, tasks.RESPONSE), torch.zeros(batch.num_rows, 1)
    for row in range(batch.num_rows):
        prompt, length = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        tokens = batch.tokens[row, :length]
        if head is Head.LANGUAGE_MODEL:
            logits = model(input_ids=tokens[None]).logits[0, prompt - 1 : -1]
            chosen = torch.distributions.Categorical(logits=logits / tasks.TEMPERATURE)
            answers[row, : length - prompt] = chosen.log_prob(tokens[prompt:])
        else:
            values = tasks.scalars(model, tokens)
            answers[row, : length - prompt] = values[prompt - 1 : -1]
            finals[row] = values[-1]
    return [answers] if head is Head.LANGUAGE_MODEL else [answers, finals]


def _score_errors(rows: int) -> list[tuple[str, float]]:
    batch = _rollout(rows, 21)
    found = []
    with torch.no_grad():
        wanted = {head: _expected_scores(head, batch) for head in Head}
    for degrees, options in (
        ({}, {}),
        ({"tensor": 2}, {}),
        ({"pipeline": 2}, {}),
        ({"tensor": 2, "pipeline": 2}, {**SEQUENCE, "hidden_dropout": 0.1}),
    ):
        for head in Head:
            hf = ref.huggingface_model(tasks.PRE_LN, head)
            layout = _layout(degrees)
            model = ref.build_model(tasks.PRE_LN, layout, head=head, reference=hf, **options)
            engine = ForwardEngine(model, micro_batch_rows=2)
            functions = _score_functions(engine, head)
            for function, expected in zip(functions, wanted[head], strict=True):
                scores = engine.score(batch, function)
                error = (scores - expected).abs().max().item()
                found.append((f"{layout} {type(function).__name__}", error))
                assert scores.dtype is torch.float32
                assert scores.device.type == "cpu"
                assert scores.shape == (rows, function.columns)
    return found


@pytest.mark.parametrize("rows", [7, 1])
def test_scores_stand_in_row_order_on_every_rank_under_every_layout(rows: int) -> None:
    for rank, errors in enumerate(run_ranks(4, _score_errors, rows)):
        assert len(errors) == 12
        for case, error in errors:
            assert error <= 5 * TOLERANCE, f"rank {rank}: {case}"


def _evaluate_in_between() -> dict[str, bool]:
    """Dropout is on; an evaluation before and after each backward pass must not show."""
    options = {"hidden_dropout": 0.1}
    plain, watched = (tasks.make_engine("sft", _layout({}), **options) for _ in range(2))
    tasks.train(plain, "sft", steps=range(2))
    losses = []
    for step in range(2):
        batch = tasks.sft_batch(tasks.ROWS, step)
        objective = tasks.sft_objective(watched, batch)
        watched.evaluate(batch, objective)
        watched.forward_backward(batch, objective)
        losses += [watched.evaluate(batch, objective).loss for _ in range(2)]
        watched.step()
    return {
        "without dropout": losses[0] == losses[1],
        "not in the way of training": _equal(_weights_of(watched), _weights_of(plain)),
    }


def test_evaluation_uses_no_dropout_and_leaves_training_alone() -> None:
    for result in run_ranks(2, _evaluate_in_between):
        assert result == {"without dropout": True, "not in the way of training": True}


def _misuse() -> dict[str, str]:
    engine = tasks.make_engine("sft", _layout({}))
    long = torch.full((1, tasks.PRE_LN.max_positions + 1), 7)
    batch = SftBatch(
        tokens=long, lengths=torch.tensor([long.shape[1]]), loss_mask=torch.ones_like(long).bool()
    )
    with pytest.raises(CapacityError) as too_long:
        engine.evaluate(batch, tasks.sft_objective(engine, batch))
    batch = tasks.sft_batch(2, 0)
    objective = tasks.sft_objective(engine, batch)
    engine.forward_backward(batch, objective)
    with pytest.raises(AssertionError) as twice:
        engine.forward_backward(batch, objective)
    return {"too long": str(too_long.value), "twice": str(twice.value)}


def test_rows_that_are_too_long_and_a_forgotten_step_are_refused() -> None:
    messages = run_ranks(1, _misuse)[0]
    assert "21 tokens" in messages["too long"]
    assert "20 positions" in messages["too long"]
    assert "step" in messages["twice"]
