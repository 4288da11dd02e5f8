"""The one place for what is to be planned: the models, how each is cut and run, and the work."""

from dataclasses import dataclass
from enum import StrEnum

from megachat.errors import ConfigError, LayoutError
from megachat.model.config import Head, OptConfig, Recompute
from megachat.parallel.layout import GenerationPlacement, ParallelLayout
from megachat.planner.hardware import ClusterConfig


class Role(StrEnum):
    """A model of an RLHF job."""

    ACTOR = "actor"
    CRITIC = "critic"
    REFERENCE = "reference"
    """The actor's start: its architecture and layout, forward only."""
    REWARD = "reward"
    """The critic's start: its architecture and layout, forward only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleSetup:
    """How one architecture is cut and run."""

    config: OptConfig
    head: Head
    layout: ParallelLayout
    value_bytes: int = 2
    """Of a parameter and of an activation: 2 is bf16, 4 is fp32."""
    sequence_parallel: bool = True
    """Without effect where the tensor degree is 1."""
    recompute: Recompute = Recompute.NONE
    micro_batch_rows: int = 2
    """Rows that go through the model at once."""
    vocab_multiple: int = 1
    """Of the padded vocabulary, for a second layout of the weights; see `vocab_multiple_for`."""

    def __post_init__(self) -> None:
        """Refuses what no engine runs.

        Raises:
            LayoutError: The layout does not cut the model into equal parts.
            ConfigError: A precision or a number of rows that does not exist.
        """
        self.config.validate_layout(self.layout)
        if self.value_bytes not in (2, 4):
            raise ConfigError(f"value_bytes is {self.value_bytes}: expected 2 (bf16) or 4 (fp32)")
        if self.micro_batch_rows < 1:
            raise ConfigError(f"micro_batch_rows is {self.micro_batch_rows}: expected at least 1")

    @property
    def padded_vocab(self) -> int:
        """Rows of the word embedding over all tensor ranks."""
        return self.config.padded_vocab(self.layout.tensor, vocab_multiple=self.vocab_multiple)

    @property
    def is_sequence_parallel(self) -> bool:
        """Whether activations between the products are cut along the sequence."""
        return self.sequence_parallel and self.layout.tensor > 1

    def rows_at_once(self, rows: int) -> int:
        """Rows of one micro-batch of a global batch of `rows` rows."""
        return min(self.micro_batch_rows, -(-rows // self.layout.data))

    def num_micro_batches(self, rows: int) -> int:
        """Micro-batches that each data rank runs of a global batch of `rows` rows."""
        num_cuts = -(-rows // self.rows_at_once(rows))
        return -(-num_cuts // self.layout.data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes of the batches; every length is planned at its maximum."""

    prompts: int = 1024
    """Prompts of one PPO step, over the whole job."""
    prompt_tokens: int = 256
    response_tokens: int = 256
    ppo_epochs: int = 1
    """Passes over each experience."""
    minibatches: int = 1
    """Optimizer steps of one pass."""
    sft_rows: int = 512
    """Rows of a global batch of supervised fine-tuning."""
    sft_tokens: int = 512
    reward_pairs: int = 256
    """Pairs of a global batch of reward-model training; both answers go through the model."""

    def __post_init__(self) -> None:
        """Refuses empty batches.

        Raises:
            ConfigError: A size is below 1, or the prompts cannot be cut into mini-batches.
        """
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: expected at least 1")
        if self.prompts % self.minibatches:
            raise ConfigError(
                f"{self.prompts} prompts cannot be cut into {self.minibatches} equal mini-batches: "
                f"choose a divisor of {self.prompts}"
            )

    @property
    def sequence_tokens(self) -> int:
        """Prompt and response together."""
        return self.prompt_tokens + self.response_tokens

    @property
    def minibatch_rows(self) -> int:
        """Rows of one optimizer step of PPO."""
        return self.prompts // self.minibatches


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A whole RLHF job: the roles, the generation layout and the work."""

    actor: RoleSetup
    """The policy; the reference runs the same setup forward."""
    critic: RoleSetup
    """The value model; the reward model runs the same setup forward."""
    generation_tensor: int
    """Tensor degree of the generation layout, which has no pipeline."""
    workload: Workload
    block_tokens: int = 32
    """Tokens of one block of the key/value cache."""
    prefill_tokens: int = 4096
    """Prompt tokens that one step of generation computes at most."""
    max_sequences: int | None = None
    """Sequences that one replica has in work at once; None: as many as the cache holds."""
    cache_bytes: int | None = None
    """Size of the key/value cache; None: what generation leaves, at most what it needs."""
    graphs: bool = True
    """Whether decode steps are recorded as CUDA graphs."""

    def __post_init__(self) -> None:
        """Refuses generation layouts that the reshard cannot make, and rows that are too long.

        Raises:
            LayoutError: The generation degree does not fit the model or the training degree.
            ConfigError: Actor and critic cover different numbers of ranks.
        """
        placement = GenerationPlacement(source=self.actor.layout, tensor=self.generation_tensor)
        self.actor.config.validate_layout(ParallelLayout(tensor=placement.tensor))
        worlds = self.actor.layout.world_size, self.critic.layout.world_size
        if worlds[0] != worlds[1]:
            raise LayoutError(
                f"actor layout {self.actor.layout} has {worlds[0]} ranks, critic layout "
                f"{self.critic.layout} has {worlds[1]}: every role covers the whole job"
            )
        for name, setup in (("actor", self.actor), ("critic", self.critic)):
            longest = max(self.workload.sequence_tokens, self.workload.sft_tokens)
            if longest > setup.config.max_positions:
                raise ConfigError(
                    f"rows of {longest} tokens, but the {name} has {setup.config.max_positions} "
                    "positions: shorten prompts or responses"
                )

    @property
    def sequences(self) -> int:
        """Sequences that one replica generates in a PPO step."""
        return -(-self.workload.prompts // self.generation_layout.data)

    @property
    def most_at_once(self) -> int:
        """Sequences that one replica may have in work at once."""
        return min(self.sequences, self.max_sequences or self.sequences)

    @property
    def blocks_per_sequence(self) -> int:
        """Blocks of the cache that the longest sequence takes; its last token is never computed."""
        return -(-(self.workload.sequence_tokens - 1) // self.block_tokens)

    @property
    def generation_layout(self) -> ParallelLayout:
        """Tensor parallel replicas over the whole job."""
        world = self.actor.layout.world_size
        return ParallelLayout.for_world(world, tensor=self.generation_tensor)

    def check_cluster(self, cluster: ClusterConfig) -> None:
        """Checks that the job fills a cluster and that tensor groups stay inside nodes.

        Raises:
            LayoutError: Too many or too few ranks, or a tensor group that spans nodes.
        """
        cluster.check_world(self.actor.layout.world_size, what=f"actor layout {self.actor.layout}")
        for what, degree in (
            ("actor tensor", self.actor.layout.tensor),
            ("critic tensor", self.critic.layout.tensor),
            ("generation tensor", self.generation_tensor),
        ):
            if cluster.nodes > 1 and cluster.gpus_per_node % degree:
                raise LayoutError(
                    f"{what} degree {degree} would span nodes of {cluster.gpus_per_node} GPUs: "
                    f"choose a divisor of {cluster.gpus_per_node}"
                )
