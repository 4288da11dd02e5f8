from pathlib import Path

import pytest

from megachat.cli import presets
from megachat.cli.presets import DeploymentType, paper_tree, tensor_degree, tiny_example
from megachat.config import build_config, load_config
from megachat.errors import ConfigError
from megachat.model.config import OPT_MODELS
from megachat.stages.config import RunConfig


@pytest.mark.parametrize("deployment", list(DeploymentType))
@pytest.mark.parametrize("actor", list(OPT_MODELS))
def test_recipe_is_a_valid_run_whose_layout_fits_the_model(
    actor: str, deployment: DeploymentType
) -> None:
    tree = paper_tree(actor, reward_model="facebook/opt-350m", deployment=deployment)
    config = build_config(RunConfig, tree, source="recipe")
    config.check()
    for role, model in ((config.models.actor, actor), (config.models.reward, "facebook/opt-350m")):
        OPT_MODELS[model].validate_layout(role.layout(config.launch.world_size))


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


def test_larger_models_get_a_larger_tensor_degree_but_never_more_than_there_are_ranks() -> None:
    degrees = [tensor_degree(name, world_size=64) for name in OPT_MODELS]
    assert degrees == sorted(degrees)
    assert degrees[-1] == 8
    assert tensor_degree("facebook/opt-175b", world_size=2) == 2
    assert tensor_degree("/models/opt-13b", world_size=8) == 4


def test_tiny_example_of_this_checkout_is_valid() -> None:
    config = load_config(RunConfig, path=tiny_example())
    config.check()
    assert config.launch.world_size == 2


def test_missing_example_says_what_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "a" / "b" / "presets.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="give --config FILE"):
        tiny_example()
