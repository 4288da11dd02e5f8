"""A run on a tiny OPT folder and local rows, complete and sound, for tests that spoil one thing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megachat.config import apply_override, build_config
from megachat.model.config import OptConfig
from megachat.preflight.host import Host
from megachat.stages.config import RunConfig
from tests.checkpoint.folders import write_folder
from tests.data.samples import pairs, train_tiny, write_jsonl

MODEL = OptConfig(
    vocab_size=64, max_positions=64, hidden=16, ffn=32, layers=2, heads=2, embed_dim=16
)
GB = 10**9


def write_case(folder: Path, *, rows: int = 64) -> None:
    """A model with its tokenizer in `opt`, and rows in `rows.jsonl`."""
    write_folder(MODEL, folder / "opt")
    train_tiny(folder / "opt")
    write_jsonl(folder / "rows.jsonl", pairs(rows))


def tree(folder: Path) -> dict[str, Any]:
    """The configuration as a TOML file would give it."""
    return {
        "run": {"output": str(folder / "out")},
        "launch": {"device": "cpu"},
        "data": {
            "sources": [{"name": "mine", "path": str(folder / "rows.jsonl")}],
            "max_prompt_tokens": 24,
            "max_tokens": 56,
            "cache_dir": str(folder / "cache"),
        },
        "models": {
            "actor": {"model": str(folder / "opt"), "precision": "fp32"},
            "reward": {"model": "sft", "precision": "fp32"},
        },
        "sft": {"batch_rows": 4, "max_steps": 1},
        "reward": {"batch_pairs": 4, "max_steps": 1},
        "rlhf": {
            "batch_prompts": 4,
            "max_steps": 1,
            "sampling": {"max_new_tokens": 8},
            "generation": {"kv_cache_gb": 0.1},
        },
    }


def config(folder: Path, *overrides: str) -> RunConfig:
    """The validated configuration with overrides as on the command line."""
    values = tree(folder)
    for override in overrides:
        apply_override(values, override)
    return build_config(RunConfig, values, source="test")


def host(*, free: Callable[[Path], int] = lambda _: 1000 * GB, **limits: Any) -> Host:
    """A machine with room for everything but what is said."""
    values = {"tasks": None, "open_files": None, "memory_bytes": 1000 * GB} | limits
    return Host(free_bytes=free, **values)
