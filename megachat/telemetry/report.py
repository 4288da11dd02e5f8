"""The one place that writes the report of a run: `write_report`.

The report is one HTML file that needs nothing else (no script, no font, no other file) and PNG
files of the same diagrams. The numbers come from the metrics files of the run folder, everything
that only the run knows comes in a `RunSummary`.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from megachat.errors import ConfigError
from megachat.telemetry.attempts import is_set_aside
from megachat.telemetry.charts import (
    Curve,
    Panel,
    draw_panel,
    draw_panels,
    draw_phases,
    to_png,
    to_svg,
)
from megachat.telemetry.machine import Fact, machine_facts, version_facts
from megachat.telemetry.metrics import METRICS_FILE, MetricsHistory, read_metrics
from megachat.telemetry.progress import format_duration

HTML_FILE = "report.html"
IMAGE_FOLDER = "report"
TEMPLATE = "report.html.jinja"


@dataclass(frozen=True, kw_only=True, slots=True)
class Highlight:
    """A number that a reader should see first."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A small table of finished text; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was said to a prompt before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A diagram to draw: metrics of one stage over its steps."""

    stage: str
    """Folder of the stage, relative to the run folder."""
    title: str
    metrics: Sequence[str]
    """Names as the stage recorded them; those it never recorded are left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """What the report says besides the curves."""

    title: str
    command: str
    """The command line that repeats the run."""
    duration_s: float
    highlights: Sequence[Highlight] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    phase_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase that do not overlap, such as `PhaseTimers.self_totals` gives."""
    charts: Sequence[Chart] = ()
    """The diagrams to draw; empty means one for each metric of each stage, `perf/` left out."""
    stage_titles: Mapping[str, str] = field(default_factory=dict)
    """Names for a person by stage folder; a stage without one is called by its folder."""
    configuration: Mapping[str, object] = field(default_factory=dict)
    """The resolved configuration as a tree of plain values."""
    paths: Mapping[str, Path] = field(default_factory=dict)
    """Where the outputs are, by what they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFiles:
    """What `write_report` wrote."""

    html: Path
    curves: Path | None
    """All curves in one PNG; None where the run recorded none."""
    phases: Path | None
    """The phase breakdown as a PNG; None where no phases were given."""
    panels: tuple[Path, ...]
    """Each diagram as an SVG of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Image:
    """A diagram."""

    title: str
    svg: bytes

    @property
    def source(self) -> str:
        """What an `img` element in a self-contained page names."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode('ascii')}"


@dataclass(frozen=True, kw_only=True, slots=True)
class _StageSection:
    """The diagrams of one stage."""

    title: str
    images: Sequence[_Image]


def write_report(folder: Path, summary: RunSummary) -> ReportFiles:
    """Writes `report.html`, and its diagrams into `report/`, in the run folder.

    Args:
        folder: The run folder; each folder below it with a metrics file is a stage.
        summary: Everything that is not in the metrics files.

    Raises:
        ConfigError: The folder cannot be written.
        DataError: A metrics file is malformed.
    """
    stages = read_stages(folder)
    panels = select_panels(stages, summary.charts)
    images = folder / IMAGE_FOLDER
    try:
        images.mkdir(parents=True, exist_ok=True)
        sections = [
            _StageSection(
                title=summary.stage_titles.get(stage, stage),
                images=[_Image(title=panel.title, svg=to_svg(draw_panel(panel))) for panel in few],
            )
            for stage, few in panels.items()
        ]
        files = _write_images(images, sections, panels, summary)
        html = _render_html(sections, summary, generated=datetime.now())
        (folder / HTML_FILE).write_text(html, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the report here: {error.strerror}") from error
    return files


def read_stages(folder: Path) -> dict[str, MetricsHistory]:
    """The metrics of each stage of a run by folder name, in the order in which they began.

    Those of earlier attempts, which were set aside, do not count.
    """
    found = {
        str(path.parent.relative_to(folder)): read_metrics(path.parent)
        for path in sorted(folder.rglob(METRICS_FILE))
        if not is_set_aside(path, below=folder)
    }
    began = {stage: history.rows[0].time for stage, history in found.items() if history.rows}
    return {stage: found[stage] for stage in sorted(began, key=lambda stage: began[stage])}


def select_panels(
    stages: Mapping[str, MetricsHistory], charts: Sequence[Chart]
) -> dict[str, list[Panel]]:
    """The panels of each stage: the charts asked for, else one for each metric."""
    panels: dict[str, list[Panel]] = {stage: [] for stage in stages}
    for chart in charts or _one_for_each_metric(stages):
        if chart.stage not in stages:
            continue
        history = stages[chart.stage]
        curves = [
            Curve(label=_readable(name), points=history.series(name))
            for name in chart.metrics
            if name in history.names
        ]
        if curves:
            panels[chart.stage].append(Panel(title=chart.title, curves=curves))
    return {stage: chosen for stage, chosen in panels.items() if chosen}


def _render_html(
    sections: Sequence[_StageSection], summary: RunSummary, *, generated: datetime
) -> str:
    """The report as one self-contained page; everything that came from outside is escaped."""
    environment = Environment(
        loader=PackageLoader("megachat.telemetry", package_path="."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    phases = None
    if summary.phase_seconds:
        bars = draw_phases(summary.phase_seconds)
        phases = _Image(title="Time by phase", svg=to_svg(bars))
    return environment.get_template(TEMPLATE).render(
        summary=summary,
        duration=format_duration(summary.duration_s),
        generated=generated.strftime("%Y-%m-%d %H:%M"),
        stages=sections,
        phases=phases,
        configuration=flatten(summary.configuration),
        machine=machine_facts(),
        versions=version_facts(),
    )


def flatten(tree: Mapping[str, object], *, prefix: str = "") -> list[Fact]:
    """A tree of settings as one line for each value, named `table.key`."""
    facts = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            facts.extend(flatten(value, prefix=f"{prefix}{key}."))
        else:
            facts.append(Fact(name=f"{prefix}{key}", value=str(value)))
    return facts


def _one_for_each_metric(stages: Mapping[str, MetricsHistory]) -> list[Chart]:
    return [
        Chart(stage=stage, title=_readable(name), metrics=(name,))
        for stage, history in stages.items()
        for name in history.names
        if not name.startswith("perf/")
    ]


def _readable(metric: str) -> str:
    """`rlhf/clip_fraction` as `clip fraction`: the section says which stage it is."""
    return metric.partition("/")[2].replace("_", " ")


def _write_images(
    folder: Path,
    sections: Sequence[_StageSection],
    panels: Mapping[str, Sequence[Panel]],
    summary: RunSummary,
) -> ReportFiles:
    """Writes all picture files; the order of stages and panels is in their names."""
    written: list[Path] = []
    for section in sections:
        for image in section.images:
            stem = _file_stem(f"{section.title} {image.title}")
            written.append(folder / f"{len(written) + 1:02d}_{stem}.svg")
            written[-1].write_bytes(image.svg)
    curves = folder / "curves.png" if written else None
    if curves is not None:
        every = [
            replace(panel, title=f"{section.title}: {panel.title}")
            for section, drawn in zip(sections, panels.values(), strict=True)
            for panel in drawn
        ]
        curves.write_bytes(to_png(draw_panels(every)))
    phases = folder / "phases.png" if summary.phase_seconds else None
    if phases is not None:
        phases.write_bytes(to_png(draw_phases(summary.phase_seconds)))
    return ReportFiles(
        html=folder.parent / HTML_FILE, curves=curves, phases=phases, panels=tuple(written)
    )


def _file_stem(title: str) -> str:
    kept = "".join(letter if letter.isalnum() else "_" for letter in title.lower())
    return "_".join(part for part in kept.split("_") if part)
