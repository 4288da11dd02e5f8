"""Times one PPO step on this machine's CPU, phase by phase, beside the limits of the machine.

    python tools/scaling/bench_ppo_step.py --dtype fp32 [--old-logprobs rollout] [--json]
    python tools/scaling/bench_ppo_step.py --peer-python OTHER_ENVIRONMENT/bin/python

Four models of one shape with random weights; every prompt is as long and every answer too; one
epoch of one mini-batch. A phase's limit is the time of its matrix products at the speed of a large
product, plus the time of the bytes that it cannot but move at the speed of reading memory, both
measured between the steps. With `--peer-python`, an interpreter of an environment with TRL, steps
of TRL's PPO trainer on the same weights and prompts take turns with ours; nothing is installed.
"""

import contextlib
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmark import (
    DTYPES,
    Ceilings,
    command_of,
    machine_state,
    measure_ceilings,
    peer_process,
    random_prompts,
    report,
    run_benchmark,
)
from pydantic import Field

from megachat.checkpoint.huggingface import read_config
from megachat.checkpoint.writer import save_huggingface
from megachat.config import ConfigModel, build_config
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.kv_cache import block_bytes
from megachat.hybrid.engine import HybridEngine, HybridSettings
from megachat.model.config import Head, ModelOptions, OptConfig
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.launch import Worker, num_cores
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch
from megachat.rlhf.config import OldLogprobs, PpoConfig
from megachat.rlhf.engine import RLHFEngine
from megachat.rlhf.ppo import PPOTrainer
from megachat.stages.rlhf import ppo_step
from megachat.telemetry.flops import TransformerShape, decode_bytes, forward_flops
from megachat.telemetry.metrics import NullMetricsWriter
from megachat.telemetry.timers import PhaseTimers
from megachat.training.engine import ForwardEngine, TrainEngine
from megachat.training.schedules import OptimizerConfig

PEER_SCRIPT = Path(__file__).with_name("trl_ppo_step.py")
OURS, PEER = "megachat", "trl"
WHOLE = "whole step"
OPTIMIZER = OptimizerConfig(learning_rate=1e-6)
BLOCK_SIZE = 16
_TRIES = 5


class Settings(ConfigModel):
    """What is measured; the options of the command line."""

    model: str = Field(
        default="facebook/opt-125m",
        description="Hub name of a published size, or HuggingFace folder: shape of all models.",
    )
    batch: int = Field(default=8, ge=1, description="Prompts.")
    prompt: int = Field(default=128, ge=1, description="Tokens of each prompt.")
    new: int = Field(default=64, ge=2, description="Tokens of each answer.")
    dtype: str = Field(default="fp32", pattern="^(bf16|fp32)$", description="bf16 or fp32.")
    threads: int = Field(default_factory=num_cores, ge=1, description="Of the CPU.")
    repeats: int = Field(default=3, ge=1, description="Measured steps, after one to warm up.")
    old_logprobs: Annotated[OldLogprobs, Field(strict=False)] = Field(
        default=OldLogprobs.RECOMPUTE, description="recompute or rollout, see rlhf.old_logprobs."
    )
    peer_python: str | None = Field(
        default=None, description="Interpreter of an environment with TRL, to compare with."
    )

    @property
    def config(self) -> OptConfig:
        """Architecture."""
        return read_config(self.model)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a phase cannot do without."""

    flops: int = 0
    """Of matrix products."""
    moved_bytes: int = 0
    """Read or written, beside the operands of those products."""

    def seconds(self, ceilings: Ceilings) -> float:
        """At the machine's limits, one after the other."""
        gemm, read = ceilings.gemm_tflop_s * 1e12, ceilings.read_gb_s * 1e9
        return self.flops / gemm + self.moved_bytes / read


