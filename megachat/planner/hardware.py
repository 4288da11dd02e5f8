"""The one place for what a cluster is: memory, links and speeds, with presets and their sources.

Gigabytes are 10^9 bytes throughout, as vendors count them; a card sold as 80 GB has a little more,
and the difference stays as margin. Speeds are the vendors' peaks; the efficiencies say which part
of a peak a plan counts on, and are assumptions, not measurements.
"""

from enum import StrEnum
from typing import Any

from pydantic import Field

from megachat.config import ConfigModel, build_config
from megachat.errors import LayoutError

GB = 10**9
"""Bytes of a gigabyte."""


class Gpu(StrEnum):
    """Machines with a preset."""

    A100_40 = "a100-40"
    A100_80 = "a100-80"
    H100_80 = "h100-80"


class Allocator(StrEnum):
    """Who hands out the memory of tensors."""

    CACHING = "caching"
    """torch's caching allocator for CUDA, in segments; see `megachat.planner.allocator`."""
    EXACT = "exact"
    """One that takes what is asked for, as on a CPU."""


class ClusterConfig(ConfigModel):
    """Equal nodes of equal GPUs; the defaults are those of `Gpu.A100_80`."""

    nodes: int = Field(default=1, ge=1, le=1000, description="Machines of the job.")
    gpus_per_node: int = Field(
        default=8, ge=1, description="GPUs in each machine; on CPUs the processes of the whole job."
    )
    gpu_memory_gb: float = Field(default=80.0, gt=0, description="Memory of one GPU, 10^9 bytes.")
    reserved_gb: float | None = Field(
        default=None,
        ge=0,
        description="Memory of one GPU that is taken beside torch's tensors. None has the planner "
        "count it: CUDA context, workspaces, NCCL's buffers. A number replaces that count.",
    )
    margin: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Part of a GPU's memory that a plan leaves free, for what it cannot know.",
    )
    allocator: Allocator = Field(
        default=Allocator.CACHING, strict=False, description="Who hands out tensors' memory."
    )
    matmul_workspace_mib: float = Field(
        default=8.125, ge=0, description="Of cuBLAS, for each stream that multiplies matrices."
    )
    host_memory_gb: float = Field(
        default=2000.0, ge=0, description="Pinned host memory a node can give, 10^9 bytes."
    )
    teraflops: float = Field(
        default=312.0, gt=0, description="Dense bf16 peak of one GPU, 10^12 operations a second."
    )
    memory_gbps: float = Field(
        default=2039.0, gt=0, description="Bandwidth of one GPU's memory, 10^9 bytes a second."
    )
    node_link_gbps: float = Field(
        default=300.0,
        gt=0,
        description="Link of one GPU to the others of its node, 10^9 bytes a second each way.",
    )
    network_gbps: float = Field(
        default=25.0,
        gt=0,
        description="One GPU's share of the network between nodes, 10^9 bytes a second each way.",
    )
    host_link_gbps: float = Field(
        default=32.0,
        gt=0,
        description="Link of one GPU to host memory, 10^9 bytes a second each way.",
    )
    compute_efficiency: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Part of the compute peak that matrix products reach (assumed; Megatron-LM "
        "reports 44-57 % for whole steps on A100).",
    )
    memory_efficiency: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Part of the memory bandwidth that decoding reaches (assumed; published "
        "175B decoders on 8 A100 reach 32-49 %).",
    )
    link_efficiency: float = Field(
        default=0.8, gt=0, le=1, description="Part of a link's peak that transfers reach (assumed)."
    )
    collective_latency_us: float = Field(
        default=15.0,
        ge=0,
        description="Shortest time of a collective inside a node, microseconds (assumed).",
    )

    @property
    def world_size(self) -> int:
        """Number of GPUs, one rank each."""
        return self.nodes * self.gpus_per_node

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU."""
        return int(self.gpu_memory_gb * GB)

    @property
    def margin_bytes(self) -> int:
        """Bytes of one GPU that a plan leaves free."""
        return int(self.gpu_memory_gb * self.margin * GB)

    @property
    def host_budget_bytes(self) -> int:
        """Bytes of one node's host memory that a plan may use."""
        return int(self.host_memory_gb * GB)

    def node_of(self, rank: int) -> int:
        """The machine a rank runs on; ranks fill one node after the other."""
        return rank // self.gpus_per_node

    def check_world(self, world_size: int, *, what: str) -> None:
        """Checks that a layout fills the cluster.

        Raises:
            LayoutError: It has more or fewer ranks than there are GPUs.
        """
        if world_size != self.world_size:
            raise LayoutError(
                f"{what} has {world_size} ranks, but {self.nodes} nodes x {self.gpus_per_node} "
                f"GPUs = {self.world_size}: change the degrees or the cluster"
            )


PRESETS: dict[Gpu, dict[str, float]] = {
    Gpu.A100_40: {
        "gpu_memory_gb": 40.0,
        "host_memory_gb": 1000.0,
        "teraflops": 312.0,
        "memory_gbps": 1555.0,
        "node_link_gbps": 300.0,
        "network_gbps": 25.0,
        "host_link_gbps": 32.0,
    },
    Gpu.A100_80: {
        "gpu_memory_gb": 80.0,
        "host_memory_gb": 2000.0,
        "teraflops": 312.0,
        "memory_gbps": 2039.0,
        "node_link_gbps": 300.0,
        "network_gbps": 25.0,
        "host_link_gbps": 32.0,
    },
    Gpu.H100_80: {
        "gpu_memory_gb": 80.0,
        "host_memory_gb": 2000.0,
        "teraflops": 989.0,
        "memory_gbps": 3350.0,
        "node_link_gbps": 450.0,
        "network_gbps": 50.0,
        "host_link_gbps": 64.0,
        "matmul_workspace_mib": 32.0,
    },
}
"""NVIDIA's data sheets: A100 (2021: 312 TFLOPS bf16, 1,555 and 2,039 GB/s, NVLink 600 GB/s both
ways, PCIe 4 x16), H100 SXM (2023: 989 TFLOPS without sparsity, 3.35 TB/s, NVLink 900 GB/s both
ways, PCIe 5 x16); network and host memory of DGX A100 (8 x 200 Gb/s HDR, 1 and 2 TB) and DGX H100
(8 x 400 Gb/s NDR, 2 TB). cuBLAS' workspaces are those that torch chooses
(`ATen/cuda/CublasHandlePool.cpp`: 32 MiB on Hopper, 8.125 MiB before)."""


def cluster_config(gpu: Gpu = Gpu.A100_80, **values: Any) -> ClusterConfig:
    """The preset of a machine with some values changed; None keeps the preset's.

    Raises:
        ConfigError: A value is out of range or unknown.
    """
    given = {name: value for name, value in values.items() if value is not None}
    return build_config(ClusterConfig, {**PRESETS[gpu], **given}, source="cluster")
