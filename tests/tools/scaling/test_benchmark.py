"""What benchmarks share: options from settings, the best of the tries, one line for an error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from benchmark import (
    READ_BYTES,
    Ceilings,
    command_of,
    measure_ceilings,
    peer_process,
    random_prompts,
    report,
)
from pydantic import Field
from typer.testing import CliRunner

from megachat.config import ConfigModel
from megachat.errors import ConfigError


class _Settings(ConfigModel):
    batch: int = Field(default=8, description="Prompts.")
    names: list[str] = Field(default=[], description="Repeatable.")


def _main(*, as_json: bool, **options: Any) -> None:
    """Says what it was given."""
    report(lambda: options, lambda summary: f"table of {summary}", as_json=as_json)


def _invoke(*words: str) -> Any:
    app = typer.Typer()
    app.command()(command_of(_Settings, _main))
    return CliRunner().invoke(app, words)


def test_every_setting_is_an_option_with_its_default_and_description() -> None:
    assert _invoke("--json").stdout == '{"batch": 8, "names": []}\n'
    found = _invoke("--batch", "3", "--names", "a", "--names", "b")
    assert found.stdout == "table of {'batch': 3, 'names': ['a', 'b']}\n"
    help_text = _invoke("--help").stdout
    assert "Prompts." in help_text and "Says what it was given." in help_text


def test_an_error_of_the_user_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    def measure() -> dict[str, Any]:
        raise ConfigError("no such model")

    with pytest.raises(typer.Exit) as caught:
        report(measure, str, as_json=True)
    assert caught.value.exit_code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: no such model\n" and captured.out == ""


def test_ceilings_are_the_best_of_their_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(READ_BYTES, "cpu", 1 << 20)
    times = iter([0.0, 2.0, 2.0, 3.0, 0.0, 4.0, 4.0, 6.0])  # 2 and 1 s reading, 4 and 2 s of GEMM
    found = measure_ceilings(torch.float32, clock=lambda: next(times), tries=2)
    assert found.read_gb_s == pytest.approx((1 << 20) / 1e9)
    assert found.gemm_tflop_s == pytest.approx(1024**3 / 1e12)
    other = Ceilings(read_gb_s=0.0, gemm_tflop_s=9.0)
    assert Ceilings.best_of([found, other]) == Ceilings(read_gb_s=found.read_gb_s, gemm_tflop_s=9.0)


_PEER = """
import json, sys
request = json.loads(sys.argv[1])
for number, _ in enumerate(sys.stdin):
    print("something else")
    print("reply", json.dumps([request["word"], number]), flush=True)
    if number == 1:
        sys.exit("that was enough")
"""


def test_a_peer_answers_each_time_and_its_last_words_are_in_the_error(tmp_path: Path) -> None:
    script, log = tmp_path / "peer.py", tmp_path / "log"
    script.write_text(_PEER)
    with peer_process(sys.executable, script, {"word": "so"}, log=log) as ask:
        assert [ask(), ask()] == [["so", 0], ["so", 1]]
        with pytest.raises(ConfigError, match=r"peer.py failed \(that was enough\): give an inter"):
            ask()


def test_an_interpreter_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    python, log = str(tmp_path / "python"), tmp_path / "log"
    with (
        peer_process(python, tmp_path / "peer.py", {}, log=log) as ask,
        pytest.raises(ConfigError, match="No such file.*: give an interpreter whose"),
    ):
        ask()


def test_prompts_are_the_same_at_every_call() -> None:
    one, other = (random_prompts(50, batch=3, length=7) for _ in range(2))
    assert torch.equal(one.tokens, other.tokens) and one.tokens.shape == (3, 7)
    assert int(one.tokens.min()) >= 4 and int(one.tokens.max()) < 50


def test_a_benchmark_runs_as_a_script_and_prints_what_its_ranks_wrote() -> None:
    script = Path(__file__).parents[3] / "tools/scaling/bench_reshard.py"
    options = "--train 1,1,1 --generate 1 --hidden 64 --layers 1 --repeats 1 --json".split()
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["train"] == "tp1.pp1.dp1" and summary["results"][0]["method"] == "megachat"
