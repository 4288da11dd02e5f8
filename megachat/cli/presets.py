"""The one place for ready-made runs: the tiny example and DeepSpeed-Chat's recipe by model size."""

from enum import StrEnum
from pathlib import Path
from typing import Any

from megachat.errors import ConfigError


class DeploymentType(StrEnum):
    """The paper's `--deployment-type`."""

    CPU = "cpu"
    """One process on this machine's processor."""
    SINGLE_GPU = "single_gpu"
    SINGLE_NODE = "single_node"
    """Eight GPUs."""
    MULTI_NODE = "multi_node"
    """Eight nodes of eight GPUs; start it on every node, with launch.rendezvous set."""


_LAUNCH: dict[DeploymentType, dict[str, Any]] = {
    DeploymentType.CPU: {"processes": 1, "device": "cpu"},
    DeploymentType.SINGLE_GPU: {"processes": 1, "device": "cuda"},
    DeploymentType.SINGLE_NODE: {"processes": 8, "device": "cuda"},
    DeploymentType.MULTI_NODE: {"processes": 8, "nodes": 8, "device": "cuda"},
}

_TENSOR_DEGREES = (("6.7b", 2), ("13b", 4), ("30b", 8), ("66b", 8), ("175b", 8))
"""Tensor degree by size in the model's name: the smallest whose weights, gradients and sharded
optimizer state leave room for activations in 80 GB; sizes that are not listed need none."""


def tiny_example() -> Path:
    """The configuration of `examples/tiny_cpu`, from this checkout or the working folder.

    Raises:
        ConfigError: Neither has it.
    """
    relative = Path("examples", "tiny_cpu", "run.toml")
    checkout = Path(__file__).resolve().parents[2]
    for folder in (checkout, Path.cwd()):
        if (folder / relative).is_file():
            return folder / relative
    raise ConfigError(
        f"{relative}: not found in {checkout} nor in the working folder: give --config FILE"
    )


def paper_tree(
    actor_model: str, *, reward_model: str, deployment: DeploymentType
) -> dict[str, Any]:
    """DeepSpeed-Chat's published recipe as a configuration tree.

    Learning rates, lengths and batch sizes are those of its OPT scripts (single node 1.3B, whose
    rates its larger full-parameter recipes share); the data is Dahoas/rm-static split 2,4,4.
    Rewards, masks and sampling follow megachat's defaults, without its recorded flaws.
    """
    launch = _LAUNCH[deployment]
    world_size = launch["processes"] * launch.get("nodes", 1)
    precision = "bf16" if launch["device"] == "cuda" else "fp32"
    per_rank = 4
    tensor = tensor_degree(actor_model, world_size=world_size)
    rows = per_rank * world_size
    slug = f"{Path(actor_model).name}-{Path(reward_model).name}"
    optimizer = {"learning_rate": 9.65e-6, "schedule": "cosine"}
    return {
        "run": {"output": f"runs/{slug}", "title": f"{actor_model} with {reward_model}"},
        "launch": dict(launch),
        "data": {
            "sources": [{"name": "Dahoas/rm-static"}],
            "split": [2, 4, 4],
            "max_prompt_tokens": 256,
            "max_tokens": 512,
        },
        "models": {
            "actor": {
                "model": actor_model,
                "precision": precision,
                "tensor": tensor,
                "sequence_parallel": tensor > 1,
                "micro_batch_rows": per_rank,
            },
            "reward": {
                "model": reward_model,
                "precision": precision,
                "micro_batch_rows": per_rank,
            },
        },
        "sft": {"batch_rows": 2 * rows, "epochs": 16, "optimizer": optimizer},
        "reward": {
            "batch_pairs": rows,
            "optimizer": {"learning_rate": 5e-5, "weight_decay": 0.1, "schedule": "cosine"},
        },
        "rlhf": {
            "batch_prompts": rows,
            "sampling": {"max_new_tokens": 256},
            "ppo": {"epochs": 1, "minibatches": 1},
            "actor_optimizer": {**optimizer, "warmup_steps": 100},
            "critic_optimizer": {
                "learning_rate": 5e-6,
                "schedule": "cosine",
                "warmup_steps": 100,
            },
        },
    }


def tensor_degree(model: str, *, world_size: int) -> int:
    """Tensor degree for a model by the size in its name, at most the world size."""
    name = Path(model).name.lower()
    wanted = next((degree for size, degree in _TENSOR_DEGREES if name.endswith(size)), 1)
    return min(wanted, world_size)
