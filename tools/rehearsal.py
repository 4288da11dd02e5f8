"""Rehearses a whole run on one rank: the stages, and iterations of PPO with all of their phases.

The production classes run on fake tensors, as in `tools/dry_run.py`. Here a model of torch's
caching allocator serves the tensors, arena and cache are `MappedDeviceBuffer`s, and both take their
memory from one driver of finite capacity. So what is seen is what a GPU would have to give: blocks
that the allocator keeps or cuts, and the moment at which somebody gets nothing.

Training and scoring compute every position of full rows, as plans assume; the losses are the
simplest that do so. Of generation the largest step is run, with the shapes of the CUDA kernels.
"""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed import ProcessGroup

from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.packed import DecodeRows, PackedStep, PrefillRows
from megachat.hybrid.engine import HybridEngine, HybridSettings
from megachat.hybrid.phases import MemoryMeasures
from megachat.model.config import ModelOptions
from megachat.model.opt import OptModel
from megachat.ops.all_reduce import BackendSum
from megachat.ops.registry import Backend
from megachat.ops.token_logprobs import token_logprobs
from megachat.parallel.device_memory import MappedDeviceBuffer
from megachat.parallel.groups import ProcessGroups
from megachat.planner.hardware import GB
from megachat.planner.job import RoleSetup
from megachat.planner.records import Phase
from megachat.planner.search import Plan
from megachat.records import SftBatch
from megachat.rlhf.engine import RLHFEngine
from megachat.rlhf.objectives import SftObjective
from megachat.training.engine import ForwardEngine, TrainEngine
from megachat.training.loss import LossTerms, ModelOutput
from megachat.training.schedules import OptimizerConfig
from tools.allocator_model import CachingAllocatorModel, ModelDriver
from tools.ledger import DeviceLedger, fake_rank

_CPU = torch.device("cpu")
_OPTIMIZER = OptimizerConfig(learning_rate=1e-5)


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseUse:
    """What one rank had of its GPU in one phase."""

    phase: Phase
    iteration: int
    """Of PPO; 0 for the stages before."""
    living_bytes: int
    """Tensors of torch's allocator at the end of the phase, rounding included."""
    reserved_bytes: int
    """What the allocator had taken from the driver then."""
    mapped_bytes: int
    """What arena and cache had mapped then."""
    peak_bytes: int
    """The most that allocator, arena and cache had together during the phase."""
    calls: dict[str, int]
    """Driver functions that were called in the phase, by name."""


class RehearsedMemory:
    """`ActorMemory` of a modelled device."""

    def __init__(self, driver: ModelDriver, ledger: DeviceLedger) -> None:
        """Takes nothing."""
        self._driver, self._ledger = driver, ledger

    def weights(self, num_bytes: int) -> MappedDeviceBuffer:
        """For the arena."""
        with unset_fake_temporarily():
            return MappedDeviceBuffer(num_bytes, _CPU, driver=self._driver, allocator=self)

    def cache(self, num_bytes: int) -> MappedDeviceBuffer:
        """For the cache."""
        return self.weights(num_bytes)

    def release_cached(self) -> None:
        """As `torch.cuda.empty_cache`."""
        self._ledger.settle()
        self._ledger.allocator.release_cached()

    def used_bytes(self) -> int:
        """Of tensors."""
        return self._ledger.allocator.used_bytes()

    def cached_bytes(self) -> int:
        """Of no tensor."""
        return self._ledger.allocator.cached_bytes()


class _EveryLogprob:
    """Scores rows by the log-probabilities of all of their tokens."""

    columns = 1

    def __init__(self, engine: ForwardEngine) -> None:
        self._group, self._vocab_start = engine.groups.tensor, engine.vocab_start

    def model_input(self, batch: SftBatch) -> Tensor:
        return batch.tokens

    def row_lengths(self, batch: SftBatch) -> Tensor:
        return batch.lengths

    def output_spans(self, batch: SftBatch) -> None:
        return None

    def __call__(self, output: ModelOutput, batch: SftBatch) -> Tensor:
        logprobs = token_logprobs(
            output.values[None],
            output.following(batch.tokens)[None],
            group=self._group,
            vocab_start=self._vocab_start,
            temperature=1.0,
        )
        return logprobs.view(batch.num_rows, -1).sum(1, keepdim=True)


