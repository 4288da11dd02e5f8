"""`HybridEngine`: the actor, switched between training and generation by `train()` and `eval()`.

The weights live once, in the arena. `eval()` gathers what this rank's generation shard lacks, in
place; `train()` gives that part of the memory back and sends nothing. While the weights have not
changed, `eval()` moves nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType

from torch import Tensor

from megachat.errors import PhaseError
from megachat.generation.config import GenerationConfig
from megachat.generation.generator import Generator
from megachat.generation.weights import (
    GenerationLayer,
    GenerationWeights,
    ReplicaCommunicators,
)
from megachat.hybrid.memory import ActorMemory, DeviceActorMemory
from megachat.hybrid.phases import MemoryMeasures, Phase
from megachat.model.config import OptConfig
from megachat.model.opt import OptModel
from megachat.parallel.groups import GenerationGroups
from megachat.parallel.layout import GenerationPlacement, ParallelLayout
from megachat.parallel.lifetime import Owner
from megachat.reshard.arena import WeightArena
from megachat.reshard.execute import Resharder, ReshardReport
from megachat.reshard.plan import plan_for_model
from megachat.telemetry.timers import nothing_to_wait_for
from megachat.training.engine import PauseReport, TrainEngine
from megachat.training.schedules import OptimizerConfig

_LAYER_PARTS = ("norm1", "qkv", "proj", "norm2", "fc1", "fc2")


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridSettings:
    """How an actor trains and generates."""

    generation_tensor: int
    """Tensor degree of generation."""
    micro_batch_rows: int
    """Record rows that go through the model at once in training."""
    optimizer: OptimizerConfig
    total_steps: int
    """Optimizer steps of the run, where the learning-rate schedule ends."""
    seed: int
    """Start of the dropout streams."""
    generation: GenerationConfig
    """Memory and batch limits of generation."""
    measures: MemoryMeasures = MemoryMeasures()
    """What of training's memory leaves the device for a generation phase."""
    ranks_per_node: int | None = None
    """Neighbouring ranks that share a node; None: all of them."""


