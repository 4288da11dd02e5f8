"""Times the kernels beside what the machine can do, and checks the cost model of a decode step.

    python tools/scaling/bench_kernels.py --model facebook/opt-125m --dtype bf16 [--json]
    python tools/scaling/bench_kernels.py --model facebook/opt-6.7b --device cuda

First each operation at the sizes that the model's decode step gives it, reading other weights each
time, as a step does; on a GPU as a CUDA graph replays it, without the cost of launches. On a CPU
then whole steps over batches and contexts, beside what `decode_cost` says. The ceilings, reading
memory and multiplying and adding in registers or matrix units, are measured in between.
"""

import ctypes
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmark import CPU, DTYPES, machine_state, measure_ceilings, report, run_benchmark
from pydantic import Field
from torch import Tensor

from megachat.checkpoint.huggingface import read_config
from megachat.config import ConfigModel, build_config
from megachat.model.config import POSITION_OFFSET, OptConfig
from megachat.ops.build import Recipe, load_library
from megachat.ops.decode_step import MOST_ROWS, CpuDecodeStep, DecodeLayer, DecodeModel
from megachat.ops.epilogues import bias_relu, bias_residual_layer_norm
from megachat.ops.paged_cache import kv_append, paged_attention_decode
from megachat.ops.registry import Backend
from megachat.ops.sample import DrawRules, sample, sample_combine
from megachat.ops.tiled_linear import tiled_linear, tiled_linear_bias_relu
from megachat.parallel.launch import Worker, num_cores
from megachat.planner.decode_cost import SHARES, Limits, predict, work_of

_READ_BYTES = 1 << 28
_FMA_ROUNDS = 3_000_000
_TRIES = 4
_SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "bench"


class Settings(ConfigModel):
    """What is measured; the options of the command line."""

    model: str
    dtype: str = Field(pattern="^(bf16|fp32)$")
    batch: tuple[Annotated[int, Field(strict=False, ge=1, le=MOST_ROWS)], ...] = Field(min_length=1)
    context: tuple[Annotated[int, Field(strict=False, ge=1)], ...] = Field(min_length=1)
    threads: int = Field(ge=1)
    repeats: int = Field(ge=1)
    block_size: int = 16
    device: str = Field(default="cpu", pattern="^(cpu|cuda)$")

    @property
    def backend(self) -> Backend:
        """Whose kernels are timed."""
        return Backend.CPU if self.device == "cpu" else Backend.CUDA

    @property
    def config(self) -> OptConfig:
        """Architecture."""
        return read_config(self.model)


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRow:
    """One operation at one batch."""

    op: str
    batch: int
    microseconds: float
    gb_s: float
    """Bytes that it must read, 10^9 a second."""
    gflop_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """Whole decode steps."""

    batch: int
    context: int
    milliseconds: float
    predicted: float
    """Milliseconds, by the cost model."""
    gb_s: float
    gflop_s: float
    limits: Limits
    """Around these steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """Something to time."""

    op: str
    batch: int
    run: Callable[[int], object]
    """Called with 0, 1, ... so that it may take other memory each time."""
    num_bytes: int
    flops: int


def ceilings(threads: int) -> Limits:
    """The best of a few tries at both limits: one alone may fall into a neighbour's work."""
    library = load_library(Recipe(sources=_SOURCES))
    read, multiply_add = library.megachat_read_ceiling, library.megachat_fma_ceiling
    read.restype = multiply_add.restype = ctypes.c_double
    buffer = _buffer(_READ_BYTES)
    pointer, size = ctypes.c_void_p(buffer.data_ptr()), ctypes.c_int64(buffer.nbytes)
    rounds = ctypes.c_int64(_FMA_ROUNDS)
    return Limits(
        read=max(read(pointer, size, ctypes.c_int(threads)) for _ in range(_TRIES)),
        multiply_add=max(multiply_add(rounds, ctypes.c_int(threads)) for _ in range(_TRIES)),
    )


