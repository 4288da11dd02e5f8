"""An owner ends once, by whatever way comes first."""

import pytest

from megachat.errors import CapacityError, PhaseError
from megachat.parallel.lifetime import Owner


class Lamp(Owner):
    def __init__(self) -> None:
        self.ends = 0

    def _end(self) -> None:
        self.ends += 1


def test_an_owner_ends_once_and_says_so_to_who_uses_it_later() -> None:
    lamp = Lamp()
    lamp.check_open()
    with lamp as entered:
        assert entered is lamp and not lamp.ends
        lamp.close()
    lamp.close()
    assert lamp.ends == 1
    with pytest.raises(PhaseError, match="this Lamp was closed .* build a new one"):
        lamp.check_open()


def test_a_block_that_fails_ends_its_owner_too_and_keeps_its_error() -> None:
    lamp = Lamp()
    with pytest.raises(CapacityError, match="the error"), lamp:
        raise CapacityError("the error")
    assert lamp.ends == 1


def test_owners_end_apart_from_each_other() -> None:
    one, other = Lamp(), Lamp()
    one.close()
    other.check_open()
