"""The plan against the production classes, for ranks of jobs far larger than this machine.

Rehearsals run in processes of their own: each joins a world that does not exist.
"""

import json
import multiprocessing as mp
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megachat.parallel.layout import ParallelLayout
from megachat.planner.records import Pool
from tools.dry_run import ALLOWED, RehearsedBytes, Row, app, compare, make_plan

OPT_175B = ("facebook/opt-175b", (4, 16, 1), 8)
CASES = (
    (*OPT_175B, 0),
    (*OPT_175B, 27),
    (*OPT_175B, 63),
    ("facebook/opt-13b", (2, 8, 1), 4, 9),
    ("facebook/opt-66b", (4, 16, 2), 8, 37),
)
"""(model, training layout, generation degree, rank): first, middle and last stage of OPT-175B on
64 ranks as the planner lays it out; generation degrees above training's and, of OPT-66B, two data
ranks. Few layers in a stage: a rehearsal's time is that of its layers."""

Case = tuple[str, tuple[int, int, int], int, int]
Outcome = tuple[list[Row], RehearsedBytes]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness.preload"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as executor:
        yield executor


class Rehearsals(dict[Case, Future[Outcome]]):
    """Each begins when a test asks for it, so that workers that share the tests share the work."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        super().__init__()
        self._pool = pool

    def __missing__(self, case: Case) -> Future[Outcome]:
        self[case] = self._pool.submit(rehearsal, *case)
        return self[case]


@pytest.fixture(scope="module")
def outcomes(pool: ProcessPoolExecutor) -> Rehearsals:
    return Rehearsals(pool)


def rehearsal(model: str, layout: tuple[int, int, int], generate: int, rank: int) -> Outcome:
    tensor, pipeline, data = layout
    train = ParallelLayout(tensor=tensor, pipeline=pipeline, data=data)
    return compare(make_plan(model, train=train, generation_tensor=generate), rank=rank)


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of the tool."""
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_pool_is_as_planned(outcomes: Rehearsals, case: Case) -> None:
    rows, rehearsed = outcomes[case].result(timeout=300)
    not_rehearsed = {Pool.ACTIVATIONS, Pool.WORKSPACE, Pool.GRAPHS, Pool.ROUNDING}
    assert set(rehearsed.pools) == set(Pool) - not_rehearsed
    for row in rows:
        assert abs(row.difference) <= ALLOWED, row


def test_a_rank_of_opt_175b_holds_the_known_bytes(
    outcomes: Rehearsals,
) -> None:
    """96 layers of 12 h^2 over 64 ranks with h = 12288; in fp32 twice and four times that."""
    _, rehearsed = outcomes[*OPT_175B, 27].result(timeout=300)
    matrices = 96 * 12 * 12288**2 // 64
    assert rehearsed.pools[Pool.WEIGHTS] == pytest.approx(2 * matrices, rel=0.001)
    assert rehearsed.pools[Pool.GRADIENTS] == pytest.approx(4 * matrices, rel=0.001)
    assert rehearsed.pools[Pool.MASTERS] == pytest.approx(4 * matrices, rel=0.001)
    assert rehearsed.pools[Pool.MOMENTS] == pytest.approx(8 * matrices, rel=0.001)
    assert rehearsed.pools[Pool.EMBEDDINGS] == 0


def test_stages_differ_by_more_than_the_allowance(
    outcomes: Rehearsals,
) -> None:
    """The comparison would notice the plan of another stage."""
    (first, _), (_, last) = (outcomes[*OPT_175B, rank].result(timeout=300) for rank in (0, 63))
    planned = {row.name: row.planned for row in first}
    for pool in (Pool.EMBEDDINGS, Pool.GRADIENTS):
        wrong = Row(name=pool, planned=planned[pool], rehearsed=last.pools[pool])
        assert abs(wrong.difference) > 0.5 * ALLOWED
    assert abs(planned[Pool.EMBEDDINGS] / last.pools[Pool.EMBEDDINGS] - 1) > ALLOWED


def test_only_known_questions_about_values_are_answered(
    outcomes: Rehearsals,
) -> None:
    """A new one has to be looked at: a wrong answer can skip work unnoticed."""
    _, rehearsed = outcomes[*OPT_175B, 63].result(timeout=300)
    assert len(rehearsed.reads) <= 8, rehearsed.reads


def test_the_command_prints_what_it_compared(pool: ProcessPoolExecutor) -> None:
    future = pool.submit(
        command, "--model", "facebook/opt-125m", "--train", "2,2,1", "--generate", "1",
        "--rank", "3", "--json",
    )  # fmt: skip
    status, output, errors = future.result(timeout=300)
    assert status == 0, errors
    rows = {row["name"]: row for row in json.loads(output)["rows"]}
    shard = rows["weights"]["rehearsed_bytes"] + rows["embeddings"]["rehearsed_bytes"]
    assert rows["masters"]["rehearsed_bytes"] == pytest.approx(2 * shard, rel=1e-5)


def test_all_phases_of_a_run_are_shown_beside_their_plan(
    pool: ProcessPoolExecutor, tmp_path: Path
) -> None:
    for name, layers in (("actor", 4), ("critic", 2)):
        config = {
            "model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048,
            "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": layers,
            "num_attention_heads": 16, "word_embed_proj_dim": 1024,
        }  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    common = (
        "--model", str(tmp_path / "actor"), "--critic", str(tmp_path / "critic"),
        "--train", "2,2,1", "--generate", "1", "--rank", "3", "--phases",
    )  # fmt: skip
    status, output, errors = pool.submit(command, *common, "--json").result(timeout=300)
    assert status == 0, errors
    phases = json.loads(output)["phases"]
    assert [phase["phase"] for phase in phases][-3:] == ["generation", "scoring", "ppo_training"]
    generation, scoring = phases[-3], phases[-2]
    assert generation["mapped_bytes"] > scoring["mapped_bytes"] > 0
    for phase in phases:
        assert phase["living_bytes"] <= phase["reserved_bytes"]
        assert phase["reserved_bytes"] + phase["mapped_bytes"] <= phase["peak_bytes"]
        assert phase["living_bytes"] + phase["mapped_bytes"] < 1.1 * phase["planned_bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "8,8,1", "--rank", "64"], "ranks 0 to 63"),
        (["--train", "8,8"], "TENSOR,PIPELINE,DATA"),
        (["--train", "8,7,1"], "layers 96"),
        (["--train", "1,1,8"], "usable"),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_in_one_line(
    arguments: list[str], message: str
) -> None:
    status, output, errors = command("--model", "facebook/opt-175b", "--generate", "8", *arguments)
    assert status == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
    assert not output
