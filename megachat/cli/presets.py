"""Makes ready-made runs: the tiny example, and DeepSpeed-Chat's recipe for models and GPUs."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megachat.errors import ConfigError

if TYPE_CHECKING:
    from megachat.planner.hardware import ClusterConfig


DEFAULT_REWARD_MODEL = "facebook/opt-350m"
"""The paper's, for actors of all sizes."""


class DeploymentType(StrEnum):
    """The paper's `--deployment-type`."""

    CPU = "cpu"
    """One process on this machine's processor."""
    SINGLE_GPU = "single_gpu"
    SINGLE_NODE = "single_node"
    """Eight GPUs."""
    MULTI_NODE = "multi_node"
    """Eight nodes of eight GPUs; start it on every node, with launch.rendezvous set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """GPUs other than a deployment type's; None keeps what that says."""

    gpu: str | None = None
    """A preset of memory and speeds; None: `a100-80`."""
    nodes: int | None = None
    gpus_per_node: int | None = None
    gpu_memory_gb: float | None = None

    @property
    def is_stated(self) -> bool:
        """Whether anything is said."""
        return self != Machine()


_SIZES: dict[DeploymentType, tuple[int, int]] = {
    DeploymentType.SINGLE_GPU: (1, 1),
    DeploymentType.SINGLE_NODE: (1, 8),
    DeploymentType.MULTI_NODE: (8, 8),
}
"""Nodes and GPUs in each, of the paper."""


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


def recipe_cluster(deployment: DeploymentType, machine: Machine) -> "ClusterConfig | None":
    """The GPUs that a recipe is planned for; None: it runs on the processor.

    Raises:
        ConfigError: The machine is another kind than the deployment type says, or none.
    """
    from megachat.planner.hardware import Gpu, cluster_config

    if deployment is DeploymentType.CPU:
        if machine.is_stated:
            raise ConfigError(
                "--gpu, --nodes, --gpus-per-node and --gpu-memory-gb describe GPUs: give "
                "--deployment-type single_gpu, single_node or multi_node"
            )
        return None
    nodes, gpus = _SIZES[deployment]
    nodes = nodes if machine.nodes is None else machine.nodes
    gpus = gpus if machine.gpus_per_node is None else machine.gpus_per_node
    too_many_nodes = deployment is not DeploymentType.MULTI_NODE and nodes > 1
    if too_many_nodes or (deployment is DeploymentType.SINGLE_GPU and gpus > 1):
        raise ConfigError(
            f"--deployment-type {deployment} is not {nodes} x {gpus} GPUs: use "
            f"{DeploymentType.MULTI_NODE if too_many_nodes else DeploymentType.SINGLE_NODE}"
        )
    if machine.gpu is not None and machine.gpu not in list(Gpu):
        raise ConfigError(f"--gpu {machine.gpu}: expected one of {', '.join(Gpu)}")
    return cluster_config(
        Gpu(machine.gpu or Gpu.A100_80),
        nodes=nodes,
        gpus_per_node=gpus,
        gpu_memory_gb=machine.gpu_memory_gb,
    )


def paper_tree(
    actor_model: str,
    *,
    reward_model: str,
    deployment: DeploymentType,
    machine: Machine = Machine(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """DeepSpeed-Chat's published recipe as a configuration tree.

    Learning rates, lengths and batch sizes are those of its OPT scripts (single node 1.3B, whose
    rates its larger full-parameter recipes share); the data is Dahoas/rm-static split 2,4,4.
    Rewards, masks and sampling follow megachat's defaults, without its recorded flaws. How it is
    run on GPUs is the planner's choice (`megachat.cli.recipe`).

    Raises:
        ConfigError: The architecture of a model cannot be known here, or the machine makes no
            sense.
        CapacityError: Nothing fits.
    """
    from megachat.cli.recipe import RecipeModels, choose, settings, workload

    models = RecipeModels(actor=actor_model, reward=reward_model)
    cluster = recipe_cluster(deployment, machine)
    run = _cpu_run() if cluster is None else _gpu_run(cluster, settings(choose(models, cluster)))
    work = workload(1 if cluster is None else cluster.world_size)
    slug = f"{Path(actor_model).name}-{Path(reward_model).name}"
    optimizer = {"learning_rate": 9.65e-6, "schedule": "cosine"}
    return {
        "run": {"output": f"runs/{slug}", "title": f"{actor_model} with {reward_model}"},
        "launch": run["launch"],
        "data": {
            "sources": [{"name": "Dahoas/rm-static"}],
            "split": [2, 4, 4],
            "max_prompt_tokens": work.prompt_tokens,
            "max_tokens": work.sft_tokens,
        },
        "models": {
            "actor": {"model": actor_model, **run["models"]["actor"]},
            "reward": {"model": reward_model, **run["models"]["reward"]},
        },
        "sft": {"batch_rows": work.sft_rows, "epochs": 16, "optimizer": optimizer},
        "reward": {
            "batch_pairs": work.reward_pairs,
            "optimizer": {"learning_rate": 5e-5, "weight_decay": 0.1, "schedule": "cosine"},
        },
        "rlhf": {
            "batch_prompts": work.prompts,
            "sampling": {"max_new_tokens": work.response_tokens},
            "ppo": {"epochs": work.ppo_epochs, "minibatches": work.minibatches},
            "actor_optimizer": {**optimizer, "warmup_steps": 100},
            "critic_optimizer": {
                "learning_rate": 5e-6,
                "schedule": "cosine",
                "warmup_steps": 100,
            },
            **run["rlhf"],
        },
    }


def _cpu_run() -> dict[str, Any]:
    """How a recipe runs in one process, on this project's kernels for processors."""
    from megachat.cli.recipe import ROWS_PER_RANK

    role = {"precision": "fp32", "micro_batch_rows": ROWS_PER_RANK}
    return {
        "launch": {"processes": 1, "device": "cpu"},
        "models": {"actor": {**role, "logprob_backend": "cpu"}, "reward": role},
        "rlhf": {"generation": {"backend": "cpu"}},
    }


def _gpu_run(cluster: "ClusterConfig", chosen: dict[str, Any]) -> dict[str, Any]:
    """How a recipe runs on a cluster, as was chosen."""
    launch = {"processes": cluster.gpus_per_node, "nodes": cluster.nodes, "device": "cuda"}
    return {"launch": launch, **chosen}
