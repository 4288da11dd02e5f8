"""What top-k and top-p keep, against sorted lists in float64, and over a tensor group."""

import pytest
import torch
from torch import Tensor

from megachat.ops.truncation import lowest_kept
from megachat.parallel.groups import ProcessGroups
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks

ROWS, COLUMNS = 40, 600
RULES = ((1, 1.0), (30, 1.0), (500, 1.0), (0, 0.02), (0, 0.7), (0, 0.999), (30, 0.6), (500, 0.9))
"""Top-k and top-p; 500 tokens are more than a rank of two has, and more than are possible."""


def _choice() -> Tensor:
    """Logits of both signs with exact ties; every other token is impossible behind the 200th."""
    generator = torch.Generator().manual_seed(1)
    choice = (2 * torch.randn(ROWS, COLUMNS, generator=generator)).bfloat16().float()
    choice[:, 200::2] = -torch.inf
    return choice


def _expected(choice: Tensor, top_k: int, top_p: float) -> Tensor:
    """Row by row: the last of the largest that are needed."""
    edges = []
    for row in choice.double():
        falling = row.sort(descending=True).values[: top_k or None]
        reached = falling.softmax(0).cumsum(0)
        needed = int((reached < top_p).sum()) if top_p < 1.0 else len(falling) - 1
        edges.append(falling[needed])
    return torch.stack(edges).float()


@pytest.mark.parametrize(("top_k", "top_p"), RULES)
def test_the_edge_is_the_last_of_the_largest_that_are_needed(top_k: int, top_p: float) -> None:
    choice = _choice()
    found = lowest_kept(choice, top_k=top_k, top_p=top_p)
    assert torch.equal(found, _expected(choice, top_k, top_p))
    assert found.is_contiguous()


def _edges(tensor: int) -> list[Tensor]:
    """By all rules, on a rank that has its part of the columns."""
    group = ProcessGroups.create(ParallelLayout(tensor=tensor)).tensor
    mine = _choice().chunk(tensor, dim=1)[group.rank()]
    return [lowest_kept(mine, top_k=top_k, top_p=top_p, group=group) for top_k, top_p in RULES]


@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_ranks_find_the_edges_of_the_whole_vocabulary(tensor: int) -> None:
    choice = _choice()
    for found in run_ranks(tensor, _edges, tensor):
        for edges, (top_k, top_p) in zip(found, RULES, strict=True):
            assert torch.equal(edges, lowest_kept(choice, top_k=top_k, top_p=top_p))
