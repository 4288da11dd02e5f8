"""The record of all faults: it is of these sources, and only a complete run writes it."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.kernels import proven
from tests.kernels.proven import (
    FAULTS_MODULE,
    NVCC_MODULE,
    Proof,
    Recorder,
    hash_of_sources,
    objection,
    read_proof,
)

FAULTS = ("test_a[one]", "test_a[two]", "test_b[one]")
KERNELS = ("copy", "sum")
PASSED = (
    *(f"{FAULTS_MODULE}::{name}" for name in FAULTS),
    *(f"{NVCC_MODULE}::test_compiled[{kernel}]" for kernel in KERNELS),
)


def test_all_faults_have_been_looked_for_in_these_sources() -> None:
    has_nvcc = shutil.which("nvcc") is not None
    assert not objection(read_proof(), sources=hash_of_sources(), has_nvcc=has_nvcc)


def _recorded(path: Path, **outcomes: str) -> Proof | None:
    """What is recorded after a session in which all passed but those with another outcome."""
    recorder = Recorder(path)
    for name in PASSED:
        key = name.split("::")[1].replace("[", "_").rstrip("]")
        outcome = outcomes.get(key, "passed")
        recorder.pytest_runtest_logreport(
            SimpleNamespace(  # type: ignore[arg-type]
                nodeid=name, when="call", passed=outcome == "passed", failed=outcome == "failed"
            )
        )
    recorder.record(faults=FAULTS, kernels=KERNELS)
    return read_proof(path)


def test_a_complete_run_is_recorded_with_the_hash_of_its_sources(tmp_path: Path) -> None:
    expected = Proof(sources=hash_of_sources(), faults=3, nvcc=True)
    assert _recorded(tmp_path / "record") == expected
    assert not objection(expected, sources=expected.sources, has_nvcc=True)


@pytest.mark.parametrize(
    ("test", "outcome"),
    [
        ("test_a_two", "failed"),
        ("test_a_two", "skipped"),
        ("test_b_one", "failed"),
        ("test_compiled_sum", "failed"),
    ],
)
def test_a_run_in_which_something_failed_or_was_left_out_is_not_recorded(
    test: str, outcome: str, tmp_path: Path
) -> None:
    assert _recorded(tmp_path / "record", **{test: outcome}) is None


def test_without_nvcc_the_record_says_so_and_a_machine_with_it_objects(tmp_path: Path) -> None:
    proof = _recorded(tmp_path / "record", test_compiled_sum="skipped")
    assert proof is not None and not proof.nvcc
    assert not objection(proof, sources=proof.sources, has_nvcc=False)
    assert "nvcc has not compiled" in objection(proof, sources=proof.sources, has_nvcc=True)


def test_sources_that_change_while_they_are_tested_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path / "record")
    monkeypatch.setattr(proven, "hash_of_sources", lambda: "another")
    recorder.record(faults=(), kernels=())
    assert not (tmp_path / "record").exists()


def test_a_changed_added_or_renamed_source_makes_the_record_old(tmp_path: Path) -> None:
    source = tmp_path / "kernels" / "cuda" / "copy.cu"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    proof = Proof(sources=hash_of_sources(tmp_path), faults=3, nvcc=True)
    hashes = [proof.sources]
    source.write_text("two")
    hashes.append(hash_of_sources(tmp_path))
    source.rename(source.with_name("move.cu"))
    hashes.append(hash_of_sources(tmp_path))
    (tmp_path / "kernels" / "budgets.json").write_text("{}")
    hashes.append(hash_of_sources(tmp_path))
    assert len(set(hashes)) == 4
    assert proven.COMMAND in objection(proof, sources=hashes[1], has_nvcc=False)
    assert proven.COMMAND in objection(None, sources=hashes[0], has_nvcc=False)
    assert not objection(replace(proof), sources=hashes[0], has_nvcc=True)
