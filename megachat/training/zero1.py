"""The one importer of DeepSpeed: AdamW whose state is sharded over data ranks (ZeRO stage 1).

megatron-core's schedule runs the backward passes on the bare model; DeepSpeed contributes the
partitioned optimizers only. Its engine is not used: it keeps one process-wide `mpu`, and a job has
several layouts. fp32 models train in fp32; bf16 models keep fp32 masters and accumulate gradients
in fp32. Either way gradients lie in flat fp32 buffers that `training.gradients` reduces to their
owners, and DeepSpeed reads the own part of each.
"""

import contextlib
import functools
import gc
import importlib
import io
import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megachat.errors import ConfigError
from megachat.parallel.groups import DeepSpeedMpu, ProcessGroups
from megachat.parallel.lifetime import Owner
from megachat.training.buffers import BUFFER_ELEMENTS
from megachat.training.gradients import GradientReducer, OwnGradient, own_gradients
from megachat.training.parameter_state import ParameterState
from megachat.training.schedules import OptimizerConfig
from megachat.training.storage import FlatStorage

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of AdamW's moments in torch's optimizer state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one optimizer step did."""

    learning_rate: float
    gradient_norm: float
    """Global norm before clipping; not finite when the step was skipped."""
    skipped: bool
    """True when a gradient was not finite: weights and state are unchanged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerTensors:
    """What an optimizer keeps beside the weights between two steps, by pool; fp32."""

    gradients: tuple[Tensor, ...]
    """Buffers of the whole shard's gradients, all zero after a step. None for an fp32 model, whose
    buffers live from `begin_gradients` to `step`."""
    masters: tuple[Tensor, ...]
    """This data rank's part of the weights."""
    moments: tuple[Tensor, ...]
    """AdamW's two, of the same part; none before the first step."""


