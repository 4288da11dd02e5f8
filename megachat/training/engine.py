"""The one place that runs models over batches: megatron-core's schedules on explicit groups.

`ForwardEngine` evaluates and scores; `TrainEngine` also trains, with ZeRO-1. Both take *global*
batches: each data rank runs its rows, and results are global on every rank, whatever the layout.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor

from megachat.errors import PhaseError
from megachat.model.opt import OptModel
from megachat.model.packing import RowPacking
from megachat.parallel.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    broadcast,
)
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.lifetime import Owner
from megachat.parallel.memory import MovableTensors
from megachat.parallel.rng import seed_for
from megachat.records import Batch
from megachat.training.buffers import buffers_of
from megachat.training.loss import LossFunction, ModelOutput
from megachat.training.micro_batches import MicroBatchPlan, plan_micro_batches
from megachat.training.schedules import OptimizerConfig, learning_rate
from megachat.training.storage import FlatStorage
from megachat.training.zero1 import OptimizerTensors, StepReport, Zero1Optimizer

BatchT = TypeVar("BatchT", bound=Batch)
BatchT_contra = TypeVar("BatchT_contra", bound=Batch, contravariant=True)


class ScoreFunction(Protocol[BatchT_contra]):
    """Maps a model's output for one micro-batch to numbers per record row."""

    @property
    def columns(self) -> int:
        """Numbers per record row."""

    def model_input(self, batch: BatchT_contra) -> Tensor:
        """`[rows, seq]` int64, as in `LossFunction`."""

    def row_lengths(self, batch: BatchT_contra) -> Tensor:
        """`[rows]` int64, as in `LossFunction`."""

    def output_spans(self, batch: BatchT_contra) -> Tensor | None:
        """`[rows, 2]` int64, as in `LossFunction`."""

    def __call__(self, output: ModelOutput, batch: BatchT_contra) -> Tensor:
        """`[batch.num_rows, columns]` float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossReport:
    """Loss and metrics of one global batch, equal on every rank."""

    loss: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PauseReport:
    """What a pause of training makes free on this rank's device."""

    offloaded_bytes: int = 0
    """Masters and moments, which are in host memory."""
    lent_bytes: int = 0
    """Gradients without content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _MicroBatch(Generic[BatchT]):
    """One micro-batch, ready for the model."""

    batch: BatchT
    tokens: Tensor
    """[rows, seq] int64, as wide as the packing."""
    packing: RowPacking
    """Which of the tokens are computed."""
    row_weights: Tensor
    """[batch.num_rows] float32, 1 real, 0 filler."""
    index: int
    """Number of the micro-batch within the global batch."""

    def output(self, values: Tensor) -> ModelOutput:
        """What the model said, with its places."""
        places, seq = self.packing.output_places, self.packing.seq
        return ModelOutput(values=values, rows=places // seq, positions=places % seq)


class _Stage:
    """What megatron-core's schedules ask of a model, answered for an `OptModel`."""

    def __init__(self, model: OptModel) -> None:
        self.config = model.transformer_config
        self.model_type = ModelType.encoder_or_decoder
        self.set_input_tensor = model.set_input_tensor


