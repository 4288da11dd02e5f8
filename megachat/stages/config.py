"""The one place that composes the run configuration from the components' own classes."""

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator

from megachat.config import ConfigModel, PathField, Seed
from megachat.data.config import DataConfig, SentencePieceConfig, Stage
from megachat.errors import ConfigError, MegachatError
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.hybrid.phases import MemoryMeasures
from megachat.model.config import (
    ModelOptions,
    NormBackend,
    OptConfig,
    Recompute,
)
from megachat.ops.registry import Backend
from megachat.parallel.launch import LaunchConfig
from megachat.parallel.layout import Axis, GenerationPlacement, ParallelLayout
from megachat.parallel.placement import SameHost
from megachat.rlhf.config import LogprobTolerance, OldLogprobs, PpoConfig
from megachat.training.schedules import OptimizerConfig

FROM_SFT = "sft"
"""`models.reward.model`: start from this run's own supervised model, with a fresh head."""


class Precision(StrEnum):
    """Of parameters and activations; optimizer state is always fp32."""

    FP32 = "fp32"
    BF16 = "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}[self]


class PairLoss(StrEnum):
    """Loss of the reward model."""

    BRADLEY_TERRY = "bradley-terry"
    """On the score at the end of each answer."""
    TOKEN_WISE = "token-wise"
    """DeepSpeed-Chat's, over all tokens from the first difference on, pads excluded."""


class GroundTruth(StrEnum):
    """A judge of replies that the reward model never sees."""

    NONE = "none"
    UPBEAT = "upbeat"
    """VADER's compound sentiment, in [-1, 1]; needs the `demo` extra."""


class RunSection(ConfigModel):
    """Identity of a run."""

    output: PathField = Path("runs/default")
    """Folder of everything the run writes."""
    seed: Seed = 1234
    title: str = "megachat run"
    sft_from: PathField | None = None
    """Output folder of another run whose supervised model takes the place of this run's own: for
    the reward model where `models.reward.model` is "sft", for the actor of PPO, and, unless
    `tokenizer.path` is given, for the tokenizer."""
    reward_from: PathField | None = None
    """Output folder of another run whose reward model takes the place of this run's own. It must
    have been made with the same tokenizer."""

    @model_validator(mode="after")
    def _others(self) -> Self:
        for key, other in (("sft_from", self.sft_from), ("reward_from", self.reward_from)):
            if other is not None and other.absolute() == self.output.absolute():
                raise ValueError(
                    f"run.{key} {other} is run.output, this run itself: leave run.{key} out"
                )
        return self

    def source_of(self, stage: Stage) -> Path | None:
        """Output folder of the run that a stage's model is taken from; None: of this one."""
        return {Stage.SFT: self.sft_from, Stage.REWARD: self.reward_from}.get(stage)


class TokenizerSection(ConfigModel):
    """Which tokenizer all models of the run share; neither key takes the actor model's own."""

    path: str | None = None
    """A folder or hub name."""
    train: SentencePieceConfig | None = None
    """Train one on the answers and prompts of the supervised data; not where `run.sft_from` or
    `run.reward_from` names a run, whose tokenizer is taken then."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is not None and self.train is not None:
            raise ValueError("path and train exclude each other: give one")
        return self


class ShapeSection(ConfigModel):
    """A model to start from random weights; its vocabulary is the tokenizer's."""

    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    ffn: int | None = Field(default=None, ge=1, description="None is 4 x hidden.")
    embed_dim: int | None = Field(default=None, ge=1, description="None is hidden.")
    max_positions: int = Field(default=2048, ge=2)
    layer_norm_first: bool = True
    init_std: float = Field(default=0.02, gt=0, allow_inf_nan=False)

    def opt_config(self, *, vocab_size: int, pad_id: int, bos_id: int, eos_id: int) -> OptConfig:
        """The architecture for a vocabulary."""
        return OptConfig(
            vocab_size=vocab_size,
            max_positions=self.max_positions,
            hidden=self.hidden,
            ffn=self.ffn or 4 * self.hidden,
            layers=self.layers,
            heads=self.heads,
            embed_dim=self.embed_dim or self.hidden,
            layer_norm_first=self.layer_norm_first,
            init_std=self.init_std,
            pad_id=pad_id,
            bos_id=bos_id,
            eos_id=eos_id,
        )


