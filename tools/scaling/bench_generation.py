"""Times generation beside the limits of the machine's memory and of its arithmetic.

    python tools/scaling/bench_generation.py --model facebook/opt-125m --random-weights \
        --batch 8 --prompt 128 --new 64 --dtype fp32 [--peer transformers] [--tensor 2] \
        [--device cuda] [--json]
    python tools/scaling/bench_generation.py --weights HF_FOLDER ...

Every engine has the same weights and prompts and answers greedily, without stopping early. Engines
take turns in one process, and so do the measurements of the machine's limits: on a machine that
others use, only the shares and ratios of one run mean something. With `--tensor` more processes
start, which wait while engines of one process run.
"""

import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from benchmark import (
    DTYPES,
    Ceilings,
    command_of,
    machine_state,
    measure_ceilings,
    random_prompts,
    report,
    run_benchmark,
)
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from megachat.checkpoint.huggingface import load_huggingface, read_config
from megachat.checkpoint.writer import save_huggingface
from megachat.config import ConfigModel, build_config
from megachat.errors import ConfigError
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.generator import Generator
from megachat.generation.kv_cache import block_bytes
from megachat.model.config import Head, ModelOptions, OptConfig, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.collectives import barrier
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.launch import Worker, num_cores
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch

OURS = "megachat"
PEERS = ("transformers", "reference")
"""HuggingFace's `generate`, and megachat's own engine on plain torch."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""CPU time, with one thread, leaves out what other processes of a busy machine take."""


class Settings(ConfigModel):
    """What is measured; the options of the command line."""

    model: str = Field(default="facebook/opt-125m", description="Hub name of a published size.")
    weights: str | None = Field(default=None, description="HuggingFace folder, for --model.")
    random_weights: bool = Field(default=False, description="Draw the weights of --model.")
    batch: int = Field(default=8, ge=1, description="Prompts.")
    prompt: int = Field(default=128, ge=1, description="Tokens of each prompt.")
    new: int = Field(default=64, ge=2, description="Tokens of each answer, or at most.")
    mean: int | None = Field(
        default=None, ge=2, description="Sample, and let one token of so many end an answer."
    )
    waves: int = Field(
        default=1,
        ge=1,
        description="Batches of prompts: transformers answers one after the other, megachat puts "
        "the next prompt in the place of an answer that ended.",
    )
    dtype: str = Field(default="bf16", pattern="^(bf16|fp32)$", description="bf16 or fp32.")
    device: str = Field(default="cpu", pattern="^(cpu|cuda)$", description="cpu or cuda.")
    threads: int = Field(default_factory=num_cores, ge=1, description="Of the CPU.")
    block_size: int = Field(default=16, ge=1, description="Tokens in a block of the cache.")
    repeats: int = Field(default=3, ge=1, description="Measured runs of each engine.")
    clock: str = Field(
        default="wall", pattern="^(wall|cpu)$", description="wall, or cpu time of this process."
    )
    peer: list[str] = Field(default=[], description="transformers or reference; repeatable.")
    tensor: int = Field(
        default=1, ge=1, description="Also cut the model over so many processes, threads shared."
    )

    @property
    def backend(self) -> Backend:
        """This project's kernels for the device."""
        return Backend.CPU if self.device == "cpu" else Backend.CUDA

    @property
    def over_ranks(self) -> str:
        """Name of the engine that is cut."""
        return f"{OURS}, tp {self.tensor}"

    @property
    def config(self) -> OptConfig:
        """Architecture."""
        return read_config(self.model if self.weights is None else self.weights)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, spread over the vocabulary; none where all are equally long.

        Random weights make all tokens about equally likely, so lengths are geometric.
        """
        return tuple(range(4, self.config.vocab_size, self.mean)) if self.mean else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One answer to every prompt."""

    total: float
    """Seconds."""
    prefill: float
    """Seconds until the first token of every answer of a batch."""
    tokens: int
    """Of all answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One engine: medians over the repeats."""

    engine: str
    tokens_per_second: float
    """New tokens over all seconds, prompts included."""
    slowest_tokens_per_second: float
    fastest_tokens_per_second: float
    mean_tokens: float
    """Of an answer."""
    prefill_seconds: float | None
    """This and the next two are None where answers end at lengths of their own."""
    decode_ms_per_step: float | None
    bandwidth_share: float | None
    """Bytes that a decode step cannot but read, over what the memory delivers in its time."""