def phase_work(settings: Settings) -> dict[str, Work]:
    """The work of each timed phase; logits count where a response token is chosen."""
    config, value_bytes = settings.config, DTYPES[settings.dtype].itemsize
    rows, lengths = settings.batch, [settings.prompt + settings.new] * settings.batch
    policy = TransformerShape(
        hidden=config.hidden,
        ffn=config.ffn,
        layers=config.layers,
        embed_dim=config.embed_dim,
        outputs=config.vocab_size,
    )
    scalar = replace(policy, outputs=1)
    answers = rows * settings.new

    def forward(shape: TransformerShape, head_tokens: int) -> int:
        return forward_flops(shape, lengths=lengths, head_tokens=head_tokens).total

    prompts = [settings.prompt] * rows
    decoded = decode_bytes(
        policy,
        prompt_lengths=prompts,
        response_lengths=[settings.new] * rows,
        bytes_per_value=value_bytes,
    )
    # Gradient, weight and two moments are read, all but the gradient written; and a bf16 copy.
    update = (7 * 4 + (2 if settings.dtype == "bf16" else 0)) * config.num_parameters
    work = {
        "generate": Work(
            flops=forward_flops(policy, lengths=prompts, head_tokens=rows).total,
            moved_bytes=decoded.total,
        ),
        "score/actor": Work(flops=forward(policy, answers)),
        "score/reference": Work(flops=forward(policy, answers)),
        "score/critic": Work(flops=forward(scalar, answers)),
        "score/reward": Work(flops=forward(scalar, rows)),
        "train actor": Work(flops=3 * forward(policy, answers), moved_bytes=update),
        "train actor/optimizer": Work(moved_bytes=update),
        "train critic": Work(flops=3 * forward(scalar, answers), moved_bytes=update),
        "train critic/optimizer": Work(moved_bytes=update),
    }
    if settings.old_logprobs is OldLogprobs.ROLLOUT:
        del work["score/actor"]
    whole = [part for name, part in work.items() if not name.endswith("optimizer")]
    work[WHOLE] = Work(
        flops=sum(part.flops for part in whole), moved_bytes=sum(part.moved_bytes for part in whole)
    )
    return work


