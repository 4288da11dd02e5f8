import pytest

from megachat.errors import ConfigError, LayoutError
from megachat.planner.hardware import GB, Gpu, cluster_config


@pytest.mark.parametrize("gpu", list(Gpu))
def test_every_preset_is_a_valid_cluster(gpu: Gpu) -> None:
    cluster = cluster_config(gpu, nodes=2, gpus_per_node=4)
    assert cluster.world_size == 8
    assert 0 < cluster.margin_bytes < 0.1 * cluster.gpu_bytes


def test_given_values_win_over_the_preset_and_none_keeps_it() -> None:
    cluster = cluster_config(Gpu.H100_80, gpu_memory_gb=96.0, nodes=None)
    assert cluster.gpu_memory_gb == 96.0
    assert cluster.nodes == 1
    assert cluster.teraflops == 989.0


def test_the_margin_is_a_part_of_a_gpu() -> None:
    cluster = cluster_config(gpu_memory_gb=80.0, margin=0.05)
    assert cluster.gpu_bytes == 80 * GB
    assert cluster.margin_bytes == 4 * GB


@pytest.mark.parametrize(
    ("values", "named"),
    [({"nodes": 0}, "nodes"), ({"gpu_memory_gb": -1.0}, "gpu_memory_gb"), ({"gpus": 8}, "gpus")],
)
def test_a_value_that_no_cluster_has_is_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        cluster_config(**values)


def test_ranks_fill_one_node_after_the_other() -> None:
    cluster = cluster_config(nodes=2, gpus_per_node=4)
    assert [cluster.node_of(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(LayoutError, match="16 ranks, but 2 nodes x 4 GPUs = 8"):
        cluster.check_world(16, what="layout tp16.pp1.dp1")
