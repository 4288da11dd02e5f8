"""Looks at data as a run would see them: format, rows, lengths, what the limits do, examples.

Rows are prepared and batched by the code that prepares them for training, into a folder that the
caller throws away. So what is shown as trained is what the loaders mark as trained.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megachat.data.arrow import ROWS_AT_ONCE
from megachat.data.config import DataConfig, SourceConfig, Stage
from megachat.data.conversion import ConversionReport
from megachat.data.loaders import LoaderOptions, PreferenceLoader, PromptLoader, SftLoader
from megachat.data.sources import TRAIN
from megachat.data.stage_data import TokenSet, build_stage_data, prepare_sources, shares_of
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError

EXAMPLES = 3
"""Rows that are shown for each step."""

_BINS = 10
_GLUED_SHARE = 0.5
"""It is told where so many answers follow their prompt without a space."""
_SHOWN = 40
"""Characters that are shown of such a place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """How many lengths lie between two numbers, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Lengths of one kind of text, before any limit."""

    what: str
    """Prompt, chosen or rejected."""
    values: tuple[int, ...]
    """Ascending, in the unit of the view."""

    def quantile(self, share: float) -> int:
        """The least length that this share of the texts does not exceed."""
        return self.values[max(0, -(-int(share * 1000) * len(self.values) // 1000) - 1)]

    def histogram(self) -> tuple[Bin, ...]:
        """Some ten bins of equal, round width that hold all lengths."""
        least, most = self.values[0], self.values[-1]
        width = _round_width(most - least + 1)
        first = least // width * width
        bins = []
        for low in range(first, most + 1, width):
            count = sum(low <= value < low + width for value in self.values)
            bins.append(Bin(low=low, high=low + width - 1, count=count))
        return tuple(bins)


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """A piece of a row."""

    text: str
    is_trained: bool
    """Whether its tokens are training targets; of a pair, whether the score is read there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as the model sees it."""

    title: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageView:
    """What all rows of a source would be in one step, without a split."""

    stage: Stage
    rows: int
    """Rows that are left."""
    tokens: int
    outcomes: Mapping[str, int]
    """Rows dropped or cut, by reason."""
    examples: tuple[Example, ...]
    problem: str = ""
    """Why there is nothing to show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceView:
    """What megachat sees in a source."""

    name: str
    path: Path | None
    report: ConversionReport
    """Of the rows to train on."""
    held_out_rows: int
    """Rows that the source holds out itself."""
    unit: str
    """Of the lengths: tokens or words."""
    lengths: tuple[Lengths, ...]
    stages: tuple[StageView, ...]
    """Empty without a tokenizer."""
    shares: str
    """What the split gives to each step, or why it cannot."""
    touching: str
    """Where a prompt and its answer meet without a space, if most of them do; else empty."""
    characters: int
    """Different characters in all texts."""


def look_at(
    source: SourceConfig,
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None,
    stages: Sequence[Stage],
    folder: Path,
) -> SourceView:
    """Prepares a source as a run would, and tells what came out.

    Args:
        source: The source.
        config: Limits, markers and split of the run; its own sources do not matter.
        tokenizer: Measures lengths; None counts words, and tells nothing of limits.
        stages: The steps that are of interest.
        folder: For prepared rows, of no use afterwards.

    Raises:
        DataError: The source cannot be read, or no row of it is usable.
    """
    everything = _everything(source, config, folder=folder)
    (prepared,) = prepare_sources(everything)
    report, rows = prepared.reports[TRAIN], prepared.splits[TRAIN]
    able = [stage for stage in stages if report.serving[stage.value]]
    views: list[StageView] = []
    if tokenizer is not None:
        views = [_stage_view(everything, stage=stage, tokenizer=tokenizer) for stage in able]
    return SourceView(
        name=source.name,
        path=source.path,
        report=report,
        held_out_rows=sum(each.rows for each in prepared.reports.values()) - report.rows,
        unit="words" if tokenizer is None else "tokens",
        lengths=_lengths(rows, tokenizer),
        stages=tuple(views),
        shares=_shares(source, config, report),
        touching=_touching(rows),
        characters=len(_characters(rows)),
    )


def text_examples(source: SourceConfig, config: DataConfig, *, folder: Path) -> list[Example]:
    """The first rows of a source as text, for where there is no tokenizer.

    Args:
        source: The source.
        config: As in `look_at`.
        folder: As in `look_at`.
    """
    (prepared,) = prepare_sources(_everything(source, config, folder=folder))
    return [
        Example(
            title=f"row {place}",
            segments=(
                Segment(text=row["prompt"], is_trained=False),
                Segment(text=row["chosen"] or "", is_trained=True),
            ),
        )
        for place, row in zip(range(1, EXAMPLES + 1), prepared.splits[TRAIN], strict=False)
    ]


def _everything(source: SourceConfig, config: DataConfig, *, folder: Path) -> DataConfig:
    """Settings under which all rows of one source are looked at, however bad, in a folder."""
    return config.model_copy(
        update={
            "sources": (source.model_copy(update={"split": None}),),
            "split": (1.0, 1.0, 1.0),
            "cache_dir": folder,
            "max_bad_share": 1.0,
            "validation_share": 0.0,
        }
    )


def _stage_view(config: DataConfig, *, stage: Stage, tokenizer: Tokenizer) -> StageView:
    (source,) = config.sources
    split = tuple(float(each is stage) for each in Stage)
    alone = config.model_copy(update={"sources": (source.model_copy(update={"split": split}),)})
    try:
        data = build_stage_data(alone, stage=stage, tokenizer=tokenizer)
    except DataError as error:
        return StageView(
            stage=stage, rows=0, tokens=0, outcomes={}, examples=(), problem=str(error)
        )
    (report,) = data.report.sources
    return StageView(
        stage=stage,
        rows=report.train_rows,
        tokens=report.tokens,
        outcomes=report.outcomes,
        examples=tuple(_examples(data.train, tokenizer)),
    )


def _examples(rows: TokenSet, tokenizer: Tokenizer) -> Iterator[Example]:
    """The first rows, with what the loaders of the step say about them."""
    options = LoaderOptions.for_evaluation(batch_size=EXAMPLES)
    if rows.stage is Stage.SFT:
        sft = next(iter(SftLoader(rows, options)))
        for place, (tokens, length, mask) in enumerate(
            zip(sft.tokens.tolist(), sft.lengths.tolist(), sft.loss_mask.tolist(), strict=True), 1
        ):
            yield _example(f"row {place}", tokens[:length], mask[:length], tokenizer)
    elif rows.stage is Stage.REWARD:
        pairs = next(iter(PreferenceLoader(rows, options)))
        for place, (both, lengths) in enumerate(
            zip(pairs.tokens.tolist(), pairs.lengths.tolist(), strict=True), 1
        ):
            for side, tokens, length in zip(("chosen", "rejected"), both, lengths, strict=True):
                at_end = [False] * (length - 1) + [True]
                yield _example(f"row {place}, {side}", tokens[:length], at_end, tokenizer)
    else:
        prompts = next(iter(PromptLoader(rows, options)))
        for place, (tokens, length) in enumerate(
            zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True), 1
        ):
            yield _example(f"row {place}", tokens[:length], [False] * length, tokenizer)


def _example(
    title: str, tokens: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer
) -> Example:
    """A row of tokens as pieces of text of which all or none is trained."""
    runs = groupby(zip(tokens, trained, strict=True), key=lambda each: each[1])
    segments = tuple(
        Segment(
            text=tokenizer.decode([token for token, _ in run], skip_specials=False),
            is_trained=is_trained,
        )
        for is_trained, run in runs
    )
    return Example(title=title, segments=segments)


def _lengths(rows: Any, tokenizer: Tokenizer | None) -> tuple[Lengths, ...]:
    """Lengths of all prompts and answers, of those kinds that there are."""
    found: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    for block in rows.iter(batch_size=ROWS_AT_ONCE):
        for what, lengths in found.items():
            lengths += _measure([text for text in block[what] if text], tokenizer)
    return tuple(
        Lengths(what=what, values=tuple(sorted(lengths)))
        for what, lengths in found.items()
        if lengths
    )


def _measure(texts: Sequence[str], tokenizer: Tokenizer | None) -> Iterable[int]:
    if tokenizer is None:
        return [len(text.split()) for text in texts]
    return [len(ids) for ids in tokenizer.encode_batch(texts)]


def _shares(source: SourceConfig, config: DataConfig, report: ConversionReport) -> str:
    """What the run's split makes of the rows."""
    try:
        shares = shares_of(source, config, serving=report.serving)
    except DataError as error:
        return str(error)
    total = sum(shares)
    return ", ".join(
        f"{stage} {share / total:.0%}" for stage, share in zip(Stage, shares, strict=True) if share
    )


def _touching(rows: Any) -> str:
    """The end of a prompt and its answer where most have no space between them."""
    first = rows.select(range(min(len(rows), ROWS_AT_ONCE)))
    both = [(row["prompt"], row["chosen"]) for row in first if row["prompt"] and row["chosen"]]
    glued = [
        prompt + chosen
        for prompt, chosen in both
        if not prompt[-1].isspace() and not chosen[0].isspace()
    ]
    return glued[0][-_SHOWN:] if len(glued) > _GLUED_SHARE * len(both) else ""


def _characters(rows: Any) -> set[str]:
    """Every character of the texts."""
    found: set[str] = set()
    for block in rows.iter(batch_size=ROWS_AT_ONCE):
        for what in ("prompt", "chosen", "rejected"):
            found.update(*(text for text in block[what] if text))
    return found


def _round_width(span: int) -> int:
    """The least of 1, 2, 5, 10, 20, ... with which a span has no more bins than wanted."""
    width = 1
    while span > _BINS * width:
        width = width * 5 // 2 if str(width)[0] == "2" else width * 2
    return width


def limited(source: SourceConfig, *, rows: int | None) -> SourceConfig:
    """A source of which only the first records are read."""
    if rows is None or (source.max_rows is not None and source.max_rows <= rows):
        return source
    return source.model_copy(update={"max_rows": rows})
