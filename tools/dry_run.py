"""Rehearses one rank of a job of any size in this process, and compares its bytes with the plan.

    python tools/dry_run.py --model facebook/opt-175b --train 8,8,1 --rank 0

The production classes (`OptModel`, `TrainEngine` with megatron-core's schedule and DeepSpeed's
ZeRO-1, `WeightArena`) run two optimizer steps' worth of allocations on fake tensors and a fake
process group, so a rank of OPT-175B takes seconds and no memory to speak of. A ledger below every
operation counts live bytes. What depends on values has none here and is answered or left out, all
of it in this file: cutting a batch by its lengths, the report of a loss, "is the gradient finite".

Not seen: memory outside of tensors (CUDA context, NCCL buffers, kernels' own workspace, the
allocator's rounding), which a plan covers with `reserved_gb`.
"""

import contextlib
import gc
import traceback
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megachat.model.config import Head, ModelOptions
from megachat.model.opt import OptModel
from megachat.parallel import cpu_compat
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from megachat.planner.job import RoleSetup
from megachat.records import PreferenceBatch, SftBatch
from megachat.reshard.arena import ResidentMemory, WeightArena
from megachat.reshard.plan import plan_for_model, plan_rank
from megachat.rlhf.objectives import PairwiseObjective, SftObjective
from megachat.training.engine import LossReport, TrainEngine, _MicroBatch
from megachat.training.schedules import OptimizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RehearsedBytes:
    """What the ledger counted on one rank."""

    parameters: int
    arena: int
    """Parameters and foreign blocks in one piece; 0 without a generation layout."""
    gradients: int
    masters: int
    moments: int
    activations: int
    """That one more micro-batch in flight keeps; 0 where only one is in flight."""
    transient_peak: int
    """Most that a forward and backward pass had alive beside the long-lived pools."""
    reads: tuple[str, ...]
    """Source lines that asked for a tensor's value, and were answered without one."""


class ByteLedger(TorchDispatchMode):
    """Counts the bytes of living tensor storages, each once."""

    def __init__(self) -> None:
        """Starts at zero."""
        super().__init__()
        self.live = 0
        self.peak = 0
        self.reads: dict[str, None] = {}
        self._known: dict[int, tuple[int, object]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and takes note of its results."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer(args[0])
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._take_note(leaf.untyped_storage())
        return out

    def restart_peak(self) -> None:
        """Forgets earlier peaks."""
        self.peak = self.live

    def _take_note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            if known[0] == size:
                return
            self.live -= known[0]
        self._known[key] = (size, weakref.ref(storage, lambda _: self._forget(key)))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)[0]

    def _answer(self, tensor: Tensor) -> bool | float:
        """A tensor's value, which does not exist: every step is finite, and clipped."""
        frames = (
            f for f in reversed(traceback.extract_stack()[:-2]) if "/torch/_" not in f.filename
        )
        line = next(frames).line or ""
        self.reads[line] = None
        is_good = not any(word in line for word in ("overflow", "isfinite"))
        return is_good if tensor.dtype is torch.bool else float(is_good)


@contextlib.contextmanager
def fake_rank(layout: ParallelLayout, rank: int) -> Iterator[ProcessGroups]:
    """The communicators of one rank of a world that does not exist."""
    cpu_compat.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        yield ProcessGroups.create(layout)
    finally:
        dist.destroy_process_group()


class _Rehearsal(TrainEngine):
    """Takes micro-batches as they come and reports nothing: both need values."""

    ledger: ByteLedger
    marks: list[int]
    """Live bytes at the start of each forward pass."""

    def _cut(self, batch: Any, inputs: Any) -> Any:
        return None, batch

    def _report(self, outputs: Any, loss: Any) -> LossReport:
        return LossReport(loss=0.0, metrics={})

    def _key_dropout(self, micro_batch: Any) -> None:
        self.marks.append(self.ledger.live)


class _FakeModel(OptModel):
    """Is where it is: torch cannot move modules of fake tensors, and DeepSpeed asks it to."""

    def to(self, *args: Any, **kwargs: Any) -> "_FakeModel":
        """This model."""
        return self


