"""Makes sure that every stage has enough rows before the first starts; says what is left out."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

from megachat.data.config import Stage
from megachat.errors import DataError
from megachat.stages.config import RunConfig

if TYPE_CHECKING:
    from megachat.data.stage_data import DataReport
    from megachat.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


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


def prepare_all_rows(config: RunConfig, tokenizer: "Tokenizer", stages: Iterable[Stage]) -> None:
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
        for line in left_out_of_evaluation(config, data.report):
            logger.info(line)


def left_out_of_evaluation(config: RunConfig, report: "DataReport") -> list[str]:
    """A line for each limit that leaves held-out rows of a stage out of its evaluation."""
    stage, lines = report.stage, []
    for source in report.sources:
        if source.beyond_limit:
            total = source.validation_rows + source.beyond_limit
            lines.append(
                f"data for {stage}: {source.name}: {source.validation_rows} of {total} rows are "
                "held out, the most that data.max_validation_rows "
                f"{config.data.max_validation_rows} allows"
            )
    held_out = sum(source.validation_rows for source in report.sources)
    section, limit = _evaluation(config, stage)
    if limit < held_out:
        lines.append(
            f"data for {stage}: the first {limit} of {held_out} held-out rows are evaluated "
            f"({section}.evaluation_rows): {held_out - limit} are left out"
        )
    return lines


def _evaluation(config: RunConfig, stage: Stage) -> tuple[str, int]:
    """The name of a stage's section and its limit."""
    return {
        Stage.SFT: ("sft", config.sft.evaluation_rows),
        Stage.REWARD: ("reward", config.reward.evaluation_rows),
        Stage.PROMPTS: ("rlhf", config.rlhf.evaluation_rows),
    }[stage]


def _batch(config: RunConfig, stage: Stage) -> tuple[str, int]:
    """The key of a stage's batch and its rows."""
    return {
        Stage.SFT: ("sft.batch_rows", config.sft.batch_rows),
        Stage.REWARD: ("reward.batch_pairs", config.reward.batch_pairs),
        Stage.PROMPTS: ("rlhf.batch_prompts", config.rlhf.batch_prompts),
    }[stage]
