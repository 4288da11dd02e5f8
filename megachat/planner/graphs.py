"""Predicts the memory that recorded decode steps keep between generation phases. Pure.

A step is recorded once for each bucket of rows and of block table columns
(`megachat.generation.graphs`). All recordings share one pool of torch's allocator, in which each
keeps its logits; the rest of a step's tensors make room for those of the next recording. The driver
keeps the kernels of each.
"""

from functools import cache

from megachat.planner.job import Job

_FINE_ROWS = 8
"""`megachat.generation.graphs.FINE_ROWS`."""
_LAYER_KERNELS, _EDGE_KERNELS = 10, 5
"""Of a decode step: norm, four products, keys and values, attention, two sums, activation; and
embedding, norm, logits around the layers."""
_KERNEL_BYTES = 16 * 2**10
"""Of a recorded kernel in the driver: assumed. vLLM logs 0.2 to 0.3 GiB for 35 graphs of a model
of 32 layers, their pool included: 20 KiB for each of some 13,000 kernels at most."""


@cache
def row_buckets(most: int) -> tuple[int, ...]:
    """Rows of the steps that are recorded where at most so many sequences run at once."""
    doubling = [rows for rows in (1, 2, 4, 8) if rows < 2 * most]
    return (*doubling, *range(2 * _FINE_ROWS, most + _FINE_ROWS, _FINE_ROWS))


def num_column_buckets(blocks_per_sequence: int) -> int:
    """Widths of block tables, powers of two, up to one that holds the longest sequence."""
    return (blocks_per_sequence - 1).bit_length() + 1


def num_graphs(job: Job) -> int:
    """Decode steps that may be recorded; 0 where none is."""
    if not job.graphs:
        return 0
    return len(row_buckets(job.most_at_once)) * num_column_buckets(job.blocks_per_sequence)


def graph_bytes(job: Job) -> int:
    """Predicted bytes of all recordings on a rank."""
    if not job.graphs:
        return 0
    config, columns = job.actor.config, num_column_buckets(job.blocks_per_sequence)
    logits = _sum_of_buckets(job.most_at_once) * columns * _logits_bytes(job)
    kernels = num_graphs(job) * (_LAYER_KERNELS * config.layers + _EDGE_KERNELS)
    return logits + kernels * _KERNEL_BYTES


@cache
def _sum_of_buckets(most: int) -> int:
    """Rows of all steps that are recorded with block tables of one width."""
    return sum(row_buckets(most))


def _logits_bytes(job: Job) -> int:
    """Of one row on one rank."""
    return job.actor.padded_vocab // job.generation_tensor * job.actor.value_bytes
