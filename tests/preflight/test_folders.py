"""Folders that cannot be written, exports whose place is taken, and disks that are too small."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import OPTForCausalLM

from megachat.checkpoint.draft import MARKER_FILE
from megachat.data.config import Stage
from megachat.errors import CapacityError, CheckpointError, ConfigError, DataError
from megachat.preflight import folders
from megachat.preflight.folders import Write, check_disk, check_folders, most_at_once
from megachat.preflight.models import Architectures
from megachat.stages.config import RunConfig
from tests.preflight.case import MODEL, config, host

ALL = frozenset(Stage)
MODELS = Architectures(actor=MODEL, critic=MODEL)


def refusals(settings: RunConfig, stages: frozenset[Stage] = ALL) -> list[str]:
    return [f"{type(each).__name__}: {each}" for each in check_folders(settings, stages)]


def into(case: Path, output: Path, *overrides: str) -> RunConfig:
    """The sound run with another run folder."""
    return config(case, f"run.output={output}", f"data.cache_dir={output}/cache", *overrides)


def test_folders_that_can_be_made_pass_and_nothing_is_made(case: Path, tmp_path: Path) -> None:
    assert refusals(into(case, tmp_path / "a" / "b")) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["out", "out/sft", "out/rlhf", "out/tokenizer", "."])
def test_a_file_where_a_folder_is_to_be_is_refused(case: Path, tmp_path: Path, taken: str) -> None:
    """For `.` the run folder is below a file."""
    path = tmp_path / ("file" if taken == "." else taken)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    output = tmp_path / "file" / "out" if taken == "." else tmp_path / "out"
    first = refusals(config(case, f"run.output={output}"))[0]
    assert first.startswith(f"ConfigError: run.output {output}: cannot write ")
    assert first.endswith("choose another folder")


def test_a_folder_without_the_right_to_write_is_refused(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right is asked of the kernel: root, who runs tests in containers, has all rights."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert refusals(into(case, tmp_path / "out")) == [
        f"ConfigError: run.output {tmp_path}/out: cannot write there (Permission denied): choose "
        "another folder",
        f"DataError: data.cache_dir {tmp_path}/out/cache: cannot be written (Permission denied): "
        "choose another",
    ]


def test_a_cache_below_a_file_is_refused(case: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = config(case, f"data.cache_dir={tmp_path}/file/cache")
    [problem] = check_folders(settings, ALL)
    assert isinstance(problem, DataError) and "data.cache_dir" in str(problem)


@pytest.mark.parametrize(
    ("stage", "name"), [(Stage.SFT, "sft"), (Stage.REWARD, "reward"), (Stage.PROMPTS, "rlhf")]
)
def test_a_foreign_file_in_the_place_of_an_export_is_refused_if_its_stage_runs(
    case: Path, tmp_path: Path, stage: Stage, name: str
) -> None:
    target = tmp_path / name / "model"
    target.mkdir(parents=True)
    settings = into(case, tmp_path)
    assert refusals(settings) == []  # an empty folder is nobody's
    (target / "notes.txt").touch()
    [problem] = check_folders(settings, frozenset({stage}))
    assert isinstance(problem, CheckpointError)
    assert f"{target}: holds notes.txt and is no earlier export" in str(problem)
    assert refusals(settings, ALL - {stage}) == []
    (target / MARKER_FILE).touch()
    assert refusals(settings) == []


def written(case: Path, settings: RunConfig, stages: frozenset[Stage] = ALL) -> dict[str, int]:
    return {each.what: each.num_bytes for each in folders.planned_writes(settings, stages, MODELS)}


def test_an_export_takes_the_bytes_of_its_weights(case: Path, tmp_path: Path) -> None:
    """HuggingFace counts the parameters, the tied output once; ours are written in fp32 or bf16."""
    model = OPTForCausalLM.from_pretrained(case / "opt")
    parameters = sum(each.numel() for each in model.parameters())
    fp32 = written(case, into(case, tmp_path))
    bf16 = written(case, into(case, tmp_path, "models.actor.precision=bf16"))
    assert fp32["export of sft"] - fp32["tokenizer"] == 4 * parameters
    assert fp32["export of prompts"] == fp32["export of sft"]
    assert bf16["export of sft"] - bf16["tokenizer"] == 2 * parameters
    assert bf16["export of reward"] - bf16["tokenizer"] == 4 * (parameters + MODEL.embed_dim)


def test_a_tokenizer_takes_its_files_and_data_what_is_not_cached_yet(
    case: Path, tmp_path: Path
) -> None:
    settings = into(case, tmp_path)
    sizes = written(case, settings)
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "sentencepiece.model")
    there = [case / "opt" / name for name in names if (case / "opt" / name).is_file()]
    assert sizes["tokenizer"] >= sum(path.stat().st_size for path in there[:2])
    rows = (case / "rows.jsonl").stat().st_size
    assert sizes["data"] == 2 * rows
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "rows.arrow").write_bytes(bytes(2 * rows))
    assert "data" not in written(case, settings)
    assert written(case, settings, frozenset()) == {}


def test_an_export_is_written_beside_the_one_that_it_replaces() -> None:
    def bytes_of(*sizes: tuple[int, int]) -> int:
        return most_at_once(
            [
                Write(what="", folder=Path(), num_bytes=10**9 * new, freed_bytes=10**9 * old)
                for new, old in sizes
            ]
        )

    beside = bytes_of((0, 0))
    assert bytes_of((1, 0), (2, 0)) == round(3.03 * 10**9) + beside
    assert bytes_of((3, 3), (2, 0)) == round(3.03 * 10**9) + beside
    assert bytes_of((3, 2), (3, 0)) == round(4.04 * 10**9) + beside


def on_a_disk(free: int) -> Callable[[Path], int]:
    return lambda folder: free if folder.is_dir() else 0


def test_a_disk_one_byte_too_small_is_refused_with_both_numbers(case: Path, tmp_path: Path) -> None:
    settings = into(case, tmp_path / "out")
    needed = most_at_once(folders.planned_writes(settings, ALL, MODELS))
    fits, small = host(free=on_a_disk(needed)), host(free=on_a_disk(needed - 1))
    assert list(check_disk(settings, ALL, MODELS, fits)) == []
    [problem] = check_disk(settings, ALL, MODELS, small)
    text = str(problem)
    assert isinstance(problem, CapacityError) and "\n" not in text
    assert text.startswith(f"run.output {tmp_path}/out: the run needs {folders.size(needed)} on")
    for part in ("tokenizer ", "data ", "export of sft ", "export of prompts ", "are free"):
        assert part in text
    assert f"but {folders.size(needed - 1)} are free" in text
    assert list(check_disk(settings, frozenset(), MODELS, small)) == []


def test_each_disk_is_asked_for_what_is_written_there(
    case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is on a disk of its own, by what `stat` says of the two folders."""
    output, cache = tmp_path / "out", tmp_path / "fast"
    output.mkdir()
    cache.mkdir()
    settings = config(case, f"run.output={output}", f"data.cache_dir={cache}")
    real = os.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = list(real(path, **options))
        found[2] += Path(path) == cache  # st_dev
        return os.stat_result(found)

    monkeypatch.setattr(folders.os, "stat", stat)
    small = host(free=lambda folder: 0 if folder == cache else 10**12)
    [problem] = check_disk(settings, ALL, MODELS, small)
    assert str(problem).startswith(f"data.cache_dir {cache}: ") and "export" not in str(problem)


def test_sizes_are_told_in_a_unit_that_shows_them() -> None:
    told = [folders.size(count) for count in (999, 1500, 2_340_000, 5 * 10**9)]
    assert told == ["999 bytes", "1.50 kB", "2.34 MB", "5.00 GB"]


def test_the_run_folder_is_named_in_errors_of_its_own_kind(case: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    [problem, *_] = check_folders(config(case, f"run.output={tmp_path}/out"), ALL)
    assert isinstance(problem, ConfigError)
