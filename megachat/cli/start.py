"""Starts the `megachat` command, and ends it in one line whatever comes.

It imports next to nothing before it listens for signals: a Ctrl-C while Python still imports would
otherwise leave a traceback.
"""

import signal
import sys

from megachat.errors import MegachatError
from megachat.parallel.openmp import let_idle_threads_sleep
from megachat.parallel.signals import Signalled, catch_signals, told_to_end
from megachat.telemetry.crash import as_megachat_error


def main() -> None:
    """Entry point of the `megachat` script."""
    catch_signals()
    let_idle_threads_sleep()
    try:
        from megachat.cli.main import app

        app()
    except (Exception, Signalled) as error:
        sys.exit(report(error))


def report(error: BaseException) -> int:
    """Writes the line that a person reads to standard error; returns the exit status."""
    told = _told(error)
    line = f"{type(told).__name__}: {told}\n"
    try:
        sys.stderr.write(line)
        sys.stderr.flush()
    except OSError:
        pass  # nobody reads it, or the disk that it goes to is full; the status says it still
    return told.exit_code


def _told(error: BaseException) -> MegachatError:
    if isinstance(error, Signalled):
        return told_to_end(error.number)
    if isinstance(error, KeyboardInterrupt):
        return told_to_end(signal.SIGINT)
    return as_megachat_error(error)


if __name__ == "__main__":
    main()
