"""What the stage loops share: their length, held-out batches and the files of an export."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from megachat.checkpoint.huggingface import save_huggingface
from megachat.data.config import Stage
from megachat.data.loaders import BatchLoader, BatchT, LoaderOptions
from megachat.data.stage_data import TokenSet
from megachat.errors import DataError
from megachat.model.opt import OptModel
from megachat.stages.config import RewardSection, RlhfSection, RunConfig, SftSection, StepLimit
from megachat.stages.context import RunContext, tokenizer_folder
from megachat.stages.starts import STAGE_FOLDERS
from megachat.training.schedules import OptimizerConfig

_EVALUATION_ROWS = 256
"""Rows of a global batch of evaluation."""

logger = logging.getLogger(__name__)


def plan_steps(
    stage: Stage, section: SftSection | RewardSection | RlhfSection, *, steps_per_epoch: int
) -> int:
    """The number of steps of a stage; the log says which key it comes from."""
    steps, limit = section.num_steps(steps_per_epoch), section.step_limit(steps_per_epoch)
    key = f"{STAGE_FOLDERS[stage]}.{limit}"
    length = f"{stage}: {steps} steps of {steps_per_epoch} an epoch"
    if limit is StepLimit.EPOCHS and section.max_steps is not None:
        logger.warning(
            "%s: %s %d ends the stage before the %d steps of max_steps: raise it or leave it out",
            *(length, key, section.epochs, section.max_steps),
        )
    else:
        logger.info("%s, ended by %s", length, key)
    return steps


def warn_of_long_warmup(
    stage: Stage, optimizers: Mapping[str, OptimizerConfig], *, num_updates: int
) -> None:
    """Says so where a learning rate never comes to its peak.

    Args:
        stage: Whose they are.
        optimizers: By their key in the stage's section.
        num_updates: Optimizer steps that each of them takes.
    """
    for key, optimizer in optimizers.items():
        if optimizer.warmup_steps > num_updates:
            logger.warning(
                "%s.%s.warmup_steps %d is more than the %d updates of the stage: the learning rate "
                "ends at %.0f %% of its peak",
                *(STAGE_FOLDERS[stage], key, optimizer.warmup_steps, num_updates),
                100 * num_updates / optimizer.warmup_steps,
            )


def held_out_batches(
    loader: type[BatchLoader[BatchT]], rows: TokenSet, *, count: int
) -> list[BatchT]:
    """The first `count` held-out rows (or all there are), in a fixed order.

    Raises:
        DataError: There are no held-out rows.
    """
    if not len(rows):
        raise DataError(
            f"data for {rows.stage}: no held-out rows to evaluate on: raise data.validation_share"
        )
    count = min(count, len(rows))
    batches: list[BatchT] = []
    for batch in loader(rows, LoaderOptions.for_evaluation(batch_size=_EVALUATION_ROWS)):
        left = count - len(batches) * _EVALUATION_ROWS
        if left <= 0:
            break
        batches.append(batch if batch.num_rows <= left else batch.select(torch.arange(left)))
    return batches


def export(context: RunContext, stage: Stage, model: OptModel, *, role: str) -> None:
    """Writes what a stage has learnt into its model folder; a collective call.

    Raises:
        CheckpointError: It cannot be written.
        DivergenceError: A weight is no finite number; nothing is written.
    """
    save_huggingface(
        model,
        context.model_folder(stage),
        extra_files=export_files(context.config),
        role=role,
    )


def export_files(config: RunConfig) -> Mapping[str, Path]:
    """Tokenizer files that belong into an exported model folder."""
    folder = tokenizer_folder(config)
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