Run = Callable[[], tuple[Timing, Tensor]]
"""Answers once; the tokens are `[prompts, new]`, `NO_TOKEN` behind an answer's end."""
NO_TOKEN = -1


def minimal_step_bytes(settings: Settings) -> int:
    """Bytes that a decode step must read: all weights but embeddings looked up, keys and values.

    The cache counts at its mean length over the answer.
    """
    config, size = settings.config, DTYPES[settings.dtype].itemsize
    looked_up = (config.max_positions + 2) * config.hidden
    cached = settings.prompt + settings.new / 2
    per_token = block_bytes(config, tensor=1, block_size=1, dtype=DTYPES[settings.dtype])
    weights = (config.num_parameters - looked_up) * size
    return round(weights + settings.batch * cached * per_token)


def megachat_engine(
    model: OptModel, prompts: PromptBatch, settings: Settings, *, backend: Backend
) -> Run:
    """This project's generator."""
    length = settings.prompt + settings.new
    blocks = settings.batch * -(-length // settings.block_size)
    size = block_bytes(
        model.config,
        tensor=model.groups.tensor.size(),
        block_size=settings.block_size,
        dtype=DTYPES[settings.dtype],
    )
    generator = Generator(
        model,
        stop_ids=settings.stop_ids,
        config=GenerationConfig(
            backend=backend,
            block_size=settings.block_size,
            kv_cache_gb=(blocks + 1) * size / 1e9,
            max_sequences=settings.batch,
            prefill_tokens=settings.batch * settings.prompt,
        ),
    )
    clock = CLOCKS[settings.clock]
    temperature = 1.0 if settings.mean else 0.0
    sampling = SamplingConfig(max_new_tokens=settings.new, temperature=temperature)

    def run() -> tuple[Timing, Tensor]:
        answers = torch.full((prompts.num_rows, settings.new), NO_TOKEN)
        counts = [0] * prompts.num_rows
        prefill = 0.0
        start = clock()
        for token in generator.stream(prompts, sampling=sampling, seed=0):
            if not any(counts):
                prefill = clock() - start
            answers[token.row, counts[token.row]] = token.token
            counts[token.row] += 1
        return Timing(total=clock() - start, prefill=prefill, tokens=sum(counts)), answers

    return run


def transformers_engine(
    folder: Path, prompts: PromptBatch, settings: Settings, *, device: torch.device
) -> Run:
    """HuggingFace's generation of the same weights; how long a prompt takes is timed apart."""
    library: Any = importlib.import_module("transformers")
    dtype = DTYPES[settings.dtype]
    model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    clock = CLOCKS[settings.clock]
    stops = torch.tensor(settings.stop_ids, dtype=torch.int64)
    batches = prompts.tokens.to(device).chunk(settings.waves)
    ending: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    if settings.mean:
        ending = {"do_sample": True, "top_k": 0, "eos_token_id": stops.tolist()}

    @torch.no_grad()
    def answer(batch: Tensor, new: int) -> Tensor:
        tokens: Tensor = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new,
            min_new_tokens=None if settings.mean else new,
            pad_token_id=model.config.pad_token_id,
            **ending,
        )[:, settings.prompt :]
        tokens = F.pad(tokens.cpu(), (0, new - tokens.shape[1]), value=NO_TOKEN)
        ended = torch.isin(tokens, stops).long()
        return tokens.masked_fill(ended.cumsum(dim=1) > ended, NO_TOKEN)

    def run() -> tuple[Timing, Tensor]:
        start = clock()
        answer(batches[0], 1)
        middle = clock()
        tokens = torch.cat([answer(batch, settings.new) for batch in batches])
        total, count = clock() - middle, int((tokens != NO_TOKEN).sum())
        return Timing(total=total, prefill=middle - start, tokens=count), tokens

    return run


