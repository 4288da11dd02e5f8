"""Multi-rank tests on one machine."""

from tests.harness.ranks import RankError, run_ranks

__all__ = ["RankError", "run_ranks"]
