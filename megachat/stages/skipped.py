"""Watches a stage's optimizers for skipped updates, and ends a run that no longer learns.

An update is skipped where a gradient is not finite; weights and moments stay as they were, on all
ranks. Now and then that is harmless. Many in a row mean that something is wrong that more batches
will not mend, and a large job should not spend its hours on them.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from megachat.checkpoint.huggingface import save_huggingface
from megachat.data.config import Stage
from megachat.errors import DivergenceError
from megachat.stages.context import RunContext
from megachat.stages.finite import at
from megachat.stages.loop import export_files
from megachat.training.engine import TrainEngine

LAST_GOOD_FOLDER = "last_good"
"""In a stage's folder: one model for each trained role, if skipped updates ended the run."""

logger = logging.getLogger(__name__)


class SkippedUpdates:
    """Counts for one stage; `note` after each update, `check` where the run may end."""

    def __init__(
        self, context: RunContext, stage: Stage, engines: Mapping[str, TrainEngine]
    ) -> None:
        """Starts at the engines' own counts.

        Args:
            context: Where the run's limit and folders are.
            stage: Whose updates these are.
            engines: What trains, by role.
        """
        self._context, self._stage, self._engines = context, stage, engines
        self._limit = context.config.launch.max_skipped_steps
        self._known = {role: engine.skipped_steps for role, engine in engines.items()}

    @property
    def total(self) -> int:
        """Skipped updates of all roles."""
        return sum(engine.skipped_steps for engine in self._engines.values())

    def note(self, step: int) -> bool:
        """Warns of updates that were skipped since the last call.

        Returns:
            Whether there have been too many in a row for the run to go on.
        """
        for role, engine in self._engines.items():
            if engine.skipped_steps > self._known[role]:
                logger.warning(
                    "%s step %d: update of the %s skipped, its gradient is not finite (norm %g): "
                    "%d in a row of at most %d, %d in all",
                    self._stage,
                    step,
                    role,
                    engine.gradient_norm,
                    engine.skipped_in_a_row,
                    self._limit,
                    engine.skipped_steps,
                )
                self._known[role] = engine.skipped_steps
        return self._find_stuck() is not None

    def check(self, step: int) -> None:
        """Ends the run after too many skipped updates in a row; all ranks call it alike.

        The present weights are those of before the skipped updates, and are saved first.

        Raises:
            DivergenceError: A role has had as many as `launch.max_skipped_steps`.
        """
        self.note(step)
        role = self._find_stuck()
        if role is None:
            return
        folder = self._context.folder(self._stage) / LAST_GOOD_FOLDER
        with at(f"{self._stage} step {step}"):
            self._save(folder)
        engine = self._engines[role]
        raise DivergenceError(
            f"{self._stage} step {step}: the last {engine.skipped_in_a_row} updates of the {role} "
            f"were skipped, since its gradient was not finite (norm {engine.gradient_norm:g}), and "
            f"launch.max_skipped_steps is {self._limit}: the weights of before are in {folder}; "
            "lower the learning rate, or look for the rows of these steps in the data"
        )

    def conclude(self) -> None:
        """Ends a stage of which a role has learnt nothing; all ranks call it alike.

        Raises:
            DivergenceError: Every update of the role was skipped, fewer than the limit.
        """
        for role, engine in self._engines.items():
            if engine.steps_done and engine.skipped_steps == engine.steps_done:
                raise DivergenceError(
                    f"{self._stage} after training: all {engine.steps_done} updates of the {role} "
                    f"were skipped, since its gradient was not finite (norm "
                    f"{engine.gradient_norm:g}): lower the learning rate, or look at the weights "
                    "and rows it began with"
                )

    def _find_stuck(self) -> str | None:
        """The first role that has used up its skipped updates."""
        for role, engine in self._engines.items():
            if engine.skipped_in_a_row >= self._limit:
                return role
        return None

    def _save(self, folder: Path) -> None:
        """Exports what every role has learnt so far."""
        for role, engine in self._engines.items():
            save_huggingface(
                engine.model,
                folder / role,
                extra_files=export_files(self._context.config),
                role=role,
            )
