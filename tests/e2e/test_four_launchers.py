"""The example started by four launchers of one process each, and by one launcher of four."""

import json
from pathlib import Path
from typing import Any

from megachat.config import load_config
from megachat.data.config import Stage
from megachat.parallel.launch import launch
from megachat.stages.config import RunConfig
from megachat.stages.context import stage_folder
from megachat.stages.results import RESULT_FILE
from megachat.stages.run import run_stages
from megachat.telemetry.metrics import read_metrics
from tests.harness.nodes import Nodes
from tests.harness.ports import free_port
from tests.stages import tiny_run

EXAMPLE = Path(__file__).parents[2] / "examples/tiny_cpu/run.toml"
TIMES = ("perf/", "time/", "memory/")
"""Metrics that tell of the machine."""


def _config(folder: Path, name: str, *, nodes: int, processes: int) -> RunConfig:
    """The example with fewer steps and the tests' data; two ranks share a layer, as in the file."""
    return load_config(
        RunConfig,
        path=EXAMPLE,
        overrides=[
            f"launch.nodes={nodes}",
            f"launch.processes={processes}",
            f"launch.rendezvous=127.0.0.1:{free_port()}",
            "launch.threads=1",
            f"run.output={folder / name}",
            f'data.sources=[{{name = "chats", path = "{folder / "rows.jsonl"}"}}]',
            f"data.cache_dir={folder / 'cache'}",
            "data.split=[2, 4, 4]",
            "data.max_answer_tokens=32",
            "data.max_tokens=56",
            "tokenizer.train.vocab_size=134",
            "models.actor.shape.hidden=32",
            "sft.max_steps=3",
            "sft.evaluation_rows=16",
            "reward.max_steps=2",
            "reward.evaluation_rows=16",
            "rlhf.max_steps=2",
            "rlhf.batch_prompts=16",
            "rlhf.evaluation_rows=16",
            "rlhf.judge=none",
            "rlhf.ppo.reward.normalization_samples=16",
            "rlhf.sampling.max_new_tokens=8",
        ],
    )


def _train(config: RunConfig) -> None:
    """What `megachat train` does with a configuration once it has checked it."""
    rules = config.ranks_on_one_host()
    launch(config.launch, run_stages, config, list(Stage), "megachat train", same_host=rules)


def _figures(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """All that a stage has measured of the model, with every digit."""
    folder = stage_folder(config, stage)
    metrics = read_metrics(folder)
    figures: dict[str, Any] = {
        name: metrics.series(name) for name in metrics.names if not name.startswith(TIMES)
    }
    return figures | json.loads((folder / RESULT_FILE).read_text())["metrics"]


def test_four_launchers_train_to_the_figures_of_one(tmp_path: Path) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    one = _config(tmp_path, "one", nodes=1, processes=4)
    four = _config(tmp_path, "four", nodes=4, processes=1)
    for config in (one, four):
        with Nodes(tmp_path) as nodes:
            for _ in range(config.launch.nodes):
                nodes.start(_train, config)
            for end in nodes.ends(seconds=240.0):
                assert end.exit_code == 0, end
    for stage in Stage:
        assert len(_figures(one, stage)) > 3
        assert _figures(four, stage) == _figures(one, stage), stage
