"""`pairwise`: rows of a table of parameters in which every two values meet, not all rows.

A fault that takes two particular values to show itself, such as a layout and a norm order, is seen
as with all rows; one that takes three particular values may be missed.
"""

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(*columns: Sequence[Any], first: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
    """Rows with one value of each column; every pair of values of two columns is in some row.

    Args:
        columns: The values of each parameter, at least two parameters.
        first: A row to begin with.

    Returns:
        The same rows in every run, sorted as in the full product.
    """
    indices = [range(len(column)) for column in columns]
    open_pairs = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(columns)), 2)
        for i, j in itertools.product(indices[a], indices[b])
    }
    product, chosen = list(itertools.product(*indices)), []
    if first is not None:
        row = tuple(column.index(value) for column, value in zip(columns, first, strict=True))
        product.insert(0, row)
    while open_pairs:
        # The first of those that close most; with `first`, that row whatever it closes.
        is_given = first is not None and not chosen
        best = (
            product[0] if is_given else max(product, key=lambda row: len(_pairs(row, open_pairs)))
        )
        open_pairs -= _pairs(best, open_pairs)
        chosen.append(best)
    return [
        tuple(column[i] for column, i in zip(columns, row, strict=True)) for row in sorted(chosen)
    ]


_Pair = tuple[tuple[int, int], tuple[int, int]]


def _pairs(row: tuple[int, ...], wanted: set[_Pair]) -> set[_Pair]:
    """Those of the wanted pairs that a row has."""
    pairs = itertools.combinations(enumerate(row), 2)
    return {(first, second) for first, second in pairs} & wanted
