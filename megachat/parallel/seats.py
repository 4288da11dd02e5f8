"""Works out where members meet, and which place each rank of the job then has."""

from dataclasses import dataclass

from torch._C._distributed_c10d import PrefixStore, Store

from megachat.errors import LaunchError
from megachat.parallel.lifeline import Gathering
from megachat.parallel.placement import LOOPBACK, Task, meeting_port, parse_rendezvous
from megachat.parallel.rendezvous import Meeting, MeetingPoint, Role, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """What the configuration says of where a job runs."""

    processes: int
    """On each node."""
    nodes: int
    rendezvous: str | None
    join_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A rank's place in the job."""

    rank: int
    world_size: int
    local: int = 0
    """Number among the ranks of its host."""
    local_size: int = 1
    host: str = LOOPBACK
    """Of the first node."""
    store_port: int = 0
    """Of torch's store there; 0 where a rank has none, being alone."""
    title: str = "rank 0"
    """How messages name it."""

    def open_store(self) -> Store:
        """The store of the default group."""
        return PrefixStore("world", open_store(self.host, self.store_port))


def meeting_of_ranks(config: Nodes, task: Task) -> MeetingPoint:
    """Where ranks that another launcher has started meet.

    Raises:
        LaunchError: Nothing says where, or what says so is malformed.
    """
    host, port, role = _point_of_task(config, task)
    count = config.processes * config.nodes
    return _meeting_point(config, host, port, role, job=task.key, unit="rank", count=count)


def meeting_of_nodes(config: Nodes, task: Task | None) -> MeetingPoint:
    """Where the launchers of the nodes meet; a single one takes a free loopback port.

    Raises:
        LaunchError: Nothing says where, or what says so is malformed.
    """
    job = f"megachat.{config.nodes}x{config.processes}" if task is None else task.key
    role = Role.HOST if config.nodes == 1 else Role.FIRST_COME
    if config.nodes == 1 and config.rendezvous is None:
        host, port = LOOPBACK, 0
    elif task is not None:
        host, port, role = _point_of_task(config, task)
    elif config.rendezvous is None:
        raise LaunchError(
            f"launch.nodes is {config.nodes}, but launch.rendezvous is not set: give host:port of "
            "the first node"
        )
    else:
        host, port = parse_rendezvous(config.rendezvous)
    return _meeting_point(config, host, port, role, job=job, unit="node", count=config.nodes)


def seat_of(meeting: Meeting, task: Task) -> Seat:
    """The place of a rank that another launcher has started."""
    hosts = [member.host for member in meeting.members]
    here = [rank for rank, host in enumerate(hosts) if host == hosts[task.number]]
    return Seat(
        rank=task.number,
        world_size=len(hosts),
        local=here.index(task.number) if task.local is None else task.local,
        local_size=len(here),
        host=meeting.host,
        store_port=meeting.store_port,
        title=meeting.members[task.number].title,
    )


def seats_of_node(meeting: Meeting, *, processes: int) -> list[Seat]:
    """The places of the ranks of this node."""
    hosts = [member.host for member in meeting.members for _ in range(processes)]
    first = meeting.number * processes
    here = [rank for rank, host in enumerate(hosts) if host == hosts[first]]
    several = len(set(hosts)) > 1
    return [
        Seat(
            rank=rank,
            world_size=len(hosts),
            local=here.index(rank),
            local_size=len(here),
            host=meeting.host,
            store_port=meeting.store_port,
            title=f"rank {rank} on {hosts[rank]}" if several else f"rank {rank}",
        )
        for rank in range(first, first + processes)
    ]


def _point_of_task(config: Nodes, task: Task) -> tuple[str, int, Role]:
    """Where processes of another launcher meet: task 0 is the host there."""
    role = Role.HOST if task.number == 0 else Role.GUEST
    if config.rendezvous is not None:
        return *parse_rendezvous(config.rendezvous), role
    if task.host is None:
        raise LaunchError(
            f"{task.way} does not tell where the first process runs, and launch.rendezvous is not "
            "set: give host:port of its node"
        )
    port = meeting_port(task.key) if task.port is None else task.port
    return task.host, port, Role.BY_STORE if task.keeps_store else role


def _meeting_point(
    config: Nodes, host: str, port: int, role: Role, *, job: str, unit: str, count: int
) -> MeetingPoint:
    gathering = Gathering(
        job=job, unit=unit, count=count, where=f"{host}:{port}", seconds=config.join_seconds
    )
    return MeetingPoint(host=host, port=port, role=role, gathering=gathering)
