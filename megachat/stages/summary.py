"""The one place that tells a person what a run did: closing summary and report."""

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from megachat.data.config import Stage
from megachat.data.stage_data import DataReport
from megachat.stages.config import RunConfig
from megachat.stages.context import (
    STAGE_TITLES,
    stage_folder,
)
from megachat.stages.data_rows import read_rows, rows_table
from megachat.stages.results import (
    MODEL_FOLDER,
    StageMemory,
    StageResult,
    write_text,
)
from megachat.stages.starts import STAGE_FOLDERS
from megachat.telemetry.log import active_console
from megachat.telemetry.progress import format_duration
from megachat.telemetry.report import Chart, Highlight, RunSummary, Sample, Table, write_report

logger = logging.getLogger(__name__)

_CHARTS = (
    Chart(stage="sft", title="Loss", metrics=("sft/loss",)),
    Chart(stage="sft", title="Token accuracy", metrics=("sft/token_accuracy",)),
    Chart(stage="reward", title="Loss", metrics=("reward/loss",)),
    Chart(stage="reward", title="Accuracy", metrics=("reward/accuracy",)),
    Chart(stage="rlhf", title="Score of the reward model", metrics=("rlhf/score",)),
    Chart(stage="rlhf", title="KL to the reference (nats/token)", metrics=("rlhf/kl",)),
    Chart(stage="rlhf", title="KL coefficient", metrics=("rlhf/kl_coefficient",)),
    Chart(stage="rlhf", title="Losses", metrics=("ppo/policy_loss", "ppo/value_loss")),
    Chart(
        stage="rlhf",
        title="Clip fractions",
        metrics=("ppo/clip_fraction", "ppo/value_clip_fraction"),
    ),
    Chart(stage="rlhf", title="Entropy", metrics=("ppo/entropy",)),
    Chart(stage="rlhf", title="Explained variance", metrics=("rlhf/explained_variance",)),
    Chart(stage="rlhf", title="Response length", metrics=("rlhf/response_length",)),
    Chart(
        stage="rlhf",
        title="Decoding against training (nats)",
        metrics=("rlhf/rollout_logprob_gap", "rlhf/rollout_logprob_gap_mean"),
    ),
)


def write_run_report(
    config: RunConfig, done: Mapping[Stage, StageResult], *, command: str, duration_s: float
) -> None:
    """Writes the report of all completed stages and shows the closing summary on the console."""
    rlhf = done.get(Stage.PROMPTS)
    summary = RunSummary(
        title=config.run.title,
        command=command,
        duration_s=duration_s,
        highlights=list(_highlights(done)),
        tables=[
            table
            for table in (
                _stage_table(done),
                rows_table(_data_reports(config, done)),
                _policy_table(rlhf),
                _reshard_table(rlhf),
            )
            if table is not None
        ],
        samples=[
            Sample(prompt=reply.prompt, before=reply.before, after=reply.after)
            for reply in (rlhf.replies if rlhf is not None else [])
        ],
        phase_seconds=rlhf.phase_seconds if rlhf is not None else {},
        charts=_CHARTS,
        stage_titles={STAGE_FOLDERS[stage]: title for stage, title in STAGE_TITLES.items()},
        configuration=config.model_dump(mode="json"),
        paths={
            "run folder": config.run.output,
            **{
                f"model after {STAGE_TITLES[stage]}": stage_folder(config, stage) / MODEL_FOLDER
                for stage in done
            },
        },
    )
    files = write_report(config.run.output, summary)
    text = "\n".join([*summary_lines(summary), f"report: {files.html}"])
    write_text(config.run.output / "summary.txt", text + "\n")
    if active_console() is not None:
        _show(text)


