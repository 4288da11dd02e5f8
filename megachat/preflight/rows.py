"""Looks into the data of a run: is it there, can it be read, and are there rows enough?

A local source is read only as far as the run's needs go: of a file of any size the first few
hundred records, unless batches are large, and one that ends before is counted to its end. What
length limits drop is not known without the tokenizer, so these counts are upper bounds; the run
counts again when it has tokenised the data of all stages, before its first step.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megachat.data.config import SourceConfig, Stage
from megachat.errors import DataError, MegachatError
from megachat.hub import hub_is_reachable
from megachat.preflight.models import told
from megachat.stages.config import RunConfig
from megachat.stages.inputs import DataInput
from megachat.stages.row_counts import check_rows

if TYPE_CHECKING:
    from megachat.data.first_look import SourceLook

_FIRST_RECORDS = 256
"""Read of every local source."""
_MOST_UNUSABLE = 10_000
"""Of a source that has given no row after so many records no more are read: the run judges it."""


def check_data(config: RunConfig, stages: frozenset[Stage]) -> Iterator[MegachatError]:
    """Refuses data that is missing, cannot be read, or is too little for a stage."""
    if not stages:
        return
    looks: list[SourceLook] = []
    sound = True
    for source in config.data.sources:
        with told() as problems:
            _find(source)
            if source.path is not None:
                looks.append(_look(config, source))
        yield from problems
        sound = sound and not problems
    if not sound:
        return
    short: Sequence[MegachatError] = ()
    if len(looks) == len(config.data.sources):
        short = _shortages(config, stages, looks)
    with told() as problems:
        for look in looks:
            look.check(max_bad_share=config.data.max_bad_share)
    yield from problems or short


def _find(source: SourceConfig) -> None:
    """Refuses a source that is not here and cannot be fetched from here.

    The library of data sets is asked only about what has to be here: it takes a second to import.
    """
    if DataInput(source=source).needs_hub and hub_is_reachable():
        return
    if DataInput(source=source).find() is None:
        raise DataError(
            f"data set {source.name}: no copy is cached here, and the hub cannot be reached from "
            "here: run megachat fetch where there is a network and the same cache, or give a local "
            "copy by path"
        )


def _look(config: RunConfig, source: SourceConfig) -> "SourceLook":
    from megachat.data.first_look import SourceLook

    look = SourceLook(source, chat=config.data.chat)
    look.read(_FIRST_RECORDS)
    return look


def _shortages(
    config: RunConfig, stages: frozenset[Stage], looks: Sequence["SourceLook"]
) -> Sequence[MegachatError]:
    """What is too little for the stages, reading on for as long as more could change that."""
    count = _FIRST_RECORDS
    while True:
        short = [
            problem
            for stage in Stage
            if stage in stages
            for problem in _short(config, stage, looks)
        ]
        unread = [look for look in looks if not look.is_complete]
        if not short or not unread:
            return short
        if any(look.unusable > _MOST_UNUSABLE for look in unread):
            return ()
        for look in unread:
            look.read(count)
        count *= 2


def _short(
    config: RunConfig, stage: Stage, looks: Sequence["SourceLook"]
) -> Sequence[MegachatError]:
    """What is too little for a stage, by what has been read."""
    with told() as problems:
        counts = [look.counts(config.data, stage) for look in looks]
        check_rows(
            config,
            stage,
            train=sum(each.train for each in counts),
            held_out=sum(each.held_out for each in counts),
        )
    return problems
