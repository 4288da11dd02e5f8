"""The checks by which `RLHFEngine` refuses models that do not fit together."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megachat.errors import ConfigError, LayoutError
from megachat.parallel.layout import ParallelLayout
from megachat.rlhf.engine import RLHFEngine

ROLES = ("actor", "critic", "reference", "reward")


def _role(*, layout: ParallelLayout, vocab_size: int = 131) -> Any:
    """What the checks see of an engine; real ones need a process group for each world size."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        groups=SimpleNamespace(layout=layout),
        model=SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size)),
    )


def _engine(**changed: Any) -> RLHFEngine:
    roles = {name: _role(layout=ParallelLayout(tensor=2, data=2)) for name in ROLES} | changed
    return RLHFEngine(**roles | {"actor": SimpleNamespace(training=roles["actor"])})


def test_every_role_may_have_its_own_layout_of_the_whole_job() -> None:
    engine = _engine(
        critic=_role(layout=ParallelLayout(data=4)),
        reference=_role(layout=ParallelLayout(pipeline=4)),
    )
    assert engine.critic.groups.layout.data == 4


@pytest.mark.parametrize("name", ROLES[1:])
def test_a_role_on_part_of_the_job_is_refused(name: str) -> None:
    with pytest.raises(LayoutError, match=f"the {name} has layout tp2.pp1.dp1 of 2 ranks") as error:
        _engine(**{name: _role(layout=ParallelLayout(tensor=2))})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ROLES[1:])
def test_roles_with_different_vocabularies_are_refused(name: str) -> None:
    layout = ParallelLayout(data=4)
    with pytest.raises(ConfigError, match=f"the {name} has 99 vocabulary rows, the actor 131"):
        _engine(**{name: _role(layout=layout, vocab_size=99)})
