"""`RLHFEngine`: the four models of PPO, each under its own parallel layout.

The paper's `DeepSpeedRLHFEngine`. The actor both trains and generates; the critic trains; the
reference (the actor's start) and the reward model only run forward.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from megachat.errors import ConfigError, LayoutError
from megachat.hybrid.engine import HybridEngine
from megachat.hybrid.phases import MemoryMeasures
from megachat.ops.backends import prepare
from megachat.ops.registry import Backend
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.memory import MovableTensors
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
    measures: MemoryMeasures = MemoryMeasures()
    """What leaves the device when it is not in use; the actor has its own copy of them."""
    logprob_backend: Backend = Backend.REFERENCE
    """Who computes log-probabilities and entropies from the logits of actor and reference, in
    scoring and in the policy's loss."""
    groups: tuple[ProcessGroups, ...] = ()
    """Communicators that end with the engine."""
    _scorers: list[MovableTensors] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks that the four models fit together; sends the scorers away if they are to wait.

        Raises:
            LayoutError: Two roles' layouts have different world sizes.
            ConfigError: Two roles read different vocabularies.
            KernelError: The backend of the log-probabilities is for other devices, or cannot be
                built here.
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
        prepare(self.logprob_backend, policy.device)
        if self.measures.offload_scorers:
            for engine in (self.reference, self.reward):
                weights = MovableTensors(engine.model.parameters(), constant=True)
                weights.to_host()
                self._scorers.append(weights)

    def eval(self) -> None:
        """The generation phase: makes room, then lays the actor's weights out for generation."""
        self.critic.pause(offload_state=self.measures.offload_critic, lend_gradients=False)
        try:
            self.actor.eval()
        except BaseException:
            self.critic.resume()
            raise

    def train(self) -> None:
        """The training phase: everything that made room for generation comes back."""
        self.actor.train()
        self.critic.resume()

    def close(self) -> None:
        """Frees what the roles hold; all ranks call it alike. May be called again."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        """Begins a block at whose end the roles close."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the roles, as each does after an error or without one, and then the groups."""
        self._scorers.clear()
        with ExitStack() as roles:
            for groups in self.groups:
                roles.callback(groups.close)
            for engine in (self.actor, self.critic, self.reference, self.reward):
                roles.callback(engine.__exit__, kind, error, traceback)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """A block in which reference and reward model can run."""
        for weights in self._scorers:
            weights.restore()
        try:
            yield
        finally:
            for weights in self._scorers:
                weights.to_host()
