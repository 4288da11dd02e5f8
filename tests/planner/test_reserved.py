from dataclasses import replace

from megachat.ops.cuda_kernels import ALL_REDUCE_BYTES
from megachat.planner.hardware import GB, Gpu, cluster_config
from megachat.planner.job import Workload
from megachat.planner.reserved import ReservedFor, reserved_memory
from tests.planner.jobs import job

MIB = 2**20


def test_parts_of_opt_175b_are_counted_by_hand() -> None:
    big = job("175b", 8, 8, 1, generate=8)
    reserved = reserved_memory(big, cluster_config(nodes=8))
    assert reserved.bytes_of(ReservedFor.CONTEXT) == 768 * MIB
    # Of the stream that computes, and of each of torch's 32 that a recording warms up on.
    assert reserved.bytes_of(ReservedFor.WORKSPACES) == 33 * int(8.125 * MIB)
    assert reserved.bytes_of(ReservedFor.COMMUNICATORS) == 1768 * MIB  # test_communicators
    assert 2 * ALL_REDUCE_BYTES < reserved.bytes_of(ReservedFor.PEER_SUMS) == 4 * MIB
    assert reserved.bytes_of(ReservedFor.MARGIN) == int(2.4 * GB)
    assert reserved.num_bytes == sum(part.num_bytes for part in reserved.parts)
    assert str(reserved).startswith("context 0.8, workspaces 0.3, communicators 1.9")


def test_one_gpu_has_neither_communicators_nor_peers() -> None:
    alone = job("1.3b", 1, 1, 1, generate=1, workload=Workload(prompts=4))
    reserved = reserved_memory(alone, cluster_config(gpus_per_node=1))
    assert {part.what for part in reserved.parts} == {
        ReservedFor.CONTEXT, ReservedFor.WORKSPACES, ReservedFor.MARGIN,
    }  # fmt: skip


def test_a_stated_number_replaces_the_count_but_not_the_margin() -> None:
    big = job("175b", 8, 8, 1, generate=8)
    reserved = reserved_memory(big, cluster_config(nodes=8, reserved_gb=5.0))
    assert {part.what: part.num_bytes for part in reserved.parts} == {
        ReservedFor.STATED: 5 * GB,
        ReservedFor.MARGIN: int(2.4 * GB),
    }


def test_workspaces_are_larger_on_hopper_and_fewer_without_recordings() -> None:
    big = job("13b", 8, 1, 1, generate=8)
    hopper = reserved_memory(big, cluster_config(Gpu.H100_80))
    assert hopper.bytes_of(ReservedFor.WORKSPACES) == 33 * 32 * MIB
    eager = reserved_memory(replace(big, graphs=False), cluster_config(Gpu.H100_80))
    assert eager.bytes_of(ReservedFor.WORKSPACES) == 32 * MIB