def build_trainer(settings: Settings, timers: PhaseTimers) -> PPOTrainer:
    """Four models with random weights: actor and reference alike, critic and reward model too."""
    config, groups = settings.config, ProcessGroups.create(ParallelLayout())
    options = ModelOptions(dtype=DTYPES[settings.dtype])

    def model(head: Head) -> OptModel:
        return OptModel(config, groups=groups, head=head, options=options, seed=1)

    blocks = settings.batch * -(-(settings.prompt + settings.new) // BLOCK_SIZE) + 1
    size = block_bytes(config, tensor=1, block_size=BLOCK_SIZE, dtype=options.dtype)
    rows = settings.batch
    actor = HybridEngine(
        model(Head.LANGUAGE_MODEL),
        HybridSettings(
            generation_tensor=1,
            micro_batch_rows=rows,
            optimizer=OPTIMIZER,
            total_steps=100,
            seed=0,
            generation=GenerationConfig(
                backend=Backend.CPU,
                block_size=BLOCK_SIZE,
                kv_cache_gb=blocks * size / 1e9,
                max_sequences=rows,
                prefill_tokens=rows * settings.prompt,
            ),
        ),
        stop_ids=(),
    )
    critic = TrainEngine(
        model(Head.SCALAR), micro_batch_rows=rows, optimizer=OPTIMIZER, total_steps=100, seed=0
    )
    return PPOTrainer(
        RLHFEngine(
            actor=actor,
            critic=critic,
            reference=ForwardEngine(model(Head.LANGUAGE_MODEL), micro_batch_rows=rows),
            reward=ForwardEngine(model(Head.SCALAR), micro_batch_rows=rows),
            logprob_backend=Backend.CPU,
        ),
        config=PpoConfig(epochs=1, minibatches=1, reward={"normalization": "none"}),  # type: ignore[arg-type]
        sampling=SamplingConfig(max_new_tokens=settings.new),
        seed=0,
        timers=timers,
        old_logprobs=settings.old_logprobs,
    )


def run_rank(_worker: Worker, settings: Settings, output: str) -> None:
    """Measures, and writes the results."""
    torch.set_num_threads(settings.threads)
    timers = PhaseTimers()
    trainer = build_trainer(settings, timers)
    prompts = random_prompts(
        settings.config.vocab_size, batch=settings.batch, length=settings.prompt
    )
    metrics = NullMetricsWriter()
    folder = Path(output).parent
    seconds: dict[str, list[float]] = {}
    peer_seconds: list[float] = []
    ceilings: list[Ceilings] = []
    with contextlib.ExitStack() as stack:
        peer_step = None
        if settings.peer_python is not None:
            _save_models(trainer, prompts, folder)
            request = settings.model_dump(mode="json") | {"folder": str(folder)}
            peer_step = stack.enter_context(
                peer_process(settings.peer_python, PEER_SCRIPT, request, log=folder / "peer.log")
            )
        for number in range(1 + settings.repeats):  # the first step warms up
            timers.reset()
            start = time.perf_counter()
            ppo_step(trainer, prompts, step=number, metrics=metrics)
            found = {WHOLE: time.perf_counter() - start} | timers.totals()
            theirs = peer_step() if peer_step is not None else None
            ceilings.append(measure_ceilings(DTYPES[settings.dtype], tries=_TRIES))
            if number:
                for name, value in found.items():
                    seconds.setdefault(name, []).append(value)
                peer_seconds += [] if theirs is None else [theirs]
    best = Ceilings.best_of(ceilings)
    summary = {
        "phases": _phases(settings, seconds, best),
        "ceilings": asdict(best),
        "peer": _spread(peer_seconds) if peer_seconds else None,
        "settings": settings.model_dump(mode="json"),
        **machine_state(),
    }
    Path(output).write_text(json.dumps(summary, allow_nan=False), encoding="utf-8")


def _phases(
    settings: Settings, seconds: Mapping[str, list[float]], ceilings: Ceilings
) -> dict[str, dict[str, float | None]]:
    """Median, spread and limit of each phase."""
    work = phase_work(settings)
    limits = {name: part.seconds(ceilings) for name, part in work.items()}
    return {
        name: {**_spread(values), "limit_seconds": limits.get(name)}
        for name, values in seconds.items()
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "seconds": statistics.median(values),
        "fastest_seconds": min(values),
        "slowest_seconds": max(values),
    }


def _save_models(trainer: PPOTrainer, prompts: PromptBatch, folder: Path) -> None:
    """Weights and prompts, where the peer reads them."""
    save_huggingface(trainer.engine.actor.training.model, folder / "policy")
    save_huggingface(trainer.engine.reward.model, folder / "reward")
    (folder / "prompts.json").write_text(
        json.dumps(prompts.tokens.tolist(), allow_nan=False), encoding="utf-8"
    )


def show(summary: Mapping[str, Any]) -> str:
    """The results as tables."""
    settings, ceilings = summary["settings"], summary["ceilings"]
    lines = [
        f"{settings['model']} x 4, {settings['dtype']}, batch {settings['batch']}, "
        f"{settings['prompt']} + {settings['new']} tokens, {settings['old_logprobs']}, "
        f"{settings['threads']} threads, {summary['processor']}, "
        f"load {' '.join(summary['load_average'])}",
        f"reading {ceilings['read_gb_s']:.1f} GB/s, GEMM {ceilings['gemm_tflop_s']:.3f} TFLOP/s",
        f"{'phase':26}{'seconds':>9}{'(fastest - slowest)':>22}{'limit':>8}{'of limit':>10}",
    ]
    for name, row in summary["phases"].items():
        lines.append(_line(name, row))
    if summary["peer"] is not None:
        ours, theirs = summary["phases"][WHOLE], summary["peer"]
        lines.append(_line(f"{PEER}, {WHOLE}", theirs))
        lines.append(
            f"{PEER} takes {theirs['seconds'] / ours['seconds']:.2f} times as long as {OURS}"
        )
    return "\n".join(lines)


def _line(name: str, row: Mapping[str, float | None]) -> str:
    seconds, limit = row["seconds"], row.get("limit_seconds")
    assert seconds is not None
    spread = f"({row['fastest_seconds']:.3f} - {row['slowest_seconds']:.3f})"
    line = f"{name:26}{seconds:9.3f}{spread:>22}"
    return line if limit is None else f"{line}{limit:8.3f}{limit / seconds:10.0%}"


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """Runs the steps and returns what was measured.

    Raises:
        MegachatError: An option is wrong, there is no such model, the kernels cannot be built, or
            the peer fails.
    """
    settings = build_config(Settings, options, source="the command line")
    _ = settings.config  # an unknown model is refused before anything starts
    return run_benchmark(run_rank, settings, threads=settings.threads)


def main(*, as_json: bool, **options: Any) -> None:
    """Times one PPO step on the CPU."""
    report(lambda: measure(options), show, as_json=as_json)


if __name__ == "__main__":
    typer.run(command_of(Settings, main))
