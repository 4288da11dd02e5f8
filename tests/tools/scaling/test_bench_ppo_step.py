"""The benchmark takes whole PPO steps, and its limits count what they say."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megachat.checkpoint.writer import save_huggingface
from megachat.errors import ConfigError
from megachat.parallel.launch import Worker
from megachat.parallel.layout import ParallelLayout
from megachat.rlhf.config import OldLogprobs
from tests.harness import run_ranks
from tests.model import reference as ref
from tools.scaling import bench_ppo_step as bench

PHASES = {
    "reshard",
    "generate",
    "score",
    "score/reference",
    "score/critic",
    "score/reward",
    "train actor",
    "train actor/optimizer",
    "train critic",
    "train critic/optimizer",
    bench.WHOLE,
}


def _measured(folder: str) -> list[str]:
    """Runs the whole benchmark on tiny models, both ways, and with a peer that has no TRL."""
    shape, output = Path(folder, "shape"), Path(folder, "summary.json")
    save_huggingface(ref.build_model(ref.PRE_LN, ParallelLayout(), seed=0), shape)
    worker = Worker(
        rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu")
    )
    found = []
    for way in OldLogprobs:
        settings = bench.Settings(
            model=str(shape), batch=3, prompt=5, new=4, threads=1, repeats=2, old_logprobs=way
        )
        bench.run_rank(worker, settings, str(output))
        found.append(output.read_text(encoding="utf-8"))
    alone = settings.model_copy(update={"peer_python": sys.executable})
    with pytest.raises(ConfigError, match=r"trl_ppo_step.py failed \(.*trl.*\): give"):
        bench.run_rank(worker, alone, str(output))
    return found


def test_steps_are_timed_phase_by_phase_beside_their_limits(tmp_path: Path) -> None:
    (texts,) = run_ranks(1, _measured, str(tmp_path))
    for way, text in zip(OldLogprobs, texts, strict=True):
        summary = json.loads(text)
        extra = {"score/actor"} if way is OldLogprobs.RECOMPUTE else set()
        phases = summary["phases"]
        assert set(phases) == PHASES | extra
        outer = [row["seconds"] for name, row in phases.items() if "/" not in name]
        whole = phases[bench.WHOLE]["seconds"]
        assert 0.5 * whole < sum(outer) - whole < 1.2 * whole
        for row in phases.values():
            assert 0 < row["fastest_seconds"] <= row["seconds"] <= row["slowest_seconds"]
        assert bench.WHOLE in bench.show(summary)


def test_the_work_of_a_phase_is_that_of_its_products() -> None:
    """By the sizes of OPT-125m, in plain numbers."""
    settings = bench.Settings(batch=2, prompt=10, new=4, dtype="fp32")
    work = bench.phase_work(settings)
    layers, hidden, vocab = 12, 768, 50272
    pairs = 2 * (14 * 15 // 2)
    products = layers * (2 * 28 * 12 * hidden**2 + 4 * pairs * hidden)
    logits = 2 * hidden * vocab
    assert work["score/actor"].flops == products + 8 * logits
    assert work["score/reward"].flops == products + 2 * 2 * hidden
    assert work["train critic"].flops == 3 * (products + 8 * 2 * hidden)
    assert work["train actor"].moved_bytes == 28 * settings.config.num_parameters
    limits = bench.Ceilings(read_gb_s=2.0, gemm_tflop_s=0.5)
    assert bench.Work(flops=10**12, moved_bytes=10**9).seconds(limits) == pytest.approx(2.5)
    noted = settings.model_copy(update={"old_logprobs": OldLogprobs.ROLLOUT})
    saved = work[bench.WHOLE].flops - bench.phase_work(noted)[bench.WHOLE].flops
    assert saved == work["score/actor"].flops
