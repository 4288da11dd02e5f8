"""Starts the ranks of a node, learns how each of them ends, and ends them.

A rank holds one end of a pipe, through which it says why it fails. The other end is in the launcher
alone: when the launcher dies, however it dies, the rank reads the end of the pipe and leaves.
"""

import multiprocessing.util
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from megachat.parallel.failures import Failure, death_of
from megachat.parallel.signals import children_ignore_signals

ORPHANED = 3
"""Exit status of a rank whose launcher is gone; nobody is left to read it."""
_LAST_WORDS_SECONDS = 10.0
"""How long a rank that has said why it fails waits for its launcher to end it."""


@dataclass(slots=True)
class _Rank:
    """A started rank as its launcher sees it."""

    origin: str
    process: BaseProcess
    pipe: Connection
    open: bool = True
    """Whether the pipe may still bring something."""


class LocalRanks:
    """The ranks of this node."""

    def __init__(self, context: BaseContext, *, on_cuda: bool) -> None:
        """None yet.

        Args:
            context: How processes are started.
            on_cuda: Whether the ranks talk through NCCL.
        """
        self._context, self._on_cuda = context, on_cuda
        self._ranks: list[_Rank] = []

    def start(self, origin: str, target: Callable[..., None], *args: Any) -> None:
        """Starts `target(channel, *args)`.

        Args:
            origin: How messages name the rank.
            target: A function of a module; `channel` is the rank's `Channel`.
            args: What it gets.
        """
        mine, theirs = self._context.Pipe()
        # A launcher that a program of its own has started shares that program's folder.
        owned = multiprocessing.parent_process() is None
        folder = multiprocessing.util.get_temp_dir() if owned else None
        process = self._context.Process(  # type: ignore[attr-defined]
            target=_run, args=(theirs, folder, target, args), name=origin
        )
        self._ranks.append(_Rank(origin, process, mine))
        with children_ignore_signals():
            process.start()
        theirs.close()

    @property
    def handles(self) -> Sequence[Any]:
        """What `multiprocessing.connection.wait` waits on for news of them."""
        pipes = [rank.pipe for rank in self._ranks if rank.open]
        return pipes + [rank.process.sentinel for rank in self._ranks]

    def collect(self) -> list[Failure]:
        """Failures since the last call; ranks that have ended well are forgotten."""
        failures = []
        for rank in list(self._ranks):
            said = _said(rank)
            if said is not None:
                failures.append(said)
            elif not rank.process.is_alive():
                # It may have spoken between the two questions.
                said = _said(rank)
                code = rank.process.exitcode or 0
                if said is not None:
                    failures.append(said)
                elif code != 0:
                    failures.append(death_of(rank.origin, code, on_cuda=self._on_cuda))
                self._ranks.remove(rank)
                rank.pipe.close()
        return failures

    @property
    def one_is_dying(self) -> bool:
        """Whether a rank has let go of its pipe, as at its end, and nobody knows yet how it ends.

        The fork server tells that a little later, and on a busy machine much later.
        """
        return any(not rank.open for rank in self._ranks)

    @property
    def all_done(self) -> bool:
        """Whether every rank has ended."""
        return not self._ranks

    def end(self) -> None:
        """Ends what still runs: a rank that lost a peer has nothing to save."""
        for rank in self._ranks:
            if rank.process.pid is not None and rank.process.is_alive():
                rank.process.kill()
        for rank in self._ranks:
            if rank.process.pid is not None:
                rank.process.join()
            rank.pipe.close()
        self._ranks.clear()


class Channel:
    """A rank's way to its launcher."""

    def __init__(self, pipe: Connection, *, folder: str | None = None) -> None:
        """Starts to watch whether the launcher lives.

        Args:
            pipe: To the launcher.
            folder: What the launcher would remove at its end: the fork server's socket is there.
        """
        self._pipe, self._folder = pipe, folder
        threading.Thread(target=self._watch, name="launcher", daemon=True).start()

    def leave(self, failure: Failure) -> NoReturn:
        """Says why this rank fails and ends the process, without any teardown.

        It stays until its launcher ends it: were it gone at once, the others would tell of their
        broken connections before anybody has told them why.
        """
        try:
            self._pipe.send(failure.to_json())
        except OSError:
            os._exit(ORPHANED)
        threading.Event().wait(_LAST_WORDS_SECONDS)
        os._exit(failure.error().exit_code)

    def _watch(self) -> None:
        """The launcher never sends: what can be read is the end."""
        self._pipe.poll(None)
        if self._folder is not None:  # nobody else is left to remove it
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(ORPHANED)


def _run(
    pipe: Connection, folder: str | None, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    target(Channel(pipe, folder=folder), *args)


def _said(rank: _Rank) -> Failure | None:
    """What a rank has written into its pipe."""
    try:
        if rank.open and rank.pipe.poll():
            return Failure.from_json(rank.pipe.recv())
    except (EOFError, OSError):
        rank.open = False
    return None
