"""The one place that sets logging up: `set_up_logging`, once per process.

Library code logs through `logging.getLogger(__name__)` and never prints. Rank 0 shows its lines on
the console, every rank keeps its own file in the run folder. The console that is shown to belongs
to the set-up as well, so that the progress view (`telemetry.progress`) and log lines share one
terminal without tearing each other apart.
"""

import logging
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from megachat.errors import ConfigError
from megachat.telemetry.attempts import set_aside
from megachat.telemetry.crash import RankFileHandler

FILE_FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
FILE_DATE_FORMAT = "%Y-%m-%d %H:%M:%S"

CHATTY_LIBRARIES = ("DeepSpeed", "datasets", "fsspec", "matplotlib", "megatron", "torch")
"""First name parts of loggers of which only warnings are of interest. Records are filtered where
they are handled, since some libraries set their own level when they are imported."""


class _NoChatter(logging.Filter):
    """Drops what the chatty libraries say below a warning."""

    def filter(self, record: logging.LogRecord) -> bool:
        chatty = record.name.partition(".")[0] in CHATTY_LIBRARIES
        return record.levelno >= logging.WARNING or not chatty


class _NotFromWarningsModule(logging.Filter):
    """Drops Python's own warnings: they belong in the file, not in front of a person."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.name != "py.warnings"


class _ConsoleHandler(logging.Handler):
    """Log lines for a person; the type by which `active_console` finds this process's console.

    Lines are not wrapped here: a terminal does that itself, and a file should keep them whole.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.addFilter(_NotFromWarningsModule())

    def emit(self, record: logging.LogRecord) -> None:
        """Shows the time, the level where it is not plain information, and the message."""
        try:
            line = Text.assemble((time.strftime("%H:%M:%S", time.localtime(record.created)), "dim"))
            line.append(" ")
            if record.levelno >= logging.WARNING:
                line.append(f"{record.levelname.lower()}: ", "bold red")
            line.append(self.format(record))
            self.console.print(line, soft_wrap=True)
        except Exception:  # logging must not end a run; its hook reports this
            self.handleError(record)


def set_up_logging(
    folder: Path | None = None,
    *,
    rank: int = 0,
    console: Console | None = None,
    level: int = logging.INFO,
) -> None:
    """Sends log lines of this process to the console (rank 0) and to `folder/rank_NNN.log`.

    A second call replaces what the first one set up, so that a process may log to the console
    alone until it knows its run folder.

    Args:
        folder: Where this rank's file goes, made if missing; None keeps no file.
        rank: Global rank of this process; only rank 0 shows lines on the console.
        console: The console to show lines on; None means standard error.
        level: Lowest level that is kept.

    Raises:
        ConfigError: The folder cannot be made or written.
    """
    handlers: list[logging.Handler] = []
    if rank == 0:
        handlers.append(_ConsoleHandler(console or Console(stderr=True)))
    if folder is not None:
        handlers.append(_file_handler(folder, rank=rank))
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _ConsoleHandler | RankFileHandler):
            root.removeHandler(handler)
            handler.close()
    for handler in handlers:
        handler.addFilter(_NoChatter())
        root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)


def start_log_files(folder: Path) -> None:
    """Sets the log files of an earlier run aside; one process calls it before any rank logs there.

    Raises:
        ConfigError: The folder cannot be written.
    """
    try:
        set_aside(folder, sorted(folder.glob("rank_*.log")))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write log files here: {error.strerror}") from error


def active_console() -> Console | None:
    """The console that this process shows log lines on, None where it shows none."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _ConsoleHandler):
            return handler.console
    return None


def _file_handler(folder: Path, *, rank: int) -> logging.Handler:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handler = RankFileHandler(folder / f"rank_{rank:03d}.log", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write log files here: {error.strerror}") from error
    handler.setFormatter(logging.Formatter(FILE_FORMAT, FILE_DATE_FORMAT))
    return handler
