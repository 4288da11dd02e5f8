"""Rehearses one rank of a job of any size in this process, and compares its bytes with the plan.

    python tools/dry_run.py --model facebook/opt-175b --train 8,8,1 --generate 8 --rank 63 [--json]
    python tools/dry_run.py ... --phases    # a whole run, over a model of torch's allocator

The production classes (`OptModel`, `HybridEngine` with its `TrainEngine`, DeepSpeed's ZeRO-1,
`WeightArena` and `Resharder`, `Generator` with its `PagedKvCache`) live through one training step
and one change to generation, for which they make room as the plan says: on fake tensors, and in a
process group whose other ranks do not exist. So a rank of OPT-175B takes seconds and no memory to
speak of. A ledger below every operation counts living tensors, whatever pool they are in.

With `--phases` all roles and stages run as in `tools/rehearsal.py`, and what the allocator keeps
and cuts is seen, too.

Not seen: memory outside of tensors (CUDA context, NCCL buffers, kernels' own workspace), which the
plan predicts, and recorded steps (CUDA graphs). `rehearsed_capacity` leaves room for both.
"""

import contextlib
import gc
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megachat.cli.plan import architecture, parse_layout
from megachat.errors import ConfigError, MegachatError
from megachat.hybrid.engine import HybridEngine
from megachat.model.specs import Placement
from megachat.ops.registry import Backend
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.planner.hardware import GB, cluster_config
from megachat.planner.job import Role
from megachat.planner.records import Phase, Pool
from megachat.planner.search import Plan, PlanRequest, RoleOptions, check_fits
from megachat.planner.traffic import reshard_traffic
from tools.ledger import ByteLedger, fake_rank
from tools.rehearsal import (
    PhaseUse,
    Rehearsal,
    build_model,
    hybrid_settings,
    train_language_model,
)

ALLOWED = 0.01
"""Largest difference of a pool from its plan, as a part of the plan."""

