"""The one place for exceptions that megachat raises on purpose.

Every error a user can cause is a `MegachatError` whose message is one line: what was wrong, where,
the numbers on both sides, and what to change. The command line prints that line and exits with 2.
Anything else that escapes is a bug in megachat: an `InternalError`, whose stack is in a log file.
"""

import signal


class MegachatError(Exception):
    """Base of all errors that megachat raises on purpose."""

    exit_code: int = 2
    """Exit status of the command that it ends."""


class ConfigError(MegachatError):
    """A configuration key, value or combination of values that cannot be honoured."""


class LayoutError(MegachatError):
    """A parallel layout that does not fit the world size, the model or another layout."""


class DataError(MegachatError):
    """Missing, empty or malformed training data."""


class CheckpointError(MegachatError):
    """A missing, corrupt or mismatching model file."""


class CapacityError(MegachatError):
    """Something does not fit: memory, positions of the model, a cache, a disk."""


class KernelError(MegachatError):
    """A compute backend that is unavailable or cannot handle the given shapes or dtypes."""


class LaunchError(MegachatError):
    """Processes that could not be started, joined or kept together."""


class AgreementError(MegachatError):
    """Two ways to the same numbers that differ by more than round-off."""


class DivergenceError(MegachatError):
    """Training whose numbers are not finite any more: a loss, gradients, scores or weights."""


class PhaseError(MegachatError):
    """Weights or memory used in a phase of the run in which they are not valid."""


class HostError(MegachatError):
    """What the operating system refuses: space, rights, open files, memory."""


class SignalError(MegachatError):
    """A signal has ended the job, as it was told."""

    number: int = signal.SIGINT
    """Of the signal."""

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """Exit status of the command, as a shell tells that a signal ended a process."""
        return 128 + self.number


class InternalError(MegachatError):
    """A bug of megachat; the message names the log file that has its stack."""

    exit_code = 1
