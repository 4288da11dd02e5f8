"""Connects every node of a job to the first one, from the first contact to the end.

Each member (a launcher, or a rank that has none above it) holds one TCP connection, its `Line`, to
the `Hub`, a thread in the first launcher or in rank 0. There they meet, and from there news of a
failure go out to all. A member that dies, however it dies, has its connection closed by the system,
so nothing needs heartbeats, which a busy machine would miss. A machine that falls silent is found
by TCP's own keep-alive, which systems answer and not processes.

Messages are lines of JSON. A member says who it is, what failed, that it is done. The hub answers
with a number and the port of torch's store, with all members once they are there, and last with the
first failure or with the word that all are done.
"""

import contextlib
import json
import select
import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megachat.errors import LaunchError
from megachat.parallel.failures import Failure, Severity, first_cause

CAUSE_SECONDS = 2.0
"""How long a consequence waits for its cause: a killed rank is seen first by those who lost it."""
PATIENCE_SECONDS = 5.0
"""When those who wait are told whom they wait for."""
FAREWELL_SECONDS = 3.0
"""How long the hub stays for members that have yet to read the news."""
_CONNECT_SECONDS = 2.0
_ANSWER_SECONDS = 10.0
"""A hub answers at once; what does not is another program."""
_SEND_SECONDS = 2.0
"""A member that does not take a line for so long is stopped; the others do not wait for it."""
_SILENT_SECONDS, _PROBE_SECONDS, _PROBES = 3, 1, 5
"""A machine that answers no probe is lost after 3 + 5 x 1 seconds, as is one that takes no data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A launcher or rank, as all others get to know it."""

    name: str
    """What it is: node or rank."""
    host: str
    number: int | None = None
    """Among the members; None takes the next free one."""
    cores: str = ""
    """The processor cores it may use."""
    gpu: str = ""
    """The only GPU it sees, where it sees one only."""

    @property
    def title(self) -> str:
        """How messages name it."""
        return f"{self.name} {self.number} on {self.host}"


