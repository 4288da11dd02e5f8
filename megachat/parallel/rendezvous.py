"""Brings the members of a job together: who hosts, who joins, what all know of each other."""

import errno
import logging
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from megachat.errors import LaunchError
from megachat.parallel import GROUP_TIMEOUT
from megachat.parallel.failures import Failure, failure_of
from megachat.parallel.lifeline import (
    PATIENCE_SECONDS,
    Complete,
    Gathering,
    Hub,
    Line,
    Member,
    News,
    Waiting,
    call,
    is_loopback,
    listen,
)
from megachat.parallel.signals import Signalled, told_to_end

_LOG = logging.getLogger(__name__)

_RETRY_SECONDS = 0.3
"""Between two calls to a first node that does not answer yet."""
_AGENT_SECONDS = 60
"""torchrun's own store answers before it starts anyone."""
FAREWELL_SECONDS = 5.0
"""How long a member that has reported a failure waits for what all others are told."""


class Role(StrEnum):
    """Who listens where the members meet."""

    HOST = "host"
    """This process, and no other may."""
    GUEST = "guest"
    """Another one."""
    FIRST_COME = "first come"
    """Whichever process on that machine comes first."""
    BY_STORE = "by store"
    """Member 0, at a port that the others learn from torchrun's store at the meeting point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeetingPoint:
    """Where members meet."""

    host: str
    port: int
    role: Role
    gathering: Gathering


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """The members of a job, connected."""

    number: int
    """Of this member."""
    members: tuple[Member, ...]
    host: str
    """Of the first node, as others reach it."""
    store_port: int
    """Of torch's store on that host."""
    line: Line
    _hub: Hub | None
    _server: TCPStore | None

    def finish(self) -> News:
        """Tells that this member is done and waits for the others; returns how the job ended."""
        self.line.done()
        return self.listen(timeout=None) or News(None)

    def fail(self, failure: Failure) -> Failure:
        """Tells of a failure; returns the one that all members are told, which came first."""
        self.line.report(failure)
        news = self.listen(timeout=FAREWELL_SECONDS)
        return (news.failure if news is not None else None) or failure

    def listen(self, *, timeout: float | None) -> News | None:
        """How the job ends, or None within the timeout."""
        return self.line.news(timeout=timeout)

    def close(self) -> None:
        """Hangs up; the host stays until the others have read the news."""
        self.line.close()
        if self._hub is not None:
            self._hub.close()


def meet(point: MeetingPoint, member: Member) -> Meeting:
    """Waits until all members have joined.

    Raises:
        LaunchError: They have not in time, one of them has failed, or a port is in use.
        SignalError: This process or another member was told to end meanwhile.
    """
    try:
        return _meet(point, member)
    except Signalled as signalled:
        here = point.gathering
        doing = f"it began to wait for {here.count} {here.unit}s at {here.where}"
        raise told_to_end(signalled.number, while_doing=doing if here.count > 1 else "") from None


def _meet(point: MeetingPoint, member: Member) -> Meeting:
    """As `meet`; a signal is raised as it is until the hub has been told of it."""
    host, port, hub, server = point.host, point.port, None, None
    listener = _listener(point, member)
    if listener is not None:
        port = int(listener.getsockname()[1])
        server = _start_store(point.host)
        hub = Hub(listener, point.gathering, store_port=server.port)
        member = Member(
            name=member.name, host=member.host, number=0, cores=member.cores, gpu=member.gpu
        )
    if point.role is Role.BY_STORE:
        port = _agree_on_port(point, port if listener is not None else None)
    line = _connect(host, port, point.gathering, member)
    try:
        welcome = line.welcome()
        members = _wait_for_all(line)
    except BaseException as error:
        line.report(failure_of(error, origin=f"{member.name} on {member.host}"))
        news = line.news(timeout=FAREWELL_SECONDS)
        line.close()
        if hub is not None:
            hub.close()
        if isinstance(error, Signalled) and news is not None and news.failure is not None:
            raise news.failure.error() from None  # the hub adds who has joined
        raise
    return Meeting(
        number=welcome.number,
        members=members,
        host=host,
        store_port=welcome.store_port,
        line=line,
        _hub=hub,
        _server=server,
    )


def open_store(host: str, port: int) -> TCPStore:
    """A connection to torch's store of the job."""
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=GROUP_TIMEOUT)


def _start_store(host: str) -> TCPStore:
    """Torch's store, where the process groups of the job find each other."""
    listener = listen(host, 0)
    port = int(listener.getsockname()[1])
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=GROUP_TIMEOUT,
        master_listen_fd=listener.detach(),
    )


