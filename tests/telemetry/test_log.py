"""Logging: who shows what where."""

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megachat.errors import ConfigError
from megachat.telemetry.log import active_console, set_up_logging


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Leaves the root logger of the test process as it was."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in list(root.handlers):
        if handler not in before:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)


def text_console() -> Console:
    return Console(file=io.StringIO(), width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_rank_0_shows_lines_and_keeps_a_file(tmp_path: Path) -> None:
    console = text_console()
    set_up_logging(tmp_path / "logs", rank=0, console=console)
    logging.getLogger("megachat.x").info("hello %d", 7)
    assert "hello 7" in shown(console)
    assert "INFO    megachat.x: hello 7" in (tmp_path / "logs" / "rank_000.log").read_text()
    assert active_console() is console


def test_other_ranks_only_keep_a_file(tmp_path: Path) -> None:
    console = text_console()
    set_up_logging(tmp_path, rank=3, console=console)
    logging.getLogger("megachat.x").info("hello")
    assert shown(console) == ""
    assert "hello" in (tmp_path / "rank_003.log").read_text()
    assert active_console() is None


def test_a_second_set_up_replaces_the_first(tmp_path: Path) -> None:
    first, second = text_console(), text_console()
    set_up_logging(console=first)
    set_up_logging(tmp_path, console=second)
    logging.getLogger("megachat.x").info("once")
    assert shown(first) == ""
    assert shown(second).count("once") == 1
    assert (tmp_path / "rank_000.log").read_text().count("once") == 1


def test_libraries_are_heard_only_when_they_warn() -> None:
    console = text_console()
    set_up_logging(console=console)
    library = logging.getLogger("datasets.builder")
    library.setLevel(logging.DEBUG)
    library.info("chatter")
    library.warning("trouble")
    assert "chatter" not in shown(console)
    assert "warning: trouble" in shown(console)


def test_markup_in_a_message_is_shown_as_it_is() -> None:
    console = text_console()
    set_up_logging(console=console)
    logging.getLogger("megachat.x").info("reply: [bold]hi[/bold] [/x]")
    assert "[bold]hi[/bold] [/x]" in shown(console)


def test_python_warnings_go_to_the_file_and_not_to_the_console(tmp_path: Path) -> None:
    console = text_console()
    set_up_logging(tmp_path, console=console)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # catch_warnings has just put Python's own hook back
        warnings.warn("old habit", UserWarning, stacklevel=1)
    logging.captureWarnings(False)
    assert "old habit" not in shown(console)
    assert "old habit" in (tmp_path / "rank_000.log").read_text()


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write log files"):
        set_up_logging(tmp_path / "file" / "logs")


def test_a_long_line_stays_one_line_in_a_file() -> None:
    console = text_console()
    set_up_logging(console=console)
    logging.getLogger("megachat.x").info("word " * 60)
    assert shown(console).rstrip("\n").count("\n") == 0


def test_the_traceback_of_an_error_is_shown() -> None:
    console = text_console()
    set_up_logging(console=console)
    try:
        raise KeyError("gone")
    except KeyError:
        logging.getLogger("megachat.x").exception("it failed")
    assert "error: it failed" in shown(console)
    assert "KeyError: 'gone'" in shown(console)
