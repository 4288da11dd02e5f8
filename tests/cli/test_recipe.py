"""What the published recipe is run as, for every size on every kind of cluster."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megachat.cli.main import EXIT_CODE, app
from megachat.cli.presets import DeploymentType, Machine, paper_tree, recipe_cluster
from megachat.cli.recipe import RecipeModels, choose, command, smallest_cluster, workload
from megachat.config import build_config
from megachat.errors import CapacityError, ConfigError
from megachat.model.config import OPT_MODELS, OptConfig, Recompute
from megachat.planner.hardware import ClusterConfig
from megachat.planner.search import Plan, PlanRequest, search
from megachat.preflight.memory import RunPlan, plan_run
from megachat.preflight.models import Architectures, known_architectures
from megachat.stages.config import RunConfig

CRITIC = "facebook/opt-350m"
ON_GPUS = [kind for kind in DeploymentType if kind is not DeploymentType.CPU]
FITS_80 = {
    "facebook/opt-13b": DeploymentType.SINGLE_NODE,
    "facebook/opt-66b": DeploymentType.MULTI_NODE,
    "facebook/opt-175b": DeploymentType.MULTI_NODE,
}
"""What the project promises on GPUs of 80 GB."""


def cluster_of(deployment: DeploymentType, memory_gb: float = 80.0) -> ClusterConfig:
    cluster = recipe_cluster(deployment, Machine(gpu_memory_gb=memory_gb))
    assert cluster is not None
    return cluster


def resolved(actor: str, deployment: DeploymentType, memory_gb: float = 80.0) -> RunConfig:
    """The run that the command line stands for."""
    tree = paper_tree(
        actor,
        reward_model=CRITIC,
        deployment=deployment,
        machine=Machine(gpu_memory_gb=memory_gb),
    )
    config = build_config(RunConfig, tree, source="recipe")
    config.check()
    return config


def planned(config: RunConfig, cluster: ClusterConfig) -> RunPlan:
    """What the check before a run's start finds."""
    architectures = known_architectures(config)
    assert isinstance(architectures, Architectures)
    return plan_run(config, architectures, cluster)


@pytest.mark.parametrize("memory_gb", [40.0, 80.0])
@pytest.mark.parametrize("deployment", ON_GPUS)
@pytest.mark.parametrize("actor", list(OPT_MODELS))
def test_every_size_is_accepted_or_refused_with_the_smallest_cluster_that_would_do(
    actor: str, deployment: DeploymentType, memory_gb: float
) -> None:
    cluster = cluster_of(deployment, memory_gb)
    try:
        config = resolved(actor, deployment, memory_gb)
    except CapacityError as error:
        assert FITS_80.get(actor) is not deployment or memory_gb < 80
        check_refusal(str(error), actor, cluster)
        return
    run, chosen = planned(config, cluster), choose_for(actor, cluster)
    assert run.reason is None
    assert run.memory.ranks == chosen.memory.ranks
    assert run.memory.reserved == chosen.memory.reserved
    assert run.memory.peak_bytes + run.memory.reserved.num_bytes <= memory_gb * 1e9
    assert config.launch.world_size == cluster.world_size
    assert cluster.gpus_per_node % config.rlhf.generation_degree(config.models.actor) == 0
    assert cluster.gpus_per_node % config.models.actor.tensor == 0


def choose_for(actor: str, cluster: ClusterConfig) -> Plan:
    return choose(RecipeModels(actor=actor, reward=CRITIC), cluster)


