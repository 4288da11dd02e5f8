"""Makes the ranks of a run agree on what lies on disk: one decides, and all see the same folders.

On a cluster a path may name another folder on each node, and a shared one may show each node
another moment. So rank 0 decides what is complete and tells the others, and before anything starts
every rank looks for what rank 0 sees. A refusal is raised on all ranks and names the nodes.
"""

import hashlib
import json
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megachat.checkpoint.reader import CONFIG_FILE
from megachat.data.cache import DataCache
from megachat.errors import ConfigError, MegachatError
from megachat.parallel.collectives import all_gather_objects
from megachat.parallel.handover import on_first_rank
from megachat.parallel.launch import Worker
from megachat.stages.config import RunConfig
from megachat.stages.context import check_writable, prepare_output
from megachat.stages.inputs import Input, Place

ATTEMPTS = 20
"""How often a rank looks for a file that it does not see."""
_PAUSE_SECONDS = 0.25
"""Between two looks: clients of a network file system remember a folder for some seconds."""
_NAMED_HOSTS = 4
"""A refusal names so many nodes and counts the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What a rank finds wrong; equal problems of several ranks are told once."""

    what: str
    """Goes before the names of the nodes."""
    remedy: str
    """What to do."""
    error: type[MegachatError] = ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one rank says."""

    host: str
    problem: Problem | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """A file that rank 0 left for the others to find."""

    name: str
    text: str
    host: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """What a rank has of an input."""

    signature: str | None = None
    """Hash of its files; None where it is not there."""
    missing: str | None = None
    """Why not, where there is a reason."""


def raise_together(problem: Problem | None) -> None:
    """Raises on every rank where any has a problem; a collective call.

    Raises:
        MegachatError: The first rank's problem, with all nodes that have the same.
    """
    found = all_gather_objects(Finding(host=socket.gethostname(), problem=problem))
    error = refusal(found)
    if error is not None:
        raise error


def refusal(findings: Sequence[Finding]) -> MegachatError | None:
    """The error of what the ranks found; None where all is well (pure).

    Args:
        findings: One of each rank, in order.
    """
    first = next((finding.problem for finding in findings if finding.problem is not None), None)
    if first is None:
        return None
    ranks: dict[str, list[int]] = {}
    for rank, finding in enumerate(findings):
        if finding.problem == first:
            ranks.setdefault(finding.host, []).append(rank)
    named = [f"{host} ({_ranges(ranks[host])})" for host in list(ranks)[:_NAMED_HOSTS]]
    others = len(ranks) - len(named)
    more = f" and {others} more nodes" if others else ""
    return first.error(f"{first.what} on {', '.join(named)}{more}: {first.remedy}")


def check_output(worker: Worker, config: RunConfig) -> None:
    """Makes the run's folder and sees to it that every rank sees and can write it.

    A collective call, the first of a run.

    Raises:
        ConfigError: It cannot be made, or some node does not see it or cannot write there.
        DataError: The folder of prepared data cannot be made on some node.
    """
    mark = on_first_rank(lambda: _leave_mark(config), task="making the run folder")
    try:
        raise_together(_problem_with_output(config, mark))
    finally:
        if worker.rank == 0:
            (config.run.output / mark.name).unlink(missing_ok=True)


def check_inputs(inputs: Sequence[Input]) -> None:
    """Sees to it that every rank has the same models and data sets; a collective call.

    Raises:
        MegachatError: Some node lacks one, or has another one than rank 0's node.
    """
    own = [_state(each) for each in inputs]
    host, states = on_first_rank(
        lambda: (socket.gethostname(), own), task="looking at the models and data sets"
    )
    problems = (
        _problem_with_input(each, state, first=first, first_host=host)
        for each, state, first in zip(inputs, own, states, strict=True)
    )
    raise_together(next((problem for problem in problems if problem is not None), None))


def _leave_mark(config: RunConfig) -> _Mark:
    """Makes the folder and puts a file into it that nobody can have seen before."""
    prepare_output(config)
    mark = _Mark(
        name=f".seen-by-all.{uuid.uuid4().hex}",
        text=uuid.uuid4().hex,
        host=socket.gethostname(),
    )
    try:
        (config.run.output / mark.name).write_text(mark.text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run.output {config.run.output}: cannot write there ({error.strerror}): choose "
            "another folder"
        ) from error
    return mark


def _problem_with_output(config: RunConfig, mark: _Mark) -> Problem | None:
    """What is wrong in this rank's eyes with the folders that it is to write."""
    if not _sees(config.run.output, mark):
        return Problem(
            what=f"run.output {config.run.output}: not the folder that rank 0 ({mark.host}) writes",
            remedy="choose one on a file system that all nodes share",
        )
    try:
        check_writable(config.run.output)
        DataCache(config.data.cache_dir)
    except MegachatError as error:
        what, _, remedy = str(error).rpartition(": ")
        return Problem(what=what, remedy=remedy, error=type(error))
    return None


def _sees(folder: Path, mark: _Mark) -> bool:
    """Whether this rank finds the mark in what it takes for the folder."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        try:
            next(folder.iterdir(), None)  # makes a network client look at the folder anew
            if (folder / mark.name).read_text(encoding="utf-8") == mark.text:
                return True
        except OSError:
            continue
    return False


def _state(each: Input) -> _State:
    try:
        place = each.find()
    except MegachatError as error:
        return _State(missing=str(error))
    return _State() if place is None else _State(signature=_signature(place))


def _signature(place: Place) -> str:
    """Hash of the names and sizes of files, and of a model's configuration."""
    sizes = [(path.name, path.stat().st_size) for path in place.files]
    digest = hashlib.sha256(json.dumps(sizes, allow_nan=False).encode())
    for path in place.files:
        if path.name == CONFIG_FILE:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _problem_with_input(
    each: Input, state: _State, *, first: _State, first_host: str
) -> Problem | None:
    """What is wrong with an input on this rank, held against that of rank 0."""
    if state.signature is None:
        return Problem(
            what=state.missing or f"{each}: not there",
            remedy="the same must be on every node: run megachat fetch there, or give a folder "
            "that all nodes share",
            error=each.error,
        )
    if state != first:
        return Problem(
            what=f"{each}: other files than on rank 0's node {first_host}",
            remedy="make them equal, or give a folder that all nodes share",
            error=each.error,
        )
    return None


def _ranges(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 0-3,8` of ascending numbers."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
