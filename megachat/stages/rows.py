"""Makes sure that there are enough rows for every stage, before the first of them starts."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from megachat.data.config import Stage
from megachat.errors import DataError
from megachat.stages.config import RunConfig

if TYPE_CHECKING:
    from megachat.data.tokenizer import Tokenizer


def check_rows(config: RunConfig, stage: Stage, *, train: int, held_out: int) -> None:
    """Refuses too few rows for one batch, or none to evaluate on (pure).

    Args:
        config: The run.
        stage: Whose rows they are.
        train: Rows of an epoch.
        held_out: Rows to evaluate on.

    Raises:
        DataError: With both numbers and the key to change.
    """
    key, batch = _batch(config, stage)
    share = config.data.validation_share
    if not train:
        raise DataError(
            f"data for {stage}: no rows to train on: raise its share in data.split, or give more "
            "data"
        )
    if train < batch:
        raise DataError(
            f"data for {stage}: {train} rows to train on do not make one batch of {key} "
            f"{batch}: lower it, or give more data"
        )
    if not held_out:
        raise DataError(
            f"data for {stage}: no held-out rows to evaluate on (data.validation_share is "
            f"{share:g}): raise data.validation_share"
        )


def prepare_rows(config: RunConfig, tokenizer: "Tokenizer", stages: Iterable[Stage]) -> None:
    """Prepares the data of all stages in the cache, which each of them then finds there.

    Otherwise the last stage could find out after the others have run that it has nothing to do.

    Raises:
        DataError: Too few rows, or as `megachat.data.stage_data.build_stage_data`.
    """
    from megachat.data.stage_data import build_stage_data

    for stage in stages:
        data = build_stage_data(config.data, stage=stage, tokenizer=tokenizer)
        train = sum(part.rows_per_epoch for part in data.train.parts)
        check_rows(config, stage, train=train, held_out=len(data.validation))


def _batch(config: RunConfig, stage: Stage) -> tuple[str, int]:
    """The key of a stage's batch and its rows."""
    return {
        Stage.SFT: ("sft.batch_rows", config.sft.batch_rows),
        Stage.REWARD: ("reward.batch_pairs", config.reward.batch_pairs),
        Stage.PROMPTS: ("rlhf.batch_prompts", config.rlhf.batch_prompts),
    }[stage]
