import os
import signal
import subprocess
import sys

import pytest

from megachat.errors import SignalError
from megachat.parallel.signals import ENDING, signals_raise


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_is_raised_once_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in ENDING]
    with pytest.raises(SignalError, match=f"ended by {number.name}, as it was told") as caught:
        with signals_raise():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)  # an impatient user does not break the end
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(each) for each in ENDING] == before


def test_a_guard_inside_another_leaves_the_second_signal_ignored() -> None:
    with pytest.raises(SignalError, match="SIGINT"):
        with signals_raise():
            try:
                with signals_raise():
                    os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)


def test_what_was_ignored_from_the_start_stays_ignored() -> None:
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_raise():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_child_ignores_signals_from_its_first_moment_and_one_to_its_parent_waits() -> None:
    """Ctrl-C comes to a fork server that still imports, too.

    In a process of its own: one that runs tests has threads, which may take the signal.
    """
    result = subprocess.run(
        [sys.executable, "-c", _PARENT], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert result.stdout == "0 'alive\\n' ''\nthe job was ended by SIGINT, as it was told\n"


_PARENT = """
import os, signal, subprocess, sys
from megachat.errors import SignalError
from megachat.parallel.signals import children_ignore_signals, signals_raise

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs tests may ignore it
code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
try:
    with signals_raise():
        with children_ignore_signals():
            os.kill(os.getpid(), signal.SIGINT)
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
except SignalError as error:
    print(child.returncode, repr(child.stdout), repr(child.stderr))
    print(error)
"""
