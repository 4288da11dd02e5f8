"""Says of a failure who failed and how, and which of several came first.

A rank that breaks down takes others with it: their collectives end with "connection closed by
peer", or NCCL's watchdog aborts them. Which of these is the cause is not a matter of clocks, which
differ between nodes: a cause outranks a consequence, and among equals the first to arrive is taken.
"""

import json
import re
import signal
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum

import torch.distributed as dist

from megachat import errors
from megachat.errors import LaunchError, MegachatError, SignalError
from megachat.parallel import signals
from megachat.parallel.signals import Signalled, name_of
from megachat.telemetry.crash import as_megachat_error, refusal_of

_OF_A_BACKEND = re.compile(r"gloo|NCCL|peer|remote worker|GLHF", re.IGNORECASE)
"""In messages of RuntimeErrors that a backend raises when a peer is gone."""


class Severity(IntEnum):
    """How likely a failure is the cause of the others; the lowest is the news."""

    CAUSE = 0
    """An error that a rank raised by itself, a process that was killed, a node that is gone."""
    ABORT = 1
    """An abort: on CUDA mostly NCCL's watchdog, which acts when some other rank is missing."""
    CONSEQUENCE = 2
    """A collective that broke down, as it does when a peer is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What ended a rank or a node, as it travels to all the others."""

    message: str
    kind: str = LaunchError.__name__
    """Name of the class in `megachat.errors` that is raised for it."""
    severity: Severity = Severity.CAUSE
    number: int | None = None
    """Of the signal that asked for it, where one did."""

    def error(self) -> MegachatError:
        """The exception to raise for it."""
        kind = vars(errors).get(self.kind)
        if not (isinstance(kind, type) and issubclass(kind, MegachatError)):
            kind = LaunchError
        error = kind(self.message)
        if isinstance(error, SignalError) and self.number is not None:
            error.number = self.number
        return error

    def to_json(self) -> str:
        """As text of one line."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Failure":
        """Inverse of `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "severity": Severity(values["severity"])})


def failure_of(error: BaseException, *, origin: str) -> Failure:
    """What a rank raised; the stack of what nobody expected goes to this process's log file.

    Args:
        error: The exception.
        origin: The rank, as messages name it.
    """
    if isinstance(error, KeyboardInterrupt):
        return told_to_end(signal.SIGINT)
    if isinstance(error, Signalled):
        return told_to_end(error.number)
    told = as_megachat_error(error, origin=origin)
    return Failure(
        kind=type(told).__name__,
        message=str(told),
        severity=Severity.CONSEQUENCE if lost_a_peer(error) else Severity.CAUSE,
        number=told.number if isinstance(told, SignalError) else None,
    )


def told_to_end(number: int) -> Failure:
    """The end that a signal asked for."""
    error = signals.told_to_end(number)
    return Failure(kind=type(error).__name__, message=str(error), number=number)


def death_of(origin: str, exit_code: int, *, on_cuda: bool) -> Failure:
    """A process that ended without a word.

    Args:
        origin: The rank, as messages name it.
        exit_code: Negative for a signal, as `multiprocessing` gives it.
        on_cuda: Whether the ranks talk through NCCL, whose watchdog ends a process by SIGABRT.
    """
    if exit_code == -signal.SIGKILL:
        return Failure(message=f"{origin} was killed by SIGKILL: see whether memory ran out")
    if exit_code == -signal.SIGABRT and on_cuda:
        return Failure(
            message=f"{origin} was aborted (SIGABRT): on CUDA mostly by NCCL's watchdog, after a "
            "collective that failed or waited too long for another rank; its lines above name it",
            severity=Severity.ABORT,
        )
    if exit_code == -signal.SIGABRT:
        return Failure(
            message=f"{origin} was aborted (SIGABRT): what it wrote above says why",
            severity=Severity.ABORT,
        )
    if -exit_code in signals.ENDING:  # sent to all processes of the job
        return told_to_end(-exit_code)
    if exit_code < 0:
        return Failure(message=f"{origin} was killed by {name_of(-exit_code)}")
    return Failure(message=f"{origin} ended without a message: exit code {exit_code}")


def lost_a_peer(error: BaseException) -> bool:
    """Whether an exception says no more than that a collective or store broke down."""
    if refusal_of(error) is not None:
        return False
    return any(
        isinstance(cause, dist.DistError)
        or (isinstance(cause, RuntimeError) and _OF_A_BACKEND.search(str(cause)) is not None)
        for cause in _chain(error)
    )


def first_cause(failures: Iterable[Failure]) -> Failure:
    """The news among failures in order of their arrival."""
    return min(failures, key=lambda failure: failure.severity)


def first_line(error: BaseException) -> str:
    """The first line of an exception's summary, without its stack."""
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
