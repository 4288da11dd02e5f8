"""Prepares the data of a stage: convert, split, hold out, tokenise, report.

Everything lies memory-mapped in the cache folder. Each rank calls `build_stage_data` with equal
arguments: the first one builds, the others wait and open the same files.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megachat.data.arrow import ROWS_AT_ONCE, open_arrow, write_arrow
from megachat.data.blending import (
    Indices,
    Part,
    hold_out,
    random_for,
    stage_part,
)
from megachat.data.cache import DataCache
from megachat.data.config import DataConfig, Recipe, SourceConfig, Stage
from megachat.data.conversion import (
    ROWS_VERSION,
    ConversionReport,
    check_reports,
    convert_source,
    read_reports,
)
from megachat.data.encoding import (
    ENCODING_VERSION,
    StageEncoder,
    TextRows,
    stage_columns,
)
from megachat.data.sources import TRAIN, VALIDATION, open_source
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError

_SOURCE_SHIFT = 40
_VALIDATION_SHIFT = 39
_REPORT_FILE = "report.json"
_LACKING: Mapping[Stage, str] = {
    Stage.SFT: "there are no answers",
    Stage.REWARD: "there are no pairs of chosen and rejected answers",
    Stage.PROMPTS: "there are no prompts",
}
"""Why rows cannot serve a step."""
_NEEDED: Mapping[Stage, str] = {
    Stage.SFT: "prompts with answers, or texts",
    Stage.REWARD: "pairs of chosen and rejected answers",
    Stage.PROMPTS: "prompts",
}
"""What rows need to serve a step."""
_NOT_ENCODED = ("cache_dir", "recipe", "max_bad_share", "sources", "split", "chat")
"""Settings that do not change the tokenised rows, or come with the sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReport:
    """What one source gives to a stage."""

    name: str
    records: int
    """Raw records, training and held-out ones together."""
    bad: int
    """Unusable records."""
    unanswered: int
    """Sound records without an answer."""
    train_rows: int
    """Tokenised rows to train on."""
    validation_rows: int
    """Tokenised rows held out."""
    tokens: int
    """Tokens of all these rows."""
    outcomes: Mapping[str, int]
    """Rows dropped or truncated, by reason."""
    beyond_limit: int = 0
    """Rows that would be held out without `max_validation_rows`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What the sources give to a stage."""

    stage: Stage
    sources: tuple[SourceReport, ...]

    def lines(self) -> list[str]:
        """One readable line per source."""
        return [
            f"{source.name}: {source.train_rows} training and {source.validation_rows} held-out "
            f"rows, {source.tokens} tokens, from {source.records} records"
            + "".join(f"; {count} {reason}" for reason, count in self._remarks(source))
            for source in self.sources
        ]

    @staticmethod
    def _remarks(source: SourceReport) -> list[tuple[str, int]]:
        remarks = [("unusable", source.bad), ("without an answer", source.unanswered)]
        return [remark for remark in (*remarks, *source.outcomes.items()) if remark[1]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRow:
    """The texts of one held-out row."""

    id: int
    """Identity of the row, equal to `PromptBatch.ids`."""
    prompt: str
    chosen: str | None
    rejected: str | None


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """Tokenised rows of one stage, memory-mapped."""

    stage: Stage
    table: Any
    """The `datasets.Dataset`, columns as in `megachat.data.encoding.STAGE_COLUMNS`."""
    parts: tuple[Part, ...]
    """Which rows come from which source."""
    pad_id: int
    """What loaders fill short rows with."""
    recipe: Recipe
    """Which tokens are training targets."""

    def __len__(self) -> int:
        """Number of rows."""
        return sum(part.num_rows for part in self.parts)

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """[rows] tokens of each row, of the longer one of a pair."""
        if not len(self):
            return np.empty(0, np.int32)
        column: NDArray[np.int32] = self.table.data.column("length").to_numpy()
        return column

    def texts(self, ids: Iterable[int] | None = None) -> tuple[TextRow, ...]:
        """The texts of some rows, or of all of them in the order of an unshuffled loader.

        Args:
            ids: Identities as in `PromptBatch.ids`.

        Raises:
            DataError: These are training rows, whose texts are not kept, or an id is unknown.
        """
        if "prompt" not in self.table.column_names:
            raise DataError("texts are kept for held-out rows only: use StageData.validation")
        known: list[int] = self.table.data.column("id").to_pylist()
        places = {row_id: place for place, row_id in enumerate(known)}
        wanted = known if ids is None else ids
        rows = self.table.select_columns(["id", "prompt", "chosen", "rejected"])
        try:
            return tuple(TextRow(**rows[places[row_id]]) for row_id in wanted)
        except KeyError as error:
            raise DataError(
                f"held-out row {error.args[0]}: no such row among {len(known)}"
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class StageData:
    """All rows of one stage."""

    train: TokenSet
    validation: TokenSet
    """Held-out rows; may be empty. Each row once, whatever the weights."""
    report: DataReport


def build_stage_data(config: DataConfig, *, stage: Stage, tokenizer: Tokenizer) -> StageData:
    """The tokenised rows of one stage, from the cache where they were built before.

    The parts of a source that serve the three stages are disjoint, and so are training and
    held-out rows. The same arguments give the same rows in the same order on every rank.

    Raises:
        DataError: A source is missing, empty or malformed, has too many bad records, or the split
            leaves no row for the stage.
    """
    cache = DataCache(config.cache_dir)
    sources = prepare_sources(config)
    parts = {
        "version": ENCODING_VERSION,
        "stage": stage,
        "tokenizer": tokenizer.fingerprint,
        "sources": [(source.folder.name, source.weights) for source in sources],
        "options": config.model_dump(mode="json", exclude=set(_NOT_ENCODED)),
    }
    build = partial(_build_stage, config, stage, tokenizer, sources)
    folder = cache.get_or_build(stage, parts, build)
    return _open_stage(config, stage=stage, tokenizer=tokenizer, folder=folder)


def require_rows(config: DataConfig, stages: Iterable[Stage]) -> None:
    """Makes sure that some source serves each of several stages, before the first of them works.

    Raises:
        DataError: As in `build_stage_data`, or a stage has no source.
    """
    sources = prepare_sources(config)
    for stage in stages:
        place = list(Stage).index(stage)
        if not any(source.weights[place] for source in sources):
            names = ", ".join(source.name for source in sources)
            raise DataError(
                f"data for {stage}: no source has rows for it: {names}: it needs {_NEEDED[stage]}: "
                "add such a source, or run the other stages alone (megachat sft)"
            )


def training_texts(config: DataConfig, *, limit: int | None = None) -> Iterator[str]:
    """Prompt and answer texts of all sources, held-out ones left out, to train a tokenizer on.

    Args:
        config: The sources.
        limit: Largest number of rows per source.

    Raises:
        DataError: As in `build_stage_data`.
    """
    for source in prepare_sources(config):
        rows = np.concatenate([_stage_rows(source, config, stage=stage).train for stage in Stage])
        selected = source.splits[TRAIN].select(np.sort(rows)[:limit])
        for block in selected.iter(batch_size=ROWS_AT_ONCE):
            for prompt, chosen in zip(block["prompt"], block["chosen"], strict=True):
                yield prompt + (chosen or "")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSource:
    """The common rows of a source."""

    name: str
    number: int
    """Its place in the configuration, part of every row's id."""
    weights: tuple[float, float, float]
    """Shares of the three stages."""
    folder: Path
    splits: Mapping[str, Any]
    """`datasets.Dataset` of common rows for `train` and, if the source has it, `validation`."""
    reports: Mapping[str, ConversionReport]


@dataclass(frozen=True, kw_only=True, slots=True)
class _StageRows:
    """Row numbers of one source that serve one stage."""

    train: Indices
    validation: Indices
    validation_split: str
    """Which split the held-out rows are rows of."""
    beyond_limit: int
    """Rows that would be held out, too, if their number had no limit."""


def prepare_sources(config: DataConfig) -> list[PreparedSource]:
    """The common rows of all sources."""
    cache = DataCache(config.cache_dir)
    return [
        _prepare_source(source, config, number=number, cache=cache)
        for number, source in enumerate(config.sources)
    ]


def _prepare_source(
    source: SourceConfig, config: DataConfig, *, number: int, cache: DataCache
) -> PreparedSource:
    """Converts a source to common rows, or finds them in the cache, and checks them."""
    opened = open_source(source, cache=cache)
    parts = {
        "version": ROWS_VERSION,
        "content": opened.fingerprint,
        "format": source.format_name,
        "columns": source.columns.names,
        "render": source.render,
        "chat": config.chat.model_dump(),
        "max_rows": source.max_rows,
    }
    convert = partial(convert_source, source, opened, chat=config.chat)
    folder = cache.get_or_build("rows", parts, convert)
    reports = read_reports(folder)
    check_reports(source, reports, max_bad_share=config.max_bad_share)
    return PreparedSource(
        name=source.name,
        number=number,
        weights=shares_of(source, config, serving=reports[TRAIN].serving),
        folder=folder,
        splits={split: open_arrow(folder / f"{split}.arrow") for split in reports},
        reports=reports,
    )


def shares_of(
    source: SourceConfig, config: DataConfig, *, serving: Mapping[str, int]
) -> tuple[float, float, float]:
    """The shares of the steps in a source's rows: none for a step that no row can serve.

    Shares that `data.split` gives to all sources are adapted to each. Those that a source names
    itself are meant, so they are refused where they would waste rows.

    Args:
        source: The settings of the source.
        config: The settings of all data.
        serving: Rows that can serve each step, by its name.

    Raises:
        DataError: Rows would be wasted, or serve no step at all.
    """
    shares = dict(zip(Stage, config.split_of(source), strict=True))
    able = [stage for stage in Stage if serving[stage.value]]
    wasted = [stage for stage in Stage if shares[stage] and stage not in able]
    can = f"its rows can serve {' and '.join(able)} only"
    if source.split is not None and wasted:
        raise DataError(
            f"data set {source.name}: split {list(source.split)} gives rows to {wasted[0]}, but "
            f"{can} ({_LACKING[wasted[0]]}): set that share to 0, or leave split out"
        )
    if not any(shares[stage] for stage in able):
        raise DataError(
            f"data set {source.name}: {can}, but data.split {list(config.split)} gives nothing to "
            "that: give the source a split of its own"
        )
    sft, reward, prompts = (shares[stage] if stage in able else 0.0 for stage in Stage)
    return sft, reward, prompts


def _stage_rows(source: PreparedSource, config: DataConfig, *, stage: Stage) -> _StageRows:
    """The part of a source's rows that serves a stage, and what of it is held out."""

    def part_of(split: str) -> Indices:
        return stage_part(
            len(source.splits[split]),
            weights=source.weights,
            part=list(Stage).index(stage),
            random=random_for(config.seed, "split", source.name, split),
        )

    if VALIDATION in source.splits:
        whole = part_of(VALIDATION)
        held_out = whole[: config.max_validation_rows]
        return _StageRows(
            train=np.sort(part_of(TRAIN)),
            validation=held_out,
            validation_split=VALIDATION,
            beyond_limit=len(whole) - len(held_out),
        )
    rows = part_of(TRAIN)
    held = hold_out(rows, share=config.validation_share, at_most=config.max_validation_rows)
    unlimited = hold_out(rows, share=config.validation_share, at_most=None)
    return _StageRows(
        train=held.train,
        validation=held.validation,
        validation_split=TRAIN,
        beyond_limit=len(unlimited.validation) - len(held.validation),
    )


def _build_stage(
    config: DataConfig,
    stage: Stage,
    tokenizer: Tokenizer,
    sources: Sequence[PreparedSource],
    folder: Path,
) -> None:
    """Tokenises the rows of all sources into one file to train on and one held out."""
    encoders = [StageEncoder(config, stage=stage, tokenizer=tokenizer) for _ in sources]
    counts: dict[str, list[int]] = {TRAIN: [0] * len(sources), VALIDATION: [0] * len(sources)}

    def encoded(split: str) -> Iterator[dict[str, list[Any]]]:
        held_out = split == VALIDATION
        for place, (source, encoder) in enumerate(zip(sources, encoders, strict=True)):
            for rows in _text_blocks(source, config, stage=stage, held_out=held_out):
                block = encoder.encode(rows, with_texts=held_out)
                counts[split][place] += len(block["id"])
                yield block

    for split in counts:
        columns = stage_columns(stage, with_texts=split == VALIDATION)
        write_arrow(folder / f"{split}.arrow", columns, encoded(split))
    reports = [
        SourceReport(
            name=source.name,
            records=sum(report.records for report in source.reports.values()),
            bad=sum(report.bad for report in source.reports.values()),
            unanswered=sum(report.unanswered for report in source.reports.values()),
            train_rows=train_rows,
            validation_rows=validation_rows,
            tokens=encoder.tokens,
            outcomes={outcome.value: encoder.counts[outcome] for outcome in encoder.counts},
            beyond_limit=_stage_rows(source, config, stage=stage).beyond_limit,
        )
        for source, encoder, train_rows, validation_rows in zip(
            sources, encoders, counts[TRAIN], counts[VALIDATION], strict=True
        )
    ]
    (folder / _REPORT_FILE).write_text(
        json.dumps([asdict(report) for report in reports], allow_nan=False)
    )


def _text_blocks(
    source: PreparedSource, config: DataConfig, *, stage: Stage, held_out: bool
) -> Iterator[TextRows]:
    """Common rows in blocks, with their ids."""
    chosen = _stage_rows(source, config, stage=stage)
    split = chosen.validation_split if held_out else TRAIN
    rows = chosen.validation if held_out else chosen.train
    first_id = (source.number << _SOURCE_SHIFT) + (split == VALIDATION) * (1 << _VALIDATION_SHIFT)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        numbers = rows[begin : begin + ROWS_AT_ONCE]
        block = source.splits[split][numbers]
        yield TextRows(
            source=source.name,
            ids=(first_id + numbers).tolist(),
            prompts=block["prompt"],
            chosen=block["chosen"],
            rejected=block["rejected"],
        )


def _open_stage(
    config: DataConfig, *, stage: Stage, tokenizer: Tokenizer, folder: Path
) -> StageData:
    """Opens what `_build_stage` wrote."""
    stored = json.loads((folder / _REPORT_FILE).read_text())
    report = DataReport(stage=stage, sources=tuple(SourceReport(**entry) for entry in stored))
    sets = {
        split: TokenSet(
            stage=stage,
            table=open_arrow(folder / f"{split}.arrow"),
            parts=tuple(
                Part(source=source.name, num_rows=num_rows, weight=source.weight)
                for source, num_rows in zip(config.sources, counts, strict=True)
            ),
            pad_id=tokenizer.pad_id,
            recipe=config.recipe,
        )
        for split, counts in (
            (TRAIN, [entry.train_rows for entry in report.sources]),
            (VALIDATION, [entry.validation_rows for entry in report.sources]),
        )
    }
    if not len(sets[TRAIN]):
        raise DataError(
            f"data for {stage}: no rows left to train on: change the split or the length limits, "
            f"or give a source that can serve it ({_NEEDED[stage]}): " + " | ".join(report.lines())
        )
    return StageData(train=sets[TRAIN], validation=sets[VALIDATION], report=report)
