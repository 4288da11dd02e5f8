"""Keeps a run folder to one run at a time, and the folder of a stage to its present attempt.

Rank 0 writes what matters there, so rank 0 holds the folder, whoever has started the ranks. Its
lock ends with it: a killed run keeps nobody out, and one whose launcher is gone still does while
its rank 0 writes.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megachat.errors import ConfigError
from megachat.locks import HeldElsewhereError, claimed, why_no_locks
from megachat.parallel.handover import on_first_rank
from megachat.stages.config import RunConfig
from megachat.stages.context import prepare_output
from megachat.stages.results import MODEL_FOLDER
from megachat.telemetry.attempts import ATTEMPTS_FOLDER, set_aside
from megachat.telemetry.log import start_log_files

LOCK_FILE = "in_use.lock"
"""In the run folder; says who writes there."""
LOGS_FOLDER = "logs"

logger = logging.getLogger(__name__)


@contextmanager
def claimed_output(config: RunConfig) -> Iterator[None]:
    """Makes the run's folder and keeps other runs out of it for the length of the body.

    A collective call, the first of a run: nothing of another run has been touched before.

    Raises:
        ConfigError: On every rank: the folder is in use, or cannot be made or written.
    """
    with ExitStack() as claim:
        on_first_rank(lambda: _take(config.run.output, config, claim), task="taking the run folder")
        yield


def start_afresh(folder: Path) -> None:
    """Empties a stage's folder for a new attempt; what the last one left is kept aside.

    Its model stays until the new one takes its place. Half a model that a killed run was writing is
    removed.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        for left_over in folder.glob(f".{MODEL_FOLDER}.*"):
            shutil.rmtree(left_over, ignore_errors=True)
        kept = (MODEL_FOLDER, ATTEMPTS_FOLDER)
        found = [path for path in sorted(folder.iterdir()) if path.name not in kept]
        place = set_aside(folder, found)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write there ({error.strerror})") from error
    if place is not None:
        logger.info("%s: what an earlier attempt recorded is in %s", folder, place)


def _take(output: Path, config: RunConfig, claim: ExitStack) -> None:
    """Claims the folder for this process and starts the log files."""
    prepare_output(config)
    try:
        claim.enter_context(claimed(output / LOCK_FILE))
    except HeldElsewhereError as error:
        raise ConfigError(
            f"run.output {output}: another run is writing there ({error}): wait for its end, end "
            "it, or choose another folder"
        ) from error
    except OSError as error:
        reason = why_no_locks(error)
        if reason is None:
            raise ConfigError(
                f"run.output {output}: {LOCK_FILE} cannot be written ({error}): choose another "
                "folder"
            ) from error
        logger.warning("run.output %s: %s: nothing keeps a second run out of it", output, reason)
    start_log_files(output / LOGS_FOLDER)
