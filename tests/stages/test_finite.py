"""Where a run says that it has diverged."""

import math

import pytest

from megachat.errors import ConfigError, DivergenceError
from megachat.stages.finite import at, require_figures


def test_a_divergence_is_told_with_its_place_and_other_errors_as_they_are() -> None:
    with pytest.raises(DivergenceError, match="^sft step 3: the loss is nan$"), at("sft step 3"):
        raise DivergenceError("the loss is nan")
    with pytest.raises(ConfigError, match="^x$"), at("sft step 3"):
        raise ConfigError("x")


def test_a_figure_is_named_unless_it_is_a_number_or_does_not_exist() -> None:
    require_figures({"distinct2_ratio": None, "kl": 0.0}, of="the actor")
    with pytest.raises(DivergenceError, match="the score after of the actor is inf: "):
        require_figures({"kl": 0.1, "score_after": math.inf, "x": math.nan}, of="the actor")