class Zero1Optimizer(Owner):
    """AdamW under ZeRO-1 for the parameters of one model shard.

    Its end leaves the parameters with their present weights, without gradients and hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: ProcessGroups,
        config: OptimizerConfig,
        decayed: set[str],
        shared: Collection[nn.Parameter] = (),
        parameter_groups: Sequence[Sequence[str]] | None = None,
        storage: FlatStorage | None = None,
    ) -> None:
        """Shards the optimizer state over the data ranks; parameters become views of flat buffers.

        Args:
            model: Holds this rank's parameters, in float32 or bfloat16.
            groups: The layout's communicators.
            config: AdamW's constants.
            decayed: Names of the parameters that weight decay applies to.
            shared: Parameters whose gradients the caller changes between the backward passes and
                `reduce_gradients`, such as by sums over a tensor group.
            parameter_groups: Which parameters share a flat buffer, by name: all of them decay or
                none does, and pipeline stages have equally many groups, some of them empty. None
                makes two.
            storage: Where the flat buffers live, and how parameters are grouped into them; None
                keeps them in memory of their own.

        Raises:
            ConfigError: The parameters are neither all float32 nor all bfloat16.
        """
        named = dict(model.named_parameters())
        dtypes = {parameter.dtype for parameter in named.values()}
        if dtypes not in ({torch.float32}, {torch.bfloat16}):
            raise ConfigError(f"training needs one dtype of float32 and bfloat16, got {dtypes}")
        self._is_bf16 = dtypes == {torch.bfloat16}
        self._before = [ParameterState.of(parameter) for parameter in named.values()]
        self._groups, self._parameters, self._storage = groups, named, storage
        if storage is not None:
            parameter_groups = storage.parameter_groups
        names = parameter_groups or [
            [name for name in named if name in decayed],
            [name for name in named if name not in decayed],
        ]
        fillers = [None if group else _filler(next(iter(named.values()))) for group in names]
        base = torch.optim.AdamW(
            [
                {
                    "params": [named[name] for name in group] if filler is None else [filler],
                    "weight_decay": config.weight_decay if set(group) & decayed else 0.0,
                }
                for group, filler in zip(names, fillers, strict=True)
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        labels = {parameter: name for name, parameter in named.items()}
        labels |= {f: f"filler.{i}" for i, f in enumerate(fillers) if f is not None}
        self._optimizer = _build_deepspeed_optimizer(
            base, labels, groups=groups, clip_norm=config.clip_norm, storage=storage
        )
        self._reducer = GradientReducer(
            [[named[name] for name in group] for group in names],
            forward_order=list(named.values()),
            shared=shared,
            group=groups.data,
        )
        self._flat_gradients: Sequence[Tensor] = []
        self._own: list[list[OwnGradient]] = []
        if self._is_bf16:
            self._take_gradients(self._optimizer.fp32_groups_gradients_flat)
            self._optimizer.counted_gradients = [
                own.value for group in self._own for own in group if self._is_counted(own.parameter)
            ] or [self._flat_gradients[0][:0]]

    def begin_gradients(self, *, passes: int) -> None:
        """Prepares for the gradients of one step; comes before its backward passes.

        Args:
            passes: Backward passes that add to the gradients. In the last one, reductions start
                while it still runs.

        Raises:
            PhaseError: The optimizer was closed.
        """
        self.check_open()
        if not self._is_bf16:
            self._take_gradients([flat.new_zeros(flat.numel()) for flat in self._flats()])
            for flat, parameters in zip(self._flat_gradients, self._members(), strict=True):
                sizes = [parameter.numel() for parameter in parameters]
                for parameter, part in zip(
                    parameters,
                    flat.split_with_sizes([*sizes, flat.numel() - sum(sizes)]),
                    strict=False,
                ):
                    parameter.grad = part.view_as(parameter)
        self._reducer.begin(self._flat_gradients, passes=passes)

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The accumulated gradient of a local parameter, before `reduce_gradients`."""
        gradient = parameter._hp_grad if self._is_bf16 else parameter.grad  # type: ignore[attr-defined]
        assert isinstance(gradient, Tensor), "no backward pass has reached this parameter"
        return gradient

    def reduce_gradients(self) -> None:
        """Sums the accumulated gradients over the data ranks, each part on its owner.

        Raises:
            PhaseError: The optimizer was closed.
        """
        self.check_open()
        self._reducer.finish()
        self._mark_hidden_faults()
        if not self._is_bf16:
            # The parameters' own `grad` keeps each buffer alive until its group is updated.
            self._optimizer.averaged_gradients = {
                index: _OwnPart(own, flat, self._groups.data)
                for index, (own, flat) in enumerate(
                    zip(self._own, self._flat_gradients, strict=True)
                )
            }
            self._flat_gradients, self._own = [], []

    def _flats(self) -> list[Tensor]:
        """DeepSpeed's flat buffers of weights."""
        return _buffers(self._optimizer, is_bf16=self._is_bf16)[0]

    def _members(self) -> list[list[nn.Parameter]]:
        """The parameters in each of them, in order."""
        inner = self._optimizer
        members: list[list[nn.Parameter]] = (
            inner.bf16_groups if self._is_bf16 else inner.bit16_groups
        )
        return members

    def _take_gradients(self, flats: Sequence[Tensor]) -> None:
        """Works on these flat buffers, one for each of the weights'."""
        self._flat_gradients = flats
        self._own = [
            own_gradients(parameters, flat, self._groups.data)
            for parameters, flat in zip(self._members(), flats, strict=True)
        ]

    def _is_counted(self, parameter: nn.Parameter) -> bool:
        """Whether the gradient norm counts this rank's copy of a parameter; DeepSpeed's rule."""
        marks = vars(parameter)
        if marks.get("ds_pipe_replicated", False):
            return False
        return self._groups.coordinate.tensor == 0 or bool(marks.get("tensor_model_parallel"))

    def _mark_hidden_faults(self) -> None:
        """Lets a gradient that is not finite spoil the norm where the norm leaves its copy out.

        The step would otherwise write it into this copy's weights and moments. Adding zero, or NaN
        if the copies hold a fault, to one counted element needs neither a collective nor a wait for
        the device, and changes no finite sum.
        """
        parts = [own for group in self._own for own in group]
        hidden = [own.value for own in parts if not self._is_counted(own.parameter)]
        counted = [own.value for own in parts if self._is_counted(own.parameter)]
        if hidden and counted:
            counted[0][:1].add_(0.0 * nn.utils.get_total_norm(hidden))

    def step(self, learning_rate: float) -> StepReport:
        """Clips, updates the own part of the state, gathers the parameters, clears gradients.

        Raises:
            PhaseError: The optimizer was closed.
        """
        self.check_open()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        norm = float(self._optimizer._global_grad_norm)
        self._optimizer.zero_grad()
        skipped = bool(self._optimizer.overflow) or not math.isfinite(norm)
        if self._storage is not None and not skipped:
            self._storage.weights_changed()
        return StepReport(learning_rate=learning_rate, gradient_norm=norm, skipped=skipped)

    def weights_loaded(self) -> None:
        """Takes over parameters that were overwritten in place, such as from a checkpoint."""
        self.check_open()
        self._optimizer.refresh_fp32_params()
        if self._storage is not None:
            self._storage.weights_changed()

    def stored_tensors(self) -> dict[str, Tensor]:
        """All tensors of the weights that a `FlatStorage` must own, for a check that it does.

        Parameters, flat buffers, the parts of them that the update writes to, and the fragments
        that a checkpoint reads: each is a way for training to go on beside the storage unnoticed.
        """
        self.check_open()
        tensors: dict[str, Tensor] = dict(self._parameters)
        flats, parts = _buffers(self._optimizer, is_bf16=self._is_bf16)
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is not None:
                tensors[f"{name} (fragment)"] = mapping.lp_fragment
        names = [] if self._storage is None else self._storage.parameter_groups
        for index, group in enumerate(names):
            if group:
                tensors[f"flat buffer {index}"] = flats[index]
                for part, tensor in enumerate(parts[index]):
                    tensors[f"part {part} of flat buffer {index}"] = tensor
        return tensors

    def optimizer_tensors(self) -> OptimizerTensors:
        """What this rank keeps beside the weights between two steps, to be moved or measured."""
        self.check_open()
        inner = self._optimizer
        masters: list[Tensor] = (
            inner.fp32_groups_flat_partition
            if self._is_bf16
            else inner.single_partition_of_fp32_groups
        )
        states = [inner.optimizer.state.get(master, {}) for master in masters]
        moments = [state[name] for state in states for name in _MOMENTS if name in state]
        gradients = inner.fp32_groups_gradients_flat if self._is_bf16 else ()
        return OptimizerTensors(
            gradients=tuple(gradients), masters=tuple(masters), moments=tuple(moments)
        )

    def _end(self) -> None:
        """Breaks every way from the parameters to the state, and empties what holds it.

        The optimizer is part of reference cycles, which Python would free at some later time.
        """
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed tells what it does
            self._optimizer.destroy()
        for state in self._before:
            state.restore()
        vars(self._optimizer.optimizer).clear()
        vars(self._optimizer).clear()
        is_closed = self._is_closed
        vars(self).clear()
        self._is_closed = is_closed