class RoleSection(ConfigModel):
    """One model role: where it starts and how it is cut over the ranks."""

    model: str | None = None
    """A HuggingFace folder or hub name; for `models.reward` also "sft"."""
    shape: ShapeSection | None = None
    """Random weights of this shape instead of `model`."""
    tensor: int = Field(default=1, ge=1)
    """Tensor-parallel degree."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline-parallel degree; the data degree is what remains of the world."""
    precision: Annotated[Precision, Field(strict=False)] = Precision.BF16
    sequence_parallel: bool = False
    recompute: Annotated[Recompute, Field(strict=False)] = Recompute.NONE
    norm_backend: Annotated[NormBackend, Field(strict=False)] = NormBackend.TORCH
    micro_batch_rows: int = Field(default=8, ge=1)
    """Rows (or pairs) that go through the model at once."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.model is None) == (self.shape is None):
            raise ValueError("give either model (folder or name) or shape (random weights)")
        return self

    def layout(self, world_size: int) -> ParallelLayout:
        """The layout of this role over the whole job.

        Raises:
            LayoutError: tensor x pipeline does not divide the world size.
        """
        return ParallelLayout.for_world(world_size, tensor=self.tensor, pipeline=self.pipeline)

    def options(self, *, dropout: float = 0.0, attention_dropout: float = 0.0) -> ModelOptions:
        """How the model runs in one stage."""
        return ModelOptions(
            dtype=self.precision.dtype,
            sequence_parallel=self.sequence_parallel and self.tensor > 1,
            recompute=self.recompute,
            hidden_dropout=dropout,
            attention_dropout=attention_dropout,
            norm_backend=self.norm_backend,
        )


class PolicySection(RoleSection):
    """The role that says how likely tokens are."""

    logprob_backend: Backend = Field(
        default=Backend.REFERENCE,
        strict=False,
        description="Who computes log-probabilities and entropies from the logits, in scoring and "
        "in the losses of the supervised stage and of PPO: plain torch, our CPU kernels or our "
        "CUDA kernels.",
    )


class ModelsSection(ConfigModel):
    """The two architectures of a run: policy and reward."""

    actor: PolicySection
    """Supervised model, actor and reference."""
    reward: RoleSection
    """Reward model and critic."""


class StepLimit(StrEnum):
    """The key of a stage's section that ends its loop."""

    EPOCHS = "epochs"
    MAX_STEPS = "max_steps"


class _LoopSection(ConfigModel):
    """What the loops of all stages share."""

    epochs: int | None = Field(default=None, ge=1)
    """Passes over the stage's data; None: as many as `max_steps` takes, without that one."""
    max_steps: int | None = Field(default=None, ge=1)
    """Steps of the stage; None runs all epochs. Where both are given, what comes first ends it."""
    evaluation_rows: int = Field(default=512, ge=1)
    """Held-out rows that are evaluated before and after."""

    def num_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole stage."""
        if self.max_steps is None:
            return steps_per_epoch * (self.epochs or 1)
        if self.epochs is None:
            return self.max_steps
        return min(steps_per_epoch * self.epochs, self.max_steps)

    def step_limit(self, steps_per_epoch: int) -> StepLimit:
        """What ends the stage after `num_steps` steps."""
        ends = self.max_steps is not None and self.max_steps == self.num_steps(steps_per_epoch)
        return StepLimit.MAX_STEPS if ends else StepLimit.EPOCHS


class _BucketedSection(_LoopSection):
    """Loops over rows of different lengths."""

    bucket_window: int = Field(default=16, ge=0)
    """Batches within which rows are sorted by length to save padding; 0 does not sort."""


class SftSection(_BucketedSection):
    """Step 1: supervised fine-tuning."""

    batch_rows: int = Field(default=32, ge=1)
    """Rows of a global batch."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9.65e-6)


class RewardSection(_BucketedSection):
    """Step 2: reward model."""

    batch_pairs: int = Field(default=32, ge=1)
    """Pairs of a global batch."""
    loss: Annotated[PairLoss, Field(strict=False)] = PairLoss.BRADLEY_TERRY
    center_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the mean squared score, which keeps scores around zero."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5, weight_decay=0.1)


