"""Bad configurations, data, checkpoints and signals: see `campaign`.

`pytest tests/e2e/test_campaign.py --campaign 2000` makes as many draws instead of a few.
"""

import shutil
from pathlib import Path

import pytest

from tests.e2e import campaign

DRAWS_EACH = 8
"""Draws of one test."""
DEFAULT = 40
"""Of a default run; some take a second, those with two processes ten."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    count = metafunc.config.getoption("campaign") or DEFAULT
    if "first" in metafunc.fixturenames:
        metafunc.parametrize("first", range(0, count, DRAWS_EACH))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("whole")
    campaign.write_whole_run(folder)
    return folder


def test_whatever_is_wrong_costs_one_line(whole: Path, tmp_path: Path, first: int) -> None:
    findings = []
    for number in range(first, first + DRAWS_EACH):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        draw = campaign.make_draw(number, folder)
        ended = campaign.run_command(draw, folder)
        faults = campaign.find_faults(draw, ended, folder)
        if faults:
            last = "\n    ".join(ended.errors.splitlines()[-12:])
            findings.append(f"{draw}\n  {'; '.join(faults)}\n    {last}")
        else:
            shutil.rmtree(folder)
    assert not findings, "\n" + "\n".join(findings)


def test_a_run_that_nothing_is_wrong_with_succeeds(whole: Path, tmp_path: Path) -> None:
    """Else the draws would prove nothing."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    draw = campaign.Draw(number=-1, command=["train", "--config", "run.toml"])
    ended = campaign.run_command(draw, folder)
    assert ended.exit_code == 0, ended.errors
    assert not campaign.find_faults(draw, ended, folder)
    assert (folder / "out/rlhf/model/model.safetensors").is_file()
