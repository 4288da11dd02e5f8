import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from megachat.cli.main import EXIT_CODE, app

ROWS = '{"prompt": "Human: hi Assistant:", "chosen": " hello", "rejected": " no"}\n' * 400


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A small valid run on local data."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    path = tmp_path / "run.toml"
    path.write_text(f"""
[run]
output = "{tmp_path}/out"
[launch]
device = "cpu"
[tokenizer.train]
vocab_size = 300
[data]
cache_dir = "{tmp_path}/cache"
max_prompt_tokens = 16
max_tokens = 32
[[data.sources]]
name = "mine"
path = "{tmp_path}/rows.jsonl"
[models.actor.shape]
layers = 2
hidden = 32
heads = 4
max_positions = 64
[models.reward]
model = "sft"
[rlhf.sampling]
max_new_tokens = 16
""")
    return path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result: Result, *needles: str) -> None:
    """Exit status 2 and, after whatever progress was logged, one line that holds every needle."""
    assert result.exit_code == EXIT_CODE, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert errors == result.stderr.strip().splitlines()[-1:], result.stderr
    for needle in needles:
        assert needle in errors[0], errors[0]


def assert_would_start_with_gpus(result: Result) -> None:
    """A dry run on this machine says OK, or which of the recipe's needs it lacks."""
    if torch.cuda.is_available():
        return
    assert_one_line(result, "launch.device is cuda, but torch")
    assert "OK" not in result.stdout


def test_help_names_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("train", "sft", "reward", "rlhf"):
        assert command in result.output


def test_dry_run_shows_configuration_and_layouts_and_writes_nothing(run_file: Path) -> None:
    before = sorted(run_file.parent.iterdir())
    result = invoke(
        "train", "--config", run_file, "--dry-run", "--set", "launch.processes=2",
        "--set", "models.actor.tensor=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "layout of actor: tp2.pp1.dp1" in result.output
    assert "layout of reward: tp1.pp1.dp2" in result.output
    assert '"max_new_tokens": 16' in result.output
    assert sorted(run_file.parent.iterdir()) == before


def test_paper_command_resolves(tmp_path: Path) -> None:
    result = invoke(
        "train", "--actor-model", "facebook/opt-13b", "--reward-model", "facebook/opt-350m",
        "--deployment-type", "single_node", "--set", f"run.output={tmp_path}", "--dry-run",
    )  # fmt: skip
    assert "layout of actor: tp4.pp1.dp2" in result.stdout
    assert_would_start_with_gpus(result)


BAD_SETTINGS: Sequence[tuple[Sequence[str], Sequence[str]]] = [
    (["sft.max_step=3"], ["sft.max_step", "did you mean 'max_steps'"]),
    (["sft.max_steps=many"], ["sft.max_steps", "integer", "'many'"]),
    (["sft.batch_rows=0"], ["sft.batch_rows", "greater than or equal to 1", "0"]),
    (["sft"], ["expected table.key=value"]),
    (["models.actor.precision=fp8"], ["models.actor.precision", "'fp8'"]),
    (["launch.processes=3", "models.actor.tensor=2"], ["world size 3", "tensor 2"]),
    (["rlhf.sampling.max_new_tokens=60"], ["max_positions", "64", "76"]),
    (["rlhf.batch_prompts=33"], ["33", "minibatches"]),
    (["rlhf.sampling.temperature=0"], ["temperature 0"]),
    (["models.actor.model=x"], ["either model", "shape"]),
    (["launch.rendezvous=nowhere"], ["launch.rendezvous", "host:port"]),
    (["launch.device=cuda"], ["launch.device is cuda"]),
]


@pytest.mark.parametrize(("settings", "needles"), BAD_SETTINGS)
def test_bad_setting_is_one_line_that_says_what_to_change(
    run_file: Path, settings: Sequence[str], needles: Sequence[str]
) -> None:
    overrides = [part for setting in settings for part in ("--set", setting)]
    if settings[0].startswith("launch.rendezvous"):
        overrides += ["--set", "launch.processes=2"]
    assert_one_line(invoke("train", "--config", run_file, *overrides), *needles)


def test_port_in_use_is_one_line(run_file: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        endpoint = f"127.0.0.1:{holder.getsockname()[1]}"
        result = invoke(
            "train", "--config", run_file, "--set", "launch.processes=2",
            "--set", f"launch.rendezvous={endpoint}",
        )  # fmt: skip
    assert_one_line(result, endpoint, "choose another port")


def test_missing_and_malformed_files_are_one_line(run_file: Path, tmp_path: Path) -> None:
    assert_one_line(invoke("train", "--config", tmp_path / "none.toml"), "cannot read")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    assert_one_line(invoke("train", "--config", broken), "not valid TOML")
    (tmp_path / "rows.jsonl").write_text("")
    assert_one_line(invoke("train", "--config", run_file), "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{not json\n" * 5)
    assert_one_line(invoke("train", "--config", run_file), "rows.jsonl")
    (tmp_path / "rows.jsonl").unlink()
    assert_one_line(invoke("train", "--config", run_file), "rows.jsonl")


def test_stage_without_its_inputs_says_which_to_run_first(run_file: Path) -> None:
    assert_one_line(invoke("rlhf", "--config", run_file), "sft", "run that stage first")


def test_unwritable_output_is_one_line(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("train", "--config", run_file, "--set", f"run.output={tmp_path}/file/out")
    assert_one_line(result, "run.output", "choose another folder")


def test_options_that_exclude_each_other_are_refused(run_file: Path) -> None:
    both = invoke("train", "--config", run_file, "--actor-model", "facebook/opt-125m")
    assert both.exit_code == EXIT_CODE
    for alone in (
        ("--reward-model", "facebook/opt-350m"),
        ("--deployment-type", "cpu"),
        ("--nodes", "2"),
        ("--gpus-per-node", "4"),
        ("--gpu-memory-gb", "40"),
        ("--gpu", "h100-80"),
    ):
        lonely = invoke("train", *alone)
        assert lonely.exit_code == EXIT_CODE
        assert "need --actor-model" in lonely.stderr.replace("\n", " ").replace("│", "")


def test_a_machine_is_taken_from_the_command_line(tmp_path: Path) -> None:
    result = invoke(
        "train", "--actor-model", "facebook/opt-1.3b", "--deployment-type", "multi_node",
        "--nodes", "2", "--gpus-per-node", "4", "--gpu-memory-gb", "40",
        "--set", f"run.output={tmp_path}", "--dry-run",
    )  # fmt: skip
    assert "Chosen for 2 x 4 GPUs of 40 GB" in result.stdout
    assert "ranks: 8" in result.stdout
    assert_would_start_with_gpus(result)


def test_a_dry_run_waits_for_no_module_that_trains(tmp_path: Path) -> None:
    command = [
        "train", "--actor-model", "facebook/opt-66b", "--deployment-type", "multi_node",
        "--set", f"run.output={tmp_path}", "--dry-run",
    ]  # fmt: skip
    heavy = ("megatron", "deepspeed", "transformers", "datasets", "tensorboard", "matplotlib")
    code = (
        f"import sys; from megachat.cli.main import app; app({command!r}, standalone_mode=False); "
        f"sys.exit(' '.join(name for name in {heavy!r} if name in sys.modules) or 0)"
    )
    root = Path(__file__).parents[2]
    # A hub that may have what is not here: offline, the library of data sets is asked.
    online = os.environ | {"HF_HUB_OFFLINE": "0", "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env=online,
    )
    assert result.returncode == 0, result.stderr
    assert "layout of actor: tp8.pp2.dp4" in result.stdout