class _EveryValue:
    """Scores rows by, and trains, the sum of a scalar head's outputs at all positions."""

    columns = 1
    metric_names: tuple[str, ...] = ()
    maximum_names: tuple[str, ...] = ()

    def model_input(self, batch: SftBatch) -> Tensor:
        return batch.tokens

    def row_lengths(self, batch: SftBatch) -> Tensor:
        return batch.lengths

    def output_spans(self, batch: SftBatch) -> None:
        return None

    def __call__(
        self, output: ModelOutput, batch: SftBatch, row_weights: Tensor | None = None
    ) -> Any:
        sums = output.values.float().view(batch.num_rows, -1).sum(1)
        if row_weights is None:
            return sums[:, None]
        return LossTerms(loss=(sums * row_weights).sum(), metrics={}, maxima={})


class Rehearsal:
    """One rank of a planned job on a modelled GPU."""

    def __init__(
        self, plan: Plan, *, rank: int, capacity_bytes: int, expandable: bool = False
    ) -> None:
        """An empty GPU.

        Args:
            plan: What runs, what makes room for generation, and the size of its cache.
            rank: Any rank of its layout.
            capacity_bytes: What the GPU has for tensors, arena and cache.
            expandable: Whether torch's allocator uses expandable segments.
        """
        self._plan, self._rank = plan, rank
        self.driver = ModelDriver(capacity_bytes)
        allocator = CachingAllocatorModel(self.driver, expandable=expandable)
        self._tokens = plan.job.workload.sequence_tokens
        self._ledger = DeviceLedger(allocator, row_tokens=self._tokens)
        self._memory = RehearsedMemory(self.driver, self._ledger)

    def run(self, *, first: Phase = Phase.SFT, iterations: int = 2) -> Iterator[PhaseUse]:
        """The phases in order, each as soon as it is over.

        Args:
            first: Where to begin: with the supervised stage, or with PPO's generation, for which
                the stages before, that leave nothing, can be left out.
            iterations: Of PPO.

        Raises:
            CapacityError: Somebody gets no memory.
        """
        job = self._plan.job
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with fake_rank(job.actor.layout, self._rank) as groups, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            critic_groups = ProcessGroups.create(job.critic.layout)
            with fake, self._ledger:
                if first is Phase.SFT:
                    yield from self._first_stages(groups, critic_groups)
                with self._engine(groups, critic_groups) as engine:
                    for iteration in range(1, iterations + 1):
                        yield from self._iteration(engine, iteration)

    def _first_stages(
        self, actor_groups: ProcessGroups, critic_groups: ProcessGroups
    ) -> Iterator[PhaseUse]:
        """Supervised fine-tuning and the reward model, each of which ends with its memory."""
        setup, tokens = self._plan.job.actor, self._plan.job.workload.sft_tokens
        with self._phase(Phase.SFT) as seen:
            actor = _train_engine(setup, actor_groups)
            train_language_model(actor, rows=self._rows(setup, actor), tokens=tokens)
        yield seen.result
        actor.close()
        del actor
        self._end_stage()
        setup = self._plan.job.critic
        with self._phase(Phase.REWARD_TRAINING) as seen:
            pairs = replace(setup, micro_batch_rows=2 * setup.micro_batch_rows)  # both answers
            critic = _train_engine(pairs, critic_groups)
            _train_values(critic, rows=self._rows(pairs, critic), tokens=tokens)
        yield seen.result
        critic.close()
        del critic
        self._end_stage()

    def _end_stage(self) -> None:
        """As `megachat.stages.scope` ends one."""
        gc.collect()
        self._memory.release_cached()

    def _engine(self, actor_groups: ProcessGroups, critic_groups: ProcessGroups) -> RLHFEngine:
        """The four roles, built in the order of the PPO stage."""
        job, measures = self._plan.job, _measures(self._plan)
        actor = build_model(job.actor, actor_groups)
        critic = build_model(job.critic, critic_groups)
        with patch("megachat.generation.runner.prepare"):
            hybrid = HybridEngine(
                actor,
                hybrid_settings(self._plan, backend=Backend.CUDA),
                stop_ids=(job.actor.config.eos_id,),
                memory=self._memory,
            )
        return RLHFEngine(
            actor=hybrid,
            critic=_trainer(critic, job.critic),
            reference=_scorer(build_model(job.actor, actor_groups), job.actor),
            reward=_scorer(build_model(job.critic, critic_groups), job.critic),
            measures=measures,
        )

    def _iteration(self, engine: RLHFEngine, iteration: int) -> Iterator[PhaseUse]:
        """One step of PPO."""
        job = self._plan.job
        with self._phase(Phase.GENERATION, iteration) as seen:
            engine.eval()
            self._generate(engine.actor)
        yield seen.result
        with self._phase(Phase.SCORING, iteration) as seen:
            engine.train()
            with engine.scoring():
                rows = self._rows(job.actor, engine.reference, most=1)
                batch = _rows(rows, self._tokens)
                for policy in (engine.actor.training, engine.reference):
                    policy.score(batch, _EveryLogprob(policy))
                batch = _rows(self._rows(job.critic, engine.reward, most=1), self._tokens)
                for values in (engine.critic, engine.reward):
                    values.score(batch, _EveryValue())
            self._ledger.settle()
        yield seen.result
        with self._phase(Phase.PPO_TRAINING, iteration) as seen:
            policy = engine.actor.training
            rows = self._rows(job.actor, policy)
            train_language_model(policy, rows=rows, tokens=self._tokens)
            rows = self._rows(job.critic, engine.critic)
            _train_values(engine.critic, rows=rows, tokens=self._tokens)
        yield seen.result

    def _generate(self, actor: HybridEngine) -> None:
        """A step of decode rows and a chunk of prompts, and one of decode rows alone."""
        with (
            patch("megachat.generation.runner.prepare"),
            patch("megachat.generation.generator.group_sum", _sum_by_backend),
        ):
            generator = actor.generator
            session = generator._session(SamplingConfig())
        generator.cache.acquire()
        job = self._plan.job
        chunks = max(1, job.prefill_tokens // job.workload.prompt_tokens)
        for prefill in (chunks, 0):
            step = _packed_step(
                rows=self._plan.memory.cache.concurrent,
                chunks=prefill,
                chunk_tokens=min(job.prefill_tokens, job.workload.prompt_tokens),
                columns=generator.cache.tables.shape[1],
            )
            with torch.no_grad():
                logits = session._runner.forward(step)
                whole = torch.zeros(len(logits), dtype=torch.int64)
                session._sampler.sample(logits, keys=whole, positions=whole)

    def _rows(self, setup: RoleSetup, engine: ForwardEngine, *, most: int | None = None) -> int:
        """Rows of a global batch that brings a stage to its fullest moment."""
        planned = setup.num_micro_batches(self._plan.job.workload.minibatch_rows)
        stage = engine.groups.coordinate.pipeline
        in_flight = setup.layout.pipeline - stage
        # One more than fit finds what an earlier one has left.
        count = min(planned, most or in_flight + (setup.layout.pipeline > 1))
        return setup.layout.data * setup.micro_batch_rows * count

    @contextmanager
    def _phase(self, phase: Phase, iteration: int = 0) -> Iterator["_Seen"]:
        """Notes what happens in the body."""
        seen = _Seen()
        self.driver.restart()
        yield seen
        gc.collect()
        self._ledger.settle()
        seen.result = PhaseUse(
            phase=phase,
            iteration=iteration,
            living_bytes=self._memory.used_bytes(),
            reserved_bytes=self._ledger.allocator.reserved_bytes(),
            mapped_bytes=self.driver.mapped_bytes,
            peak_bytes=self.driver.peak_bytes,
            calls=dict(self.driver.calls),
        )


class _Seen:
    """What a phase leaves when it is over."""

    result: PhaseUse


def _measures(plan: Plan) -> MemoryMeasures:
    return MemoryMeasures(**{str(measure): True for measure in plan.memory.measures})


def hybrid_settings(plan: Plan, *, backend: Backend) -> HybridSettings:
    """How the actor of a planned job trains and generates."""
    job = plan.job
    return HybridSettings(
        generation_tensor=job.generation_tensor,
        micro_batch_rows=job.actor.micro_batch_rows,
        optimizer=_OPTIMIZER,
        total_steps=2,
        seed=1,
        generation=GenerationConfig(
            kv_cache_gb=(plan.memory.cache.num_bytes + 1) / GB,
            block_size=job.block_tokens,
            max_sequences=job.most_at_once,
            prefill_tokens=job.prefill_tokens,
            backend=backend,
        ),
        measures=_measures(plan),
        ranks_per_node=plan.cluster.gpus_per_node,
    )


def build_model(setup: RoleSetup, groups: ProcessGroups) -> OptModel:
    """A role's shard, its weights undefined."""
    options = ModelOptions(
        dtype={2: torch.bfloat16, 4: torch.float32}[setup.value_bytes],
        sequence_parallel=setup.is_sequence_parallel,
        recompute=setup.recompute,
        vocab_multiple=setup.vocab_multiple,
    )
    return OptModel(setup.config, groups=groups, head=setup.head, options=options, seed=None)


def _trainer(model: OptModel, setup: RoleSetup) -> TrainEngine:
    return TrainEngine(
        model,
        micro_batch_rows=setup.micro_batch_rows,
        optimizer=_OPTIMIZER,
        total_steps=2,
        seed=1,
    )


def _train_engine(setup: RoleSetup, groups: ProcessGroups) -> TrainEngine:
    return _trainer(build_model(setup, groups), setup)


def _scorer(model: OptModel, setup: RoleSetup) -> ForwardEngine:
    return ForwardEngine(model, micro_batch_rows=setup.micro_batch_rows)


def _rows(count: int, tokens: int) -> SftBatch:
    return SftBatch(
        tokens=torch.zeros(count, tokens, dtype=torch.int64),
        lengths=torch.full((count,), tokens),
        loss_mask=torch.ones(count, tokens, dtype=torch.bool),
    )


def train_language_model(engine: TrainEngine, *, rows: int, tokens: int) -> None:
    """A step on full rows; afterwards everything that lives between steps exists."""
    objective = SftObjective(
        num_targets=1.0, group=engine.groups.tensor, vocab_start=engine.vocab_start
    )
    engine.forward_backward(_rows(rows, tokens), objective)
    _step(engine)


def _train_values(engine: TrainEngine, *, rows: int, tokens: int) -> None:
    engine.forward_backward(_rows(rows, tokens), _EveryValue())
    _step(engine)


def _step(engine: TrainEngine) -> None:
    report = engine.step()
    assert not report.skipped, "a skipped step would leave out the moments"


def _sum_by_backend(group: ProcessGroup, _: Backend, *, device: torch.device) -> BackendSum:
    """How a tensor group adds up where GPUs do not reach each other's memory."""
    del device
    return BackendSum(group)


def _packed_step(*, rows: int, chunks: int, chunk_tokens: int, columns: int) -> PackedStep:
    """A step of full size."""
    tokens = rows + chunks * chunk_tokens
    return PackedStep(
        tokens=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.zeros(tokens, dtype=torch.int64),
        slots=torch.zeros(tokens, dtype=torch.int64),
        decode=DecodeRows(
            tables=torch.zeros(rows, columns, dtype=torch.int32),
            lengths=torch.zeros(rows, dtype=torch.int64),
        ),
        prefill=PrefillRows(
            tables=torch.zeros(chunks, columns, dtype=torch.int32),
            starts=torch.zeros(chunks, dtype=torch.int64),
            offsets=torch.zeros(chunks + 1, dtype=torch.int64),
        )
        if chunks
        else None,
        outputs=torch.zeros(rows + chunks, dtype=torch.int64) if chunks else None,
    )
