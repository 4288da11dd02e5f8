"""The one place that draws: curves of metrics and the bars of a phase breakdown.

Figures are built without pyplot, hence without global state and without a display.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#1f2933"
FAINT = "#7b8794"
GRID = "#e4e7eb"
COLOURS = ("#2563c9", "#d9702b", "#2a9268", "#8b5fbf")

PANEL_INCHES = (3.9, 2.5)
MARGIN_INCHES = {"left": 0.58, "right": 0.12, "bottom": 0.5, "top": 0.48}
"""Around the axes of a panel. Fixed, since fitting them to the labels costs half of a drawing."""
PNG_DPI = 180
SMOOTHED_FROM = 40
"""Noisy curves with at least so many points are drawn faintly, their moving average on top."""
AVERAGED_SHARE = 0.06
"""Width of that average as a share of the points."""
NOISY_FROM = 0.005
"""A curve is noisy where it differs from its average by this share of its range on average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One line of a panel."""

    label: str
    points: Sequence[tuple[int, float]]
    """(step, value) by rising step; values that are not finite leave a gap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """One small diagram of curves over steps."""

    title: str
    curves: Sequence[Curve]


def draw_panel(panel: Panel) -> Figure:
    """One panel as a figure of its own."""
    return draw_panels([panel])


def draw_panels(panels: Sequence[Panel], *, columns: int = 3) -> Figure:
    """All panels in one figure, row by row."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows))
    left, right = MARGIN_INCHES["left"] / width, MARGIN_INCHES["right"] / width
    bottom, top = MARGIN_INCHES["bottom"] / height, MARGIN_INCHES["top"] / height
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        corner = ((column + left) / columns, (rows - 1 - row + bottom) / rows)
        size = ((1 - left - right) / columns, (1 - bottom - top) / rows)
        axes = figure.add_axes((*corner, *size))
        if place < len(panels):
            _fill(axes, panels[place])
        else:
            axes.set_axis_off()
    return figure


def draw_phases(phase_seconds: Mapping[str, float]) -> Figure:
    """Horizontal bars of where the time went, the longest on top, with seconds and shares."""
    phases = sorted(phase_seconds.items(), key=lambda item: item[1])
    whole = sum(phase_seconds.values())
    figure = Figure(figsize=(7.2, 0.7 + 0.36 * len(phases)), layout="constrained")
    axes: Axes = figure.subplots()
    bars = axes.barh([name for name, _ in phases], [s for _, s in phases], color=COLOURS[0])
    labels = [f" {seconds:.1f} s  ({_share(seconds, whole)})" for _, seconds in phases]
    axes.bar_label(bars, labels=labels, color=INK, padding=2)
    axes.margins(x=0.22)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelcolor=INK)
    axes.xaxis.set_visible(False)
    return figure


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    return _save(figure, "png")


def to_svg(figure: Figure) -> bytes:
    """The figure as an SVG file with letters drawn as shapes, so that it needs no font."""
    return _save(figure, "svg")


def moving_average(values: Sequence[float], *, reach: int) -> list[float]:
    """Average of the finite values up to `reach` places away from each; NaN where none is."""
    averages = []
    for middle in range(len(values)):
        near = values[max(0, middle - reach) : middle + reach + 1]
        window = [value for value in near if math.isfinite(value)]
        averages.append(sum(window) / len(window) if window else math.nan)
    return averages


def is_noisy(values: Sequence[float], averages: Sequence[float]) -> bool:
    """Whether a curve is easier to read as its average."""
    finite = [value for value in values if math.isfinite(value)]
    if len(values) < SMOOTHED_FROM or len(finite) < SMOOTHED_FROM // 2:
        return False
    away = [abs(v - a) for v, a in zip(values, averages, strict=True) if math.isfinite(v)]
    return sum(away) / len(away) > NOISY_FROM * (max(finite) - min(finite))


def _fill(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    for curve, colour in zip(panel.curves, _colours(len(panel.curves)), strict=True):
        _draw_curve(axes, curve, colour)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=FAINT, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))  # longer numbers would leave the margin
    axes.set_xlabel("step", color=FAINT, fontsize=9)
    if len(panel.curves) > 1 or any(map(_num_missing, panel.curves)):
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK)


def _draw_curve(axes: Axes, curve: Curve, colour: str) -> None:
    steps = [step for step, _ in curve.points]
    values = [value if math.isfinite(value) else math.nan for _, value in curve.points]
    averages = moving_average(values, reach=max(1, round(len(values) * AVERAGED_SHARE / 2)))
    marker = "o" if len(steps) < SMOOTHED_FROM / 4 else None
    if is_noisy(values, averages):
        axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.3)
        values = averages
    axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, ms=4, label=_label(curve))


def _label(curve: Curve) -> str:
    missing = _num_missing(curve)
    return f"{curve.label} ({missing} not finite)" if missing else curve.label


def _num_missing(curve: Curve) -> int:
    return sum(not math.isfinite(value) for _, value in curve.points)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _share(part: float, whole: float) -> str:
    if whole <= 0:
        return "-"
    return f"{100 * part / whole:.0f} %" if part >= 0.01 * whole else "< 1 %"


def _save(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=PNG_DPI)
    return buffer.getvalue()
