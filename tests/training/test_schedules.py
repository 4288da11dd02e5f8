import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.config import load_config
from megachat.errors import ConfigError
from megachat.training.schedules import OptimizerConfig, ScheduleKind, learning_rate


def _rates(config: OptimizerConfig, total_steps: int) -> list[float]:
    return [
        learning_rate(config, step=step, total_steps=total_steps) for step in range(total_steps)
    ]


def test_constant_stays_at_the_peak() -> None:
    config = OptimizerConfig(learning_rate=3e-4, schedule=ScheduleKind.CONSTANT)
    assert _rates(config, 5) == [3e-4] * 5


def test_linear_runs_from_the_peak_to_its_final_share_in_equal_steps() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleKind.LINEAR, final_share=0.2)
    assert _rates(config, 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_half_a_wave_from_the_peak_to_its_final_share() -> None:
    config = OptimizerConfig(learning_rate=2.0, schedule=ScheduleKind.COSINE, final_share=0.1)
    share = [0.1 + 0.9 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(7)]
    assert _rates(config, 7) == pytest.approx([2.0 * each for each in share])


def test_warm_up_rises_linearly_and_never_starts_at_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleKind.LINEAR, warmup_steps=4)
    assert _rates(config, 7) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.0])


def test_steps_after_the_end_stay_at_the_final_rate() -> None:
    for kind in (ScheduleKind.LINEAR, ScheduleKind.COSINE):
        config = OptimizerConfig(learning_rate=1.0, schedule=kind, final_share=0.3)
        late = [learning_rate(config, step=step, total_steps=10) for step in (9, 10, 1000)]
        assert late == pytest.approx([0.3] * 3)


@given(
    kind=st.sampled_from(ScheduleKind),
    warmup=st.integers(0, 40),
    total=st.integers(1, 60),
    share=st.floats(0, 1),
)
@settings(deadline=None)
def test_rate_rises_to_the_peak_then_never_rises_again(
    kind: ScheduleKind, warmup: int, total: int, share: float
) -> None:
    share = 0.0 if kind is ScheduleKind.CONSTANT else share
    config = OptimizerConfig(
        learning_rate=0.5, schedule=kind, warmup_steps=warmup, final_share=share
    )
    rates = _rates(config, total)
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0.5 * share <= rate <= 0.5 for rate in falling)
    assert all(0.0 < rate <= 0.5 for rate in rising)
    if falling:
        assert falling[0] == 0.5


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("learning_rate=0", "learning_rate"),
        ("schedule=exponential", "schedule"),
        ("beta1=1.0", "beta1"),
        ("epsilon=0.0", "epsilon"),
        ("clip_norm=-1.0", "clip_norm"),
        ("final_share=1.5", "final_share"),
        ("warmup_steps=2.5", "warmup_steps"),
        ("warmup=3", "did you mean 'warmup_steps'"),
    ],
)
def test_a_setting_that_cannot_be_is_named(setting: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(OptimizerConfig, overrides=[setting])


def test_a_constant_schedule_with_an_end_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"constant never decays, but final_share is 0\.5"):
        load_config(OptimizerConfig, overrides=["schedule=constant", "final_share=0.5"])


def test_the_schedule_is_read_from_toml(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.toml"
    path.write_text('schedule = "linear"\nlearning_rate = 1e-4\n')
    config = load_config(OptimizerConfig, path=path)
    assert (config.schedule, config.learning_rate) == (ScheduleKind.LINEAR, 1e-4)
