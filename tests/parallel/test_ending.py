import os
import signal

import pytest

from megachat.errors import LaunchError
from megachat.parallel.ending import signals_raise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_raised_once_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(LaunchError, match=f"ended by {number.name}, as it was told"):
        with signals_raise():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)  # an impatient user does not break the end
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
