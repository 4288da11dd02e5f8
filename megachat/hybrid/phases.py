"""The one place that says which memory leaves the device in which phase of a PPO step.

| | generation | scoring | training |
|---|---|---|---|
| actor's weights, own shard | device | device | device |
| actor's weights, other ranks' shards; key-value cache | device | - | - |
| actor's masters and moments | host with `offload_optimizer` | device | device |
| actor's gradients (bf16) | lent with `reuse_gradients` | device | device |
| critic's masters and moments | host with `offload_critic` | device | device |
| reference and reward model | host with `offload_scorers` | device | host likewise |

`megachat plan` counts the same four measures under the same names.
"""

from enum import StrEnum

from pydantic import Field

from megachat.config import ConfigModel


class Phase(StrEnum):
    """What the actor's memory is laid out for."""

    TRAINING = "training"
    GENERATION = "generation"


class MemoryMeasures(ConfigModel):
    """What makes room on the device during generation; nothing here changes a result.

    On the CPU device and host are one memory: nothing is gained there, and the copies cost.
    """

    offload_optimizer: bool = Field(
        default=False,
        description="The actor's fp32 masters and moments are in host memory meanwhile.",
    )
    reuse_gradients: bool = Field(
        default=False,
        description="The actor's fp32 gradients, which hold nothing then, lend their memory. With "
        "precision fp32 there are none between steps.",
    )
    offload_critic: bool = Field(
        default=False,
        description="The critic's fp32 masters and moments are in host memory meanwhile.",
    )
    offload_scorers: bool = Field(
        default=False,
        description="Reference and reward model are in host memory except while they score.",
    )