def run_rank(worker: Worker, settings: Settings, output: str) -> None:
    """Measures, and writes the results."""
    prompts = random_prompts(
        settings.config.vocab_size, batch=settings.batch * settings.waves, length=settings.prompt
    )
    engines: dict[str, Run] = {}
    model = _model(ParallelLayout(data=settings.tensor), settings)
    folder = Path(output).parent / "weights"
    if "transformers" in settings.peer:
        save_huggingface(model, folder)
    if worker.rank == 0:
        engines = _engines(model, prompts, settings, folder=folder, device=worker.device)
    if settings.tensor > 1:
        cut = _model(ParallelLayout(tensor=settings.tensor), settings)
        engines[settings.over_ranks] = megachat_engine(
            cut, prompts, settings, backend=settings.backend
        )
    timings, answers, best = _take_turns(engines, settings, worker)
    if worker.rank == 0:
        summary = _summary(timings, answers, best, settings) | machine_state(worker.device)
        Path(output).write_text(json.dumps(summary), encoding="utf-8")


def _model(layout: ParallelLayout, settings: Settings) -> OptModel:
    """The model in a layout of all ranks."""
    model = OptModel(
        settings.config,
        groups=ProcessGroups.create(layout),
        head=Head.LANGUAGE_MODEL,
        options=ModelOptions(
            dtype=DTYPES[settings.dtype],
            vocab_multiple=vocab_multiple_for(layout.tensor, layout.tensor),
        ),
        seed=1,
    )
    if settings.weights is not None:
        load_huggingface(model, Path(settings.weights))
    return model


def _engines(
    model: OptModel,
    prompts: PromptBatch,
    settings: Settings,
    *,
    folder: Path,
    device: torch.device,
) -> dict[str, Run]:
    """Those of one process."""
    engines = {OURS: megachat_engine(model, prompts, settings, backend=settings.backend)}
    if "reference" in settings.peer:
        engines["reference"] = megachat_engine(model, prompts, settings, backend=Backend.REFERENCE)
    if "transformers" in settings.peer:
        engines["transformers"] = transformers_engine(folder, prompts, settings, device=device)
    return engines