class _PlannedTransfers(P2PCommunicator):  # type: ignore[misc]
    """Pipeline transfers of micro-batches that each keep their own length.

    Every stage knows the plan, so the shapes that megatron's stages would send each other ahead of
    each transfer are looked up here. Padding all micro-batches to one length would cost time, and
    make dropout masks depend on which rows share a data rank.
    """

    def __init__(self, model: OptModel, micro_batches: Sequence[_MicroBatch[Any]]) -> None:
        """Notes the shape of each micro-batch's hidden states."""
        config = copy.copy(model.transformer_config)
        config.variable_seq_lengths = True
        super().__init__(model.groups.pipeline, config)
        parts = model.groups.layout.tensor if config.sequence_parallel else 1
        shapes = [
            (micro_batch.packing.num_tokens // parts, 1, config.hidden_size)
            for micro_batch in micro_batches
        ]
        self._from_previous, self._from_next = iter(shapes), iter(shapes)

    def _communicate_shapes(
        self, _send_next: Any, _send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Megatron's question before each transfer; in each direction they come in order."""
        return (
            next(self._from_previous) if recv_prev else (),
            next(self._from_next) if recv_next else (),
        )


class ForwardEngine(Owner):
    """Runs one role's model forward under its layout: evaluation and scoring.

    The model stays the caller's: the end of an engine leaves it its weights.
    """

    def __init__(self, model: OptModel, *, micro_batch_rows: int) -> None:
        """Wraps a model.

        Args:
            model: This rank's shard.
            micro_batch_rows: Record rows that go through the model at once.
        """
        self.model = model
        self.groups: ProcessGroups = model.groups
        self.device = next(model.parameters()).device
        self._micro_batch_rows = micro_batch_rows
        self._stage = _Stage(model)

    def _end(self) -> None:
        """Holds nothing of its own."""

    @property
    def vocab_start(self) -> int:
        """First vocabulary id of this rank's slice of the logits."""
        tensor = self.groups.layout.tensor
        return self.groups.coordinate.tensor * self.model.padded_vocab // tensor

    @torch.no_grad()
    def evaluate(self, batch: BatchT, loss: LossFunction[BatchT]) -> LossReport:
        """Loss and metrics of a global batch, without gradients and without dropout."""
        self.model.eval()
        _, micro_batches = self._cut(batch, loss)
        outputs = self._run(micro_batches, partial(_terms_of, loss), forward_only=True)
        return self._report(outputs, loss)

    @torch.no_grad()
    def score(self, batch: BatchT, function: ScoreFunction[BatchT]) -> Tensor:
        """Scores every row of a global batch.

        Returns:
            `[batch.num_rows, function.columns]` float32 on the CPU, the same on every rank, in row
            order.
        """
        self.model.eval()
        plan, micro_batches = self._cut(batch, function)
        outputs = self._run(micro_batches, partial(_scores_of, function), forward_only=True)
        num_local = sum(micro_batch.batch.num_rows for micro_batch in micro_batches)
        if self.groups.is_last_stage:
            local = torch.cat(outputs).float()
        else:
            local = torch.empty(num_local, function.columns, device=self.device)
        gathered = all_gather_rows(local, self.groups.data)
        broadcast(gathered, self.groups.pipeline, source=self.groups.layout.pipeline - 1)
        order = torch.tensor(plan.rows_in_order)
        scores = torch.empty(batch.num_rows, function.columns)
        scores[order[order >= 0]] = gathered.cpu()[order >= 0]
        return scores

    def _cut(
        self, batch: BatchT, inputs: LossFunction[BatchT] | ScoreFunction[BatchT]
    ) -> tuple[MicroBatchPlan, list[_MicroBatch[BatchT]]]:
        """The plan for the global batch and this data rank's micro-batches.

        Raises:
            PhaseError: The engine was closed.
        """
        self.check_open()
        lengths = inputs.row_lengths(batch)
        record_lengths = lengths.view(batch.num_rows, -1).amax(dim=1)
        plan = plan_micro_batches(
            record_lengths.tolist(),
            num_shards=self.groups.layout.data,
            rows_per_micro_batch=self._micro_batch_rows,
        )
        shard = plan.shards[self.groups.coordinate.data]
        selected = [batch.select(torch.tensor(cut.rows)) for cut in shard]
        packings = [self._pack(part, inputs) for part in selected]
        micro_batches = [
            _MicroBatch(
                batch=part.to(self.device),
                tokens=_fit(inputs.model_input(part), packing.seq).to(self.device),
                packing=packing,
                row_weights=(torch.arange(part.num_rows) < cut.num_real).float().to(self.device),
                index=cut.index,
            )
            for part, cut, packing in zip(selected, shard, packings, strict=True)
        ]
        return plan, micro_batches

    def _pack(
        self, part: BatchT, inputs: LossFunction[BatchT] | ScoreFunction[BatchT]
    ) -> RowPacking:
        """The rows of a micro-batch without padding, evened out for sequence parallelism."""
        spans = inputs.output_spans(part)
        is_cut = self.model.options.sequence_parallel
        return RowPacking.of(
            inputs.row_lengths(part).clamp(min=1).tolist(),
            spans=None if spans is None else spans.tolist(),
            multiple=self.groups.layout.tensor if is_cut else 1,
            device=self.device,
        )

    def _run(
        self,
        micro_batches: list[_MicroBatch[BatchT]],
        collect: Callable[[_MicroBatch[BatchT], Tensor], Any],
        *,
        forward_only: bool,
        before_forward: Callable[[_MicroBatch[BatchT]], None] = lambda _: None,
    ) -> list[Any]:
        """Runs the schedule; what `collect` returns on the last stage comes back as a list."""

        def forward_step(iterator: Iterator[_MicroBatch[BatchT]], _: _Stage) -> tuple[Tensor, Any]:
            micro_batch = next(iterator)
            before_forward(micro_batch)
            out = self.model(micro_batch.tokens, micro_batch.packing)
            return out, partial(_call, collect, micro_batch)

        pipelined = self.groups.layout.pipeline > 1
        schedule = (
            forward_backward_pipelining_without_interleaving
            if pipelined
            else forward_backward_no_pipelining
        )
        if not next(self.model.parameters()).untyped_storage().nbytes():
            raise PhaseError(
                "the weights of this role are in host memory: bring them back before they run"
            )
        transfers = _PlannedTransfers(self.model, micro_batches) if pipelined else None
        collected: list[Any] = schedule(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=self._stage,
            num_microbatches=len(micro_batches),
            # Of the first; each transfer looks up its own.
            seq_length=micro_batches[0].packing.num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            p2p_communicator=transfers,
            pg_collection=self.groups.megatron,
        )
        return collected

    def _report(self, outputs: list[Any], loss: LossFunction[Any]) -> LossReport:
        """Sums what the last stages collected over data ranks and tells every stage."""
        names, maxima = loss.metric_names, loss.maximum_names
        sums = torch.zeros(1 + len(names), dtype=torch.float64, device=self.device)
        largest = torch.full((len(maxima),), -torch.inf, dtype=torch.float64, device=self.device)
        for terms in outputs:
            sums += torch.stack([terms.loss.detach(), *(terms.metrics[name] for name in names)])
            if maxima:
                found = torch.stack([terms.maxima[name].double() for name in maxima])
                largest = torch.maximum(largest, found)
        last = self.groups.layout.pipeline - 1
        broadcast(all_reduce_sum(sums, self.groups.data), self.groups.pipeline, source=last)
        broadcast(all_reduce_max(largest, self.groups.data), self.groups.pipeline, source=last)
        values = dict(zip(names, sums[1:].tolist(), strict=True))
        values |= dict(zip(maxima, largest.tolist(), strict=True))
        return LossReport(loss=sums[0].item(), metrics=values)


class TrainEngine(ForwardEngine):
    """Trains one role's model: 1F1B over the pipeline, ZeRO-1 over the data ranks."""

    def __init__(
        self,
        model: OptModel,
        *,
        micro_batch_rows: int,
        optimizer: OptimizerConfig,
        total_steps: int,
        seed: int,
        storage: FlatStorage | None = None,
    ) -> None:
        """Builds the sharded optimizer from the model's present weights.

        Args:
            model: This rank's shard, weights loaded.
            micro_batch_rows: Record rows that go through the model at once.
            optimizer: AdamW and its schedule.
            total_steps: Optimizer steps of the run, where the schedule ends.
            seed: Start of the dropout streams.
            storage: Where the optimizer keeps the weights, such as an arena that generation reads
                too; None: in memory of its own.
        """
        super().__init__(model, micro_batch_rows=micro_batch_rows)
        specs = model.local_specs()
        self._zero1 = Zero1Optimizer(
            model,
            groups=self.groups,
            config=optimizer,
            decayed={name for name, spec in specs.items() if spec.decays},
            shared=[*model.tensor_reduced_parameters(), *model.tied_parameters()],
            parameter_groups=buffers_of(model),
            storage=storage,
        )
        self._optimizer_config = optimizer
        self._total_steps = total_steps
        self._seed = seed
        self._has_gradient = False
        self._state, self._gradients = MovableTensors(()), MovableTensors(())
        self._is_paused = False
        self.steps_done = 0
        """Steps that have taken a batch, skipped ones among them: what schedules go by."""
        self.skipped_steps = 0
        """Those that changed nothing, since a gradient was not finite."""
        self.skipped_in_a_row = 0
        """How many of them came last."""
        self.gradient_norm = 0.0
        """Of the last step, before clipping; not finite if that was skipped."""

    def pause(self, *, offload_state: bool, lend_gradients: bool) -> PauseReport:
        """Frees memory of the device that only training needs, until `resume`.

        Scoring goes on: it needs the weights alone.

        Args:
            offload_state: Masters and moments move to the host.
            lend_gradients: The gradient buffers, which hold nothing between a step and the next
                backward pass, give their memory to whoever allocates next.

        Raises:
            PhaseError: There is a gradient that no step has used, or the engine was closed.
        """
        self.check_open()
        if self._has_gradient:
            raise PhaseError("a gradient waits for its step: call step() before training pauses")
        if not self._is_paused:
            kept = self._zero1.optimizer_tensors()
            self._state = self._movable([*kept.masters, *kept.moments] if offload_state else [])
            self._gradients = MovableTensors(kept.gradients if lend_gradients else ())
            self._state.to_host()
            self._gradients.discard()
            self._is_paused = offload_state or lend_gradients
        return PauseReport(
            offloaded_bytes=self._state.num_bytes, lent_bytes=self._gradients.num_bytes
        )

    def resume(self) -> None:
        """Takes back what `pause` freed; training goes on as if nothing had been."""
        self.check_open()
        self._state.restore()
        self._gradients.restore()
        self._is_paused = False

    def _movable(self, state: list[Tensor]) -> MovableTensors:
        """The state as it is to be moved; the host's memory is used again unless it has grown."""
        movable = MovableTensors(state)
        return self._state if self._state.holds_what(movable) else movable

    def forward_backward(self, batch: BatchT, loss: LossFunction[BatchT]) -> LossReport:
        """The gradient of a global batch's loss, reduced over data ranks; `step` uses it up."""
        self.check_open()
        assert not self._has_gradient, "each forward_backward needs its own step"
        if self._is_paused:
            raise PhaseError(
                "the optimizer's memory is given away for a generation phase: call train() first"
            )
        self._has_gradient = True
        self.model.train()
        _, micro_batches = self._cut(batch, loss)
        reported: list[Any] = []
        # The schedule divides each loss by the number of micro-batches; ours are already shares of
        # the global loss.
        scale = len(micro_batches)
        self._zero1.begin_gradients(passes=len(micro_batches))

        def collect(micro_batch: _MicroBatch[BatchT], output: Tensor) -> tuple[Tensor, Any]:
            terms = _terms_of(loss, micro_batch, output)
            # Detached, or the graph would keep each micro-batch's input and its gradient alive.
            reported.append(replace(terms, loss=terms.loss.detach()))
            return terms.loss * scale, None

        self._run(micro_batches, collect, forward_only=False, before_forward=self._key_dropout)
        self._reduce_shared_gradients()
        self._zero1.reduce_gradients()
        return self._report(reported, loss)

    def step(self) -> StepReport:
        """Updates the weights with the gradient of the last `forward_backward` and clears it."""
        self.check_open()
        rate = learning_rate(
            self._optimizer_config, step=self.steps_done, total_steps=self._total_steps
        )
        report = self._zero1.step(rate)
        self._has_gradient = False
        self.steps_done += 1
        self.gradient_norm = report.gradient_norm
        self.skipped_steps += report.skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if report.skipped else 0
        return report

    def weights_loaded(self) -> None:
        """To be called when the model's parameters were overwritten in place (a checkpoint)."""
        self._zero1.weights_loaded()

    def stored_tensors(self) -> dict[str, Tensor]:
        """All tensors that must lie in the `storage`; to be checked where memory changes hands."""
        return self._zero1.stored_tensors()

    def optimizer_tensors(self) -> OptimizerTensors:
        """What the optimizer keeps beside the weights, by pool."""
        return self._zero1.optimizer_tensors()

    def _end(self) -> None:
        """Frees the optimizer's state, also where a pause has sent it away."""
        self._zero1.close()
        self._state = self._gradients = MovableTensors(())

    def _key_dropout(self, micro_batch: _MicroBatch[Any]) -> None:
        """Names the dropout stream of a micro-batch independently of stages and data ranks."""
        self.model.set_dropout_key(
            seed_for(self._seed, "dropout", self.steps_done, micro_batch.index)
        )

    def _reduce_shared_gradients(self) -> None:
        """Sums gradients of parameters that several ranks of one model copy hold."""
        for parameter in self.model.tensor_reduced_parameters():
            all_reduce_sum(self._zero1.gradient(parameter), self.groups.tensor)
        for parameter in self.model.tied_parameters():
            all_reduce_sum(self._zero1.gradient(parameter), self.groups.embedding)


def _call(
    collect: Callable[[_MicroBatch[Any], Tensor], Any],
    micro_batch: _MicroBatch[Any],
    output: Tensor,
    *,
    non_loss_data: bool = False,
) -> Any:
    """The schedule's loss callback; `non_loss_data` is how it asks in forward-only runs."""
    del non_loss_data
    return collect(micro_batch, output)


def _terms_of(loss: LossFunction[Any], micro_batch: _MicroBatch[Any], output: Tensor) -> Any:
    """A loss applied to one micro-batch."""
    return loss(micro_batch.output(output), micro_batch.batch, micro_batch.row_weights)


def _scores_of(
    function: ScoreFunction[Any], micro_batch: _MicroBatch[Any], output: Tensor
) -> Tensor:
    """A score function applied to one micro-batch."""
    return function(micro_batch.output(output), micro_batch.batch)


def _fit(tokens: Tensor, seq: int) -> Tensor:
    """`[rows, ...]` cut or padded to `[rows, seq]`."""
    return torch.nn.functional.pad(tokens[:, :seq], (0, max(0, seq - tokens.shape[1])))