class HybridEngine(Owner):
    """The actor of PPO: a `TrainEngine` and a `Generator` over the same memory.

    Its end is that of its weights, too: the model's parameters are empty afterwards.
    """

    def __init__(
        self,
        model: OptModel,
        settings: HybridSettings,
        *,
        stop_ids: Sequence[int],
        suppressed_ids: Sequence[int] = (),
        memory: ActorMemory | None = None,
        synchronize: Callable[[], None] = nothing_to_wait_for,
    ) -> None:
        """Moves a model into an arena and builds both engines; a collective call of all ranks.

        Args:
            model: The actor's shard under its training layout, weights loaded; built with
                `ModelOptions.vocab_multiple` for both tensor degrees.
            settings: How it trains and generates.
            stop_ids: Tokens that end a response.
            suppressed_ids: Tokens that are never sampled.
            memory: Where arena and cache get theirs; None chooses by the model's device.
            synchronize: Waits until the device has done what it was told, for the time that a
                phase change takes.

        Raises:
            LayoutError: The generation degree does not nest into the training layout, cuts a
                parameter unevenly, or spans nodes.
            CapacityError: The key-value cache cannot hold one block.
        """
        layout, dtype = model.groups.layout, model.options.dtype
        device = next(model.parameters()).device
        placement = GenerationPlacement(source=layout, tensor=settings.generation_tensor)
        plan = plan_for_model(
            model.config,
            source=layout,
            target=ParallelLayout(tensor=placement.tensor, data=placement.replicas),
            ranks_per_node=settings.ranks_per_node,
            element_bytes=dtype.itemsize,
        )
        groups = GenerationGroups.create(plan.placement, training=model.groups)
        self._memory = memory if memory is not None else DeviceActorMemory(device)
        self.arena = WeightArena(
            plan,
            rank=model.groups.rank,
            dtype=dtype,
            device=device,
            memory=self._memory.weights,
        )
        self._model = model
        with ExitStack() as built:  # an optimizer that does not fit takes the arena with it
            built.enter_context(self.arena)
            self.training = TrainEngine(
                model,
                micro_batch_rows=settings.micro_batch_rows,
                optimizer=settings.optimizer,
                total_steps=settings.total_steps,
                seed=settings.seed,
                storage=self.arena.adopt(model),
            )
            built.pop_all()
        self._memory.release_cached()  # where the weights were before
        self._resharder = Resharder(self.arena, groups, synchronize=synchronize)
        self.last_reshard: ReshardReport | None = None
        """The latest gather; None before the first."""
        self.last_pause = PauseReport()
        """What the latest generation phase took from training."""
        self._measures = settings.measures
        self.phase = Phase.TRAINING
        self._stop_ids, self._suppressed_ids = tuple(stop_ids), tuple(suppressed_ids)
        self._groups = groups
        self._generation = settings.generation
        self._generator: Generator | None = None

    def eval(self) -> "HybridEngine":
        """Switches to generation: makes room, gathers this rank's generation shard in place.

        Raises:
            PhaseError: A gradient waits for its step, the training weights left the arena, or the
                engine was closed.
        """
        self.check_open()
        if self.phase is Phase.TRAINING or not self.arena.is_current:
            self.arena.check_aliasing(self.training.stored_tensors())
            self.last_pause = self.training.pause(
                offload_state=self._measures.offload_optimizer,
                lend_gradients=self._measures.reuse_gradients,
            )
            self.phase = Phase.GENERATION
            try:
                # What training has just freed, and its activations before, must be the driver's
                # again: arena and cache take from there.
                self._memory.release_cached()
                self.last_reshard = self._resharder.gather()
            except BaseException:
                self.train()
                raise
        return self

    def train(self) -> "HybridEngine":
        """Switches to training: gives back the cache and what belongs to other ranks' shards.

        What training had left to generation returns.

        Raises:
            PhaseError: The engine was closed.
        """
        self.check_open()
        if self.phase is Phase.GENERATION:
            if self._generator is not None:
                self._generator.cache.release()
            self.arena.release()
            self.training.resume()
            self.phase = Phase.TRAINING
        return self

    @contextmanager
    def generation(self) -> Iterator[Generator]:
        """The generation phase as a block: `eval()` before, `train()` after."""
        self.eval()
        try:
            yield self.generator
        finally:
            self.train()

    @property
    def generator(self) -> Generator:
        """Generates with the present weights.

        Raises:
            PhaseError: The actor is in its training phase, or the engine was closed.
        """
        self.check_open()
        if self.phase is not Phase.GENERATION:
            raise PhaseError(
                "the actor is laid out for training: call eval() or use generation() first"
            )
        if self._generator is None:
            self._generator = Generator(
                arena_weights(self._model.config, self.arena.weights(), replicas=self._groups),
                stop_ids=self._stop_ids,
                suppressed_ids=self._suppressed_ids,
                config=self._generation,
                cache_memory=self._memory.cache,
            )
        return self._generator

    def close(self) -> None:
        """Frees everything, the communicators of generation too; all ranks call it alike."""
        super().close()
        self._groups.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes it; after an error the communicators are left to the end of the job.

        Other ranks may stand in a collective. Were they to lose this one now, their complaints
        about that could be told before the error of this rank.
        """
        if kind is None:
            self.close()
        else:
            super().close()

    def _end(self) -> None:
        """Recorded steps before the memory that they read and the communicators that they use."""
        with ExitStack() as parts:
            parts.callback(self.arena.close)
            parts.callback(self.training.close)
            if self._generator is not None:
                parts.callback(self._generator.close)
        self._generator = None
        del self._resharder


def arena_weights(
    config: OptConfig, tensors: Mapping[str, Tensor], *, replicas: ReplicaCommunicators
) -> GenerationWeights:
    """The arena's views under the names that the generation runner reads.

    Args:
        config: The architecture.
        tensors: `WeightArena.weights()`, by specification name.
        replicas: Who shares this copy of the model, and the other copies.
    """
    return GenerationWeights(
        config=config,
        groups=replicas,
        layers=tuple(
            GenerationLayer(
                **{
                    f"{part}_{kind}": tensors[f"layers.{layer}.{part}.{kind}"]
                    for part in _LAYER_PARTS
                    for kind in ("weight", "bias")
                }
            )
            for layer in range(config.layers)
        ),
        words=tensors["embedding.word.weight"],
        positions=tensors["embedding.position.weight"],
        project_in=tensors.get("embedding.project_in.weight"),
        project_out=tensors.get("head.project_out.weight"),
        final_norm_weight=tensors.get("final_norm.weight"),
        final_norm_bias=tensors.get("final_norm.bias"),
    )
