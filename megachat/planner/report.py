"""The one place that turns plans into JSON, text tables and Markdown."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megachat.parallel.layout import ParallelLayout
from megachat.planner.hardware import GB
from megachat.planner.job import Role, RoleSetup
from megachat.planner.records import (
    Measure,
    PhaseMemory,
    Pool,
    RankMemory,
    Residence,
    rank_ranges,
)
from megachat.planner.search import Plan, Refusal, SearchResult
from megachat.planner.traffic import reshard_traffic

MEASURE_TEXTS = {
    Measure.REUSE_GRADIENTS: "the actor's fp32 gradients lend their memory to generation",
    Measure.OFFLOAD_OPTIMIZER: "the actor's fp32 weights and moments go to host memory while "
    "generating",
    Measure.OFFLOAD_SCORERS: "reference and reward model are in host memory except while scoring",
    Measure.OFFLOAD_CRITIC: "the critic's fp32 weights and moments go to host memory while "
    "generating",
}


def plan_json(plan: Plan) -> dict[str, Any]:
    """Everything a plan says; bytes are integers, times are predicted seconds."""
    job, memory = plan.job, plan.memory
    return {
        "cluster": plan.cluster.model_dump(),
        "workload": asdict(job.workload),
        "actor": _setup_json(job.actor),
        "critic": _setup_json(job.critic),
        "generation": {
            **_layout_json(job.generation_layout),
            "block_tokens": job.block_tokens,
            "prefill_tokens": job.prefill_tokens,
        },
        "measures": [measure.value for measure in Measure if measure in memory.measures],
        "memory": {
            "gpu_bytes": memory.gpu_bytes,
            "reserved": [
                {"what": part.what.value, "bytes": part.num_bytes} for part in memory.reserved.parts
            ],
            "budget_bytes": memory.budget_bytes,
            "peak_bytes": memory.peak_bytes,
            "host_budget_bytes": memory.host_budget_bytes,
            "host_bytes": memory.host_bytes,
            "ranks": [_rank_json(rank) for rank in memory.ranks],
        },
        "kv_cache": {
            **asdict(memory.cache),
            "bytes": memory.cache.num_bytes,
            "tokens": memory.cache.num_blocks * memory.cache.block_tokens,
            "concurrent": memory.cache.concurrent,
            "waves": memory.cache.waves,
        },
        "reshard": [
            {**asdict(stage), "received_intra_node": stage.received_intra_node}
            for stage in reshard_traffic(job, plan.cluster)
        ],
        "predicted_seconds": {**asdict(plan.seconds), "total": plan.seconds.total},
    }


def search_json(result: SearchResult, *, limit: int) -> dict[str, Any]:
    """The ranking, best first, and what is refused."""
    return {
        "plans": [_row_json(plan) for plan in result.plans[:limit]],
        "num_plans": len(result.plans),
        "refusals": [
            {
                "train": _layout_json(refusal.train),
                "generation_tensor": refusal.generation_tensor,
                "reason": refusal.reason,
            }
            for refusal in result.refusals
        ],
    }


def plan_view(plan: Plan, *, title: str, rank: int | None = None) -> RenderableType:
    """Tables for a terminal: the pools of one rank in each phase, then cache, bytes and times.

    Args:
        plan: What to show.
        title: Of the whole.
        rank: Whose memory; None shows the ranks with the highest peak.
    """
    memory = plan.memory.fullest if rank is None else _of_rank(plan, rank)
    table = Table(title=f"Predicted GB on ranks {rank_ranges(memory.ranks)}", title_justify="left")
    table.add_column("pool")
    for phase in memory.phases:
        table.add_column(phase.phase.value, justify="right")
    for cells in memory_rows(memory, budget_bytes=plan.memory.budget_bytes):
        table.add_row(*cells)
    return Group(Text(title), table, *(Text(line) for line in plan_lines(plan)))


def search_view(result: SearchResult, *, limit: int) -> RenderableType:
    """The ranking as a table, and the nearest refusals."""
    table = Table(title="layouts by predicted time of a PPO step", title_justify="left")
    for header in RANKING_HEADERS:
        table.add_column(header)
    for cells in ranking_rows(result.plans[:limit]):
        table.add_row(*cells)
    refused = [Text(f"refused {line}") for line in refusal_lines(result.refusals[:limit])]
    return Group(table, *refused)


def markdown_section(plan: Plan, result: SearchResult, *, title: str, limit: int) -> str:
    """One case of `docs/planning.md`: the chosen plan, and the layouts beside it."""
    fullest = plan.memory.fullest
    rows = memory_rows(fullest, budget_bytes=plan.memory.budget_bytes)
    parts = [
        f"## {title}",
        *plan_lines(plan),
        f"Predicted GB on ranks {rank_ranges(fullest.ranks)}, the fullest:",
        _markdown_table(["pool", *(phase.phase.value for phase in fullest.phases)], rows),
        f"The {min(limit, len(result.plans))} layouts that are predicted to be fastest, of "
        f"{len(result.plans)} that fit:",
        _markdown_table(RANKING_HEADERS, ranking_rows(result.plans[:limit])),
    ]
    if result.refusals:
        parts.append(f"Of {len(result.refusals)} refused ones, the nearest:")
        parts.append("\n".join(f"* {line}" for line in refusal_lines(result.refusals[:3])))
    return "\n\n".join(parts) + "\n"


def plan_lines(plan: Plan) -> list[str]:
    """What a plan decides, in sentences."""
    job, cache, seconds = plan.job, plan.memory.cache, plan.seconds
    traffic = max(
        reshard_traffic(job, plan.cluster), key=lambda stage: (stage.received, -stage.stage)
    )
    measures = [text for measure, text in MEASURE_TEXTS.items() if measure in plan.memory.measures]
    return [
        f"Actor: train {job.actor.layout} ({_how(job.actor)}), generate "
        f"{job.generation_layout}; critic: train {job.critic.layout} ({_how(job.critic)}).",
        f"Predicted peak: {_gb(plan.memory.peak_bytes)} of {_gb(plan.memory.budget_bytes)} GB "
        f"usable; host memory {_gb(plan.memory.host_bytes)} GB a node.",
        f"Predicted beside tensors, GB of {plan.memory.gpu_bytes / GB:.1f}: {plan.memory.reserved} "
        f"(left free, {plan.cluster.margin:.0%}).",
        f"During generation: {'; '.join(measures) or 'nothing has to move'}.",
        f"Predicted cache: {_gb(cache.num_bytes)} GB a rank, {cache.num_blocks} blocks of "
        f"{cache.block_tokens} tokens, {cache.concurrent} of {cache.sequences} sequences of a "
        f"replica at once at full length: {cache.waves} wave{'s' if cache.waves > 1 else ''}.",
        f"Predicted reshard: a rank receives up to {_gb(traffic.received)} GB, "
        f"{_gb(traffic.received_intra_node)} inside its node and "
        f"{_gb(traffic.received_inter_node)} from others; redundant {_gb(traffic.redundant)}; the "
        "way back moves nothing.",
        f"Predicted PPO step (not measured): {seconds.total:.1f} s = reshard "
        f"{seconds.reshard:.1f} + offload {seconds.offload:.1f} + prefill {seconds.prefill:.1f} + "
        f"decode {seconds.decode:.1f} + scoring {seconds.scoring:.1f} + actor "
        f"{seconds.actor_training:.1f} + critic {seconds.critic_training:.1f}.",
    ]


def memory_rows(memory: RankMemory, *, budget_bytes: int) -> list[list[str]]:
    """A row for each pool of each role, then totals; cells are GB, or where the pool is instead."""
    keys = [
        (role, pool)
        for role in Role
        for pool in Pool
        if any(
            item.role is role and item.pool is pool
            for phase in memory.phases
            for item in phase.pools
        )
    ]
    rows = [
        [f"{role.value} {pool.value.replace('_', ' ')}"]
        + [_cell(phase, role, pool) for phase in memory.phases]
        for role, pool in keys
    ]
    rows.append(["total on the GPU", *(_gb(phase.total()) for phase in memory.phases)])
    rows.append(["free", *(_gb(budget_bytes - phase.total()) for phase in memory.phases)])
    return rows


RANKING_HEADERS = (
    "train",
    "generate",
    "recompute",
    "measures",
    "predicted GB",
    "waves",
    "predicted s",
)


def ranking_rows(plans: Sequence[Plan]) -> list[list[str]]:
    """Cells under `RANKING_HEADERS`."""
    return [
        [
            str(plan.job.actor.layout),
            f"tp{plan.job.generation_tensor}",
            plan.job.actor.recompute.value,
            ", ".join(m.value for m in Measure if m in plan.memory.measures) or "none",
            _gb(plan.memory.peak_bytes),
            str(plan.memory.cache.waves),
            f"{plan.seconds.total:.1f}",
        ]
        for plan in plans
    ]


def refusal_lines(refusals: Sequence[Refusal]) -> list[str]:
    """One line for each."""
    return [
        f"{refusal.train}"
        + (f" -> tp{refusal.generation_tensor}" if refusal.generation_tensor else "")
        + f": {refusal.reason}"
        for refusal in refusals
    ]


def _cell(phase: PhaseMemory, role: Role, pool: Pool) -> str:
    parts = []
    for residence, note in (
        (Residence.DEVICE, ""),
        (Residence.LENT, " lent"),
        (Residence.HOST, " on host"),
    ):
        num_bytes = phase.bytes_of(pool, role=role, residence=residence)
        if num_bytes:
            parts.append(f"{_gb(num_bytes)}{note}")
    return " + ".join(parts) or "-"


def _rank_json(memory: RankMemory) -> dict[str, Any]:
    return {
        "ranks": list(memory.ranks),
        "actor_stage": memory.actor_stage,
        "critic_stage": memory.critic_stage,
        "phases": {
            phase.phase.value: {
                "device_bytes": phase.total(),
                "host_bytes": phase.total(Residence.HOST),
                "pools": [
                    {
                        "role": item.role.value,
                        "pool": item.pool.value,
                        "residence": item.residence.value,
                        "bytes": item.num_bytes,
                    }
                    for item in phase.pools
                ],
            }
            for phase in memory.phases
        },
    }


def _setup_json(setup: RoleSetup) -> dict[str, Any]:
    return {
        **_layout_json(setup.layout),
        "parameters": setup.config.num_parameters,
        "value_bytes": setup.value_bytes,
        "sequence_parallel": setup.is_sequence_parallel,
        "recompute": setup.recompute.value,
        "micro_batch_rows": setup.micro_batch_rows,
    }


def _layout_json(layout: ParallelLayout) -> dict[str, int]:
    return {"tensor": layout.tensor, "pipeline": layout.pipeline, "data": layout.data}


def _row_json(plan: Plan) -> dict[str, Any]:
    return {
        "train": _layout_json(plan.job.actor.layout),
        "generation_tensor": plan.job.generation_tensor,
        "critic": _layout_json(plan.job.critic.layout),
        "recompute": plan.job.actor.recompute.value,
        "measures": [measure.value for measure in Measure if measure in plan.memory.measures],
        "peak_bytes": plan.memory.peak_bytes,
        "waves": plan.memory.cache.waves,
        "predicted_seconds": plan.seconds.total,
    }


def _of_rank(plan: Plan, rank: int) -> RankMemory:
    return next(memory for memory in plan.memory.ranks if rank in memory.ranks)


def _how(setup: RoleSetup) -> str:
    parts = [{2: "bf16", 4: "fp32"}[setup.value_bytes]]
    parts += ["sequence parallel"] if setup.is_sequence_parallel else []
    parts += [] if setup.recompute.value == "none" else ["full recomputation"]
    rows = setup.micro_batch_rows
    return ", ".join([*parts, f"{rows} row{'s' if rows > 1 else ''} a micro-batch"])


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / GB:.1f}"
