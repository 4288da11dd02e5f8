"""A very small run: its data, its configuration, and a context to run single stages in."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from megachat.config import apply_override, build_config
from megachat.data.config import Stage
from megachat.parallel.launch import Worker
from megachat.stages.config import RunConfig
from megachat.stages.context import RunContext, prepare_output, stage_folder
from megachat.stages.results import RESULT_FILE
from megachat.stages.run import prepare_tokenizer, run_stages

_GOOD = "lovely happy bright sweet warm gentle".split()
_BAD = "awful sad gloomy bitter cold broken".split()
_OPENINGS = ("tell me of the", "do you like the", "what about the", "how is your")
_SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]


def write_rows(path: Path) -> Path:
    """400 rows in the common format; the chosen answers are the friendly ones.

    The things they talk of have made-up names, for a vocabulary that both of two ranks hold of.
    """
    random = Random(0)
    names = ["".join(random.choices(_SYLLABLES, k=3)) for _ in range(80)]
    rows = []
    for _ in range(400):
        name, other = random.sample(names, k=2)
        rows.append(
            {
                "prompt": f"<human> {random.choice(_OPENINGS)} {name} ?<bot>",
                "chosen": f" i love the {name} , it is {random.choice(_GOOD)} as the {other}",
                "rejected": f" i hate the {name} , it is {random.choice(_BAD)} as the {other}",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, Any]:
    """The configuration as a TOML file would give it; everything lies in `folder`."""
    return {
        "run": {"output": str(folder / "run"), "seed": 3, "title": "A very small run"},
        "launch": {"device": "cpu"},
        "tokenizer": {"train": {"vocab_size": 134}},
        "data": {
            "sources": [{"name": "chats", "path": str(folder / "rows.jsonl")}],
            "split": [2, 4, 4],
            "validation_share": 0.25,
            "max_prompt_tokens": 20,
            "max_tokens": 52,
            "cache_dir": str(folder / "cache"),
        },
        "models": {
            "actor": {
                "precision": "fp32",
                "micro_batch_rows": 4,
                "shape": {
                    "hidden": 32,
                    "layers": 2,
                    "heads": 2,
                    "max_positions": 52,
                    "init_std": 0.08,
                },
            },
            "reward": {"precision": "fp32", "micro_batch_rows": 4, "model": "sft"},
        },
        "sft": {
            "batch_rows": 8,
            "max_steps": 6,
            "bucket_window": 2,
            "evaluation_rows": 9,
            "optimizer": {"learning_rate": 5e-3, "epsilon": 1e-4},
        },
        "reward": {
            "batch_pairs": 8,
            "max_steps": 5,
            "evaluation_rows": 11,
            "optimizer": {"learning_rate": 5e-3, "epsilon": 1e-4},
        },
        "rlhf": {
            "batch_prompts": 8,
            "max_steps": 2,
            "evaluation_rows": 10,
            "sampling": {"max_new_tokens": 8},
            "old_logprobs": "rollout",
            "ppo": {"reward": {"normalization_samples": 12}},
            "actor_optimizer": {"learning_rate": 1e-3, "epsilon": 1e-4},
            "critic_optimizer": {"learning_rate": 1e-3, "epsilon": 1e-4},
        },
    }


def config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration with overrides as on the command line."""
    values = tree(folder)
    for override in overrides:
        apply_override(values, override)
    return build_config(RunConfig, values, source="test")


def worker() -> Worker:
    """This rank of the harness's world."""
    return Worker(
        rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu")
    )


def context(settings: RunConfig) -> RunContext:
    """What a stage gets, on this rank of the harness's world."""
    prepare_output(settings)
    here = worker()
    return RunContext(config=settings, worker=here, tokenizer=prepare_tokenizer(settings))


def run(
    folder: Path, overrides: Sequence[str] = (), stages: Sequence[Stage] = tuple(Stage)
) -> None:
    """Runs stages on this rank of the harness's world."""
    run_stages(worker(), config(folder, overrides), stages, "megachat train --config tiny.toml")


def read_result_metrics(settings: RunConfig, stage: Stage) -> dict[str, float]:
    """The figures that a completed stage left."""
    text = (stage_folder(settings, stage) / RESULT_FILE).read_text(encoding="utf-8")
    metrics: dict[str, float] = json.loads(text)["metrics"]
    return metrics
