"""One very small run, carried through all stages once for all tests that look at its output."""

from pathlib import Path

import pytest

from megachat.stages.config import RunConfig
from tests.harness import run_ranks
from tests.stages import tiny_run


@pytest.fixture(scope="session")
def finished_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a completed run in a single process; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    tiny_run.write_rows(folder / "rows.jsonl")
    run_ranks(1, tiny_run.run, folder)
    return folder


@pytest.fixture(scope="session")
def finished(finished_folder: Path) -> RunConfig:
    """The configuration of that run."""
    return tiny_run.config(finished_folder)
