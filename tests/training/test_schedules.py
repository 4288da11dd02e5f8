from pathlib import Path

import pytest
import torch
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


def _of_torch(kind: ScheduleKind, *, share: float, steps: int) -> list[float]:
    """The rates of torch's own schedule from a peak of 1 to `share` after so many steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule: torch.optim.lr_scheduler.LRScheduler
    if kind is ScheduleKind.LINEAR:
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=share, total_iters=steps
        )
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=share)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("kind", [ScheduleKind.LINEAR, ScheduleKind.COSINE])
@pytest.mark.parametrize(("share", "steps", "warmup"), [(0.0, 6, 0), (0.2, 5, 0), (0.1, 9, 4)])
def test_the_decay_is_that_of_torch_and_arrives_after_the_last_step(
    kind: ScheduleKind, share: float, steps: int, warmup: int
) -> None:
    config = OptimizerConfig(
        learning_rate=1.0, schedule=kind, final_share=share, warmup_steps=warmup
    )
    rates = [*_rates(config, steps), learning_rate(config, step=steps, total_steps=steps)]
    expected = _of_torch(kind, share=share, steps=steps - warmup)
    assert rates[warmup:] == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert rates[-1] == pytest.approx(share)


def test_warm_up_rises_linearly_and_never_starts_at_zero() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleKind.LINEAR, warmup_steps=4)
    assert _rates(config, 7) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 2 / 3, 1 / 3])


def test_a_warm_up_that_is_longer_than_the_run_rises_to_the_end() -> None:
    config = OptimizerConfig(learning_rate=1.0, schedule=ScheduleKind.COSINE, warmup_steps=8)
    assert _rates(config, 2) == [0.125, 0.25]


def test_a_run_of_one_step_takes_it_at_the_peak() -> None:
    for kind in ScheduleKind:
        assert _rates(OptimizerConfig(learning_rate=0.5, schedule=kind), 1) == [0.5]


def test_steps_after_the_end_stay_at_the_final_rate() -> None:
    for kind in (ScheduleKind.LINEAR, ScheduleKind.COSINE):
        config = OptimizerConfig(learning_rate=1.0, schedule=kind, final_share=0.3)
        late = [learning_rate(config, step=step, total_steps=10) for step in (10, 11, 1000)]
        assert late == pytest.approx([0.3] * 3)


@given(
    kind=st.sampled_from(ScheduleKind),
    warmup=st.integers(0, 40),
    total=st.integers(1, 60),
    share=st.floats(0, 1),
)
@settings(deadline=None)
def test_rate_rises_to_the_peak_then_never_rises_again_and_is_never_zero(
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
    assert all(0.5 * share <= rate for rate in falling)
    assert all(0.0 < rate <= 0.5 for rate in rates)
    if falling:
        assert falling[0] == 0.5


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("learning_rate=0", "learning_rate"),
        ("learning_rate=inf", "learning_rate"),
        ("weight_decay=inf", "weight_decay"),
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