@dataclass(frozen=True, slots=True)
class Welcome:
    """The hub's first answer."""

    number: int
    store_port: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Who is there while others are not yet."""

    text: str


@dataclass(frozen=True, slots=True)
class Complete:
    """Everyone is there; in order of their numbers."""

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class News:
    """The last message: a failure, or None when all members are done."""

    failure: Failure | None


Message = Welcome | Waiting | Complete | News


@dataclass(frozen=True, kw_only=True, slots=True)
class Gathering:
    """What a hub waits for."""

    job: str
    """Tells members from strangers and from members of another job."""
    unit: str
    """What members are, for messages: node or rank."""
    count: int
    where: str
    """Where they meet, for messages."""
    seconds: float
    """How long it waits for all of them."""


@dataclass(slots=True)
class _Peer:
    """A connection as the hub sees it."""

    connection: socket.socket
    member: Member | None = None
    """None until it has said who it is."""
    done: bool = False
    buffer: bytes = b""


@dataclass(slots=True)
class _Agenda:
    """Moments at which a hub acts by itself, of the monotonic clock."""

    remind: float | None = None
    give_up: float | None = None
    decide: float | None = None
    leave: float | None = None

    def patience(self) -> float | None:
        """Seconds until the next one."""
        moments = [each for each in (self.remind, self.give_up, self.decide, self.leave) if each]
        return max(0.0, min(moments) - time.monotonic()) if moments else None


@dataclass(slots=True)
class _Minutes:
    """What a hub has heard."""

    members: dict[int, Member] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    num_done: int = 0
    news: News | None = None


class Hub:
    """The end of all lines, a thread in the process that hosts the job."""

    def __init__(self, listener: socket.socket, gathering: Gathering, *, store_port: int) -> None:
        """Takes over a listening socket."""
        self._listener, self._gathering, self._store_port = listener, gathering, store_port
        self._agenda = _Agenda()
        self._peers, self._heard = dict[int, _Peer](), _Minutes()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets members read the news, if there are any, but waits no longer for them than that."""
        if self._heard.news is not None:
            self._thread.join(FAREWELL_SECONDS + _SEND_SECONDS)

    def _run(self) -> None:
        agenda = self._agenda
        while agenda.leave is None or (self._peers and time.monotonic() < agenda.leave):
            for key, _ in self._selector.select(agenda.patience()):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd in self._peers:
                    self._read(self._peers[key.fd])
            now = time.monotonic()
            if agenda.remind is not None and now >= agenda.remind:
                agenda.remind = None
                self._send_all({"waiting": self._who_is_there()})
            if agenda.give_up is not None and now >= agenda.give_up:
                agenda.give_up = None
                self._note(Failure(message=self._given_up()))
            if agenda.decide is not None and time.monotonic() >= agenda.decide:
                self._tell(News(first_cause(self._heard.failures)))
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(_SEND_SECONDS)
        _keep_alive(connection)
        self._peers[connection.fileno()] = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, peer: _Peer) -> None:
        try:
            data = peer.connection.recv(1 << 16)
        except OSError:
            data = b""
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        try:
            for line in lines:
                self._take(peer, json.loads(line))
        except (ValueError, KeyError, TypeError):  # a stranger's
            data, peer.member = b"", None
        if not data:
            self._drop(peer)
            if peer.member is not None and not peer.done:
                self._note(
                    Failure(
                        message=f"lost contact with {peer.member.title}: its process was killed, "
                        "or its machine or network is down"
                    )
                )

    def _take(self, peer: _Peer, words: dict[str, Any]) -> None:
        """One message of a member."""
        if peer.member is None:
            self._welcome(peer, words)
        elif "failure" in words:
            self._note(self._with_who_is_there(Failure.from_json(words["failure"])))
        elif not peer.done:
            peer.done = True
            self._heard.num_done += 1
            if self._heard.num_done == self._gathering.count and self._agenda.decide is None:
                self._tell(News(None))

    def _welcome(self, peer: _Peer, words: dict[str, Any]) -> None:
        """Gives a member its number, and everyone the list once it is complete."""
        wanted, members = Member(**words["member"]), self._heard.members
        free = (number for number in range(1, self._gathering.count) if number not in members)
        number = wanted.number if wanted.number is not None else next(free, self._gathering.count)
        problem = self._objection(words["job"], wanted, number)
        if problem is not None:
            self._send(peer, {"refused": problem})
            return
        if not members:  # the host's own: it comes at once
            now = time.monotonic()
            self._agenda.remind = now + PATIENCE_SECONDS
            self._agenda.give_up = now + self._gathering.seconds
        peer.member = members[number] = Member(**{**asdict(wanted), "number": number})
        self._send(peer, {"number": number, "store_port": self._store_port})
        if self._heard.news is not None:
            self._send(peer, _in_words(self._heard.news))
        elif len(members) == self._gathering.count:
            self._agenda.remind = self._agenda.give_up = None
            everyone = [asdict(members[each]) for each in range(self._gathering.count)]
            self._send_all({"members": everyone})
        elif self._agenda.remind is None:  # the others have been told
            self._send(peer, {"waiting": self._who_is_there()})

    def _objection(self, job: str, wanted: Member, number: int) -> str | None:
        """Why a member cannot be let in."""
        here = self._gathering
        if job != here.job:
            return f"another job answers at {here.where} ({here.job}, not {job})"
        if number >= here.count or number in self._heard.members:
            taken = self._heard.members.get(number)
            return (
                f"all {here.count} {here.unit}s have joined at {here.where} already"
                if taken is None
                else f"{taken.title} has joined at {here.where} already"
            )
        return None

    def _who_is_there(self) -> str:
        here, members = self._gathering, self._heard.members
        hosts = ", ".join(dict.fromkeys(members[each].host for each in sorted(members)))
        text = f"{len(members)} of {here.count} {here.unit}s have joined at {here.where} ({hosts})"
        missing = [str(each) for each in range(here.count) if each not in members]
        if here.unit == "node" or len(missing) > 8:
            return text
        return f"{text}; missing: {here.unit} {', '.join(missing)}"

    def _with_who_is_there(self, failure: Failure) -> Failure:
        """A signal that ends the wait for absent members says who was there."""
        count = self._gathering.count
        if failure.number is None or len(self._heard.members) == count or count == 1:
            return failure
        message = f"{failure.message}, while it waited: {self._who_is_there()}"
        return replace(failure, message=message)

    def _given_up(self) -> str:
        return (
            f"after {self._gathering.seconds:g} s {self._who_is_there()}: start the others "
            "sooner, check launch.nodes and launch.rendezvous, or raise launch.join_seconds"
        )

    def _note(self, failure: Failure) -> None:
        """A cause is the news at once; a consequence waits a little for its cause."""
        self._heard.failures.append(failure)
        moment = time.monotonic()
        moment += 0.0 if failure.severity is Severity.CAUSE else CAUSE_SECONDS
        if self._heard.news is None:
            self._agenda.decide = min(self._agenda.decide or moment, moment)

    def _tell(self, news: News) -> None:
        agenda = self._agenda
        agenda.remind = agenda.give_up = agenda.decide = None
        if self._heard.news is None:
            self._heard.news = news
            agenda.leave = time.monotonic() + FAREWELL_SECONDS
            self._send_all(_in_words(news))

    def _send_all(self, words: dict[str, Any]) -> None:
        for peer in list(self._peers.values()):
            if peer.member is not None:
                self._send(peer, words)

    @staticmethod
    def _send(peer: _Peer, words: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            peer.connection.sendall(json.dumps(words, allow_nan=False).encode() + b"\n")

    def _drop(self, peer: _Peer) -> None:
        del self._peers[peer.connection.fileno()]
        self._selector.unregister(peer.connection)
        peer.connection.close()


class Line:
    """A member's connection to the hub."""

    def __init__(self, connection: socket.socket, *, job: str, member: Member, where: str) -> None:
        """Says who this is.

        Args:
            connection: To the hub.
            job: Which job this belongs to.
            member: This process.
            where: The hub's address, for messages.
        """
        self._connection, self._where, self._buffer = connection, where, b""
        connection.settimeout(None)
        _keep_alive(connection)
        self._write({"job": job, "member": asdict(member)})

    def fileno(self) -> int:
        """To wait on."""
        return self._connection.fileno()

    def report(self, failure: Failure) -> None:
        """Tells of a failure; the news will follow."""
        self._write({"failure": failure.to_json()})

    def done(self) -> None:
        """Tells that this member has nothing more to do."""
        self._write({"done": True})

    def welcome(self) -> Welcome:
        """The hub's first answer.

        Raises:
            LaunchError: It refuses this member, or is no hub.
        """
        words = self._receive(_ANSWER_SECONDS)
        if not words or not {"refused", "number"} & set(words):
            raise LaunchError(
                f"what answers at {self._where} is not this job: choose another port with "
                "launch.rendezvous"
            )
        if "refused" in words:
            raise LaunchError(f"{words['refused']}: choose another port with launch.rendezvous")
        return Welcome(words["number"], words["store_port"])

    def message(self, *, timeout: float | None) -> Message | None:
        """What the hub tells next, or None within `timeout` seconds; None waits for ever."""
        words = self._receive(timeout)
        if words is None:
            return None
        if "waiting" in words:
            return Waiting(words["waiting"])
        if "members" in words:
            return Complete(tuple(Member(**each) for each in words["members"]))
        failure = words.get("failure", self._lost())
        return News(Failure.from_json(failure) if failure is not None else None)

    def news(self, *, timeout: float | None) -> News | None:
        """How the job ends, or None within the timeout; what else is told is passed over."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            message = self.message(timeout=left)
            if message is None or isinstance(message, News):
                return message

    def close(self) -> None:
        """Hangs up."""
        self._connection.close()

    def _lost(self) -> str:
        return Failure(
            message=f"lost contact with the first node at {self._where}: its process was killed, "
            "or its machine or network is down"
        ).to_json()

    def _receive(self, timeout: float | None) -> dict[str, Any] | None:
        """A message, empty when the connection has ended or carries something else."""
        end = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self], [], [], left)[0]:
                return None
            try:
                data = self._connection.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                return {}
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            words = json.loads(line)
        except ValueError:
            return {}
        return words if isinstance(words, dict) else {}

    def _write(self, words: dict[str, Any]) -> None:
        """A hub that is gone is noticed when its messages are read."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(words, allow_nan=False).encode() + b"\n")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket: on loopback for a loopback address, on all interfaces for others.

    Many systems give their own name a loopback address, which other nodes cannot reach.

    Raises:
        OSError: The port is in use.
    """
    if is_loopback(host):
        return socket.create_server((host, port), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
        )
    return socket.create_server(("", port), backlog=1024)


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only."""
    return host == "localhost" or host.startswith("127.")


def call(host: str, port: int) -> socket.socket:
    """A connection.

    Raises:
        OSError: Nobody answers there now.
    """
    return socket.create_connection((host, port), timeout=_CONNECT_SECONDS)


def _in_words(news: News) -> dict[str, Any]:
    return {"failure": news.failure.to_json() if news.failure is not None else None}


def _keep_alive(connection: socket.socket) -> None:
    """Lets the system find out that the other machine is gone."""
    lost_ms = 1000 * (_SILENT_SECONDS + _PROBES * _PROBE_SECONDS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, _SILENT_SECONDS),
        (socket.TCP_KEEPINTVL, _PROBE_SECONDS),
        (socket.TCP_KEEPCNT, _PROBES),
        (socket.TCP_USER_TIMEOUT, lost_ms),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
