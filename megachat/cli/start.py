"""Starts the `megachat` command, and ends it in one line whatever comes.

It imports next to nothing before it listens for signals: a Ctrl-C while Python still imports would
otherwise leave a traceback.
"""

import sys

from megachat.parallel.openmp import let_idle_threads_sleep
from megachat.parallel.signals import Signalled, catch_signals, report


def main() -> None:
    """Entry point of the `megachat` script."""
    catch_signals()
    let_idle_threads_sleep()
    try:
        from megachat.cli.main import app

        app()
    except (Exception, Signalled) as error:
        sys.exit(report(error))


if __name__ == "__main__":
    main()
