"""All that is wrong is told at once, alike by the run and by its dry run, and nothing is begun."""

import re
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megachat.cli.main import EXIT_CODE, app
from megachat.data.config import Stage
from megachat.errors import ConfigError, DataError, LayoutError
from megachat.parallel import launch
from megachat.preflight.checks import Report, preflight, together
from tests.data.samples import write_jsonl
from tests.preflight.case import config, host, tree

ALL = list(Stage)


def write_toml(path: Path, folder: Path, output: Path) -> Path:
    """The sound run as a file; only tables and plain values are needed."""
    lines: list[str] = []

    def table(name: str, values: dict[str, object]) -> None:
        plain = {key: each for key, each in values.items() if not isinstance(each, dict)}
        if plain:
            lines.append(f"[{name}]")
        for key, each in plain.items():
            if key == "sources":
                assert isinstance(each, list)
                items = ", ".join(
                    "{" + ", ".join(f'{k} = "{v}"' for k, v in item.items()) + "}" for item in each
                )
                lines.append(f"sources = [{items}]")
            else:
                lines.append(
                    f"{key} = {each}" if isinstance(each, int | float) else f'{key} = "{each}"'
                )
        for key, each in values.items():
            if isinstance(each, dict):
                table(f"{name}.{key}" if name else key, each)

    values = tree(folder)
    values["run"]["output"], values["data"]["cache_dir"] = str(output), str(output / "cache")
    for name, section in values.items():
        table(name, section)
    path.write_text("\n".join(lines))
    return path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A run that must not start."""

    needle: str
    settings: Sequence[str] = ()
    spoil: Callable[[Path], None] | None = None
    """Changes the run folder."""
    command: str = "train"


def _foreign_file(output: Path) -> None:
    (output / "sft" / "model").mkdir(parents=True)
    (output / "sft" / "model" / "mine.txt").touch()


def _file_as_output(output: Path) -> None:
    output.touch()


def _broken_result(output: Path) -> None:
    (output / "sft").mkdir(parents=True)
    (output / "sft" / "result.json").write_text("{")


BAD = {
    "tensor 4 with 2 heads": Bad(
        settings=["launch.processes=4", "models.actor.tensor=4"], needle="attention heads 2"
    ),
    "pipeline 3 with 2 layers": Bad(
        settings=["launch.processes=3", "models.actor.pipeline=3"], needle="layers 2"
    ),
    "generation degree": Bad(
        settings=["launch.processes=4", "rlhf.generation_tensor=4"], needle="generation_tensor 4"
    ),
    "world": Bad(settings=["launch.processes=3", "models.actor.tensor=2"], needle="world size 3"),
    "rendezvous, one process": Bad(
        settings=["launch.rendezvous=foo"], needle="launch.rendezvous is 'foo'"
    ),
    "rendezvous, two processes": Bad(
        settings=["launch.rendezvous=foo", "launch.processes=2"], needle="launch.rendezvous is"
    ),
    "nodes without a rendezvous": Bad(
        settings=["launch.nodes=2"], needle="launch.rendezvous is not set"
    ),
    "100,000 processes": Bad(settings=["launch.processes=100000"], needle="launch.processes"),
    "device": Bad(settings=["launch.device=cuda"], needle="launch.device is cuda"),
    "generation backend": Bad(
        settings=["rlhf.generation.backend=cuda"], needle="rlhf.generation.backend: backend"
    ),
    "logprob backend": Bad(
        settings=["models.actor.logprob_backend=cuda"], needle="models.actor.logprob_backend: "
    ),
    "no held-out rows": Bad(
        settings=["data.validation_share=0"], needle="raise data.validation_share"
    ),
    "batch": Bad(settings=["sft.batch_rows=4000"], needle="sft.batch_rows 4000: lower it"),
    "positions": Bad(settings=["data.max_tokens=4096"], needle="data.max_tokens is 4096"),
    "vocabulary": Bad(settings=["tokenizer.train.vocab_size=999"], needle="999 ids"),
    "minibatches": Bad(settings=["rlhf.ppo.minibatches=3"], needle="minibatches"),
    "cache of keys and values": Bad(
        settings=["rlhf.generation.kv_cache_gb=0.000004"], needle="kv_cache_gb"
    ),
    "missing model": Bad(settings=["models.reward.model=./none"], needle="no such folder"),
    "missing data": Bad(
        settings=['data.sources=[{name="mine", path="none.jsonl"}]'], needle="none.jsonl"
    ),
    "foreign file": Bad(spoil=_foreign_file, needle="holds mine.txt and is no earlier export"),
    "output is a file": Bad(spoil=_file_as_output, needle="cannot write there (File exists)"),
    "broken result": Bad(spoil=_broken_result, needle="not a stage result"),
    "reward before sft": Bad(command="reward", needle="run that stage first"),
    "rlhf before sft": Bad(command="rlhf", needle="run that stage first"),
}


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", BAD)
def test_a_dry_run_refuses_what_the_run_refuses_in_the_same_line(
    name: str, case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, output = BAD[name], tmp_path / "out"
    monkeypatch.setattr(launch, "prepare_ranks", lambda *_: None)  # as if it were still at it
    if bad.spoil is not None:
        bad.spoil(output)
    file = write_toml(tmp_path / "run.toml", case, output)
    overrides = [part for setting in bad.settings for part in ("--set", setting)]
    before = _files(tmp_path)
    dry = invoke(bad.command, "--config", file, *overrides, "--dry-run")
    assert dry.exit_code == EXIT_CODE, dry.output
    run = invoke(bad.command, "--config", file, *overrides)
    assert run.exit_code == EXIT_CODE, run.output
    assert dry.stderr == run.stderr and dry.stderr.count("\n") == 1
    assert re.match(r"[A-Z]\w+Error: ", dry.stderr) and bad.needle in dry.stderr, dry.stderr
    assert "OK" not in dry.stdout and "Traceback" not in dry.output
    assert _files(tmp_path) == before


@pytest.mark.parametrize("command", ["train", "sft"])
def test_a_sound_run_is_said_to_start(case: Path, tmp_path: Path, command: str) -> None:
    file = write_toml(tmp_path / "run.toml", case, tmp_path / "out")
    result = invoke(command, "--config", file, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("OK: the run would start\n")
    assert not (tmp_path / "out").exists()


def test_a_port_in_use_is_known_before_the_start(case: Path, tmp_path: Path) -> None:
    file = write_toml(tmp_path / "run.toml", case, tmp_path / "out")
    settings = ["--set", "launch.processes=2", "--set"]
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        point = f"127.0.0.1:{holder.getsockname()[1]}"
        taken = invoke(
            "train", "--config", file, "--dry-run", *settings, f"launch.rendezvous={point}"
        )
    assert taken.exit_code == EXIT_CODE and f"{point}: cannot listen there" in taken.stderr
    free = invoke("train", "--config", file, "--dry-run", *settings, f"launch.rendezvous={point}")
    assert free.exit_code == 0, free.output


def test_everything_that_is_wrong_is_told_at_once(case: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    settings = config(
        case, f"run.output={tmp_path}/out", "launch.processes=4", "models.actor.tensor=4",
        "data.validation_share=0", "rlhf.generation.backend=cuda",
    )  # fmt: skip
    report = preflight(settings, ALL, host(free=lambda _: 0))
    text = str(together(report.problems))
    assert type(together(report.problems)) is LayoutError and "\n" not in text
    for needle in (
        "models.actor: attention heads 2",
        "| also ConfigError: run.output",
        "| also CapacityError: run.output",
        "| also KernelError: rlhf.generation.backend",
        "| also DataError: data for prompts: no held-out rows",
    ):
        assert needle in text, text


def test_a_disk_that_is_too_small_is_refused_for_the_stages_that_are_left(case: Path) -> None:
    """A megabyte is enough for nothing; the sizes are tested with the folders."""
    report = preflight(config(case), ALL, host(free=lambda _: 2**20))
    [problem] = report.problems
    assert "are free: make room" in str(problem)
    assert preflight(config(case), ALL, host()).problems == []


def test_what_cannot_be_known_yet_is_noted_and_not_refused(
    case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy"})
    monkeypatch.setattr("megachat.hub.constants.HF_HUB_OFFLINE", False)
    report = preflight(config(case, "models.reward.model=nobody/nothing"), ALL, host())
    assert report.problems == []
    assert report.notes == [
        "layouts, memory and disk are not checked: the architecture of nobody/nothing cannot be "
        "known before it is downloaded"
    ]


def test_equal_lines_are_told_once_and_one_problem_keeps_its_error() -> None:
    report, error = Report(), ConfigError("a")
    report.add([error, ConfigError("a"), DataError("b")])
    assert [str(each) for each in report.problems] == ["a", "b"]
    assert together([error]) is error
    assert str(together(report.problems)) == "a | also DataError: b"
    with pytest.raises(ConfigError):
        report.refuse()
    Report().refuse()


def test_a_preflight_of_a_large_file_takes_no_time(case: Path, tmp_path: Path) -> None:
    shutil.copytree(case / "opt", tmp_path / "opt")
    row = {"prompt": "Human: hi Assistant:", "chosen": " a", "rejected": " b"}
    write_jsonl(tmp_path / "rows.jsonl", [row] * 200_000)
    settings = config(tmp_path)
    preflight(config(case), ALL, host())  # imports
    before = time.process_time()
    assert preflight(settings, ALL, host()).problems == []
    assert time.process_time() - before < 1.0
