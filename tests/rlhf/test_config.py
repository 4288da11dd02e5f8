import math
from pathlib import Path

import pytest

from megachat.config import ConfigModel, build_config, load_config
from megachat.errors import ConfigError
from megachat.rlhf.config import (
    KlConfig,
    KlControl,
    KlEstimator,
    LogprobTolerance,
    MissingEos,
    PpoConfig,
    Recipe,
    RewardConfig,
    RewardNormalization,
    Whitening,
)


class _Run(ConfigModel):
    ppo: PpoConfig = PpoConfig()


def _load(*overrides: str) -> PpoConfig:
    return load_config(_Run, overrides=overrides).ppo


def test_the_defaults_are_those_of_the_megachat_recipe() -> None:
    config = PpoConfig()
    assert config == _load("ppo.recipe=megachat") == _load()
    assert (config.gamma, config.lam) == (1.0, 0.95)
    assert config.clip_range == config.value_clip_range == 0.2
    assert config.reward.clip == 5.0 and config.whitening is Whitening.FULL
    assert config.kl.control is KlControl.ADAPTIVE


def test_every_field_is_documented() -> None:
    source = Path(PpoConfig.__module__.replace(".", "/") + ".py")
    lines = (Path(__file__).parents[2] / source).read_text(encoding="utf-8").splitlines()
    for model in (PpoConfig, KlConfig, RewardConfig, LogprobTolerance):
        for name in model.model_fields:
            start = next(n for n, line in enumerate(lines) if line.startswith(f"    {name}: "))
            following = lines[start + 1 : start + 4]
            assert any(line.strip().startswith('"""') for line in following), name


def test_the_deepspeed_chat_recipe_has_its_constants() -> None:
    config = _load("ppo.recipe=deepspeed-chat")
    assert config.recipe is Recipe.DEEPSPEED_CHAT
    assert config.kl.control is KlControl.FIXED and config.kl.coefficient == 0.1
    assert config.kl.estimator is KlEstimator.K1
    assert config.whitening is Whitening.NONE
    assert config.reward.normalization is RewardNormalization.NONE
    assert config.reward.missing_eos is MissingEos.KEEP and config.reward.clip == 5.0
    assert config.epochs == config.minibatches == 1


def test_given_keys_win_over_the_recipe_table_by_table() -> None:
    config = _load("ppo.recipe=deepspeed-chat", "ppo.kl.coefficient=0.02", "ppo.epochs=4")
    assert config.kl.coefficient == 0.02 and config.epochs == 4
    assert config.kl.control is KlControl.FIXED and config.whitening is Whitening.NONE
    built = PpoConfig(recipe=Recipe.DEEPSPEED_CHAT, kl=KlConfig(coefficient=0.02), epochs=4)
    assert built == config


@pytest.mark.parametrize("recipe", list(Recipe))
def test_a_written_configuration_reads_back_as_the_same(recipe: Recipe) -> None:
    config = _load(f"ppo.recipe={recipe}", "ppo.lam=0.9")
    assert PpoConfig.model_validate(config.model_dump()) == config
    assert PpoConfig.model_validate_json(config.model_dump_json(exclude_unset=True)) == config


def test_infinity_switches_clips_off() -> None:
    config = _load("ppo.value_clip_range=inf", "ppo.reward.clip=inf", "ppo.dual_clip=3.0")
    assert math.isinf(config.value_clip_range) and math.isinf(config.reward.clip)
    assert config.dual_clip == 3.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ppo.gamma=1.1"], "ppo.gamma: .*less than or equal to 1"),
        (["ppo.gamma=nan"], "ppo.gamma: "),
        (["ppo.lam=-0.1"], "ppo.lam: .*greater than or equal to 0"),
        (["ppo.clip_range=1.0"], "ppo.clip_range: .*less than 1"),
        (["ppo.epochs=0"], "ppo.epochs: "),
        (["ppo.epochs=1.5"], "ppo.epochs: "),
        (["ppo.kl.target=inf"], "ppo.kl.target: .*finite"),
        (["ppo.kl.estimator=k4"], "ppo.kl.estimator: .*'k4'"),
        (["ppo.recipe=trl"], "ppo.recipe: .*'trl'"),
        (["ppo.reward.clipp=5.0"], r"ppo.reward.clipp: unknown key \(did you mean 'clip'"),
        (["ppo.kl=3"], "ppo.kl: "),
        (["ppo.recipe=deepspeed-chat", "ppo.kl=3"], "ppo.kl: "),
        (["ppo.kl.coefficient=0.0"], "ppo.kl: coefficient 0 with control 'adaptive' stays 0"),
        (["ppo.reward.missing_eos_value=1.0"], "ppo.reward: missing_eos_value 1.0 is above 0"),
        (
            ["ppo.early_stop_kl=0.1", "ppo.epochs=1", "ppo.minibatches=1"],
            "ppo: early_stop_kl 0.1 never acts with epochs 1 x minibatches 1",
        ),
    ],
)
def test_values_that_cannot_be_honoured_are_refused_in_one_line(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _load(*overrides)
    assert "\n" not in str(caught.value)


def test_values_that_are_fine_in_their_setting_are_accepted() -> None:
    assert _load("ppo.kl.coefficient=0.0", "ppo.kl.control=fixed").kl.coefficient == 0.0
    replaced = _load("ppo.reward.missing_eos=replace", "ppo.reward.missing_eos_value=1.0")
    assert replaced.reward.missing_eos_value == 1.0
    assert _load("ppo.early_stop_kl=0.1", "ppo.epochs=1").early_stop_kl == 0.1


def test_rows_are_cut_into_equal_minibatches_or_refused() -> None:
    config = build_config(PpoConfig, {"minibatches": 3}, source="test")
    assert config.minibatch_rows(96) == 32
    with pytest.raises(ConfigError, match="ppo.minibatches: 64 rows .* 3 equal .* divisor of 64"):
        config.minibatch_rows(64)


def test_a_kl_step_that_could_reach_zero_is_refused_before_the_run() -> None:
    config = _load("ppo.kl.horizon=64", "ppo.kl.error_clip=0.5")
    config.check_rows(126)
    with pytest.raises(ConfigError, match="ppo.kl.horizon: 64 samples .* 0.5 x 128 .* = 64 could"):
        config.check_rows(128)
    _load("ppo.kl.horizon=1", "ppo.kl.control=fixed").check_rows(128)
