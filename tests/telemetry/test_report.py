"""The run report: one page that needs nothing else, and says what was measured."""

import base64
import dataclasses
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from megachat.errors import ConfigError
from megachat.telemetry.metrics import MetricsWriter
from megachat.telemetry.report import (
    Chart,
    Highlight,
    ReportFiles,
    RunSummary,
    Sample,
    Table,
    flatten,
    read_stages,
    select_panels,
    write_report,
)

VOID_TAGS = {"meta", "img", "br", "link", "input", "hr"}

SUMMARY = RunSummary(
    title="A <run>",
    command='megachat train --set run.name="a & b"',
    duration_s=187.0,
    highlights=(Highlight(label="KL", value="0.11", note="nats per token"),),
    tables=(
        Table(title="Reward", header=("", "before", "after"), rows=(("mean", "-0.1", "1.2"),)),
    ),
    samples=(
        Sample(prompt="hi\nthere", before="", after="<script>alert('x')</script> & [b]ok[/b]"),
    ),
    phase_seconds={"generate": 3.0, "train": 1.0},
    configuration={"sft": {"lr": 0.001, "steps": 3}, "seed": 7},
    paths={"Run folder": Path("runs/a")},
)


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in VOID_TAGS:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run whose second stage by name began first."""
    for stage, metrics in (
        ("sft", {"sft/loss": 2.0, "perf/tokens_per_s": 9.0}),
        ("reward", {"reward/loss": 0.7, "reward/accuracy": 0.5}),
    ):
        with MetricsWriter(tmp_path / stage) as writer:
            for step in range(3):
                writer.write(step, metrics)
    return tmp_path


def write_and_read(folder: Path, summary: RunSummary = SUMMARY) -> tuple[ReportFiles, Page]:
    files = write_report(folder, summary)
    return files, Page(files.html.read_text(encoding="utf-8"))


def test_page_needs_nothing_from_outside_and_no_script(run_folder: Path) -> None:
    files, page = write_and_read(run_folder)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    html = files.html.read_text(encoding="utf-8")
    assert re.search(r"url\(|@import|https?:", html) is None


def test_pictures_inside_the_page_are_drawings(run_folder: Path) -> None:
    _, page = write_and_read(run_folder)
    for source in page.sources:
        svg = base64.b64decode(source.partition(",")[2])
        assert b"<svg" in svg
        assert b"<text" not in svg  # letters are shapes: no font is needed


def test_what_came_from_a_model_or_a_user_is_text_and_never_markup(run_folder: Path) -> None:
    _, page = write_and_read(run_folder)
    assert "A <run>" in page.texts
    assert 'megachat train --set run.name="a & b"' in page.texts
    assert "<script>alert('x')</script> & [b]ok[/b]" in page.texts


def test_page_shows_everything_it_was_given(run_folder: Path) -> None:
    _, page = write_and_read(run_folder)
    for text in (
        "0.11",
        "nats per token",
        "-0.1",
        "1.2",
        "runs/a",
        "no words",
        "torch",
        version("torch"),
    ):
        assert any(text in shown for shown in page.texts), text
    for text in ("sft.lr", "0.001", "seed", "7", "Configuration, 3 settings"):
        assert text in page.texts
    assert any("took 3m07s" in shown for shown in page.texts)


def test_pictures_are_written_as_files_too(run_folder: Path) -> None:
    files, _ = write_and_read(run_folder)
    assert files.curves is not None
    assert files.phases is not None
    assert [path.name for path in files.panels] == [
        "01_sft_loss.svg",
        "02_reward_loss.svg",
        "03_reward_accuracy.svg",
    ]
    for path in (files.curves, files.phases):
        with Image.open(path) as image:
            assert image.width > 300
    for path in files.panels:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_stages_come_in_the_order_in_which_they_began(run_folder: Path) -> None:
    assert list(read_stages(run_folder)) == ["sft", "reward"]


def test_charts_that_were_asked_for_replace_the_default_ones(run_folder: Path) -> None:
    charts = (
        Chart(stage="reward", title="Both", metrics=("reward/loss", "reward/accuracy")),
        Chart(stage="reward", title="Nothing", metrics=("reward/absent",)),
        Chart(stage="absent", title="Nothing", metrics=("reward/loss",)),
    )
    panels = select_panels(read_stages(run_folder), charts)
    assert list(panels) == ["reward"]
    (panel,) = panels["reward"]
    assert [curve.label for curve in panel.curves] == ["loss", "accuracy"]
    assert panel.curves[0].points == [(0, 0.7), (1, 0.7), (2, 0.7)]


def test_stages_may_have_names_for_a_person(run_folder: Path) -> None:
    summary = dataclasses.replace(SUMMARY, stage_titles={"sft": "Supervised finetuning"})
    files, page = write_and_read(run_folder, summary)
    assert "Curves: Supervised finetuning" in page.texts
    assert files.panels[0].name == "01_supervised_finetuning_loss.svg"


def test_a_run_without_metrics_still_has_a_report(tmp_path: Path) -> None:
    bare = RunSummary(title="Bare", command="megachat sft", duration_s=0.2)
    files, page = write_and_read(tmp_path, bare)
    assert (files.curves, files.phases, files.panels) == (None, None, ())
    assert page.sources == []


def test_a_report_is_written_over_an_older_one(run_folder: Path) -> None:
    write_report(run_folder, SUMMARY)
    _, page = write_and_read(run_folder, dataclasses.replace(SUMMARY, title="Newer"))
    assert "Newer" in page.texts
    assert "A <run>" not in page.texts


def test_settings_are_flattened_to_dotted_names() -> None:
    facts = flatten({"a": {"b": {"c": 1}, "d": [1, 2]}, "e": None})
    assert [(fact.name, fact.value) for fact in facts] == [
        ("a.b.c", "1"),
        ("a.d", "[1, 2]"),
        ("e", "None"),
    ]


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report(tmp_path, SUMMARY)
