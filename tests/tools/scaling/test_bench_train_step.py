"""The benchmark trains on both ways and moves the bytes that it says."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from megachat.checkpoint.writer import save_huggingface
from megachat.parallel.launch import Worker
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.model import reference as ref
from tools.scaling import bench_train_step as bench


def _measured(folder: str) -> str:
    """Runs the whole benchmark on a tiny model; rank 0's results."""
    shape, output = Path(folder, "shape"), Path(folder, "summary.json")
    layout = ParallelLayout(data=dist.get_world_size())
    save_huggingface(ref.build_model(ref.PRE_LN, layout, seed=0), shape)
    worker = Worker(
        rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu")
    )
    settings = bench.Settings(
        model=str(shape), processes=2, rows=2, micro_batch=1, tokens=6, threads=1, repeats=2
    )
    bench.run_rank(worker, settings, str(output))
    return output.read_text(encoding="utf-8") if not worker.rank else ""


def test_both_steps_and_both_collectives_are_timed_and_their_bytes_are_stated(
    tmp_path: Path,
) -> None:
    summary = json.loads(run_ranks(2, _measured, str(tmp_path))[0])
    assert set(summary["seconds"]) == {
        bench.OVERLAPPED,
        bench.AFTERWARDS,
        bench.SCATTER,
        bench.REDUCE,
    }
    assert all(len(row["all"]) == 2 for row in summary["seconds"].values())
    assert summary["buffers"] == 2
    received = summary["received_bytes"]
    assert 2 * received[bench.SCATTER] == received[bench.REDUCE] == summary["gradient_bytes"]
    text = bench.show(summary)
    assert f"{bench.REDUCE}: " in text
    assert "2 ranks x 2 rows of 6 tokens" in text