def _show(text: str) -> None:
    """Writes the summary to standard output; progress and log lines go to standard error."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError as error:  # nobody reads it any more, or that disk is full; the file has it
        logger.warning("the summary cannot be shown: %s", error.strerror)


def summary_lines(summary: RunSummary) -> Iterator[str]:
    """The closing summary as plain lines."""
    yield f"{summary.title}: done in {format_duration(summary.duration_s)}"
    for table in summary.tables:
        yield ""
        yield from _table_lines(table)
    for sample in summary.samples:
        yield ""
        yield f"prompt  {sample.prompt}"
        yield f"before  {sample.before}"
        yield f"after   {sample.after}"
    if summary.phase_seconds:
        yield ""
        total = math.fsum(summary.phase_seconds.values())
        width = 2 + max(map(len, summary.phase_seconds))
        for name, seconds in sorted(summary.phase_seconds.items(), key=lambda item: -item[1]):
            yield f"{name:{width}}{seconds:8.1f} s {100 * seconds / total:5.1f} %"
    yield ""
    for name, path in summary.paths.items():
        yield f"{name}: {path}"


def _table_lines(table: Table) -> Iterator[str]:
    """A table in aligned columns under its title."""
    rows: list[Sequence[str]] = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    yield table.title
    for row in rows:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(["  " + first, *rest])
    if table.note:
        yield "  " + table.note


def _data_reports(config: RunConfig, done: Iterable[Stage]) -> dict[Stage, DataReport]:
    """What the sources gave to the completed stages, where that is known."""
    found = {stage: read_rows(stage_folder(config, stage)) for stage in done}
    return {stage: report for stage, report in found.items() if report is not None}


def _highlights(done: Mapping[Stage, StageResult]) -> Iterator[Highlight]:
    """The figures a reader should see first."""
    if Stage.SFT in done:
        values = done[Stage.SFT].metrics
        yield Highlight(
            label="SFT perplexity",
            value=_figure(values["perplexity_after"], ".1f"),
            note=f"from {_figure(values['perplexity_before'], '.1f')}, held-out",
        )
    if Stage.REWARD in done:
        values = done[Stage.REWARD].metrics
        yield Highlight(
            label="Reward accuracy",
            value=_figure(values["accuracy"], ".1%"),
            note="held-out pairs",
        )
    if Stage.PROMPTS in done:
        values = done[Stage.PROMPTS].metrics
        yield Highlight(
            label="Score gain",
            value=f"{_figure(values['score_gain_in_std'], '+.2f')} SD",
            note="in standard deviations of the SFT replies' scores",
        )
        yield Highlight(
            label="KL to reference", value=_figure(values["kl"], ".3f"), note="nats per token"
        )
        if "truth_gain" in values:
            yield Highlight(
                label="Ground truth gain",
                value=_figure(values["truth_gain"], "+.3f"),
                note=f"95 % interval {_figure(values['truth_gain_low'], '.3f')} "
                f"to {_figure(values['truth_gain_high'], '.3f')}",
            )


def _stage_table(done: Mapping[Stage, StageResult]) -> Table | None:
    """What each stage took and reached."""
    if not done:
        return None
    reached = {
        Stage.SFT: lambda m: (
            f"perplexity {_figure(m['perplexity_before'], '.1f')} -> "
            f"{_figure(m['perplexity_after'], '.1f')}"
        ),
        Stage.REWARD: lambda m: (
            f"held-out pairs {_figure(m['accuracy'], '.1%')} right, "
            f"margin {_figure(m['margin'], '.2f')}"
        ),
        Stage.PROMPTS: lambda m: (
            f"score {_figure(m['score_before'], '.2f')} -> {_figure(m['score_after'], '.2f')}"
        ),
    }
    measures = dict.fromkeys(r.memory.measure for r in done.values() if r.memory is not None)
    return Table(
        title="Stages",
        header=("stage", "steps", "ended by", "time", "peak memory a rank", "reached"),
        rows=[
            (
                STAGE_TITLES[stage],
                _steps(result),
                result.ended_by or "-",
                format_duration(result.seconds),
                _memory_text(result.memory),
                reached[stage](result.metrics),
            )
            for stage, result in done.items()
        ],
        note="".join(f"memory: {measure}" for measure in [", or ".join(measures)] if measure),
    )


def _steps(result: StageResult) -> str:
    """The number of steps, and how many updates were skipped on the way, if any."""
    steps, skipped = _figure(result.metrics["steps"], ".0f"), result.metrics.get("skipped_steps")
    return f"{steps} ({skipped:.0f} skipped)" if skipped else steps


def _figure(value: float | None, form: str) -> str:
    """A number in its format; a dash where it does not exist."""
    return "-" if value is None else format(value, form)


def _memory_text(memory: StageMemory | None) -> str:
    """The peak of a rank, or of the ranks with the least and the most."""
    if memory is None:
        return "not measured"
    least, most = f"{memory.least_bytes / 1e9:.2f}", f"{memory.most_bytes / 1e9:.2f}"
    return f"{most} GB" if least == most else f"{least} to {most} GB"


def _policy_table(result: StageResult | None) -> Table | None:
    """Held-out prompts at temperature 1, before and after PPO."""
    if result is None:
        return None
    values = result.metrics
    rows: list[tuple[str, float | None, float | None]] = [
        ("mean score of the reward model", values["score_before"], values["score_after"]),
        ("distinct-2 of the replies", values["distinct2_before"], values["distinct2_after"]),
        ("replies that end by themselves", values["finished_before"], values["finished_after"]),
        ("tokens per reply", values["tokens_before"], values["tokens_after"]),
        ("KL to the reference, nats/token", 0.0, values["kl"]),
    ]
    if "truth_gain" in values:
        rows[1:1] = [("ground-truth score", values["truth_before"], values["truth_after"])]
        rows.append(
            (
                "share of positive words",
                values["positive_share_before"],
                values["positive_share_after"],
            )
        )
    return Table(
        title="Held-out prompts, temperature 1",
        header=("", "before PPO", "after PPO"),
        rows=[
            (name, _figure(before, ".3f"), _figure(after, ".3f")) for name, before, after in rows
        ],
    )


def _reshard_table(result: StageResult | None) -> Table | None:
    """What it took to turn the actor's training weights into generation weights."""
    if result is None or result.reshard is None:
        return None
    cost = result.reshard
    return Table(
        title=f"Reshard of the actor, {cost.train} -> {cost.generate}, mean of {cost.count}",
        header=("of the rank with the most", "a phase change"),
        rows=[
            ("milliseconds", f"{1000 * cost.seconds:.1f}"),
            ("bytes received", f"{cost.received_bytes:,.0f}"),
            ("bytes held twice", f"{cost.redundant_bytes:,.0f}"),
        ],
    )
