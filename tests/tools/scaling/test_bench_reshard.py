"""The benchmark's rivals do the same work, and its counts are those of the plan."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from megachat.parallel.launch import Worker
from tests.harness import run_ranks
from tests.reshard.cases import fill, whole_value
from tools.scaling import bench_reshard as bench


def _worker() -> Worker:
    return Worker(
        rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu")
    )


def _settings(generate: int) -> bench.Settings:
    return bench.Settings(
        train=(2, 2, 1), generate=generate, hidden=128, layers=2, dtype="bf16", repeats=1
    )


def _wrong_rivals(output: str) -> list[str]:
    """Weights that a rival's second model has wrong; then the whole benchmark once."""
    problems = []
    job = bench.build_job(_worker(), _settings(1))
    fill(job.model)
    for prepare in (bench.megatron_swap, bench.full_gather):
        method = prepare(job)
        assert method.target is not None
        received = method.run()
        if received < job.arena.part.traffic.lower_bound:
            problems.append(f"{prepare.__name__} received {received} bytes")
        specs = {spec.name: spec for spec in job.model.global_specs()}
        for name, found in method.target.parameters_by_spec().items():
            own = method.target.local_slices(specs[name])
            if not torch.equal(found, whole_value(specs[name], torch.bfloat16)[own]):
                problems.append(f"{prepare.__name__}: {name}")
    bench.run_rank(_worker(), _settings(2), output)
    return problems


def test_rivals_fetch_the_right_weights_and_megachat_the_fewest_bytes(tmp_path: Path) -> None:
    output = tmp_path / "summary.json"
    assert run_ranks(4, _wrong_rivals, str(output)) == [[]] * 4
    summary = json.loads(output.read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in summary["results"]}
    assert list(rows) == list(bench.METHODS)
    assert rows[bench.OURS]["received_bytes"] == summary["lower_bound_bytes"]
    for name in ("megatron-core swap", "full gather"):
        assert rows[name]["received_bytes"] > rows[bench.OURS]["received_bytes"]
    assert bench.OURS in bench.show(summary)
