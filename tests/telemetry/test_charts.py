"""Diagrams: what is drawn is what was measured."""

import io
import math
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from megachat.telemetry.charts import (
    SMOOTHED_FROM,
    Curve,
    Panel,
    draw_panel,
    draw_panels,
    draw_phases,
    is_noisy,
    moving_average,
    to_png,
    to_svg,
)


def panel(*curves: Curve) -> Panel:
    return Panel(title="Loss", curves=curves)


def curve(values: list[float], *, label: str = "loss") -> Curve:
    return Curve(label=label, points=list(enumerate(values)))


def lines_of(drawn: Panel) -> list[tuple[list[float], list[float]]]:
    """x and y of every line in the first diagram of a figure."""
    axes = draw_panel(drawn).axes[0]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def legend_of(drawn: Panel) -> list[str]:
    legend = draw_panel(drawn).axes[0].get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_a_short_curve_is_drawn_point_by_point() -> None:
    assert lines_of(panel(curve([3.0, 1.0, 2.0]))) == [([0, 1, 2], [3.0, 1.0, 2.0])]


def test_a_noisy_curve_is_drawn_with_its_average_on_top() -> None:
    values = [math.sin(step / 10) + (-1) ** step for step in range(SMOOTHED_FROM * 2)]
    raw, averaged = lines_of(panel(curve(values)))
    assert raw[1] == values
    assert np.std(np.diff(averaged[1])) < np.std(np.diff(values)) / 3


def test_a_smooth_curve_is_left_alone() -> None:
    values = [1.0 - step / 200 for step in range(200)]
    assert [line[1] for line in lines_of(panel(curve(values)))] == [values]


def test_values_that_are_not_finite_leave_a_gap_and_are_counted() -> None:
    drawn = panel(curve([1.0, math.inf, 2.0, math.nan]))
    ((_, values),) = lines_of(drawn)
    assert [math.isnan(value) for value in values] == [False, True, False, True]
    assert legend_of(drawn) == ["loss (2 not finite)"]


def test_several_curves_are_told_apart_by_a_legend() -> None:
    drawn = panel(curve([1.0, 2.0], label="train"), curve([2.0, 3.0], label="held out"))
    assert legend_of(drawn) == ["train", "held out"]
    assert legend_of(panel(curve([1.0, 2.0]))) == []


def test_moving_average_is_that_of_the_finite_neighbours() -> None:
    averages = moving_average([1.0, 2.0, math.nan, 6.0, 7.0], reach=1)
    assert averages == [1.5, 1.5, 4.0, 6.5, 6.5]
    assert math.isnan(moving_average([math.nan], reach=3)[0])


def test_a_constant_curve_is_not_noisy() -> None:
    values = [2.0] * SMOOTHED_FROM
    assert not is_noisy(values, moving_average(values, reach=2))


def test_phases_are_bars_with_seconds_and_shares_the_longest_on_top() -> None:
    axes = draw_phases({"score": 9.0, "generate": 90.5, "advantages": 0.5}).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "advantages",
        "score",
        "generate",
    ]
    assert [bar.get_width() for bar in axes.patches] == [0.5, 9.0, 90.5]
    assert [text.get_text().split() for text in axes.texts] == [
        ["0.5", "s", "(<", "1", "%)"],
        ["9.0", "s", "(9", "%)"],
        ["90.5", "s", "(90", "%)"],
    ]


def test_phases_that_took_no_time_are_drawn() -> None:
    axes = draw_phases({"score": 0.0}).axes[0]
    assert axes.texts[0].get_text().split() == ["0.0", "s", "(-)"]


def test_all_panels_share_one_picture() -> None:
    figure = draw_panels([panel(curve([1.0, 2.0]))] * 4, columns=3)
    assert [axes.axison for axes in figure.axes] == [True] * 4 + [False] * 2


def test_pictures_are_valid_files() -> None:
    figure = draw_panel(panel(curve([1.0, 2.0])))
    with Image.open(io.BytesIO(to_png(figure))) as image:
        image.verify()
        assert image.format == "PNG"
    root = ElementTree.fromstring(to_svg(figure))
    assert root.tag.endswith("svg")
