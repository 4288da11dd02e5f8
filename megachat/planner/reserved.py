"""Predicts the memory of a GPU that is taken beside torch's tensors, and the margin. Pure.

Context and modules: a process takes 287 MB with torch's first tensor and kernels loaded lazily
(pytorch/pytorch pull request 86509), 426 MiB on a newer GPU and CUDA 13 (unslothai/unsloth-zoo pull
request 1053), 484 MiB with a communicator (NVIDIA/nccl pull request 2366). 512 MiB are planned, and
256 MiB for the kernels that load as they are called: matrix products of every shape, NCCL's, ours.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from megachat.planner.communicators import communicator_bytes
from megachat.planner.graphs import num_graphs
from megachat.planner.hardware import GB, ClusterConfig
from megachat.planner.job import Job

_MIB = 2**20
_CONTEXT_BYTES, _MODULE_BYTES = 512 * _MIB, 256 * _MIB
_STREAM_POOL = 32
"""Streams that torch hands out in turns; every recording of a decode step takes one to warm up."""
_PEER_SUM_BYTES = 2 * _MIB + 2 * _MIB
"""Two places of `megachat.ops.cuda_kernels.ALL_REDUCE_BYTES`, and flags, which take a granule."""


class ReservedFor(StrEnum):
    """What takes memory beside torch's tensors."""

    STATED = "stated"
    """What the cluster's `reserved_gb` says, in place of all the others but the margin."""
    CONTEXT = "context"
    """CUDA's context and the modules of kernels."""
    WORKSPACES = "workspaces"
    """cuBLAS', one for each stream; torch keeps them."""
    COMMUNICATORS = "communicators"
    """NCCL's buffers."""
    PEER_SUMS = "peer_sums"
    """What the ranks of a generation tensor group map from each other."""
    MARGIN = "margin"
    """Left free for what no plan knows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReservedPart:
    """Predicted bytes of a GPU that tensors cannot have."""

    what: ReservedFor
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """All that a plan may not fill with tensors, equal on all GPUs."""

    parts: tuple[ReservedPart, ...]

    @property
    def num_bytes(self) -> int:
        """All parts together."""
        return sum(part.num_bytes for part in self.parts)

    def bytes_of(self, what: ReservedFor) -> int:
        """Bytes of one part; 0 where there is none."""
        return sum(part.num_bytes for part in self.parts if part.what is what)

    def __str__(self) -> str:
        """Each part in GB."""
        return ", ".join(
            f"{part.what.value.replace('_', ' ')} {part.num_bytes / GB:.1f}" for part in self.parts
        )


def reserved_memory(job: Job, cluster: ClusterConfig) -> Reserved:
    """What is taken beside tensors on the fullest GPU of a job, and the cluster's margin."""
    margin = (ReservedFor.MARGIN, cluster.margin_bytes)
    if cluster.reserved_gb is not None:
        return _reserved((ReservedFor.STATED, int(cluster.reserved_gb * GB)), margin)
    streams = 1 + min(_STREAM_POOL, num_graphs(job))
    return _reserved(
        (ReservedFor.CONTEXT, _CONTEXT_BYTES + _MODULE_BYTES),
        (ReservedFor.WORKSPACES, streams * int(cluster.matmul_workspace_mib * _MIB)),
        (
            ReservedFor.COMMUNICATORS,
            communicator_bytes(
                job.actor.layout,
                job.critic.layout,
                job.generation_tensor,
                ranks_per_node=cluster.gpus_per_node,
            ),
        ),
        (ReservedFor.PEER_SUMS, _PEER_SUM_BYTES if job.generation_tensor > 1 else 0),
        margin,
    )


@cache
def _reserved(*parts: tuple[ReservedFor, int]) -> Reserved:
    return Reserved(
        parts=tuple(
            ReservedPart(what=what, num_bytes=num_bytes) for what, num_bytes in parts if num_bytes
        )
    )
