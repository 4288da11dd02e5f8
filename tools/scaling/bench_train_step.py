"""Times training steps over data-parallel ranks on one machine, and what their gradients cost.

    python tools/scaling/bench_train_step.py --processes 2 [--dtype fp32] [--json]

In turns, between barriers: a step whose reductions start while the backward pass still runs, the
same step with all of them after it, and, on buffers of the gradients' size and cut, nothing but the
reduce-scatter that steps do and the all-reduce that they did until 2026-11. The time of the
slowest rank counts. Ranks on one machine share its memory and its cores with what they send, so the
seconds say little of a network; the bytes are those of any.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from benchmark import DTYPES, command_of, machine_state, report, run_benchmark
from pydantic import Field
from torch import Tensor, nn

from megachat.checkpoint.huggingface import read_config
from megachat.config import ConfigModel, build_config
from megachat.model.config import Head, ModelOptions, OptConfig
from megachat.model.opt import OptModel
from megachat.parallel.collectives import (
    all_gather_objects,
    all_reduce_sum,
    barrier,
    start_reduce_scatter,
)
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.launch import Worker, num_cores
from megachat.parallel.layout import ParallelLayout
from megachat.records import SftBatch
from megachat.rlhf.objectives import SftObjective
from megachat.training.engine import TrainEngine
from megachat.training.schedules import OptimizerConfig

OVERLAPPED, AFTERWARDS = "step, reductions in the backward pass", "step, reductions after it"
SCATTER, REDUCE = "reduce-scatter alone", "all-reduce alone"


class Settings(ConfigModel):
    """What is measured; the options of the command line."""

    model: str = Field(
        default="facebook/opt-125m",
        description="Hub name of a published size, or HuggingFace folder: the model's shape.",
    )
    processes: int = Field(default=2, ge=2, description="Data ranks.")
    rows: int = Field(default=4, ge=1, description="Rows of each rank.")
    micro_batch: int = Field(default=2, ge=1, description="Rows that are computed at once.")
    tokens: int = Field(default=64, ge=2, description="Of each row.")
    dtype: str = Field(default="fp32", pattern="^(bf16|fp32)$", description="bf16 or fp32.")
    threads: int | None = Field(default=None, ge=1, description="Of each rank; None: its share.")
    repeats: int = Field(default=3, ge=1, description="Measured turns, after one to warm up.")

    @property
    def config(self) -> OptConfig:
        """Architecture."""
        return read_config(self.model)

    @property
    def threads_each(self) -> int:
        """CPU threads of a rank."""
        return self.threads or max(1, num_cores() // self.processes)


class _ReducedAfterwards(OptModel):
    """A model that announces changes to all gradients after the backward pass.

    Its tensor group has one rank, so there is nothing to change, and all reductions wait.
    """

    def tensor_reduced_parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return list(self.parameters())


def _engine(kind: type[OptModel], settings: Settings, groups: ProcessGroups) -> TrainEngine:
    options = ModelOptions(dtype=DTYPES[settings.dtype])
    model = kind(settings.config, groups=groups, head=Head.LANGUAGE_MODEL, options=options, seed=1)
    return TrainEngine(
        model,
        micro_batch_rows=settings.micro_batch,
        optimizer=OptimizerConfig(learning_rate=1e-6),
        total_steps=100,
        seed=0,
    )


def _batch(settings: Settings) -> SftBatch:
    rows = settings.rows * settings.processes
    generator = torch.Generator().manual_seed(0)
    return SftBatch(
        tokens=torch.randint(
            4, settings.config.vocab_size, (rows, settings.tokens), generator=generator
        ),
        lengths=torch.full((rows,), settings.tokens),
        loss_mask=torch.ones(rows, settings.tokens, dtype=torch.bool),
    )


def _train(engine: TrainEngine, batch: SftBatch) -> None:
    objective = SftObjective.for_batch(
        batch, group=engine.groups.tensor, vocab_start=engine.vocab_start
    )
    engine.forward_backward(batch, objective)
    engine.step()


def _scatter(buffers: Sequence[Tensor], groups: ProcessGroups) -> None:
    for pending in [start_reduce_scatter(buffer, groups.data) for buffer in buffers]:
        pending.wait()


def _reduce(buffers: Sequence[Tensor], groups: ProcessGroups) -> None:
    for buffer in buffers:
        all_reduce_sum(buffer, groups.data)


def run_rank(worker: Worker, settings: Settings, output: str) -> None:
    """Measures, and writes the results on rank 0."""
    torch.set_num_threads(settings.threads_each)
    groups = ProcessGroups.create(ParallelLayout(data=settings.processes))
    overlapped = _engine(OptModel, settings, groups)
    afterwards = _engine(_ReducedAfterwards, settings, groups)
    batch = _batch(settings)
    shares = [master.numel() for master in overlapped.optimizer_tensors().masters]
    buffers = [torch.zeros(share * settings.processes) for share in shares]
    actions: Mapping[str, Callable[[], None]] = {
        OVERLAPPED: lambda: _train(overlapped, batch),
        AFTERWARDS: lambda: _train(afterwards, batch),
        SCATTER: lambda: _scatter(buffers, groups),
        REDUCE: lambda: _reduce(buffers, groups),
    }
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(1 + settings.repeats):  # the first turn warms up
        for name, action in actions.items():
            barrier()
            start = time.perf_counter()
            action()
            slowest = max(all_gather_objects(time.perf_counter() - start))
            if number:
                seconds[name].append(slowest)
    if worker.rank:
        return
    size = 4 * sum(map(Tensor.numel, buffers))
    part = size * (settings.processes - 1) // settings.processes
    summary = {
        "seconds": {
            name: {"median": statistics.median(found), "all": found}
            for name, found in seconds.items()
        },
        "gradient_bytes": size,
        "buffers": len(buffers),
        "received_bytes": {SCATTER: part, REDUCE: 2 * part},
        "settings": settings.model_dump(mode="json"),
        "threads": settings.threads_each,
        **machine_state(),
    }
    Path(output).write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")


def show(summary: Mapping[str, Any]) -> str:
    """The results as a table."""
    settings, seconds = summary["settings"], summary["seconds"]
    lines = [
        f"{settings['model']}, {settings['dtype']}, {settings['processes']} ranks x "
        f"{settings['rows']} rows of {settings['tokens']} tokens, {summary['threads']} threads "
        f"each, {summary['processor']}, load {' '.join(summary['load_average'])}",
        f"{summary['gradient_bytes'] / 1e6:.0f} MB of gradients in {summary['buffers']} buffers",
        f"{'':40}{'seconds':>9}{'(fastest - slowest)':>22}{'MB to each rank':>18}",
    ]
    for name, row in seconds.items():
        spread = f"({min(row['all']):.3f} - {max(row['all']):.3f})"
        received = summary["received_bytes"].get(name)
        last = "" if received is None else f"{received / 1e6:18.0f}"
        lines.append(f"{name:40}{row['median']:9.3f}{spread:>22}{last}")
    for one, other in ((OVERLAPPED, AFTERWARDS), (SCATTER, REDUCE)):
        ratio = seconds[other]["median"] / seconds[one]["median"]
        lines.append(f"{other}: {ratio:.2f} times as long as {one}")
    return "\n".join(lines)


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Runs the steps and returns what was measured.

    Raises:
        MegachatError: An option is wrong, or there is no such model.
    """
    settings = build_config(Settings, options, source="the command line")
    _ = settings.config  # an unknown model is refused before anything starts
    return run_benchmark(
        run_rank, settings, processes=settings.processes, threads=settings.threads_each
    )


def main(*, as_json: bool, **options: Any) -> None:
    """Times training steps over data-parallel ranks."""
    report(lambda: measure(options), show, as_json=as_json)


if __name__ == "__main__":
    typer.run(command_of(Settings, main))