_TRAINING_POOLS = (Pool.WEIGHTS, Pool.EMBEDDINGS, Pool.GRADIENTS, Pool.MASTERS, Pool.MOMENTS)
_GENERATION_POOLS = (Pool.FOREIGN_BLOCKS, Pool.KV_CACHE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RehearsedBytes:
    """What one rank allocated."""

    pools: dict[Pool, int]
    """In the phase that needs each."""
    alive: int
    """All living tensors after a training step, the whole arena included."""
    kept: int
    """Of training's pools, what is on the device while generating."""
    received: int
    """What the change to generation brought from other ranks."""
    reads: tuple[str, ...]
    """Source lines that asked for a tensor's value and were answered without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One quantity on both sides."""

    name: str
    planned: int
    rehearsed: int

    @property
    def difference(self) -> float:
        """As a part of the plan, or of a MiB where less is planned (memory comes in pages)."""
        return (self.rehearsed - self.planned) / max(self.planned, 2**20)


def rehearse(plan: Plan, *, rank: int) -> RehearsedBytes:
    """Builds one rank's actor, trains it for a step and changes it to generation as planned.

    Args:
        plan: What runs, what makes room for generation, and the size of its cache.
        rank: Any rank of its layout.
    """
    setup, tokens = plan.job.actor, plan.job.workload.sft_tokens
    ledger = ByteLedger(row_tokens=tokens)
    # The arena's and the cache's own address ranges are real, and never touched.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_rank(setup.layout, rank) as groups, warnings.catch_warnings(), fake, ledger:
        warnings.simplefilter("ignore")
        actor = _actor(plan, groups)
        rows = setup.layout.data * setup.micro_batch_rows
        train_language_model(actor.training, rows=rows, tokens=tokens)
        gc.collect()
        alive, pools = ledger.live, _training_pools(actor)
        actor.eval()
        assert actor.last_reshard is not None, "eval() gathers"
        kept = sum(_training_pools(actor).values())
        # All parameters are views of the arena, whose storage is the generation shard.
        arena = _storage_bytes(actor.training.model.parameters())
        pools[Pool.FOREIGN_BLOCKS] = arena - pools[Pool.WEIGHTS] - pools[Pool.EMBEDDINGS]
        pools[Pool.KV_CACHE] = _storage_bytes([actor.generator.cache.pool])
        return RehearsedBytes(
            pools=pools,
            alive=alive,
            kept=kept,
            received=actor.last_reshard.received_bytes,
            reads=tuple(ledger.reads),
        )


def _actor(plan: Plan, groups: ProcessGroups) -> HybridEngine:
    setup = plan.job.actor
    settings = hybrid_settings(plan, backend=Backend.REFERENCE)
    return HybridEngine(build_model(setup, groups), settings, stop_ids=(setup.config.eos_id,))


def _training_pools(actor: HybridEngine) -> dict[Pool, int]:
    """Bytes on the device behind the pools of training."""
    model, state = actor.training.model, actor.training.optimizer_tensors()
    tensors = model.parameters_by_spec()
    in_layers = {spec.name for spec in model.global_specs() if spec.placement is Placement.LAYER}
    return {
        Pool.WEIGHTS: sum(tensors[name].nbytes for name in tensors if name in in_layers),
        Pool.EMBEDDINGS: sum(tensors[name].nbytes for name in tensors if name not in in_layers),
        Pool.GRADIENTS: _storage_bytes(state.gradients),
        Pool.MASTERS: _storage_bytes(state.masters),
        Pool.MOMENTS: _storage_bytes(state.moments),
    }


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors; views of one buffer count once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def compare(plan: Plan, *, rank: int) -> tuple[list[Row], RehearsedBytes]:
    """A rank's plan and its rehearsal: pool by pool, then what else can be held side by side."""
    memory = next(memory for memory in plan.memory.ranks if rank in memory.ranks)
    training, generation = (
        {
            pool: memory.phase(phase).bytes_of(pool, role=Role.ACTOR)
            for pool in (*_TRAINING_POOLS, *_GENERATION_POOLS)
        }
        for phase in (Phase.PPO_TRAINING, Phase.GENERATION)
    )
    planned = {pool: training[pool] for pool in _TRAINING_POOLS}
    planned |= {pool: generation[pool] for pool in _GENERATION_POOLS}
    stage = plan.job.actor.layout.coordinate(rank).pipeline
    traffic = next(item for item in reshard_traffic(plan.job, plan.cluster) if item.stage == stage)
    rehearsed = rehearse(plan, rank=rank)
    rows = [
        Row(name=pool.value, planned=num_bytes, rehearsed=rehearsed.pools[pool])
        for pool, num_bytes in planned.items()
    ]
    alive = sum(training.values()) + generation[Pool.FOREIGN_BLOCKS]
    kept = sum(generation[pool] for pool in _TRAINING_POOLS)
    rows += [
        Row(name="everything after a step", planned=alive, rehearsed=rehearsed.alive),
        Row(name="training's while generating", planned=kept, rehearsed=rehearsed.kept),
        Row(name="received by a reshard", planned=traffic.received, rehearsed=rehearsed.received),
    ]
    return rows, rehearsed


def make_plan(
    model: str,
    *,
    train: ParallelLayout,
    generation_tensor: int,
    critic: str = "facebook/opt-350m",
    gpus_per_node: int = 8,
) -> Plan:
    """How `megachat plan` makes a job with these layouts fit.

    Raises:
        CapacityError: It cannot.
        ConfigError: There is no such model.
        LayoutError: A layout does not fit the model or the nodes.
    """
    per_node = min(gpus_per_node, train.world_size)
    return check_fits(
        PlanRequest(
            actor=architecture(model),
            critic=architecture(critic),
            cluster=cluster_config(nodes=train.world_size // per_node, gpus_per_node=per_node),
            actor_options=RoleOptions(layout=train),
            generation_tensor=generation_tensor,
        )
    )


def rehearse_phases(
    plan: Plan, *, rank: int, first: Phase = Phase.SFT, expandable: bool = False
) -> Iterator[tuple[PhaseUse, int]]:
    """Each phase of a run on one rank, with the bytes that the plan says for it, graphs left out.

    Args:
        plan: How the job runs.
        rank: Any rank of its layout.
        first: Where to begin: with the supervised stage, or with PPO's generation.
        expandable: Whether torch's allocator uses expandable segments.

    Raises:
        CapacityError: Somebody gets no memory.
    """
    memory = next(memory for memory in plan.memory.ranks if rank in memory.ranks)
    capacity = rehearsed_capacity(plan, rank=rank)
    rehearsal = Rehearsal(plan, rank=rank, capacity_bytes=capacity, expandable=expandable)
    for use in rehearsal.run(first=first):
        phase = memory.phase(use.phase)
        yield use, phase.total() - phase.bytes_of(Pool.GRAPHS)


def rehearsed_capacity(plan: Plan, *, rank: int) -> int:
    """What one rank's GPU has for the tensors, the arena and the cache of a rehearsal, in bytes.

    The plan's budget: memory without what is taken beside tensors (context, cuBLAS' workspaces,
    communicators, peer sums) and without the margin, so that nothing holds because of the latter.
    Recorded steps are no part of a rehearsal, so their planned bytes are taken off in all phases.
    """
    memory = next(memory for memory in plan.memory.ranks if rank in memory.ranks)
    graphs = memory.phase(Phase.GENERATION).bytes_of(Pool.GRAPHS)
    return plan.memory.budget_bytes - graphs


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="OPT by hub name or HuggingFace folder.")],
    train: Annotated[
        str, typer.Option(metavar="TENSOR,PIPELINE,DATA", help="The actor's training layout.")
    ],
    generate: Annotated[int, typer.Option(help="Tensor degree of generation.")],
    critic: Annotated[
        str, typer.Option(help="The critic's and reward model's, likewise.")
    ] = "facebook/opt-350m",
    rank: Annotated[int, typer.Option(help="Which rank of the job.")] = 0,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs in each machine.")] = 8,
    phases: Annotated[
        bool, typer.Option("--phases", help="Rehearse all phases of a run, and the allocator.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Rehearse one rank of a job and compare its bytes with the plan; 1 where they disagree."""
    try:
        layout = parse_layout(train)
        if not 0 <= rank < layout.world_size:
            raise ConfigError(f"--rank {rank}: the job has ranks 0 to {layout.world_size - 1}")
        plan = make_plan(
            model,
            train=layout,
            generation_tensor=generate,
            critic=critic,
            gpus_per_node=gpus_per_node,
        )
        if phases:
            _rehearse_and_show_phases(plan, rank, as_json=as_json)
            return
        with contextlib.redirect_stdout(sys.stderr):  # of DeepSpeed's logger
            rows, rehearsed = compare(plan, rank=rank)
    except MegachatError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(_json(plan, rank, rows, rehearsed), indent=2, allow_nan=False))
    else:
        Console().print(_table(plan, rank, rows))
    if any(abs(row.difference) > ALLOWED for row in rows):
        raise typer.Exit(1)


def _rehearse_and_show_phases(plan: Plan, rank: int, *, as_json: bool) -> None:
    """Prints each phase of a run beside its plan, also where one of them gets no memory."""
    found: list[tuple[PhaseUse, int]] = []
    try:
        with contextlib.redirect_stdout(sys.stderr):
            for item in rehearse_phases(plan, rank=rank):
                found.append(item)
    finally:
        if as_json:
            seen = [{**asdict(use), "planned_bytes": planned} for use, planned in found]
            typer.echo(json.dumps({"rank": rank, "phases": seen}, indent=2, allow_nan=False))
        else:
            Console().print(_phase_table(plan, rank, found))


def _phase_table(plan: Plan, rank: int, found: list[tuple[PhaseUse, int]]) -> Table:
    table = Table(
        title=f"rank {rank} of {plan.job.actor.layout} -> tp{plan.job.generation_tensor}, GB of "
        f"{rehearsed_capacity(plan, rank=rank) / GB:.1f}",
        title_justify="left",
    )
    for header in ("phase", "tensors", "allocator", "arena, cache", "peak", "planned", "calls"):
        table.add_column(header, justify="left" if header == "phase" else "right")
    for use, planned in found:
        sizes = (use.living_bytes, use.reserved_bytes, use.mapped_bytes, use.peak_bytes, planned)
        name = use.phase.value.replace("_", " ")
        table.add_row(
            f"{name} {use.iteration}" if use.iteration else name,
            *(f"{size / GB:.2f}" for size in sizes),
            f"{sum(use.calls.values())}",
        )
    return table


def _json(plan: Plan, rank: int, rows: list[Row], rehearsed: RehearsedBytes) -> dict[str, Any]:
    return {
        "train": str(plan.job.actor.layout),
        "generation_tensor": plan.job.generation_tensor,
        "rank": rank,
        "rows": [
            {
                "name": row.name,
                "planned_bytes": row.planned,
                "rehearsed_bytes": row.rehearsed,
                "difference": row.difference,
            }
            for row in rows
        ],
        "values_asked_for": list(rehearsed.reads),
    }


def _table(plan: Plan, rank: int, rows: list[Row]) -> Table:
    coordinate = plan.job.actor.layout.coordinate(rank)
    table = Table(
        title=f"rank {rank} (stage {coordinate.pipeline}) of {plan.job.actor.layout} -> "
        f"tp{plan.job.generation_tensor}, GB",
        title_justify="left",
    )
    for header in ("pool", "planned", "rehearsed", "difference"):
        table.add_column(header, justify="left" if header == "pool" else "right")
    for row in rows:
        table.add_row(
            row.name.replace("_", " "),
            f"{row.planned / GB:.3f}",
            f"{row.rehearsed / GB:.3f}",
            f"{row.difference:+.3%}",
        )
    return table


if __name__ == "__main__":
    app()
