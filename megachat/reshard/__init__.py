"""Training weights become generation weights in place, and back, without a second copy.

Only what is pure is gathered here; `arena` and `execute` need torch.
"""

from megachat.reshard.plan import (
    HopOrder,
    NodeSpan,
    RankPlan,
    ReshardPlan,
    Traffic,
    build_reshard_plan,
    plan_for_model,
    plan_rank,
)

__all__ = [
    "HopOrder",
    "NodeSpan",
    "RankPlan",
    "ReshardPlan",
    "Traffic",
    "build_reshard_plan",
    "plan_for_model",
    "plan_rank",
]