@functools.cache
def _buffer(num_bytes: int) -> Tensor:
    """Kept: memory that is new to a process reads slower."""
    return torch.ones(num_bytes // 4)


def random_model(
    config: OptConfig,
    dtype: torch.dtype,
    *,
    blocks: int,
    block_size: int,
    device: torch.device = CPU,
) -> DecodeModel:
    """Weights and a cache for decode steps on one rank."""
    hidden, ffn = config.hidden, config.ffn

    def weight(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).uniform_(-0.05, 0.05)

    def layer() -> DecodeLayer:
        page = (blocks, block_size, config.heads, config.head_dim)
        return DecodeLayer(
            norm1_weight=weight(hidden),
            norm1_bias=weight(hidden),
            qkv_weight=weight(3 * hidden, hidden),
            qkv_bias=weight(3 * hidden),
            proj_weight=weight(1, hidden, hidden),
            proj_bias=weight(hidden),
            norm2_weight=weight(hidden),
            norm2_bias=weight(hidden),
            fc1_weight=weight(ffn, hidden),
            fc1_bias=weight(ffn),
            fc2_weight=weight(1, hidden, ffn),
            fc2_bias=weight(hidden),
            keys=weight(*page),
            values=weight(*page),
        )

    projected = config.embed_dim != hidden
    return DecodeModel(
        layers=tuple(layer() for _ in range(config.layers)),
        words=weight(config.vocab_size, config.embed_dim),
        positions=weight(config.max_positions + POSITION_OFFSET, hidden),
        position_offset=POSITION_OFFSET,
        project_in=weight(hidden, config.embed_dim) if projected else None,
        project_out=weight(config.embed_dim, hidden) if projected else None,
        final_norm_weight=weight(hidden) if config.layer_norm_first else None,
        final_norm_bias=weight(hidden) if config.layer_norm_first else None,
        norm_first=config.layer_norm_first,
        epsilon=1e-5,
        vocab_start=0,
        local_vocab=config.vocab_size,
        group_sum=None,
    )


def op_calls(model: DecodeModel, *, batch: int, context: int, backend: Backend) -> Iterator[_Call]:
    """The operations of a step, each over all layers in turn."""
    yield from _products(model, batch, backend)
    yield from _attention(model, batch, context, backend)
    yield from _elementwise(model, batch, backend)


def _inputs(model: DecodeModel, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.words)


def _products(model: DecodeModel, batch: int, backend: Backend) -> Iterator[_Call]:
    layers, multiply = model.layers, tiled_linear.on(backend)
    with_relu, bias = tiled_linear_bias_relu.on(backend), layers[0].fc1_bias
    for op, weights in (
        ("tiled_linear qkv", [layer.qkv_weight[None] for layer in layers]),
        ("tiled_linear proj", [layer.proj_weight for layer in layers]),
        ("tiled_linear_bias_relu fc1", [layer.fc1_weight[None] for layer in layers]),
        ("tiled_linear fc2", [layer.fc2_weight for layer in layers]),
        # As after a reshard from two tensor ranks to one.
        ("tiled_linear fc2, 2 tiles", [_in_two_tiles(layer.fc2_weight) for layer in layers]),
        ("tiled_linear logits", [model.words[None]]),
    ):
        tiles, _, width = weights[0].shape
        x = _inputs(model, batch, tiles * width)

        def run(turn: int, x: Tensor = x, weights: list[Tensor] = weights) -> Tensor:
            return multiply(x, weights[turn % len(weights)])

        def run_with_relu(turn: int, x: Tensor = x, weights: list[Tensor] = weights) -> Tensor:
            return with_relu(x, weights[turn % len(weights)], bias)

        yield _Call(
            op=op,
            batch=batch,
            run=run_with_relu if "relu" in op else run,
            num_bytes=weights[0].nbytes,
            flops=2 * weights[0].numel() * batch,
        )


def _in_two_tiles(weight: Tensor) -> Tensor:
    """The same numbers in tiles of half as many inputs, in some order."""
    _, outputs, width = weight.shape
    return weight.view(2, outputs, width // 2)


def _attention(model: DecodeModel, batch: int, context: int, backend: Backend) -> Iterator[_Call]:
    layers, size = model.layers, model.words.element_size()
    attend, append = paged_attention_decode.on(backend), kv_append.on(backend)
    tables, lengths, slots = _rows_of(layers[0].keys, batch=batch, context=context)
    heads, head_dim = layers[0].keys.shape[2:]
    width = heads * head_dim
    query, qkv = _inputs(model, batch, heads, head_dim), _inputs(model, batch, 3 * width)

    def run_attend(turn: int) -> Tensor:
        layer = layers[turn % len(layers)]
        return attend(query, layer.keys, layer.values, tables, lengths)

    def run_append(turn: int) -> Tensor:
        layer = layers[turn % len(layers)]
        return append(qkv, layer.qkv_bias, layer.keys, layer.values, slots)

    yield _Call(
        op=f"paged_attention_decode {context}",
        batch=batch,
        run=run_attend,
        num_bytes=2 * batch * context * width * size,
        flops=4 * batch * context * width,
    )
    yield _Call(op="kv_append", batch=batch, run=run_append, num_bytes=qkv.nbytes, flops=0)


def _elementwise(model: DecodeModel, batch: int, backend: Backend) -> Iterator[_Call]:
    layers, hidden = model.layers, model.positions.shape[1]
    relu, norm = bias_relu.on(backend), bias_residual_layer_norm.on(backend)
    draw, combine = sample.on(backend), sample_combine.on(backend)
    x, inner = _inputs(model, batch, hidden), _inputs(model, batch, len(layers[0].fc1_bias))
    logits = _inputs(model, batch, len(model.words))
    rows = torch.arange(batch, device=logits.device)
    nothing = rows[:0]
    rules = DrawRules(
        temperature=1.0, suppressed=nothing, stops=nothing, min_new_tokens=1, first_group=0
    )

    def run_relu(turn: int) -> Tensor:
        return relu(inner, layers[turn % len(layers)].fc1_bias)

    def run_norm(turn: int) -> object:
        layer = layers[turn % len(layers)]
        return norm(x, layer.fc2_bias, x, layer.norm1_weight, layer.norm1_bias, 1e-5)

    def run_draw(_: int) -> Tensor:
        return draw(logits, keys=rows, positions=rows, rules=rules)

    parts = run_draw(0)[None]

    def run_combine(_: int) -> object:
        return combine(parts)

    for op, run, read in (
        ("bias_relu", run_relu, inner.nbytes),
        ("bias_residual_layer_norm", run_norm, 2 * x.nbytes),
        ("sample", run_draw, logits.nbytes),
        ("sample_combine", run_combine, parts.nbytes),
    ):
        yield _Call(op=op, batch=batch, run=run, num_bytes=read, flops=0)


def _rows_of(keys: Tensor, *, batch: int, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tables, lengths and slots of equally long sequences whose blocks lie in no order."""
    block_size = keys.shape[1]
    columns = -(-context // block_size)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))
    tables = order[: batch * columns].view(batch, columns).int()
    slots = tables[:, -1].long() * block_size + (context - 1) % block_size
    lengths = torch.full((batch,), context)
    return tables.to(keys.device), lengths.to(keys.device), slots.to(keys.device)


def _seconds(run: Callable[[int], object], *, repeats: int, calls: int) -> float:
    """Median over the repeats of the mean over some calls."""
    turns = iter(range(1_000_000))
    run(next(turns))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run(next(turns))
        found.append((time.perf_counter() - start) / calls)
    return statistics.median(found)


def _seconds_of_graph(run: Callable[[int], object], *, repeats: int, calls: int) -> float:
    """The same for a GPU: the calls are recorded, and replays of the recording are timed there."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        run(0)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(calls):
            run(turn)
    graph.replay()
    found: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(found)


def measure_ops(model: DecodeModel, settings: Settings) -> list[OpRow]:
    """All operations at all batches, at the middle context."""
    context = sorted(settings.context)[len(settings.context) // 2]
    clock = _seconds if settings.device == "cpu" else _seconds_of_graph
    rows = []
    for batch in settings.batch:
        for call in op_calls(model, batch=batch, context=context, backend=settings.backend):
            spent = clock(call.run, repeats=settings.repeats, calls=2 * len(model.layers))
            rows.append(
                OpRow(
                    op=call.op,
                    batch=batch,
                    microseconds=spent * 1e6,
                    gb_s=call.num_bytes / spent / 1e9,
                    gflop_s=call.flops / spent / 1e9,
                )
            )
    return rows


def measure_steps(model: DecodeModel, settings: Settings) -> tuple[list[StepRow], Limits]:
    """Whole steps, and the best ceilings between them."""
    step = CpuDecodeStep(model, most_rows=max(settings.batch))
    config, size = settings.config, model.words.element_size()
    measured: list[tuple[int, int, float]] = []
    tries = [ceilings(settings.threads)]
    for context in settings.context:
        for batch in settings.batch:
            tables, lengths, slots = _rows_of(model.layers[0].keys, batch=batch, context=context)

            inputs = {"positions": lengths - 1, "slots": slots, "lengths": lengths}

            def run(_: int, tables: Tensor = tables, inputs: dict[str, Tensor] = inputs) -> Tensor:
                return step.run(inputs["lengths"], tables=tables, **inputs)

            spent = _seconds(run, repeats=settings.repeats, calls=2)
            measured.append((batch, context, spent))
            tries.append(ceilings(settings.threads))
    best = Limits(
        **{field.name: max(getattr(each, field.name) for each in tries) for field in fields(Limits)}
    )
    rows = []
    for number, (batch, context, spent) in enumerate(measured):
        # A machine that others use is not equally fast all the time: its limits just before and
        # just after are the ones that held.
        before, after = tries[number : number + 2]
        limits = Limits(
            read=(before.read + after.read) / 2,
            multiply_add=(before.multiply_add + after.multiply_add) / 2,
        )
        work = work_of(config, batch=batch, context=context, value_bytes=size)
        rows.append(
            StepRow(
                batch=batch,
                context=context,
                milliseconds=spent * 1e3,
                predicted=predict(work, limits, SHARES[settings.dtype]) * 1e3,
                gb_s=(work.weight_bytes + work.cache_bytes) / spent / 1e9,
                gflop_s=(work.product_flops + work.attention_flops) / spent / 1e9,
                limits=limits,
            )
        )
    return rows, best


def _steps_and_limits(
    model: DecodeModel, settings: Settings, device: torch.device
) -> tuple[list[StepRow], Limits]:
    """Steps are those of the fused operation of the CPU."""
    if device.type == "cpu":
        return measure_steps(model, settings)
    best = measure_ceilings(DTYPES[settings.dtype], device=device, tries=settings.repeats)
    return [], Limits(read=best.read_gb_s * 1e9, multiply_add=best.gemm_tflop_s * 1e12)


def run_rank(worker: Worker, settings: Settings, output: str) -> None:
    """Measures, and writes the results."""
    torch.set_num_threads(settings.threads)
    blocks = max(settings.batch) * -(-max(settings.context) // settings.block_size)
    model = random_model(
        settings.config,
        DTYPES[settings.dtype],
        blocks=blocks,
        block_size=settings.block_size,
        device=worker.device,
    )
    ops = measure_ops(model, settings)
    steps, best = _steps_and_limits(model, settings, worker.device)
    summary = {
        "ceilings": {"read_gb_s": best.read / 1e9, "fma_gflop_s": best.multiply_add / 1e9},
        "ops": [asdict(row) for row in ops],
        "steps": [asdict(row) for row in steps],
        "settings": settings.model_dump(mode="json"),
        **machine_state(worker.device),
    }
    Path(output).write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")


def show(summary: dict[str, Any]) -> str:
    """The results as two tables."""
    settings, limits = summary["settings"], summary["ceilings"]
    read, fma = limits["read_gb_s"], limits["fma_gflop_s"]
    lines = [
        f"{settings['model']}, {settings['dtype']}, {settings['threads']} threads, "
        f"{summary['processor']}, load {' '.join(summary['load_average'])}",
        f"reading {read:.1f} GB/s, multiplying and adding {fma:.0f} GFLOP/s",
        f"{'operation':30}{'batch':>6}{'us':>10}{'GB/s':>8}{'':>6}{'GFLOP/s':>9}",
    ]
    lines += [
        f"{row['op']:30}{row['batch']:6}{row['microseconds']:10.1f}{row['gb_s']:8.2f}"
        f"{row['gb_s'] / read:6.0%}{row['gflop_s']:9.1f}{row['gflop_s'] / fma:6.0%}"
        for row in summary["ops"]
    ]
    if not summary["steps"]:
        return "\n".join(lines)
    lines.append(f"{'step: context':30}{'batch':>6}{'ms':>10}{'GB/s':>8}{'':>6}{'GFLOP/s':>9}")
    lines += [
        f"{row['context']:<30}{row['batch']:6}{row['milliseconds']:10.2f}{row['gb_s']:8.2f}"
        f"{row['gb_s'] / read:6.0%}{row['gflop_s']:9.1f}{row['gflop_s'] / fma:6.0%}"
        f"  predicted {row['predicted']:.2f} ms ({row['predicted'] / row['milliseconds'] - 1:+.0%})"
        for row in summary["steps"]
    ]
    return "\n".join(lines)


def measure(values: dict[str, Any]) -> dict[str, Any]:
    """Runs everything and returns what was measured.

    Raises:
        MegachatError: An option is wrong, the model is unknown, or the kernels cannot be built.
    """
    settings = build_config(Settings, values, source="the command line")
    return run_benchmark(run_rank, settings, threads=settings.threads, device=settings.device)


def main(
    model: Annotated[str, typer.Option(help="Hub name of a published size.")] = "facebook/opt-125m",
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    batch: Annotated[str, typer.Option(help="Sequences, with commas.")] = "1,8,32,64",
    context: Annotated[str, typer.Option(help="Tokens, with commas.")] = "16,160,1024",
    threads: Annotated[int, typer.Option(help="Of the CPU; 0 takes all cores.")] = 0,
    repeats: Annotated[int, typer.Option(help="Of each measurement.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Prints JSON.")] = False,
) -> None:
    """Times kernels and, on a CPU, whole decode steps."""
    values = {
        "model": model,
        "dtype": dtype,
        "batch": tuple(batch.split(",")),
        "context": tuple(context.split(",")),
        "threads": threads or num_cores(),
        "repeats": repeats,
        "device": device,
    }
    report(lambda: measure(values), show, as_json=as_json)


if __name__ == "__main__":
    typer.run(main)
