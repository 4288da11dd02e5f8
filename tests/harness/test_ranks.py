import pytest
import torch
import torch.distributed as dist

from tests.harness import RankError, run_ranks


def _sum_of_ranks(offset: int) -> float:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return value.item()


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one gives up")
    dist.barrier()


def test_results_come_back_in_rank_order_after_a_collective() -> None:
    assert run_ranks(4, _sum_of_ranks, 10) == [46.0] * 4


def test_a_failing_rank_shows_its_own_traceback_and_ends_the_others() -> None:
    with pytest.raises(RankError, match="rank one gives up"):
        run_ranks(2, _fail_on_rank_one)
