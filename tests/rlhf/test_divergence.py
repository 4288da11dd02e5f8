"""A role whose numbers stop being numbers ends the step on all ranks, and is named."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megachat.errors import DivergenceError
from megachat.model.opt import OptModel
from megachat.parallel.layout import ParallelLayout
from megachat.rlhf.config import PpoConfig
from megachat.rlhf.ppo import PPOTrainer
from tests.harness import run_ranks
from tests.rlhf import tiny

LENGTHS = [3, 5, 2, 4]
ROLES: dict[str, tuple[Callable[[PPOTrainer], OptModel], str, str]] = {
    "actor": (
        lambda trainer: trainer.engine.actor.training.model,
        "embedding.word.weight",
        "log-probs of the tokens that the actor sampled are not finite",
    ),
    "reference": (
        lambda trainer: trainer.engine.reference.model,
        "layers.1.fc2.bias",
        "log-probs of the reference are not finite",
    ),
    "critic": (
        lambda trainer: trainer.engine.critic.model,
        "head.score.weight",
        "values of the critic are not finite",
    ),
    "reward": (
        lambda trainer: trainer.engine.reward.model,
        "head.score.weight",
        "scores of the reward model are not finite",
    ),
}
"""By role: its model, a parameter to spoil, and what is then said."""


def _spoil(value: float) -> dict[str, str]:
    """The error of a step for each role that is spoiled, on the last data rank alone."""
    config = PpoConfig.model_validate({"reward": {"normalization": "none"}})
    layout = ParallelLayout.for_world(dist.get_world_size())
    trainer = tiny.trainer(config, actor=layout, reward=layout)
    found = {}
    for role, (model_of, name, _) in ROLES.items():
        weight = model_of(trainer).parameters_by_spec()[name].data
        kept = weight.clone()
        if dist.get_rank() == dist.get_world_size() - 1:
            weight.fill_(value)
        with pytest.raises(DivergenceError) as told:
            trainer.generate_experience(tiny.prompts(LENGTHS))
        found[role] = str(told.value)
        weight.copy_(kept)
    experience = trainer.generate_experience(tiny.prompts(LENGTHS))  # all is well again
    before = tiny.own_weights(trainer.engine.actor.training.model)
    bad = replace(experience, advantages=experience.advantages * torch.nan)
    with pytest.raises(DivergenceError) as told:
        trainer.train_rlhf(bad)
    found["loss"] = str(told.value)
    after = tiny.own_weights(trainer.engine.actor.training.model)
    assert all(torch.equal(value[1], after[name][1]) for name, value in before.items())
    return found


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_role_that_answers_no_numbers_is_named_on_all_ranks(value: float) -> None:
    """Two copies of every model, of which one is spoiled."""
    first, last = run_ranks(2, _spoil, value)
    assert first == last
    for role, (_, _, said) in ROLES.items():
        assert said in first[role] and "\n" not in first[role]
    assert first["loss"].startswith("the loss of the actor is nan: ")
