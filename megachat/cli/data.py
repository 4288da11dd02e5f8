"""`megachat data`: shows what megachat sees in one's own files, before anything is trained."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megachat.cli.plan import takes_options
from megachat.cli.ranges import Range, check_ranges
from megachat.errors import ConfigError

if TYPE_CHECKING:
    from megachat.data.config import DataConfig, SourceConfig
    from megachat.data.inspection import Example, Lengths, SourceView, StageView
    from megachat.stages.config import RunConfig
    from megachat.stages.measure import Measure

_BAR = 40
"""Width of the longest bar of a histogram."""
_SHOWN = 400
"""Characters of a piece of an example; what is longer is cut in its middle."""
_MARKS = ("[[", "]]")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataOptions:
    """The options of `megachat data`; every field is one."""

    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE...", help="Files or folders of rows; default: --config's."),
    ] = None
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Limits and tokenizer of this run (TOML).")
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override in it, as for train."),
    ] = None
    stage: Annotated[str | None, typer.Option(help="One step only: sft, reward or prompts.")] = None
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Folder or hub name of what lengths are counted with."),
    ] = None
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="KNOWN=YOURS", help="E.g. --column prompt=question."),
    ] = None
    rows: Annotated[
        int,
        typer.Option(help="Look at so many records of each source at most."),
        Range(least=1, most=10**9),
    ] = 10_000


@takes_options(DataOptions)
def data(options: DataOptions) -> None:
    """Show what megachat sees in data: format, rows, lengths, what is dropped or cut, examples.

    Nothing is trained and nothing is kept.
    """
    from megachat.data.config import Stage
    from megachat.data.inspection import limited, look_at, text_examples

    check_ranges(options)
    if not options.files and options.config is None:
        raise ConfigError("nothing to look at: name files, or --config FILE")
    if options.stage is not None and options.stage not in list(Stage):
        raise ConfigError(f"--stage {options.stage}: expected one of {', '.join(Stage)}")
    stages = list(Stage) if options.stage is None else [Stage(options.stage)]
    run = _run_of(options)
    sources = chosen_sources(options.files or [], read_columns(options.columns or []), run)
    settings = _settings(run, sources)
    with tempfile.TemporaryDirectory(prefix="megachat-data-") as name:
        folder = Path(name)
        measure = _measure(options, run, folder)
        typer.echo(f"lengths by tokenizer: {measure.origin}")
        for source in sources:
            few = limited(source, rows=options.rows)
            view = look_at(few, settings, tokenizer=measure.tokenizer, stages=stages, folder=folder)
            for line in view_lines(view, limit=options.rows, settings=settings):
                typer.echo(line)
            if measure.tokenizer is None:
                for example in text_examples(few, settings, folder=folder):
                    typer.echo(example_line(example))


def read_columns(items: Sequence[str]) -> dict[str, str]:
    """The names in `prompt=question` by the known one.

    Raises:
        ConfigError: An item has another form.
    """
    columns = {}
    for item in items:
        known, separator, yours = item.partition("=")
        if not separator or not known or not yours:
            raise ConfigError(f"--column {item}: expected KNOWN=YOURS such as prompt=question")
        columns[known] = yours
    return columns


def chosen_sources(
    files: Sequence[Path], columns: Mapping[str, str], run: "RunConfig | None" = None
) -> "list[SourceConfig]":
    """The sources that files stand for, as a run names them where it does.

    Raises:
        ConfigError: A column has an unknown name.
    """
    from megachat.config import build_config
    from megachat.data.config import SourceConfig

    known = [] if run is None else list(run.data.sources)
    if not files:
        return known
    by_path = {each.path.resolve(): each for each in known if each.path is not None}
    return [
        by_path.get(file.resolve())
        or build_config(
            SourceConfig, {"path": str(file), "columns": dict(columns)}, source=str(file)
        )
        for file in files
    ]


def view_lines(view: "SourceView", *, limit: int, settings: "DataConfig") -> Iterator[str]:
    """What megachat sees in a source, as lines."""
    report = view.report
    yield ""
    yield f"{view.name}" + (f" ({view.path})" if view.path is not None else "")
    yield f"  format     {report.format}" + (f": {report.found}" if report.found else "")
    more = f" (only the first {limit:,} are read here)" if report.records >= limit else ""
    held_out = f", {view.held_out_rows:,} rows held out by the source" if view.held_out_rows else ""
    yield f"  rows       {report.rows:,} of {report.records:,} records{more}{held_out}"
    if report.unanswered:
        yield f"  no answer  {report.unanswered:,}"
    if report.bad:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in report.reasons.items())
        yield f"  unusable   {report.bad:,}: {reasons}; the first is {report.first_problem}"
    serves = ", ".join(f"{stage} {rows:,}" for stage, rows in report.serving.items())
    yield f"  can serve  {serves} rows"
    yield f"  split      {view.shares}"
    if report.bad > settings.max_bad_share * report.records:
        yield (
            f"  note       a run stops: data.max_bad_share {settings.max_bad_share:g} allows fewer "
            "unusable records"
        )
    if view.touching:
        yield (
            f'  note       prompts and answers touch ("...{_shortened(view.touching)}"): render = '
            '"chat" of the source puts the markers of data.chat around them'
        )
    for lengths in view.lengths:
        yield from _histogram_lines(lengths, view.unit)
    for stage in view.stages:
        yield from _stage_lines(stage, settings)


def example_line(example: "Example") -> str:
    """A row in one line, with what is trained between marks."""
    text = "".join(
        _shortened(segment.text).join(_MARKS if segment.is_trained else ("", ""))
        for segment in example.segments
    )
    return f"    {example.title}: {text}"


def _stage_lines(view: "StageView", settings: "DataConfig") -> Iterator[str]:
    from megachat.data.config import Stage

    yield ""
    if view.problem:
        yield f"  {view.stage}: {view.problem}"
        return
    yield f"  {view.stage}: {view.rows:,} rows, {view.tokens:,} tokens"
    for outcome, count in view.outcomes.items():
        yield f"    {count:,} {outcome}"
    limits = ("max_prompt_tokens", "max_tokens", "max_answer_tokens", "min_answer_tokens")
    keys = {*limits, "long_prompts", "long_answers"}
    values = settings.model_dump(mode="json", include=keys, exclude_none=True)
    yield "    limits: " + ", ".join(f"data.{key} = {value}" for key, value in values.items())
    marked = {
        Stage.SFT: f"trained tokens (data.recipe = {settings.recipe}) stand in [[ ]]",
        Stage.REWARD: "the score is read at the token in [[ ]]",
        Stage.PROMPTS: "the actor answers these; what it says is trained",
    }
    yield f"    {marked[view.stage]}:"
    for example in view.examples:
        yield example_line(example)


def _histogram_lines(lengths: "Lengths", unit: str) -> Iterator[str]:
    half, most = lengths.quantile(0.5), lengths.quantile(0.95)
    yield ""
    yield (
        f"  {lengths.what}, {unit}: median {half}, 95 % within {most}, longest {lengths.values[-1]}"
    )
    bins = lengths.histogram()
    top = max(each.count for each in bins)
    width = len(str(bins[-1].high))
    for each in bins:
        bar = "#" * -(-each.count * _BAR // top)
        yield f"    {each.low:>{width}} - {each.high:>{width}}  {each.count:>7,}  {bar}".rstrip()


def _shortened(text: str) -> str:
    """One line of text, with its control characters written out."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _run_of(options: DataOptions) -> "RunConfig | None":
    from megachat.config import load_config
    from megachat.stages.config import RunConfig

    if options.config is None:
        if options.overrides:
            raise ConfigError("--set needs --config")
        return None
    return load_config(RunConfig, path=options.config, overrides=options.overrides or [])


def _settings(run: "RunConfig | None", sources: "Sequence[SourceConfig]") -> "DataConfig":
    """Limits and markers: those of the run, else the default ones."""
    from megachat.data.config import DataConfig

    return DataConfig(sources=tuple(sources)) if run is None else run.data


def _measure(options: DataOptions, run: "RunConfig | None", folder: Path) -> "Measure":
    from megachat.stages.measure import default_measure, measure_of_run, named_measure

    if options.tokenizer is not None:
        return named_measure(options.tokenizer)
    return default_measure() if run is None else measure_of_run(run, folder=folder)
