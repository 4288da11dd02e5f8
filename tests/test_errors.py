import inspect

from megachat import errors
from megachat.errors import ConfigError, InternalError, MegachatError, SignalError


def _error_classes() -> list[type[Exception]]:
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


def test_every_error_is_a_direct_child_of_one_base() -> None:
    """The launcher finds a rank's error class by its name in this module."""
    leaves = [kind for kind in _error_classes() if kind is not MegachatError]
    assert len(leaves) >= 7
    assert all(kind.__bases__ == (MegachatError,) for kind in leaves)
    assert MegachatError.__bases__ == (Exception,)


def test_an_error_is_its_message() -> None:
    for kind in _error_classes():
        error = kind("hidden 30 is not a multiple of heads 4: change one of them")
        assert str(error) == "hidden 30 is not a multiple of heads 4: change one of them"
        assert kind.__doc__


def test_exit_codes_tell_mistakes_bugs_and_signals_apart() -> None:
    signalled = SignalError("told to end")
    signalled.number = 15
    assert (ConfigError("x").exit_code, InternalError("x").exit_code) == (2, 1)
    assert (signalled.exit_code, SignalError("x").exit_code) == (143, 130)
