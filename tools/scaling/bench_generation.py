"""Times generation beside the limits of the machine's memory and of its arithmetic.

    python tools/scaling/bench_generation.py --model facebook/opt-125m --random-weights \
        --batch 8 --prompt 128 --new 64 --dtype fp32 [--peer transformers] [--tensor 2] \
        [--device cuda] [--peer openvino --peer-python OTHER_ENVIRONMENT/bin/python] [--json]
    python tools/scaling/bench_generation.py --weights HF_FOLDER ...

Every engine has the same weights and prompts and answers greedily, without stopping early. Engines
take turns, and so do the measurements of the machine's limits: on a machine that others use, only
the shares and ratios of one run mean something. With `--tensor` more processes start, which wait
while engines of one process run; OpenVINO has a process and an environment of its own, in which
nothing is installed.
"""

import contextlib
import json
import statistics
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
from generation_engines import (
    CLOCKS,
    OURS,
    PEERS,
    Run,
    Settings,
    Timing,
    megachat_engine,
    openvino_engine,
    openvino_process,
    transformers_engine,
)
from torch import Tensor

from megachat.checkpoint.huggingface import load_huggingface
from megachat.checkpoint.writer import save_huggingface
from megachat.config import build_config
from megachat.errors import ConfigError
from megachat.generation.kv_cache import block_bytes
from megachat.model.config import Head, ModelOptions, vocab_multiple_for
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.collectives import barrier
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.launch import Worker
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch


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


def run_rank(worker: Worker, settings: Settings, output: str) -> None:
    """Measures, and writes the results."""
    prompts = random_prompts(
        settings.config.vocab_size, batch=settings.batch * settings.waves, length=settings.prompt
    )
    engines: dict[str, Run] = {}
    model = _model(ParallelLayout(data=settings.tensor), settings)
    folder = Path(output).parent
    if set(settings.peer) & {"transformers", "openvino"}:
        save_huggingface(model, folder / "weights")
    with contextlib.ExitStack() as peers:
        if worker.rank == 0:
            engines = _engines(model, prompts, settings, folder=folder, device=worker.device)
            if "openvino" in settings.peer:
                ask = peers.enter_context(openvino_process(prompts, settings, folder))
                engines["openvino"] = openvino_engine(ask, settings)
        _measure_all(engines, prompts, settings, worker=worker, output=Path(output))


def _measure_all(
    engines: dict[str, Run],
    prompts: PromptBatch,
    settings: Settings,
    *,
    worker: Worker,
    output: Path,
) -> None:
    """Runs all engines in turns, and those over all ranks too; a collective call."""
    if settings.tensor > 1:
        cut = _model(ParallelLayout(tensor=settings.tensor), settings)
        engines[settings.over_ranks] = megachat_engine(
            cut, prompts, settings, backend=settings.backend
        )
    timings, answers, best = _take_turns(engines, settings, worker)
    if worker.rank == 0:
        summary = _summary(timings, answers, best, settings) | machine_state(worker.device)
        output.write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")


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
        engines["transformers"] = transformers_engine(
            folder / "weights", prompts, settings, device=device
        )
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
    if ("openvino" in settings.peer) != (settings.peer_python is not None):
        raise ConfigError("--peer openvino and --peer-python PYTHON belong together: give both")
    if "openvino" in settings.peer and (settings.device, settings.clock) != ("cpu", "wall"):
        raise ConfigError("OpenVINO runs on the CPU, and its own clock is the wall's")
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
