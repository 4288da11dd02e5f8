"""Lets one rank work for long while others wait, outside any collective: `Board`, `on_first_rank`.

A collective that waits longer than its group's timeout ends a job (NCCL's watchdog does), and a
disk may take that long. So who reads, writes or trains a tokenizer says in the store of the job
that it is done, the others ask the store from time to time, and a collective begins only when
everyone has something to do in it. A failure is told the same way, so nobody waits for a result
that will not come.
"""

import itertools
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megachat.errors import LaunchError, MegachatError
from megachat.parallel import HANDOVER_LIMIT

T = TypeVar("T")

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.001, 0.25
_POLL_SHARE = 0.1
"""A rank asks again after this share of the time it has waited: late by a tenth at most."""

_FAILED = "failed"
_BYTES = "bytes"

_boards = itertools.count()
"""Boards that this process has opened. All ranks open them in the same order, as they call
collectives, so that the number tells one board's messages from another's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Result:
    """What a working rank leaves for the others."""

    value: object = None
    failure: MegachatError | None = None
    crash: str | None = None
    """Traceback of any other error."""


class Board:
    """Messages between the ranks of one task; each rank opens it at the same point of the program.

    A message is posted once, by one rank, under a name that the others know. It says that something
    is ready, or why it never will be.
    """

    def __init__(self, task: str, *, limit: timedelta = HANDOVER_LIMIT) -> None:
        """Opens the board; no communication.

        Args:
            task: What the ranks are doing, for messages: "reading /models/opt-66b".
            limit: How long a rank may wait for a message.
        """
        world = dist.group.WORLD
        assert world is not None, "the process has joined a world"
        self._store = world.get_group_store()
        self._prefix = f"megachat/{next(_boards)}/"
        self._rank = dist.get_rank()
        self._task = task
        self._limit = limit

    def post(self, name: str, failure: MegachatError | None = None) -> None:
        """Says that `name` is ready, or that it failed; once a name."""
        if failure is not None:
            self._put(_FAILED, failure)
        self._put(name, failure)

    def failure(self) -> MegachatError | None:
        """A failure that any rank has posted so far; ranks may see it at different times."""
        return self._take(_FAILED) if self._has(_FAILED) else None

    def wait(
        self, names: Sequence[str], *, meanwhile: Callable[[], None] | None = None
    ) -> MegachatError | None:
        """Waits until all names are posted; equal on all ranks that wait for the same names.

        Args:
            names: What to wait for.
            meanwhile: Called between two looks at the store.

        Returns:
            The failure posted under the first of the names that has one.

        Raises:
            LaunchError: Something was not posted within the limit.
        """
        self._poll(lambda: self._has(*names), meanwhile)
        failures = (self._take(name) for name in names)
        return next((failure for failure in failures if failure is not None), None)

    def conclude(
        self,
        own: str | None,
        failure: MegachatError | None,
        *,
        names: Sequence[str],
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Ends a task on all ranks alike: when all of its parts are done, or one has failed.

        Args:
            own: The part that this rank speaks for, if any.
            failure: What became of it.
            names: All parts.
            meanwhile: Called between two looks at the store.

        Raises:
            MegachatError: The failure of the first part that has one, on every rank.
            LaunchError: A part did not end within the limit.
        """
        if own is not None:
            self.post(own, failure)
        first = self.wait(names, meanwhile=meanwhile)
        if first is not None:
            raise first

    def tell(self, name: str, value: object) -> None:
        """Posts a picklable value for `hear`."""
        self._put(name, value)

    def hear(self, name: str) -> Any:
        """Waits for what one rank tells.

        Raises:
            LaunchError: It was not told within the limit.
        """
        self._poll(lambda: self._has(name), None)
        return self._take(name)

    def meet(self, name: str) -> None:
        """Waits until every rank of the world has called this.

        Raises:
            LaunchError: Some rank did not within the limit.
        """
        if self._store.add(f"{self._prefix}{name}/arrived", 1) == dist.get_world_size():
            self._put(name, None)
        self.hear(name)

    def count_bytes(self, amount: int = 0) -> int:
        """Adds to the bytes that all ranks have moved so far, and returns the sum."""
        return self._store.add(self._prefix + _BYTES, amount)

    def _has(self, *names: str) -> bool:
        return self._store.check([self._prefix + name for name in names])

    def _put(self, name: str, value: object) -> None:
        content = pickle.dumps(value)
        self._store.set(self._prefix + name, content)  # type: ignore[arg-type]  # takes bytes too

    def _take(self, name: str) -> Any:
        """What a rank of this job has put there."""
        return pickle.loads(self._store.get(self._prefix + name))

    def _poll(self, ready: Callable[[], bool], meanwhile: Callable[[], None] | None) -> None:
        # Not `Store.wait`: it would hold the client, which NCCL's own threads use too.
        started = time.monotonic()
        while not ready():
            waited = time.monotonic() - started
            if waited > self._limit.total_seconds():
                raise LaunchError(
                    f"rank {self._rank} has waited {self._limit} for another rank, {self._task}: "
                    "see whether the file system answers and whether all ranks are alive"
                )
            if meanwhile is not None:
                meanwhile()
            time.sleep(min(max(_SHORTEST_POLL_S, waited * _POLL_SHARE), _LONGEST_POLL_S))


def store_barrier(task: str, *, limit: timedelta = HANDOVER_LIMIT) -> None:
    """Waits until every rank of the world has arrived, outside any collective.

    Args:
        task: What a rank that is late is doing, for the message.
        limit: How long to wait.

    Raises:
        LaunchError: Some rank did not arrive within the limit.
    """
    Board(task, limit=limit).meet("all")


def on_first_rank(work: Callable[[], T], *, task: str, limit: timedelta = HANDOVER_LIMIT) -> T:
    """Runs `work` on rank 0 and returns its picklable result on every rank.

    All ranks call it alike; what they hand over as `work` is called on rank 0 only.

    Args:
        work: Takes as long as it needs, up to the limit.
        task: What it does, for messages: "training a tokenizer".
        limit: How long the others wait.

    Raises:
        MegachatError: What `work` raised, on every rank.
        LaunchError: It did not end within the limit.
        RuntimeError: On the other ranks, if it raised anything else on rank 0.
    """
    board = Board(task, limit=limit)
    if dist.get_rank() == 0:
        try:
            value = work()
        except MegachatError as error:
            board.tell("result", _Result(failure=error))
            raise
        except Exception:
            board.tell("result", _Result(crash=traceback.format_exc()))
            raise
        board.tell("result", _Result(value=value))
        return value
    result: _Result = board.hear("result")
    if result.failure is not None:
        raise result.failure
    if result.crash is not None:
        raise RuntimeError(f"rank 0 failed, {task}:\n{result.crash}")
    return cast(T, result.value)
