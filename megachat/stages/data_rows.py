"""Prepares the rows of a stage, and says in the log and beside the metrics what became of them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megachat.data.config import Stage
from megachat.data.stage_data import DataReport, SourceReport, StageData, build_stage_data
from megachat.parallel.handover import store_barrier
from megachat.stages.context import STAGE_TITLES, RunContext
from megachat.stages.results import write_json
from megachat.telemetry.report import Table

logger = logging.getLogger(__name__)

DATA_FILE = "data.json"
"""In a stage's folder: what each source gave to it."""

_DROPPED, _CUT = "dropped: ", "kept: "
"""How the outcomes of rows begin."""


def prepare_rows(context: RunContext, stage: Stage) -> StageData:
    """The rows of a stage; all ranks call it alike.

    Raises:
        DataError: A source is unusable, or nothing is left for the stage.
        ConfigError: The stage's folder cannot be written.
    """
    data = build_stage_data(context.config.data, stage=stage, tokenizer=context.tokenizer)
    for line in data.report.lines():
        logger.info("data for %s: %s", stage, line)
    if context.worker.rank == 0:
        write_json(context.folder(stage) / DATA_FILE, asdict(data.report))
    store_barrier("preparing the data")
    return data


def read_rows(folder: Path) -> DataReport | None:
    """What `prepare_rows` noted down in a stage's folder; None where it is not to be read."""
    try:
        values = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
        return DataReport(
            stage=Stage(values["stage"]),
            sources=tuple(SourceReport(**source) for source in values["sources"]),
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def rows_table(reports: Mapping[Stage, DataReport]) -> Table | None:
    """What was left out of each source and cut, by stage; None where nothing is known."""
    rows = [
        (
            STAGE_TITLES[stage],
            source.name,
            f"{source.train_rows:,} + {source.validation_rows:,}",
            f"{source.bad:,}",
            _counted(source, _CUT),
            _counted(source, _DROPPED),
        )
        for stage, report in reports.items()
        for source in report.sources
        if source.train_rows or source.validation_rows or source.outcomes
    ]
    if not rows:
        return None
    return Table(
        title="Data",
        header=("stage", "source", "rows + held out", "unusable", "cut", "dropped"),
        rows=rows,
        note="unusable: records of the whole source; limits are data.max_prompt_tokens, "
        "data.max_tokens, data.max_answer_tokens and data.min_answer_tokens",
    )


def _counted(source: SourceReport, kind: str) -> str:
    """Outcomes of one kind, `3 answer truncated`; `-` where there are none."""
    found = [
        f"{count:,} {outcome.removeprefix(kind)}"
        for outcome, count in source.outcomes.items()
        if outcome.startswith(kind)
    ]
    return ", ".join(found) or "-"
