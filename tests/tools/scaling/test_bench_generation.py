"""The benchmark's engines answer alike, and its bytes and shares are what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megachat.checkpoint.writer import save_huggingface
from megachat.errors import ConfigError, MegachatError
from megachat.parallel.launch import Worker
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.model import reference as ref
from tools.scaling import bench_generation as bench


def _measured(folder: str, options: dict[str, Any]) -> bench.Settings:
    """Runs the whole benchmark on given weights."""
    model = ref.build_model(ref.PRE_LN, ParallelLayout(data=dist.get_world_size()), seed=0)
    weights, output = Path(folder, "given"), Path(folder, "summary.json")
    save_huggingface(model, weights)
    dist.barrier()
    settings = bench.Settings(
        weights=str(weights),
        batch=2,
        prompt=5,
        new=6,
        dtype="fp32",
        threads=1,
        repeats=2,
        clock="cpu",
        **options,
    )
    worker = Worker(
        rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu")
    )
    bench.run_rank(worker, settings, str(output))
    return settings


def test_all_engines_answer_alike_and_the_keys_are_those_of_megachat(tmp_path: Path) -> None:
    peers = ["transformers", "reference"]
    run_ranks(1, _measured, str(tmp_path), {"peer": peers})
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    rows = {row["engine"]: row for row in summary["engines"]}
    assert set(rows) == {bench.OURS, *peers}
    assert summary["same_tokens"] == dict.fromkeys(rows, 1.0)
    ours = rows[bench.OURS]
    for key in ("tokens_per_second", "decode_ms_per_step", "prefill_seconds", "bandwidth_share"):
        assert summary[key] == ours[key] > 0
    read = summary["ceilings"]["read_gb_s"] * 1e9
    share = summary["step_bytes"] / (ours["decode_ms_per_step"] / 1000) / read
    assert share == pytest.approx(ours["bandwidth_share"])
    assert bench.OURS in bench.show(summary)


def test_a_model_cut_over_processes_answers_as_the_whole_one(tmp_path: Path) -> None:
    settings, _ = run_ranks(2, _measured, str(tmp_path), {"tensor": 2})
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["same_tokens"] == {bench.OURS: 1.0, settings.over_ranks: 1.0}
    assert [row["engine"] for row in summary["engines"]] == [bench.OURS, settings.over_ranks]
    assert all(row["tokens_per_second"] > 0 for row in summary["engines"])


def test_answers_that_end_early_are_counted_to_their_ends(tmp_path: Path) -> None:
    options = {"mean": 3, "waves": 20, "peer": ["transformers"]}
    run_ranks(1, _measured, str(tmp_path), options)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    # The mean of the smaller of 6 and a geometric length of mean 3 is 3 (1 - (2/3)^6) = 2.74, with
    # a deviation of 0.3 for 40 rows; the weights make some tokens likelier than others.
    for row in summary["engines"]:
        assert 1.5 < row["mean_tokens"] < 4.5
        assert row["decode_ms_per_step"] is None and row["tokens_per_second"] > 0
    assert summary["same_tokens"] is None
    assert "transformers" in bench.show(summary)


def test_a_step_reads_every_weight_once_and_the_cache_at_its_mean_length() -> None:
    settings = bench.Settings(batch=3, prompt=10, new=4, dtype="bf16", random_weights=True)
    config = settings.config
    layer = 12 * config.hidden**2 + 13 * config.hidden  # four matrices, their biases, two norms
    words = config.vocab_size * config.hidden
    weights = config.layers * layer + words + 2 * config.hidden
    cache = 3 * 12 * 2 * config.layers * config.hidden
    assert bench.minimal_step_bytes(settings) == 2 * (weights + cache)


def test_unknown_weights_are_an_error_of_this_project() -> None:
    with pytest.raises(MegachatError, match="known sizes are"):
        _ = bench.Settings(model="facebook/opt-none", random_weights=True).config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peer": ["openvino"]}, "--peer openvino and --peer-python PYTHON belong together"),
        ({"peer_python": "python"}, "belong together"),
        ({"peer": ["openvino"], "peer_python": "python", "clock": "cpu"}, "OpenVINO runs on"),
        ({"peer": ["vllm"]}, "known are transformers, reference, openvino"),
    ],
)
def test_peers_that_cannot_be_compared_with_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.measure({"random_weights": True, **options})
