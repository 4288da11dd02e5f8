from pathlib import Path

import pytest

from megachat.cli import presets
from megachat.cli.presets import (
    DeploymentType,
    Machine,
    paper_tree,
    recipe_cluster,
    tiny_example,
)
from megachat.config import build_config, load_config
from megachat.errors import ConfigError
from megachat.model.config import OPT_MODELS
from megachat.ops.registry import Backend
from megachat.stages.config import RunConfig


def test_deployment_types_start_the_processes_of_the_paper() -> None:
    worlds = {}
    for deployment in DeploymentType:
        tree = paper_tree(
            "facebook/opt-1.3b", reward_model="facebook/opt-350m", deployment=deployment
        )
        worlds[deployment] = build_config(RunConfig, tree, source="recipe").launch.world_size
    assert worlds == {
        DeploymentType.CPU: 1,
        DeploymentType.SINGLE_GPU: 1,
        DeploymentType.SINGLE_NODE: 8,
        DeploymentType.MULTI_NODE: 64,
    }


@pytest.mark.parametrize(
    ("deployment", "generation", "logprobs"),
    [
        (DeploymentType.CPU, Backend.CPU, Backend.CPU),
        (DeploymentType.SINGLE_GPU, Backend.CUDA, Backend.CUDA),
    ],
)
def test_kernels_are_those_of_the_device(
    deployment: DeploymentType, generation: Backend, logprobs: Backend
) -> None:
    tree = paper_tree("facebook/opt-125m", reward_model="facebook/opt-350m", deployment=deployment)
    config = build_config(RunConfig, tree, source="recipe")
    assert config.rlhf.generation.backend is generation
    assert config.models.actor.logprob_backend is logprobs


def test_any_opt_is_for_the_processor_whatever_its_size() -> None:
    for actor in OPT_MODELS:
        tree = paper_tree(actor, reward_model="sft", deployment=DeploymentType.CPU)
        build_config(RunConfig, tree, source="recipe").check()


def test_a_machine_replaces_the_deployment_s_sizes() -> None:
    machine = Machine(gpu="h100-80", nodes=4, gpus_per_node=4, gpu_memory_gb=96.0)
    cluster = recipe_cluster(DeploymentType.MULTI_NODE, machine)
    assert cluster is not None
    assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu_memory_gb) == (4, 4, 96.0)
    assert cluster.teraflops == 989.0
    tree = paper_tree(
        "facebook/opt-1.3b",
        reward_model="facebook/opt-350m",
        deployment=DeploymentType.MULTI_NODE,
        machine=machine,
    )
    launch = build_config(RunConfig, tree, source="recipe").launch
    assert (launch.nodes, launch.processes) == (4, 4)


@pytest.mark.parametrize(
    ("deployment", "machine", "message"),
    [
        (DeploymentType.CPU, Machine(gpu_memory_gb=40.0), "describe GPUs"),
        (DeploymentType.SINGLE_GPU, Machine(gpus_per_node=4), "use single_node"),
        (DeploymentType.SINGLE_NODE, Machine(nodes=2), "use multi_node"),
        (DeploymentType.SINGLE_NODE, Machine(gpu="b200"), "--gpu b200: expected one of a100-40"),
        (DeploymentType.MULTI_NODE, Machine(nodes=0), "nodes"),
        (DeploymentType.MULTI_NODE, Machine(gpu_memory_gb=-1.0), "gpu_memory_gb"),
    ],
)
def test_a_machine_that_makes_no_sense_is_refused(
    deployment: DeploymentType, machine: Machine, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_cluster(deployment, machine)


def test_tiny_example_of_this_checkout_is_valid() -> None:
    config = load_config(RunConfig, path=tiny_example())
    config.check()
    assert config.launch.world_size == 2


def test_missing_example_says_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "a" / "b" / "presets.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="give --config FILE"):
        tiny_example()