def check_refusal(message: str, actor: str, cluster: ClusterConfig) -> None:
    """One line, both numbers, and a cluster that does, where half of it does not."""
    assert "\n" not in message
    assert re.search(r"phase \w+ needs [0-9.]+ GB on ranks .*, [0-9.]+ GB are usable", message)
    enough = smallest_cluster(OPT_MODELS[actor], OPT_MODELS[CRITIC], cluster)
    if enough is None:
        # 350 GB of weights on the 8 GPUs of a node, of 40 GB each.
        assert (actor, cluster.gpu_memory_gb) == ("facebook/opt-175b", 40.0)
        assert "no cluster of up to 64 nodes" in message
        return
    assert f"would do is {enough.nodes} x {enough.gpus_per_node} GPUs of" in message
    assert enough.world_size > cluster.world_size
    choose_for(actor, enough)
    half = {"nodes": max(1, enough.nodes // 2)}
    if enough.nodes == 1:
        half["gpus_per_node"] = enough.gpus_per_node // 2
    with pytest.raises(CapacityError):
        choose_for(actor, enough.model_copy(update=half))


@pytest.mark.parametrize("actor", FITS_80)
def test_what_the_paper_trains_is_accepted_by_the_planner_in_its_own_command(actor: str) -> None:
    plan = choose_for(actor, cluster_of(FITS_80[actor]))
    line = command(plan, RecipeModels(actor=actor, reward=CRITIC))
    result = CliRunner().invoke(app, [*shlex.split(line)[1:], "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content["memory"]["peak_bytes"] == plan.memory.peak_bytes
    assert content["memory"]["budget_bytes"] == plan.memory.budget_bytes
    assert content["kv_cache"]["num_blocks"] == plan.memory.cache.num_blocks
    assert set(content["measures"]) == {measure.value for measure in plan.memory.measures}
    assert content["actor"]["recompute"] == plan.job.actor.recompute.value


def test_a_run_keeps_what_was_chosen() -> None:
    config = resolved("facebook/opt-175b", DeploymentType.MULTI_NODE)
    plan = choose_for("facebook/opt-175b", cluster_of(DeploymentType.MULTI_NODE))
    job, actor = plan.job, config.models.actor
    assert actor.layout(64) == job.actor.layout
    assert config.models.reward.layout(64) == job.critic.layout
    assert actor.sequence_parallel and actor.micro_batch_rows == job.actor.micro_batch_rows
    assert config.rlhf.memory.offload_optimizer and config.rlhf.memory.reuse_gradients
    cache = plan.memory.cache
    assert int(config.rlhf.generation.kv_cache_gb * 1e9) // cache.block_bytes == cache.num_blocks
    assert config.rlhf.generation.max_sequences == 32  # 4 x 64 prompts on 8 replicas


def test_of_plans_about_as_fast_the_simplest_is_taken() -> None:
    cluster = cluster_of(DeploymentType.SINGLE_NODE)
    plan = choose_for("facebook/opt-13b", cluster)
    fastest = search(
        PlanRequest(
            actor=OPT_MODELS["facebook/opt-13b"],
            critic=OPT_MODELS[CRITIC],
            cluster=cluster,
            workload=workload(8),
            block_tokens=16,
            row_choices=(4, 2, 1),
        )
    ).best
    assert plan.seconds.total <= 1.1 * fastest.seconds.total
    assert plan.job.actor.layout.pipeline == 1
    assert plan.job.actor.recompute is Recompute.NONE and not plan.memory.measures


def folder(path: Path, config: OptConfig, **changes: Any) -> str:
    values = {
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "hidden_size": config.hidden,
        "ffn_dim": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(values | changes), encoding="utf-8")
    return str(path)


def test_the_architecture_counts_and_not_the_name(tmp_path: Path) -> None:
    large = folder(tmp_path / "opt-125m", OPT_MODELS["facebook/opt-66b"])
    cluster = cluster_of(DeploymentType.MULTI_NODE)
    by_folder, by_name = (choose_for(name, cluster) for name in (large, "facebook/opt-66b"))
    assert by_folder.job == by_name.job


def test_a_model_that_is_not_here_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="nobody/no-such-opt: its architecture") as caught:
        choose_for("nobody/no-such-opt", cluster_of(DeploymentType.SINGLE_NODE))
    assert "\n" not in str(caught.value)


def test_a_critic_that_starts_from_the_policy_is_as_large() -> None:
    models = RecipeModels(actor="facebook/opt-1.3b", reward="sft")
    plan = choose(models, cluster_of(DeploymentType.SINGLE_NODE))
    assert plan.job.critic.config == plan.job.actor.config
    assert "--critic facebook/opt-1.3b" in command(plan, models)


def test_a_dry_run_says_what_was_chosen_and_why() -> None:
    result = CliRunner().invoke(
        app,
        shlex.split(
            "train --actor-model facebook/opt-175b --deployment-type multi_node --dry-run "
            "--set rlhf.memory.offload_optimizer=false"
        ),
    )
    assert result.exit_code == EXIT_CODE, result.output  # the weights of 175B are on no hub
    assert "is on no hub" in result.stderr and result.stderr.count("\n") == 1
    before = result.stdout.partition("\n{")[0]
    for part in (
        "Chosen for 8 x 8 GPUs of 80 GB",
        "Actor: train tp8.pp8.dp1",
        "critic: train tp1.pp1.dp64",
        "Predicted peak: ",
        "margin 2.4 (left free",
        "Without a pipeline, tp8.pp1.dp8: phase scoring needs",
        "Without offload_optimizer: phase generation needs",
        "The same plan: megachat plan --model facebook/opt-175b",
        "With --set: does not fit: phase generation needs",
    ):
        assert part in before, part
    assert '"generation_tensor": 8' in result.stdout


def test_what_does_not_fit_ends_with_one_line_and_its_exit_status() -> None:
    result = CliRunner().invoke(
        app,
        shlex.split("train --actor-model facebook/opt-30b --deployment-type single_node --dry-run"),
    )
    assert result.exit_code == EXIT_CODE
    assert result.stderr.startswith("CapacityError: facebook/opt-30b with facebook/opt-350m on 1 x")
    assert result.stderr.count("\n") == 1
    assert "the smallest cluster of such GPUs that would do is 2 x 8 GPUs of 80 GB" in result.stderr
