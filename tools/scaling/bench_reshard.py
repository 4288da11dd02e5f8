"""Times ways to turn training weights into generation weights, side by side in one run.

    python tools/scaling/bench_reshard.py --train 2,2,1 --generate 2 [--json]

Gloo ranks on this machine run megachat's reshard, megatron-core's `swap_model_weights` (over a copy
service for the CPU), a gather of full tensors that are then cut, and bare collectives that deliver
as many bytes as megachat receives. Methods take turns, so that a busy machine slows all of them.
The default model has the layers of OPT-125m, the smallest one published.
"""

import ctypes
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from benchmark import DTYPES, report, run_benchmark
from torch import Tensor, nn

from megachat.config import ConfigModel
from megachat.errors import ConfigError
from megachat.model.config import Head, ModelOptions, OptConfig, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.parallel.collectives import (
    all_gather_last_dim,
    all_gather_objects,
    all_gather_rows,
    barrier,
    broadcast,
    start_all_gather,
    start_exchange,
    start_gather,
)
from megachat.parallel.groups import GenerationGroups, ProcessGroups
from megachat.parallel.launch import Worker
from megachat.parallel.layout import ParallelLayout
from megachat.reshard.arena import WeightArena
from megachat.reshard.execute import Resharder
from megachat.reshard.plan import plan_for_model

OURS, RAW = "megachat", "raw all-gather"


