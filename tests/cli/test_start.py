"""The command as a process: how it ends when it is told to, and when it breaks down."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.nodes import wait_for

HEADER = "import os, signal, sys, typer; from megachat.cli import main, start\n"


def _run(body: str, *, limit: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command `megachat probe`, whose body is Python."""
    code = (
        f"{HEADER}{limit}\n@main.app.command()\n@main._errors_in_one_line()\n"
        f"def probe():\n    {body}\nsys.argv = ['megachat', 'probe']\nstart.main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_one_line_and_its_own_status(number: signal.Signals) -> None:
    body = f"[os.kill(os.getpid(), {int(number)}) for _ in range(2)]"
    result = _run(body)
    assert result.returncode == 128 + number
    said = f"SignalError: the job was ended by {number.name}, as it was told\n"
    assert (result.stdout, result.stderr) == ("", said)


def test_an_impatient_second_signal_leaves_no_traceback() -> None:
    body = "import atexit; atexit.register(os.kill, os.getpid(), 2); os.kill(os.getpid(), 2)"
    result = _run(body)
    assert result.returncode == 130
    assert result.stderr == "SignalError: the job was ended by SIGINT, as it was told\n"


def test_a_bug_is_one_line_and_status_1() -> None:
    result = _run("{}['x']")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("InternalError: internal error on megachat: KeyError: 'x' (<string>:")
    path = Path(line.rpartition("its stack is in ")[2])
    assert "KeyError: 'x'" in path.read_text()
    path.unlink()


def test_too_few_handles_are_one_line_that_names_the_limit() -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))"
    result = _run("kept = [os.dup(0) for _ in range(20)]", limit=limit)
    assert result.returncode == 2
    assert "too many open files: this process may have 12 at once" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_signal_while_modules_are_imported_is_one_line(tmp_path: Path) -> None:
    """The first thing that a dry run does, and it takes seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megachat.cli.start", "train", "--dry-run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "torch/" in maps.read_text(), "the import of torch")
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130
    assert said == "SignalError: the job was ended by SIGINT, as it was told\n"
