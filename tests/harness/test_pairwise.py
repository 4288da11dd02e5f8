import itertools
from typing import Any

import pytest

from tests.harness.pairwise import pairwise

TABLES = [
    ("ab", "xyz"),
    ("abcdef", "xy", (1, 2)),
    ("ab", "xy", (1, 2), (3, 4), (True, False)),
    ("abc", "xyz", (1, 2, 3), (4, 5, 6)),
    ("a", "x", (1, 2, 3)),
]


@pytest.mark.parametrize(
    "columns", TABLES, ids=lambda columns: "x".join(map(str, map(len, columns)))
)
def test_every_two_values_meet_in_some_row(columns: tuple[Any, ...]) -> None:
    rows = pairwise(*columns)
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(itertools.product(*columns))
    for a, b in itertools.combinations(range(len(columns)), 2):
        met = {(row[a], row[b]) for row in rows}
        assert met == set(itertools.product(columns[a], columns[b])), (a, b)


@pytest.mark.parametrize(("columns", "most"), [(TABLES[1], 12), (TABLES[2], 8), (TABLES[3], 12)])
def test_there_are_few_rows_and_always_the_same(columns: tuple[Any, ...], most: int) -> None:
    """Of 24, 32 and 81 in the full tables; never fewer than the two longest columns' product."""
    rows = pairwise(*columns)
    longest = sorted(map(len, columns))[-2:]
    assert longest[0] * longest[1] <= len(rows) <= most
    assert rows == pairwise(*columns)


def test_a_row_that_has_to_be_in_is_in() -> None:
    assert ("b", "y", 2) in pairwise("ab", "xy", (1, 2), first=("b", "y", 2))
    assert len(pairwise("ab", "xy", (1, 2), first=("b", "y", 2))) <= 5