def _listener(point: MeetingPoint, member: Member) -> socket.socket | None:
    """The meeting point itself, where this process hosts it.

    Raises:
        LaunchError: It has to, but the port is in use.
    """
    if point.role is Role.BY_STORE:
        return listen(point.host, 0) if member.number == 0 else None
    if point.role is Role.GUEST or (point.role is Role.FIRST_COME and not is_here(point.host)):
        return None
    try:
        return _listen(point)
    except OSError as error:
        if point.role is Role.FIRST_COME and error.errno == errno.EADDRINUSE:
            return None
        raise _cannot_listen(point, error) from error


def check_listening(point: MeetingPoint) -> None:
    """Refuses a meeting point that this process has to host and cannot; listens for a moment only.

    Raises:
        LaunchError: The port is in use, or the host is another machine.
    """
    try:
        _listen(point).close()
    except OSError as error:
        raise _cannot_listen(point, error) from error


def _listen(point: MeetingPoint) -> socket.socket:
    """Opens the port of a meeting point that this process hosts.

    Raises:
        LaunchError: One node is to meet on another machine.
        OSError: The port cannot be had.
    """
    where = point.gathering.where
    if point.gathering.count == 1 and not is_here(point.host):
        raise LaunchError(
            f"{where}: cannot listen there, it is another machine: leave launch.rendezvous out for "
            "one node"
        )
    return listen(point.host, point.port)


def _cannot_listen(point: MeetingPoint, error: OSError) -> LaunchError:
    why = os.strerror(error.errno) if error.errno else str(error)
    return LaunchError(
        f"{point.gathering.where}: cannot listen there ({why}): choose another port with "
        "launch.rendezvous=host:port"
    )


def is_here(host: str) -> bool:
    """Whether a name or address is one of this machine's."""
    if is_loopback(host) or host in (socket.gethostname(), socket.getfqdn()):
        return True
    try:
        addresses = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(_can_bind(family, address) for family, _, _, _, address in addresses)


def _can_bind(family: int, address: object) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address)  # type: ignore[arg-type]
        except OSError:
            return False
    return True


def _agree_on_port(point: MeetingPoint, port: int | None) -> int:
    """Tells or learns the hub's port through torchrun's store."""
    agent = TCPStore(
        point.host,
        point.port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=_AGENT_SECONDS),
    )
    store = PrefixStore(f"megachat/{point.gathering.job}", agent)
    if port is not None:
        store.set("hub", str(port))
        return port
    try:
        return int(store.get("hub"))
    except dist.DistError as error:
        raise LaunchError(
            f"rank 0 has not joined within {_AGENT_SECONDS} s at {point.gathering.where}"
        ) from error


def _connect(host: str, port: int, gathering: Gathering, member: Member) -> Line:
    """Calls the first node until it answers.

    Raises:
        LaunchError: It does not in time.
    """
    started, told = time.monotonic(), False
    while True:
        try:
            connection = call(host, port)
            break
        except OSError as error:
            waited = time.monotonic() - started
            if waited > gathering.seconds:
                raise LaunchError(
                    f"after {gathering.seconds:g} s nobody answers at {gathering.where} ({error}): "
                    "start the first node, or check launch.rendezvous and the network"
                ) from error
            if waited > PATIENCE_SECONDS and not told:
                told = True
                _LOG.warning("waiting for the first node at %s: %s", gathering.where, error)
            try:
                time.sleep(_RETRY_SECONDS)
            except Signalled as signalled:
                doing = f"it waited for the first node: nobody answers at {gathering.where}"
                raise told_to_end(signalled.number, while_doing=doing) from None
    return Line(connection, job=gathering.job, member=member, where=f"{host}:{port}")


def _wait_for_all(line: Line) -> tuple[Member, ...]:
    """All members.

    Raises:
        LaunchError: One of them has failed, or they have not come in time.
    """
    while True:
        message = line.message(timeout=None)
        if isinstance(message, Complete):
            return message.members
        if isinstance(message, Waiting):
            _LOG.warning("waiting: %s", message.text)
        if isinstance(message, News) and message.failure is not None:
            raise message.failure.error()


def check_gpus(members: tuple[Member, ...]) -> None:
    """Makes sure that processes that see one GPU each do not see the same one.

    Raises:
        LaunchError: Two of them do.
    """
    owners: dict[tuple[str, str], Member] = {}
    for member in members:
        if member.gpu:
            other = owners.setdefault((member.host, member.gpu), member)
            if other is not member:
                raise LaunchError(
                    f"{other.title} and {member.title} see the same GPU {member.gpu}: start one "
                    "process for each GPU (srun --gpus-per-task=1), or let them see all of a node"
                )
