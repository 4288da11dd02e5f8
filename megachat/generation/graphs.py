"""The one place that records decode steps and replays them: one graph for each bucket of rows.

A step without chunks reads everything that changes from step to step from device memory: tokens,
positions, block tables, lengths. So its kernels can be launched once, recorded, and replayed for
other sequences at other positions with a single launch, which is what makes small batches fast on
a GPU. Weights and pages keep their addresses over training phases, and with them the graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megachat.generation.packed import DecodeRows, PackedStep
from megachat.parallel.lifetime import Owner

FINE_ROWS = 8
"""Up to here buckets double, above they are multiples of it: at most seven rows are wasted."""


class StepRecorder(Protocol):
    """Records device work to be done again."""

    def record(self, compute: Callable[[], Tensor]) -> "Recording":
        """Runs `compute`, which must not read device values on the host, and keeps its work."""

    def close(self) -> None:
        """Destroys what was recorded, and with it its hold on communicators and memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Work that has been recorded."""

    output: Tensor
    """What it leaves; overwritten by every replay of it and of recordings of its recorder."""
    replay: Callable[[], None]
    """Does the work again, on what its inputs hold now."""


class CudaGraphRecorder(Owner):
    """Records CUDA graphs, which share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        """Takes nothing from the device before the first recording."""
        self._device = device
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def record(self, compute: Callable[[], Tensor]) -> Recording:
        """Runs `compute` once outside a graph and once to record it.

        Raises:
            PhaseError: The recorder was closed.

        The first run makes what is made lazily: workspaces of cuBLAS, connections of NCCL.
        """
        self.check_open()
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            compute()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        # Only this thread's calls may break a recording: NCCL's watchdog asks the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = compute()
        graph.replay()  # recording computes nothing
        self._graphs.append(graph)
        return Recording(output=output, replay=graph.replay)

    def _end(self) -> None:
        """Waits until no replay runs: a graph may hold the kernels of a communicator."""
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs = []


def recorder_for(device: torch.device) -> StepRecorder | None:
    """Records on the kind of device that can; None elsewhere."""
    return CudaGraphRecorder(device) if device.type == "cuda" else None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Graph:
    """One recorded step and the tensors that it reads."""

    inputs: PackedStep
    recording: Recording


class DecodeGraphs(Owner):
    """Runs decode steps by replaying a recorded one of the same bucket.

    A bucket is a number of rows and a width of the block tables, each rounded up. The rows that a
    step lacks repeat its first one: they compute and store what that row does, and the logits are
    dropped. So no block of the cache is spent on them and no row is special to a kernel.
    """

    def __init__(
        self, forward: Callable[[PackedStep], Tensor], *, recorder: StepRecorder, columns: int
    ) -> None:
        """Records nothing yet: a bucket is recorded when it is first needed.

        Args:
            forward: Computes a step's logits on memory whose addresses stay.
            recorder: Records it.
            columns: Width of a whole block table.
        """
        self._forward = forward
        self._recorder = recorder
        self._columns = columns
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @property
    def buckets(self) -> frozenset[tuple[int, int]]:
        """Rows and columns of what has been recorded."""
        return frozenset(self._graphs)

    def logits(self, step: PackedStep) -> Tensor:
        """Logits of a step's rows, `[rows, padded_vocab/tp]`; good until the next call.

        Args:
            step: Decode rows and nothing else.

        Raises:
            PhaseError: The graphs were closed.
        """
        self.check_open()
        assert step.decode is not None and step.prefill is None and step.outputs is None
        rows, columns = step.decode.tables.shape
        bucket = (rows_bucket(rows), min(_next_power_of_two(columns), self._columns))
        graph = self._graphs.get(bucket)
        if graph is None:
            inputs = _padded(step, rows=bucket[0], columns=bucket[1])
            recording = self._recorder.record(lambda: self._forward(inputs))
            graph = self._graphs[bucket] = _Graph(inputs=inputs, recording=recording)
        else:
            _fill(graph.inputs, step)
            graph.recording.replay()
        return graph.recording.output[:rows]

    def _end(self) -> None:
        """Ends the recordings, and lets go of who computes, which knows these graphs in turn."""
        self._graphs = {}
        self._recorder.close()
        del self._forward


def rows_bucket(rows: int) -> int:
    """Rows of the graph that serves a number of rows: 1, 2, 4, 8, 16, 24, 32, ..."""
    if rows <= FINE_ROWS:
        return _next_power_of_two(rows)
    return -(-rows // FINE_ROWS) * FINE_ROWS


def _next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _padded(step: PackedStep, *, rows: int, columns: int) -> PackedStep:
    """Tensors of a bucket's size that hold a step."""
    assert step.decode is not None
    inputs = PackedStep(
        tokens=step.tokens.new_zeros(rows),
        positions=step.positions.new_zeros(rows),
        slots=step.slots.new_zeros(rows),
        decode=DecodeRows(
            tables=step.decode.tables.new_zeros(rows, columns),
            lengths=step.decode.lengths.new_zeros(rows),
        ),
        prefill=None,
        outputs=None,
    )
    _fill(inputs, step)
    return inputs


def _fill(inputs: PackedStep, step: PackedStep) -> None:
    """Copies a step into the tensors of its bucket; rows that are left repeat the first."""
    assert inputs.decode is not None and step.decode is not None
    for target, source in (
        (inputs.tokens, step.tokens),
        (inputs.positions, step.positions),
        (inputs.slots, step.slots),
        (inputs.decode.lengths, step.decode.lengths),
        (inputs.decode.tables[:, : step.decode.tables.shape[1]], step.decode.tables),
    ):
        rows = len(source)
        target[:rows].copy_(source)
        if rows < len(target):
            target[rows:].copy_(source[:1].expand_as(target[rows:]))