class RlhfSection(_LoopSection):
    """Step 3: PPO. Dropout is off: old and new log-probs must come from one function."""

    batch_prompts: int = Field(default=32, ge=1)
    """Prompts of one experience, over the whole job."""
    generation_tensor: int | None = Field(default=None, ge=1)
    """Tensor degree the actor generates with; None is the one it trains with. Pipeline stages are
    gathered for generation, and every rank generates."""
    generation: GenerationConfig = GenerationConfig()
    memory: MemoryMeasures = MemoryMeasures()
    """What leaves the device to make room for generation."""
    sampling: SamplingConfig = SamplingConfig()
    old_logprobs: Annotated[OldLogprobs, Field(strict=False)] = OldLogprobs.RECOMPUTE
    """Log-probs of the policy that sampled: `rollout` saves the actor's forward pass over each
    experience; ratios, KL and rewards are then made of what decoding noted down."""
    logprob_tolerance: LogprobTolerance = LogprobTolerance()
    """Where `rollout` ends the run: mean gap between decoding and training, nats per token."""
    ppo: PpoConfig = PpoConfig()
    actor_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9.65e-6)
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-6)
    judge: Annotated[GroundTruth, Field(strict=False)] = GroundTruth.NONE
    """Ground truth that the replies before and after are compared by."""
    samples: int = Field(default=3, ge=0)
    """Held-out prompts whose replies before and after are shown."""

    def generation_degree(self, actor: RoleSection) -> int:
        """Tensor degree that an actor generates with."""
        return actor.tensor if self.generation_tensor is None else self.generation_tensor

    @model_validator(mode="after")
    def _samples_at_a_temperature(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError("rlhf.sampling.temperature 0 explores nothing: PPO needs one above 0")
        return self


class RunConfig(ConfigModel):
    """Everything a run needs to know."""

    run: RunSection = RunSection()
    launch: LaunchConfig = LaunchConfig()
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataConfig
    models: ModelsSection
    sft: SftSection = SftSection()
    reward: RewardSection = RewardSection()
    rlhf: RlhfSection = RlhfSection()

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.models.actor.model == FROM_SFT:
            raise ValueError('models.actor.model "sft" is for models.reward: give a folder or name')
        needs_tokenizer = self.models.actor.shape is not None
        if needs_tokenizer and self.tokenizer.path is None and self.tokenizer.train is None:
            raise ValueError(
                "models.actor has random weights and so no tokenizer: give tokenizer.path or "
                "tokenizer.train"
            )
        return self

    def check(self) -> None:
        """Checks relations that span components, before any process is started.

        Raises:
            LayoutError: A role's degrees do not fit the number of processes, or the generation
                degree does not nest into the actor's layout.
            ConfigError: Rows and mini-batches do not fit.
        """
        for problem in self.problems():
            raise problem

    def problems(self) -> Iterator[MegachatError]:
        """All that `check` would raise."""
        world_size = self.launch.world_size
        roles = {"actor": self.models.actor, "reward": self.models.reward}
        checks: list[Callable[[], object]] = []
        for name, role in roles.items():
            checks.append(partial(role.layout, world_size))
            if role.shape is not None:
                checks.append(partial(self._check_positions, name, role.shape.max_positions))
        checks += [
            self._check_generation,
            partial(self.rlhf.ppo.check_rows, self.rlhf.batch_prompts),
        ]
        told: set[str] = set()
        for check in checks:
            try:
                check()
            except MegachatError as error:
                if str(error) not in told:  # both roles may have the same problem
                    yield error
                told.add(str(error))

    def own_stages(self, stages: Sequence[Stage]) -> list[Stage]:
        """Those of some stages that this run does itself.

        Raises:
            ConfigError: It takes all of them from other runs.
        """
        own = [stage for stage in stages if self.run.source_of(stage) is None]
        if not own:
            named = ", ".join(f"run.{stage}_from {self.run.source_of(stage)}" for stage in stages)
            raise ConfigError(
                f"{named}: nothing is left to run, since these models are taken from there: leave "
                "that out to train them here"
            )
        return own

    def ranks_on_one_host(self) -> tuple[SameHost, ...]:
        """Tensor groups of training and of generation, which exchange within every layer."""
        actor, reward = self.models.actor, self.models.reward
        world_size, degree = self.launch.world_size, self.rlhf.generation_degree(actor)
        placement = GenerationPlacement(source=actor.layout(world_size), tensor=degree)
        generation = dict.fromkeys(placement.tensor_group(rank) for rank in range(world_size))
        return (
            *(
                SameHost(
                    why=f"models.{name}.tensor {role.tensor}",
                    groups=role.layout(world_size).groups_along(Axis.TENSOR),
                )
                for name, role in (("actor", actor), ("reward", reward))
            ),
            SameHost(why=f"rlhf.generation_tensor {degree}", groups=tuple(generation)),
        )

    def _check_generation(self) -> None:
        """Refuses a generation degree that does not nest into the actor's layout, if that fits."""
        actor, world_size = self.models.actor, self.launch.world_size
        if world_size % (actor.tensor * actor.pipeline) == 0:
            GenerationPlacement(
                source=actor.layout(world_size), tensor=self.rlhf.generation_degree(actor)
            )

    def _check_positions(self, role: str, max_positions: int) -> None:
        """Refuses rows that are longer than a model's position table."""
        longest = self.data.max_prompt_tokens + self.rlhf.sampling.max_new_tokens
        if max(longest, self.data.max_tokens) > max_positions:
            raise ConfigError(
                f"data.max_prompt_tokens {self.data.max_prompt_tokens} + "
                f"rlhf.sampling.max_new_tokens {self.rlhf.sampling.max_new_tokens} = {longest}, "
                f"data.max_tokens {self.data.max_tokens}, but models.{role}.shape.max_positions is "
                f"{max_positions}: raise it or shorten the rows"
            )