def _take_turns(
    engines: dict[str, Run], settings: Settings, worker: Worker
) -> tuple[dict[str, list[Timing]], dict[str, Tensor], Ceilings]:
    """Runs all engines again and again; a collective call.

    Args:
        engines: Those that this rank takes part in.
        settings: What is measured.
        worker: This rank; the first one also measures the machine's limits, while others wait.

    Returns:
        Timings and answers of this rank's engines, and the limits.
    """
    names = [OURS, *sorted(settings.peer)] + [settings.over_ranks] * (settings.tensor > 1)
    timings: dict[str, list[Timing]] = {name: [] for name in engines}
    answers: dict[str, Tensor] = {}
    ceilings = [Ceilings(read_gb_s=0.0, gemm_tflop_s=0.0)]
    for repeat in range(settings.repeats + 1):
        for name in names:
            is_cut = name == settings.over_ranks
            torch.set_num_threads(max(1, settings.threads // (settings.tensor if is_cut else 1)))
            barrier()
            if name in engines:
                timing, answers[name] = engines[name]()
                timings[name] += [timing] if repeat else []  # the first run warms up
        torch.set_num_threads(settings.threads)
        barrier()
        if worker.rank == 0:
            ceilings.append(
                measure_ceilings(
                    DTYPES[settings.dtype], device=worker.device, clock=CLOCKS[settings.clock]
                )
            )
    return timings, answers, Ceilings.best_of(ceilings)


def _summary(
    timings: dict[str, list[Timing]],
    answers: dict[str, Tensor],
    best: Ceilings,
    settings: Settings,
) -> dict[str, Any]:
    """What is written."""
    results = [_result(name, timings[name], settings, best) for name in timings]
    first = results[0]
    return {
        "tokens_per_second": first.tokens_per_second,
        "decode_ms_per_step": first.decode_ms_per_step,
        "prefill_seconds": first.prefill_seconds,
        "bandwidth_share": first.bandwidth_share,
        "ceilings": asdict(best),
        "engines": [asdict(result) for result in results],
        "same_tokens": None
        if settings.mean  # engines draw from the same distribution, but not the same tokens
        else {
            name: (found == answers[OURS]).float().mean().item() for name, found in answers.items()
        },
        "step_bytes": minimal_step_bytes(settings),
        "settings": settings.model_dump(mode="json"),
    }


def _result(name: str, timings: list[Timing], settings: Settings, ceilings: Ceilings) -> Result:
    """Medians of one engine."""
    speeds = [timing.tokens / timing.total for timing in timings]
    prefill = step = None
    if settings.mean is None and settings.waves == 1:
        prefill = statistics.median(timing.prefill for timing in timings)
        decoding = [timing.total - timing.prefill for timing in timings]
        step = statistics.median(decoding) / (settings.new - 1)
    least = minimal_step_bytes(settings) / 1e9 / ceilings.read_gb_s
    return Result(
        engine=name,
        tokens_per_second=statistics.median(speeds),
        slowest_tokens_per_second=min(speeds),
        fastest_tokens_per_second=max(speeds),
        mean_tokens=statistics.mean(timing.tokens for timing in timings)
        / (settings.batch * settings.waves),
        prefill_seconds=prefill,
        decode_ms_per_step=None if step is None else 1000 * step,
        bandwidth_share=None if step is None else least / step,
    )


def show(summary: dict[str, Any]) -> str:
    """The results as a table."""
    settings, ceilings = summary["settings"], summary["ceilings"]
    same = summary["same_tokens"] or {}
    lines = [
        f"{settings['model']}, {settings['dtype']}, {settings['waves']} x {settings['batch']} "
        f"prompts, {settings['prompt']} + {settings['new']} tokens, {settings['threads']} threads, "
        f"{summary['processor']}, load {' '.join(summary['load_average'])}",
        f"reading {ceilings['read_gb_s']:.1f} GB/s, GEMM {ceilings['gemm_tflop_s']:.3f} TFLOP/s",
        f"{'engine':14}{'tokens/s':>10}{'(slowest - fastest)':>22}{'tokens':>8}{'prefill s':>11}"
        f"{'ms/step':>9}{'bandwidth':>11}{'same tokens':>13}",
    ]
    for row in summary["engines"]:
        spread = (
            f"({row['slowest_tokens_per_second']:.1f} - {row['fastest_tokens_per_second']:.1f})"
        )
        lines.append(
            f"{row['engine']:14}{row['tokens_per_second']:10.1f}{spread:>22}"
            f"{row['mean_tokens']:8.1f}"
            f"{_shown(row['prefill_seconds'], '.3f'):>11}"
            f"{_shown(row['decode_ms_per_step'], '.2f'):>9}"
            f"{_shown(row['bandwidth_share'], '.0%'):>11}"
            f"{_shown(same.get(row['engine']), '.1%'):>13}"
        )
    return "\n".join(lines)


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Runs all engines and returns what was measured.

    Raises:
        MegachatError: An option is wrong, the model cannot be read, or the kernels cannot be built.
    """
    settings = build_config(Settings, options, source="the command line")
    if settings.random_weights == (settings.weights is not None):
        raise ConfigError("give either --random-weights or --weights HF_FOLDER")
    if not set(settings.peer) <= set(PEERS):
        raise ConfigError(f"--peer {' '.join(settings.peer)}: known are {', '.join(PEERS)}")
    return run_benchmark(
        run_rank,
        settings,
        processes=settings.tensor,
        threads=settings.threads,
        device=settings.device,
    )


def main(*, as_json: bool, **options: Any) -> None:
    """Times generation."""
    report(lambda: measure(options), show, as_json=as_json)


if __name__ == "__main__":
    typer.run(command_of(Settings, main))
