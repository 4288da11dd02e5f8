from pathlib import Path

import pytest

from tests.preflight.case import write_case


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sound run, which tests only read."""
    folder = tmp_path_factory.mktemp("case")
    write_case(folder)
    return folder
