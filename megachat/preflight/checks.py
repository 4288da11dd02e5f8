"""Asks before a run starts whether it can: `preflight`, for every command and for `--dry-run`.

All problems are collected, so that a user mends them at once. A check looks at the configuration
and this machine, and writes, starts and downloads nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megachat.data.config import Stage
from megachat.errors import MegachatError
from megachat.parallel.launch import check_start
from megachat.preflight import backends, folders, models, rows
from megachat.preflight.host import Host, check_processes, this_host
from megachat.preflight.memory import check_memory
from megachat.preflight.models import Architectures, known_architectures, told
from megachat.stages.config import RunConfig
from megachat.stages.results import StageResult
from megachat.stages.status import completed_stages, has_tokenizer, require_inputs


@dataclass(kw_only=True, slots=True)
class Report:
    """What was found."""

    problems: list[MegachatError] = field(default_factory=list)
    """Why the run cannot start, each a line; empty: nothing known stands in its way."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, and warnings."""
    to_run: frozenset[Stage] = frozenset()
    """What is asked for and not complete."""

    def add(self, problems: Iterable[MegachatError]) -> None:
        """Takes in what a check finds, each line once."""
        for problem in problems:
            if str(problem) not in map(str, self.problems):
                self.problems.append(problem)

    def refuse(self) -> None:
        """Raises what was found.

        Raises:
            MegachatError: The first problem's kind, with all problems in one line.
        """
        if self.problems:
            raise together(self.problems)


def together(problems: Sequence[MegachatError]) -> MegachatError:
    """One error, of the kind of the first one, whose line holds them all."""
    first, *others = problems
    if not others:
        return first
    lines = [str(first), *(f"{type(other).__name__}: {other}" for other in others)]
    return type(first)(" | also ".join(lines))


def preflight(config: RunConfig, stages: Sequence[Stage], host: Host | None = None) -> Report:
    """Looks for all that would stop a run, now or later.

    Args:
        config: The run.
        stages: What is asked for, in order; what is complete is not looked at.
        host: What this machine allows; None asks the kernel.
    """
    host = host if host is not None else this_host()
    to_run, state = _stages_to_run(config, stages)
    report = Report(to_run=to_run)
    device = _check_launch(config, host, report)
    report.add(config.problems())
    known = _check_models(config, to_run, report)
    if known is not None and not report.problems:  # or the planner says it all again
        with told() as problems:
            note = check_memory(config, [stage for stage in stages if stage in to_run])
            report.notes += [note] if note is not None else []
        report.add(problems)
    report.add(state)
    report.add(models.check_available(config, to_run))
    report.add(models.check_weights(config, to_run))
    report.add(folders.check_folders(config, to_run))
    report.add(folders.check_disk(config, to_run, known, host))
    report.add(backends.check_packages(config, to_run))
    if device is not None:
        report.add(backends.check_backends(config, to_run, device))
    report.add(rows.check_data(config, to_run))
    return report


def _stages_to_run(
    config: RunConfig, stages: Sequence[Stage]
) -> tuple[frozenset[Stage], Sequence[MegachatError]]:
    """What is asked for and not complete; what the run folder lacks of what it starts from."""
    done: Mapping[Stage, StageResult] = {}
    with told() as problems:
        stages = config.own_stages(stages)
        done = completed_stages(config)
        require_inputs(config, done, stages)
    with told() as others:
        has_tokenizer(config)
    return frozenset(stages).difference(done), problems + others


def _check_launch(config: RunConfig, host: Host, report: Report) -> torch.device | None:
    """Whether the ranks can be started; what they compute on, where that is known."""
    device: torch.device | None = None
    with told() as problems:
        device = check_start(config.launch)
    report.add(problems)
    report.add(check_processes(config.launch, host, device))
    return device


def _check_models(
    config: RunConfig, stages: frozenset[Stage], report: Report
) -> Architectures | None:
    """Whether the models fit the run; what they are, where that is known."""
    known: Architectures | None = None
    with told() as problems:
        found = known_architectures(config)
        if isinstance(found, str):
            report.notes.append(
                f"layouts, memory and disk are not checked: the architecture of {found} cannot be "
                "known before it is downloaded"
            )
        else:
            known = found
    report.add(problems)
    if known is not None:
        report.add(models.check_layouts(config, stages, known))
        report.add(models.check_positions(config, stages, known))
    report.add(models.check_vocabulary(config, stages, known))
    return known
