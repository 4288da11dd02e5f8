"""The benchmark calls every operation of a decode step, and its rates are work over time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megachat.model.config import OPT_MODELS, OptConfig
from megachat.ops.registry import Backend, registered_ops
from megachat.parallel.launch import Worker
from tests.harness import run_ranks
from tools.scaling import bench_kernels as bench

TINY = replace(
    OPT_MODELS["facebook/opt-350m"],
    vocab_size=150, max_positions=40, hidden=32, ffn=64, layers=2, heads=4, embed_dim=16,
)  # fmt: skip


def _measured(output: str) -> bench.Settings:
    settings = bench.Settings(
        model="facebook/opt-350m", dtype="fp32", batch=(1, 3), context=(5, 20), threads=1, repeats=2
    )

    def config(_: bench.Settings) -> OptConfig:
        return TINY

    worker = Worker(
        rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Settings, "config", property(config))
        patch.setattr(bench, "_READ_BYTES", 1 << 20)
        patch.setattr(bench, "_FMA_ROUNDS", 1000)
        bench.run_rank(worker, settings, output)
    return settings


def test_every_operation_of_a_step_is_timed_and_steps_are_predicted(tmp_path: Path) -> None:
    output = tmp_path / "summary.json"
    run_ranks(1, _measured, str(output))
    summary = json.loads(output.read_text(encoding="utf-8"))
    timed = {row["op"].split()[0] for row in summary["ops"]}
    of_a_step = {
        name
        for name, op in registered_ops().items()
        if Backend.CUDA in op.backends
        and name != "paged_attention_prefill"
        and not name.startswith("token_logprobs")
    }
    assert timed == of_a_step
    product = next(row for row in summary["ops"] if row["op"] == "tiled_linear_bias_relu fc1")
    assert product["batch"] == 1
    assert product["gb_s"] == pytest.approx(32 * 64 * 4 / product["microseconds"] / 1e3)
    assert product["gflop_s"] == pytest.approx(32 * 64 * 2 / product["microseconds"] / 1e3)
    assert [(row["context"], row["batch"]) for row in summary["steps"]] == [
        (5, 1), (5, 3), (20, 1), (20, 3),
    ]  # fmt: skip
    assert all(row["predicted"] > 0 and row["milliseconds"] > 0 for row in summary["steps"])
    assert min(summary["ceilings"].values()) > 0
    text = bench.show(summary)
    assert "paged_attention_decode 20" in text and "predicted" in text
