"""The one place that predicts times, from peaks and assumed efficiencies; none of it is measured.

Compute is operations over the cluster's usable peak, stretched by the pipeline's bubble. Decoding
takes the larger of reading (weights once a step, the cache once a row) and computing, plus two
collectives a layer. Transfers are bytes over a link's usable speed and are not overlapped with
anything, so that a plan errs on the slow side.
"""

from dataclasses import dataclass
from functools import cache

from megachat.model.config import Head, Recompute
from megachat.parallel.layout import Axis, ParallelLayout
from megachat.planner.hardware import GB, ClusterConfig
from megachat.planner.job import Job, Role, RoleSetup
from megachat.planner.pools import GRADIENT_BYTES
from megachat.planner.records import MemoryPlan, Phase, Residence
from megachat.planner.sizes import stage_elements
from megachat.planner.traffic import reshard_traffic
from megachat.telemetry.flops import (
    Recomputation,
    TransformerShape,
    decode_bytes,
    forward_flops,
    training_flops,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSeconds:
    """Predicted seconds of the parts of one PPO step."""

    reshard: float
    offload: float
    """To host memory and back."""
    prefill: float
    decode: float
    scoring: float
    actor_training: float
    critic_training: float

    @property
    def generation(self) -> float:
        """Prefill and decoding."""
        return self.prefill + self.decode

    @property
    def total(self) -> float:
        """The whole step."""
        return (
            self.reshard
            + self.offload
            + self.generation
            + self.scoring
            + self.actor_training
            + self.critic_training
        )


def predict_seconds(job: Job, cluster: ClusterConfig, memory: MemoryPlan) -> StepSeconds:
    """Predicts one PPO step."""
    clock = _Clock(cluster)
    work = job.workload
    updates = work.ppo_epochs * work.minibatches
    return StepSeconds(
        reshard=clock.reshard(job),
        offload=clock.offload(memory),
        prefill=clock.prefill(job),
        decode=clock.decode(job, memory.cache.concurrent),
        # Each architecture has two roles: actor and reference, critic and reward model.
        scoring=2
        * sum(clock.score(setup, work.prompts, work.sequence_tokens) for setup in _setups(job)),
        actor_training=updates * clock.train(job.actor, work.minibatch_rows, work.sequence_tokens),
        critic_training=updates
        * clock.train(job.critic, work.minibatch_rows, work.sequence_tokens),
    )


class _Clock:
    """Turns work into seconds on one cluster."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self._flops = cluster.teraflops * 1e12 * cluster.compute_efficiency
        """Of one GPU."""
        self._memory = cluster.memory_gbps * GB * cluster.memory_efficiency
        self._node = cluster.node_link_gbps * GB * cluster.link_efficiency
        self._network = cluster.network_gbps * GB * cluster.link_efficiency
        self._host = cluster.host_link_gbps * GB * cluster.link_efficiency

    def reshard(self, job: Job) -> float:
        """The stage that receives most; between nodes, then inside them."""
        return max(
            stage.received_inter_node / self._network + stage.received_intra_node / self._node
            for stage in reshard_traffic(job, self._cluster)
        )

    def offload(self, memory: MemoryPlan) -> float:
        """Optimizer state goes and comes; frozen models keep a host copy and only come."""
        seconds = 0.0
        for rank in memory.ranks:
            generation = rank.phase(Phase.GENERATION)
            away = [item for item in generation.pools if item.residence is Residence.HOST]
            ways = (
                item.num_bytes * (1 if item.role in (Role.REFERENCE, Role.REWARD) else 2)
                for item in away
            )
            seconds = max(seconds, sum(ways) / self._host)
        return seconds

    def prefill(self, job: Job) -> float:
        """All prompts, spread over all GPUs."""
        work, config = job.workload, job.actor.config
        flops = _forward(_shape(job.actor), work.prompts, work.prompt_tokens, 1)
        tokens = -(-work.prompts // job.generation_layout.data) * work.prompt_tokens
        passes = -(-tokens // job.prefill_tokens)
        per_pass = job.actor.value_bytes * min(tokens, job.prefill_tokens) * config.hidden
        layers = 2 * config.layers * passes
        return flops / self._flops / self._cluster.world_size + layers * self._all_reduce(
            per_pass, job.generation_tensor
        )

    def decode(self, job: Job, concurrent: int) -> float:
        """Waves of at most `concurrent` sequences of one replica, each as long as allowed."""
        sequences = -(-job.workload.prompts // job.generation_layout.data)
        full, rest = divmod(sequences, max(1, concurrent))
        seconds = full * self._wave(job, max(1, concurrent))
        return seconds + (self._wave(job, rest) if rest else 0.0)

    def _wave(self, job: Job, rows: int) -> float:
        """Decoding of `rows` sequences together on one replica."""
        work, tensor, shape = job.workload, job.generation_tensor, _shape(job.actor)
        steps = work.response_tokens - 1
        read = _decode_read(
            shape, rows, work.prompt_tokens, work.response_tokens, job.actor.value_bytes
        )
        flops = 2 * shape.matmul_parameters * rows * steps
        busy = max(read / tensor / self._memory, flops / tensor / self._flops)
        message = job.actor.value_bytes * rows * shape.hidden
        return busy + steps * 2 * shape.layers * self._all_reduce(message, tensor)

    def score(self, setup: RoleSetup, rows: int, tokens: int) -> float:
        """One role's forward pass over a global batch."""
        flops = _forward(_shape(setup), rows, tokens, None)
        return self._pipelined(setup, flops, rows, tokens, passes=1)

    def train(self, setup: RoleSetup, rows: int, tokens: int) -> float:
        """One optimizer step on a global batch."""
        recomputes = setup.recompute is Recompute.FULL
        flops = _training(_shape(setup), rows, tokens, recomputes)
        compute = self._pipelined(setup, flops, rows, tokens, passes=3 if recomputes else 2)
        return compute + self._data_parallel(setup)

    def _pipelined(
        self, setup: RoleSetup, flops: int, rows: int, tokens: int, *, passes: int
    ) -> float:
        """Products, collectives and transfers of all micro-batches, with the bubble.

        A pass through the layers, forward, again or backward, has two all-reduces a layer; forward
        and backward passes hand a hidden state or its gradient to the next stage.
        """
        layout, count = setup.layout, setup.num_micro_batches(rows)
        at_once = setup.rows_at_once(rows)
        filled = count * at_once * layout.data / rows  # fillers are computed too
        slots = count + layout.pipeline - 1
        message = setup.value_bytes * at_once * tokens * setup.config.hidden
        collectives = 2 * passes * setup.config.layers / layout.pipeline * slots
        return (
            flops * filled / layout.world_size / self._flops * slots / count
            + collectives * self._all_reduce(message, layout.tensor)
            + min(passes, 2) * slots * self._to_next_stage(setup, message)
        )

    def _to_next_stage(self, setup: RoleSetup, message: float) -> float:
        """One hidden state from a pipeline stage to the next, its sequence shard where cut."""
        layout = setup.layout
        if layout.pipeline == 1:
            return 0.0
        node = self._cluster.node_of
        crosses = any(
            node(rank) != node(rank + layout.tensor * layout.data)
            for rank in range(0, layout.world_size - layout.tensor * layout.data, layout.tensor)
        )
        cut = layout.tensor if setup.is_sequence_parallel else 1
        return message / cut / (self._network if crosses else self._node)

    def _data_parallel(self, setup: RoleSetup) -> float:
        """Reduce-scatter of fp32 gradients and all-gather of the weights over the data ranks."""
        layout = setup.layout
        elements = max(stage_elements(setup, stage=stage).total for stage in range(layout.pipeline))
        part = (layout.data - 1) / layout.data
        volume = elements * part * (GRADIENT_BYTES + setup.value_bytes)
        return volume / (self._network if self._spans_nodes(layout) else self._node)

    def _spans_nodes(self, layout: ParallelLayout) -> bool:
        """Whether the data group of rank 0 reaches into another node."""
        ranks = layout.ranks_along(Axis.DATA, 0)
        return self._cluster.node_of(ranks[-1]) != self._cluster.node_of(0)

    def _all_reduce(self, num_bytes: float, degree: int) -> float:
        """A ring inside a node."""
        if degree == 1:
            return 0.0
        volume = 2 * (degree - 1) / degree * num_bytes
        return max(self._cluster.collective_latency_us * 1e-6, volume / self._node)


def _setups(job: Job) -> tuple[RoleSetup, RoleSetup]:
    return job.actor, job.critic


def _shape(setup: RoleSetup) -> TransformerShape:
    config = setup.config
    return TransformerShape(
        hidden=config.hidden,
        ffn=config.ffn,
        layers=config.layers,
        embed_dim=config.embed_dim,
        outputs=config.vocab_size if setup.head is Head.LANGUAGE_MODEL else 1,
    )


@cache
def _forward(shape: TransformerShape, rows: int, tokens: int, head_tokens: int | None) -> int:
    """Of equally long rows; `head_tokens` of each get an output, None means all."""
    return rows * forward_flops(shape, lengths=[tokens], head_tokens=head_tokens).total


@cache
def _training(shape: TransformerShape, rows: int, tokens: int, recomputes: bool) -> int:
    mode = Recomputation.LAYERS if recomputes else Recomputation.NONE
    return rows * training_flops(shape, lengths=[tokens], recomputation=mode)


@cache
def _decode_read(
    shape: TransformerShape, rows: int, prompt_tokens: int, response_tokens: int, value_bytes: int
) -> int:
    """Of equally long rows: weights are read for all of them together, the cache for each."""
    row = decode_bytes(
        shape,
        prompt_lengths=[prompt_tokens],
        response_lengths=[response_tokens],
        bytes_per_value=value_bytes,
    )
    return row.weights + rows * row.cache