def rehearse(
    setup: RoleSetup,
    *,
    rank: int,
    tokens: int,
    num_micro_batches: int,
    generation_tensor: int | None = None,
) -> RehearsedBytes:
    """Builds one rank's model and optimizer, and runs a training step.

    Args:
        setup: The model and how it runs; a scalar head trains on pairs.
        rank: Any rank of the layout.
        tokens: Length of every row.
        num_micro_batches: Micro-batches of each data rank.
        generation_tensor: Puts the weights into the arena of a reshard to this tensor degree; None
            trains without one.
    """
    ledger = ByteLedger()
    with fake_rank(setup.layout, rank) as groups, FakeTensorMode(), ledger:
        warnings.filterwarnings("ignore")
        model = _FakeModel(
            setup.config, groups=groups, head=setup.head, options=_options(setup), seed=None
        )
        arena = None if generation_tensor is None else _arena(model, generation_tensor)
        engine = _Rehearsal(
            model,
            micro_batch_rows=setup.micro_batch_rows,
            optimizer=OptimizerConfig(learning_rate=1e-5),
            total_steps=1,
            seed=1,
            storage=None if arena is None else arena.adopt(model),
        )
        engine.ledger, engine.marks = ledger, []
        batch, loss = _batch(setup, engine, tokens=tokens, count=num_micro_batches)
        gc.collect()
        long_lived = ledger.live
        ledger.restart_peak()
        engine.forward_backward(batch, loss)
        transient_peak = ledger.peak - long_lived
        engine.step()
        gc.collect()
        return RehearsedBytes(
            parameters=sum(parameter.nbytes for parameter in model.parameters()),
            arena=0 if arena is None else arena.num_bytes,
            transient_peak=transient_peak,
            activations=_kept_by_each(engine.marks, setup, groups),
            reads=tuple(ledger.reads),
            **_optimizer_bytes(engine),
        )


def _arena(model: OptModel, generation_tensor: int) -> WeightArena:
    """The memory that training shares with generation; foreign blocks included."""
    layout, options = model.groups.layout, model.options
    plan = plan_for_model(
        model.config,
        source=layout,
        target=ParallelLayout.for_world(layout.world_size, tensor=generation_tensor),
        element_bytes=options.dtype.itemsize,
    )
    rank, device = model.groups.rank, torch.device("cpu")
    num_bytes = plan_rank(plan, rank).elements * options.dtype.itemsize
    memory = ResidentMemory(num_bytes, device)
    return WeightArena(plan, rank=rank, dtype=options.dtype, device=device, memory=memory)


def _options(setup: RoleSetup) -> ModelOptions:
    return ModelOptions(
        dtype={2: torch.bfloat16, 4: torch.float32}[setup.value_bytes],
        sequence_parallel=setup.is_sequence_parallel,
        recompute=setup.recompute,
        vocab_multiple=setup.vocab_multiple,
    )


def _batch(
    setup: RoleSetup, engine: TrainEngine, *, tokens: int, count: int
) -> tuple[Any, SftObjective | PairwiseObjective]:
    """Micro-batches and a loss of the model's kind."""
    rows = setup.micro_batch_rows

    def integers(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64)

    def micro_batch(index: int) -> _MicroBatch[Any]:
        batch: SftBatch | PreferenceBatch
        if setup.head is Head.LANGUAGE_MODEL:
            mask = torch.ones(rows, tokens, dtype=torch.bool)
            batch = SftBatch(tokens=integers(rows, tokens), lengths=integers(rows), loss_mask=mask)
        else:
            batch = PreferenceBatch(
                tokens=integers(rows, 2, tokens),
                lengths=integers(rows, 2),
                prompt_lengths=integers(rows),
            )
        flat = batch.tokens.flatten(0, -2)
        return _MicroBatch(batch=batch, tokens=flat, row_weights=torch.ones(rows), index=index)

    batches = [micro_batch(index) for index in range(count)]
    if setup.head is Head.LANGUAGE_MODEL:
        return batches, SftObjective(
            num_targets=1.0, group=engine.groups.tensor, vocab_start=engine.vocab_start
        )
    return batches, PairwiseObjective(num_pairs=1.0)


def _kept_by_each(marks: list[int], setup: RoleSetup, groups: ProcessGroups) -> int:
    """Growth from one warm-up forward pass to the next, the first left out: it allocates buffers."""
    warm_ups = min(len(marks), setup.layout.pipeline - groups.coordinate.pipeline)
    return marks[2] - marks[1] if warm_ups > 2 else 0


def _optimizer_bytes(engine: TrainEngine) -> dict[str, int]:
    """Bytes of the optimizer's pools, from DeepSpeed's own lists."""
    optimizer = engine._zero1._optimizer
    states = optimizer.optimizer.state.values()
    moments = (value for state in states for value in state.values() if torch.is_tensor(value))
    return {
        "gradients": _storage_bytes(optimizer.fp32_groups_gradients_flat),
        "masters": _storage_bytes(optimizer.fp32_groups_flat_partition),
        "moments": _storage_bytes(value for value in moments if value.ndim),
    }


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors; views of one buffer count once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