class Settings(ConfigModel):
    """What is measured."""

    train: tuple[int, int, int]
    """Tensor, pipeline and data degree."""
    generate: int
    """Tensor degree of generation."""
    hidden: int
    layers: int
    dtype: str
    repeats: int

    @property
    def source(self) -> ParallelLayout:
        """Training layout."""
        tensor, pipeline, data = self.train
        return ParallelLayout(tensor=tensor, pipeline=pipeline, data=data)

    @property
    def target(self) -> ParallelLayout:
        """Generation layout."""
        return ParallelLayout.for_world(self.source.world_size, tensor=self.generate)

    @property
    def config(self) -> OptConfig:
        """Architecture: OPT's proportions, a small vocabulary."""
        return OptConfig(
            vocab_size=4000,
            max_positions=256,
            hidden=self.hidden,
            ffn=4 * self.hidden,
            layers=self.layers,
            heads=self.hidden // 64,
            embed_dim=self.hidden,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One method, the slowest or largest of all ranks."""

    method: str
    milliseconds: float
    """Median over the repeats, from barrier to barrier."""
    received_bytes: int
    extra_bytes: int
    """Growth of resident memory over training, at its peak."""
    extra_over_bound: int
    """The same, less what generation cannot do without: its shard less the training shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What every method starts from."""

    settings: Settings
    model: OptModel
    groups: ProcessGroups
    target_groups: ProcessGroups
    arena: WeightArena
    generation: GenerationGroups

    def second_model(self) -> OptModel:
        """A model under the generation layout, in memory of its own."""
        return OptModel(
            self.settings.config,
            groups=self.target_groups,
            head=Head.LANGUAGE_MODEL,
            options=self.model.options,
            seed=None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to fetch the weights."""

    run: Callable[[], int]
    """Fetches once; returns the bytes that this rank received."""
    reset: Callable[[], None] = lambda: None
    """Goes back to training, outside of the time that is measured."""
    target: OptModel | None = None
    """The second model, of a method that needs one."""


def megachat_reshard(job: Job) -> Method:
    """In place, by the plan."""
    resharder = Resharder(job.arena, job.generation)
    return Method(run=lambda: resharder.gather().received_bytes, reset=job.arena.release)


def megatron_swap(job: Job) -> Method:
    """megatron-core's resharding into a second model."""
    refit = importlib.import_module("megatron.core.resharding.refit")
    base = importlib.import_module("megatron.core.resharding.copy_services.base")

    class CpuCopyService(base.CopyService):  # type: ignore[misc, name-defined]
        """Point to point on the CPU, all at once; megatron's own gloo service needs CUDA."""

        def __init__(self) -> None:
            self.received = 0
            self._sends: list[tuple[int, Tensor]] = []
            self._receives: list[tuple[int, Tensor]] = []
            self._local: list[Tensor] = []

        def submit_send(self, src_tensor: Tensor, dest_rank: int) -> None:
            """Queues a tensor for a rank."""
            self._sends.append((dest_rank, src_tensor))

        def submit_recv(self, dest_tensor: Tensor, src_rank: int) -> None:
            """Queues a tensor to overwrite."""
            self._receives.append((src_rank, dest_tensor))

        def run(self) -> None:
            """Transfers everything; what stays on this rank is copied, in the same order."""
            rank = dist.get_rank()
            local_sends = [tensor for peer, tensor in self._sends if peer == rank]
            local_receives = [tensor for peer, tensor in self._receives if peer == rank]
            for source, sink in zip(local_sends, local_receives, strict=True):
                sink.copy_(source)
            assert dist.group.WORLD is not None
            pending = start_exchange(
                sends=[item for item in self._sends if item[0] != rank],
                receives=[item for item in self._receives if item[0] != rank],
                group=dist.group.WORLD,
            )
            pending.wait()
            self.received = pending.received_bytes
            self._sends.clear()
            self._receives.clear()

    second = job.second_model()
    source, target = _as_megatron(job.model), _as_megatron(second)
    service = CpuCopyService()

    def run() -> int:
        refit.swap_model_weights(source, target, service)
        return service.received

    return Method(run=run, target=second)


def _as_megatron(model: OptModel) -> nn.Module:
    """A model with the two attributes that megatron-core's resharding reads."""
    shell = nn.Module()
    shell.model = model
    vars(shell)["config"] = SimpleNamespace(num_moe_experts=None)
    vars(shell)["pg_collection"] = model.groups.megatron
    return shell


def full_gather(job: Job) -> Method:
    """Every whole tensor on every rank, one after the other, cut into a second model."""
    target = job.second_model()
    sinks = target.parameters_by_spec()
    sources = job.model.parameters_by_spec()
    layout, here = job.groups.layout, job.groups.coordinate
    holders = _first_holders(job)

    @torch.no_grad()
    def run() -> int:
        received = 0
        for spec in job.model.global_specs():
            stage = holders[spec.name]
            if here.pipeline == stage:
                whole = sources[spec.name].detach()
                if spec.shard_dim is not None:
                    gather = all_gather_rows if spec.shard_dim == 0 else all_gather_last_dim
                    received += whole.nbytes * (layout.tensor - 1)
                    whole = gather(whole, job.groups.tensor)
            else:
                whole = torch.empty(spec.shape, dtype=job.model.options.dtype)
                received += whole.nbytes
            broadcast(whole, job.groups.pipeline, source=stage)
            sinks[spec.name].copy_(whole[target.local_slices(spec)])
        return received

    return Method(run=run, target=target)


def _first_holders(job: Job) -> dict[str, int]:
    """The first pipeline stage that trains each parameter."""
    names = all_gather_objects(list(job.model.parameters_by_spec()), job.groups.pipeline)
    return {name: stage for stage in reversed(range(len(names))) for name in names[stage]}


def raw_all_gather(job: Job) -> Method:
    """One `all_gather_single` that delivers as many bytes."""
    buffer, group = _raw_buffer(job)
    if buffer is None:
        return Method(run=lambda: 0)

    def run() -> int:
        pending = start_all_gather(buffer, group)
        pending.wait()
        return pending.received_bytes

    return Method(run=run)


def raw_sends(job: Job) -> Method:
    """One send to each rank of the group that deliver as many bytes, without any buckets."""
    buffer, group = _raw_buffer(job)
    if buffer is None:
        return Method(run=lambda: 0)
    slots = buffer.chunk(group.size())

    def run() -> int:
        pending = start_gather(slots, group)
        pending.wait()
        return pending.received_bytes

    return Method(run=run)


def _raw_buffer(job: Job) -> tuple[Tensor | None, dist.ProcessGroup]:
    """Memory whose gather delivers what the reshard receives; None if that is nothing."""
    finer = job.arena.plan.placement.splits > 1
    group = job.generation.pipeline if finer else job.generation.gather
    if group.size() == 1:
        return None, group
    # Ranks of one group receive a little more or less (edge stages), a collective needs one size.
    received = max(all_gather_objects(job.arena.part.traffic.received, group))
    elements = -(-received // (group.size() - 1) // job.model.options.dtype.itemsize)
    return torch.ones(elements * group.size(), dtype=job.model.options.dtype), group


METHODS: dict[str, Callable[[Job], Method]] = {
    OURS: megachat_reshard,
    "megatron-core swap": megatron_swap,
    "full gather": full_gather,
    RAW: raw_all_gather,
    "raw sends": raw_sends,
}


def run_rank(worker: Worker, settings: Settings, output: str) -> None:
    """Measures on one rank; the first one writes the results."""
    job = build_job(worker, settings)
    bound = job.arena.part.traffic.lower_bound
    methods: dict[str, Method] = {}
    received: dict[str, int] = {}
    extra: dict[str, int] = {}
    for name, prepare in METHODS.items():
        _settle()
        start = resident_bytes("VmRSS")
        method = methods[name] = prepare(job)
        for _ in range(2):  # the first opens connections and makes plans
            method.reset()
            _settle()
            received[name] = method.run()
            extra[name] = resident_bytes("VmHWM") - start
        method.reset()
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(settings.repeats):
        for name, method in methods.items():
            method.reset()
            times[name].append(_timed(method))
    mine = [
        Result(
            method=name,
            milliseconds=1000 * statistics.median(times[name]),
            received_bytes=received[name],
            extra_bytes=extra[name],
            extra_over_bound=extra[name] - bound,
        )
        for name in METHODS
    ]
    gathered, bounds = all_gather_objects(mine), all_gather_objects(bound)
    if worker.rank == 0:
        results = [_worst(list(rows)) for rows in zip(*gathered, strict=True)]
        summary = {
            "train": str(settings.source),
            "generate": str(settings.target),
            "dtype": settings.dtype,
            "parameters": settings.config.num_parameters,
            "lower_bound_bytes": max(bounds),
            "hop_order": str(job.arena.plan.order),
            "results": [asdict(result) for result in results],
        }
        Path(output).write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")


def build_job(worker: Worker, settings: Settings) -> Job:
    """A model of random weights in its arena."""
    groups = ProcessGroups.create(settings.source)
    dtype = DTYPES[settings.dtype]
    multiple = vocab_multiple_for(settings.source.tensor, settings.generate)
    plan = plan_for_model(
        settings.config,
        source=settings.source,
        target=settings.target,
        element_bytes=dtype.itemsize,
    )
    model = OptModel(
        settings.config,
        groups=groups,
        head=Head.LANGUAGE_MODEL,
        options=ModelOptions(dtype=dtype, vocab_multiple=multiple),
        seed=1,
    )
    arena = WeightArena(plan, rank=worker.rank, dtype=dtype, device=worker.device)
    arena.adopt(model)
    return Job(
        settings=settings,
        model=model,
        groups=groups,
        target_groups=ProcessGroups.create(settings.target),
        arena=arena,
        generation=GenerationGroups.create(plan.placement, training=groups),
    )


def _timed(method: Method) -> float:
    """Seconds until all ranks have finished."""
    barrier()
    start = time.perf_counter()
    method.run()
    barrier()
    return time.perf_counter() - start


def _worst(rows: list[Result]) -> Result:
    """The slowest and largest of all ranks."""
    return Result(
        method=rows[0].method,
        milliseconds=max(row.milliseconds for row in rows),
        received_bytes=max(row.received_bytes for row in rows),
        extra_bytes=max(row.extra_bytes for row in rows),
        extra_over_bound=max(row.extra_over_bound for row in rows),
    )


def _settle() -> None:
    """Gives freed memory back to the system, and starts the peak of this process anew."""
    barrier()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def resident_bytes(field: str) -> int:
    """Memory of this process: VmRSS now, VmHWM at most since it was cleared."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def show(summary: dict[str, Any]) -> str:
    """The results as a table."""
    head = (
        f"{summary['train']} -> {summary['generate']}, {summary['parameters'] / 1e6:.1f} M "
        f"parameters in {summary['dtype']}, {summary['hop_order']}"
    )
    lines = [head, f"{'method':20}{'ms':>10}{'received MB':>14}{'extra MB':>11}{'over bound':>12}"]
    for row in summary["results"]:
        lines.append(
            f"{row['method']:20}{row['milliseconds']:10.1f}{row['received_bytes'] / 1e6:14.2f}"
            f"{row['extra_bytes'] / 1e6:11.2f}{row['extra_over_bound'] / 1e6:12.2f}"
        )
    return "\n".join(lines)


def main(
    train: Annotated[str, typer.Option(help="Tensor, pipeline, data degree.")] = "2,2,1",
    generate: Annotated[int, typer.Option(help="Tensor degree of generation.")] = 2,
    hidden: Annotated[int, typer.Option(help="Width; a multiple of 64.")] = 768,
    layers: Annotated[int, typer.Option(help="Layers.")] = 12,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    repeats: Annotated[int, typer.Option(help="Measured runs of each method.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Prints JSON.")] = False,
) -> None:
    """Times ways to turn training weights into generation weights."""

    def measure() -> dict[str, Any]:
        degrees = [int(part) for part in train.split(",")]
        if len(degrees) != 3 or dtype not in DTYPES or hidden % 64:
            raise ConfigError(
                f"--train {train} --dtype {dtype} --hidden {hidden}: expected three degrees, bf16 "
                "or fp32, a multiple of 64"
            )
        settings = Settings(
            train=(degrees[0], degrees[1], degrees[2]),
            generate=generate,
            hidden=hidden,
            layers=layers,
            dtype=dtype,
            repeats=repeats,
        )
        return run_benchmark(run_rank, settings, processes=settings.source.world_size, threads=1)

    report(measure, show, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
