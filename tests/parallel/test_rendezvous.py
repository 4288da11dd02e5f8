import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from megachat.errors import LaunchError, SignalError
from megachat.parallel.launch import LaunchConfig, launch
from megachat.parallel.lifeline import Gathering, Member
from megachat.parallel.rendezvous import MeetingPoint, Role, check_gpus, is_here, meet
from megachat.parallel.signals import signals_raise
from tests.harness.nodes import Nodes, wait_for
from tests.harness.ports import free_port
from tests.parallel import entries
from tests.parallel.test_several_nodes import HOST, listens


def test_waiting_for_a_node_says_who_has_joined_and_ends_in_time(tmp_path: Path) -> None:
    config = LaunchConfig(
        device="cpu",
        threads=1,
        nodes=2,
        rendezvous=f"127.0.0.1:{free_port()}",
        join_seconds=0.5,
    )
    with Nodes(tmp_path) as nodes:
        nodes.start(launch, config, entries.report, tmp_path)
        (end,) = nodes.ends()
    assert end.exit_code == 2
    assert "after 0.5 s 1 of 2 nodes have joined at 127.0.0.1:" in end.message
    assert f"({HOST})" in end.message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_a_waiting_launcher_ends_it_with_one_line_that_says_who_was_there(
    tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    config = LaunchConfig(device="cpu", threads=1, nodes=2, rendezvous=f"127.0.0.1:{port}")
    with Nodes(tmp_path) as nodes:
        nodes.start(launch, config, entries.report, tmp_path)
        wait_for(lambda: listens(port), "the launcher")
        os.kill(nodes.pid(0), number)
        (end,) = nodes.ends()
    assert end.exit_code == 128 + number
    where = f"127.0.0.1:{port}"
    said = f"SignalError: the job was ended by {number.name}, as it was told, while it "
    assert end.message in (
        f"{said}waited: 1 of 2 nodes have joined at {where} ({HOST})",
        f"{said}began to wait for 2 nodes at {where}",  # it listens a little before it joins
    )


def test_a_signal_to_a_launcher_that_finds_no_first_node_says_so() -> None:
    """This process is the second one."""
    point = _point(free_port(), Role.GUEST)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(SignalError, match="by SIGINT, .* nobody answers at 127.0.0.1:"):
        with signals_raise():
            timer.start()
            meet(point, Member(name="node", host=HOST, number=1))
    timer.join()


def test_the_names_and_addresses_of_this_machine_are_known() -> None:
    assert all(is_here(name) for name in ("localhost", "127.0.0.1", HOST))
    assert not is_here("192.0.2.1")  # reserved for examples
    assert not is_here("no-such-host.invalid")


def _point(port: int, role: Role, *, seconds: float = 30.0) -> MeetingPoint:
    where = f"127.0.0.1:{port}"
    gathering = Gathering(job="job", unit="rank", count=1, where=where, seconds=seconds)
    return MeetingPoint(host="127.0.0.1", port=port, role=role, gathering=gathering)


def test_a_host_whose_port_is_taken_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        point = _point(taken.getsockname()[1], Role.HOST)
        with pytest.raises(LaunchError, match="127.0.0.1:.*: cannot listen .*another port"):
            meet(point, Member(name="rank", host=HOST, number=0))


def test_a_first_node_that_never_answers_is_named() -> None:
    point = _point(free_port(), Role.GUEST, seconds=0.2)
    with pytest.raises(LaunchError, match="after 0.2 s nobody answers at 127.0.0.1:"):
        meet(point, Member(name="rank", host=HOST, number=0))


def test_two_processes_that_see_the_same_gpu_are_refused() -> None:
    first, second, other = (
        Member(name="rank", number=number, host="gpu7", gpu=gpu)
        for number, gpu in enumerate(("GPU-1", "GPU-1", "GPU-2"))
    )
    check_gpus((first, other))
    with pytest.raises(LaunchError, match="rank 0 on gpu7 and rank 1 on gpu7 see the same GPU"):
        check_gpus((first, second, other))
