"""`RLHFEngine`: the four models of PPO, each under its own parallel layout.

The paper's `DeepSpeedRLHFEngine`. The actor both trains and generates; the critic trains; the
reference (the actor's start) and the reward model only run forward.
"""

from dataclasses import dataclass

from megachat.errors import ConfigError, LayoutError
from megachat.hybrid.engine import HybridEngine
from megachat.training.engine import ForwardEngine, TrainEngine


@dataclass(frozen=True, kw_only=True, slots=True)
class RLHFEngine:
    """The roles of one PPO run."""

    actor: HybridEngine
    """The policy: trains, and generates with the same weights."""
    critic: TrainEngine
    """Predicts the outcome of a response from each of its states."""
    reference: ForwardEngine
    """The policy that the KL penalty holds the actor to."""
    reward: ForwardEngine
    """Scores finished responses."""

    def __post_init__(self) -> None:
        """Checks that the four models fit together.

        Raises:
            LayoutError: Two roles' layouts have different world sizes.
            ConfigError: Two roles read different vocabularies.
        """
        policy = self.actor.training
        roles: dict[str, ForwardEngine] = {
            "actor": policy,
            "critic": self.critic,
            "reference": self.reference,
            "reward": self.reward,
        }
        for name, engine in roles.items():
            layout, config = engine.groups.layout, engine.model.config
            if layout.world_size != policy.groups.layout.world_size:
                raise LayoutError(
                    f"the {name} has layout {layout} of {layout.world_size} ranks, the actor "
                    f"{policy.groups.layout}: every role covers the whole job"
                )
            if config.vocab_size != policy.model.config.vocab_size:
                raise ConfigError(
                    f"the {name} has {config.vocab_size} vocabulary rows, the actor "
                    f"{policy.model.config.vocab_size}: all roles need one tokenizer"
                )