class _OwnPart(list[Tensor]):
    """The own part of a flat gradient buffer, as DeepSpeed's fp32 optimizer takes it.

    The norm reads it in pieces; the update takes it whole (`flat_partition`) and needs no copy.
    """

    def __init__(self, own: Sequence[OwnGradient], flat: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(each.value for each in own)
        self.flat_partition = flat.chunk(group.size())[group.rank()]


class _SumOverAllRanks(DeepSpeedMpu):
    """The `mpu` of an optimizer of whose gradients every rank of the job has another part."""

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Where the squared norms of the parts are summed."""
        world = dist.group.WORLD
        assert world is not None
        return world


def _filler(like: nn.Parameter) -> nn.Parameter:
    """Stands in for a group that another stage has: all stages reduce the norms of all groups."""
    return nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))


def _build_deepspeed_optimizer(
    base: torch.optim.Optimizer,
    labels: Mapping[nn.Parameter, str],
    *,
    groups: ProcessGroups,
    clip_norm: float,
    storage: FlatStorage | None,
) -> Any:
    """DeepSpeed's ZeRO-1 optimizer around `base`, without DeepSpeed's engine.

    The engine would add one process-wide `mpu`, and nothing that is used here.
    """
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    is_sharded = groups.layout.data > 1
    common = {
        "clip_grad": clip_norm,
        "allgather_bucket_size": BUFFER_ELEMENTS,
        "dp_process_group": groups.data,
        "timers": importlib.import_module("deepspeed.utils.timer").NoopTimer(),
    }
    with _quiet_memory_statistics():
        if next(iter(labels)).dtype is torch.bfloat16:
            precision = importlib.import_module("deepspeed.runtime.precision_config")
            return _bf16_optimizer_class()(
                base,
                labels,
                mpu=_SumOverAllRanks(groups) if is_sharded else groups.deepspeed_mpu,
                # immediate_grad_update adds each bf16 gradient to the fp32 one once it exists.
                bfloat16_config=precision.DeepSpeedBF16Config(
                    enabled=True, immediate_grad_update=True
                ),
                grad_acc_dtype=torch.float32,
                storage=storage,
                **common,
            )
        return _fp32_optimizer_class()(
            base,
            labels,
            mpu=groups.deepspeed_mpu,
            optimizer_params=None,
            contiguous_gradients=False,  # nor hooks for them: the gradients come reduced
            communication_data_type=torch.float32,
            gradient_accumulation_dtype=torch.float32,
            partition_grads=False,
            check_grad_overflow=False,
            storage=storage,
            **common,
        )


@contextlib.contextmanager
def _quiet_memory_statistics() -> Iterator[None]:
    """On rank 0 DeepSpeed prints memory statistics unasked, twice for each parameter group.

    It collects garbage each time, which with hundreds of groups takes minutes where many objects
    are alive; those that exist already are set aside.
    """
    gc.freeze()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        gc.unfreeze()


@functools.cache
def _bf16_optimizer_class() -> Any:
    """`BF16_Optimizer` on reduced gradients; its flat buffers go where a `FlatStorage` says."""
    module: Any = importlib.import_module("deepspeed.runtime.bf16_optimizer")

    class PlacedBf16Optimizer(module.BF16_Optimizer):  # type: ignore[misc]
        def __init__(self, *args: Any, storage: FlatStorage | None, **kwargs: Any) -> None:
            self._placer = _Placer(storage)
            self.counted_gradients: list[Tensor] = []
            super().__init__(*args, **kwargs)
            self._placer.finish()

        def _flatten_dense_tensors_aligned(self, *args: Any, **kwargs: Any) -> Tensor:
            flat: Tensor = super()._flatten_dense_tensors_aligned(*args, **kwargs)
            return self._placer.place(flat)

        def get_grads_for_norm(self, for_clipping: bool = False) -> Any:
            """Of the own part only: the others hold what has been sent away."""
            if for_clipping:
                return self.fp32_groups_gradient_flat_partition
            return self.counted_gradients, {}

    return PlacedBf16Optimizer


@functools.cache
def _fp32_optimizer_class() -> Any:
    """`DeepSpeedZeroOptimizer`, its flat buffers where a `FlatStorage` says."""
    module: Any = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2")

    class PlacedZeroOptimizer(module.DeepSpeedZeroOptimizer):  # type: ignore[misc]
        def __init__(self, *args: Any, storage: FlatStorage | None, **kwargs: Any) -> None:
            self._placer = _Placer(storage)
            super().__init__(*args, **kwargs)
            self._placer.finish()

        def flatten_dense_tensors_aligned(self, *args: Any, **kwargs: Any) -> Tensor:
            flat: Tensor = super().flatten_dense_tensors_aligned(*args, **kwargs)
            return self._placer.place(flat)

    return PlacedZeroOptimizer


class _Placer:
    """Moves the flat buffers to their storage while an optimizer is being built.

    Each group is flattened once then, in order; later calls flatten gradients.
    """

    def __init__(self, storage: FlatStorage | None) -> None:
        self._storage = storage
        self._next = 0

    def place(self, flat: Tensor) -> Tensor:
        """Places the next buffer; returns what is not to be placed untouched."""
        if self._storage is None:
            return flat
        self._next += 1
        return self._storage.place(self._next - 1, flat.detach())

    def finish(self) -> None:
        """From now on nothing is placed."""
        if self._storage is not None:
            placed, planned = self._next, len(self._storage.parameter_groups)
            assert placed == planned, f"DeepSpeed flattened {placed} groups, not {planned}"
        self._storage = None


def _buffers(optimizer: Any, *, is_bf16: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Flat parameter buffers, and the views of them by data rank."""
    if is_bf16:
        return optimizer.bf16_groups_flat, optimizer.bf16_partitioned_groups
    return optimizer.bit16_groups_flat, optimizer.parallel_partitioned_bit16_groups
