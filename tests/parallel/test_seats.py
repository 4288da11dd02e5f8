from dataclasses import replace

import pytest

from megachat.errors import LaunchError
from megachat.parallel.placement import PORTS, Task, Way
from megachat.parallel.rendezvous import Role
from megachat.parallel.seats import Nodes, meeting_of_nodes, meeting_of_ranks

ONE = Nodes(processes=4, nodes=1, rendezvous=None, join_seconds=60.0)
TWO = replace(ONE, nodes=2)
TASK = Task(way=Way.SLURM, number=1, count=8, key="slurm.7.0.0", host="gpu1")


def test_one_node_meets_at_a_free_loopback_port() -> None:
    point = meeting_of_nodes(ONE, None)
    assert (point.host, point.port, point.role) == ("127.0.0.1", 0, Role.HOST)
    assert (point.gathering.count, point.gathering.unit) == (1, "node")


def test_nodes_without_another_launcher_meet_where_they_are_told() -> None:
    point = meeting_of_nodes(replace(TWO, rendezvous="gpu1:2000"), None)
    assert (point.host, point.port, point.role) == ("gpu1", 2000, Role.FIRST_COME)
    with pytest.raises(LaunchError, match="launch.nodes is 2, but launch.rendezvous is not set"):
        meeting_of_nodes(TWO, None)


def test_tasks_of_a_job_derive_the_same_point_and_the_first_is_its_host() -> None:
    first, second = (meeting_of_ranks(TWO, replace(TASK, number=number)) for number in range(2))
    assert first.host == second.host == "gpu1" and first.port == second.port in PORTS
    assert (first.role, second.role) == (Role.HOST, Role.GUEST)
    assert first.gathering == second.gathering and first.gathering.count == 8
    assert meeting_of_nodes(TWO, TASK).port == first.port


def test_a_port_that_is_set_is_taken_and_a_rendezvous_overrides_all() -> None:
    assert meeting_of_ranks(TWO, replace(TASK, port=99)).port == 99
    point = meeting_of_ranks(replace(TWO, rendezvous="x:5"), replace(TASK, port=99))
    assert (point.host, point.port) == ("x", 5)


def test_a_store_that_the_launcher_keeps_is_used_to_find_the_hub() -> None:
    task = replace(TASK, way=Way.TORCHRUN, port=99, keeps_store=True)
    assert meeting_of_ranks(TWO, task).role is Role.BY_STORE


def test_tasks_that_know_no_host_need_a_rendezvous() -> None:
    task = replace(TASK, way=Way.PMI, host=None)
    with pytest.raises(LaunchError, match="PMI does not tell where .*launch.rendezvous"):
        meeting_of_ranks(TWO, task)
