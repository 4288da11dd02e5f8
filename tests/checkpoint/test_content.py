"""A model is known by what its folder holds."""

import os
import shutil
from pathlib import Path

import pytest

from megachat import digests
from megachat.checkpoint import content, load_together, save_huggingface
from megachat.checkpoint.content import folder_digest, weights_state
from megachat.digests import FileDigests
from megachat.errors import CheckpointError
from megachat.model import Head
from megachat.parallel.layout import ParallelLayout
from tests.checkpoint import folders
from tests.harness import run_ranks
from tests.model import reference as ref


def _load_and_save(folder: Path) -> str | None:
    """The digest that loading tells; leaves an export of what was loaded."""
    model = ref.build_model(ref.PRE_LN, ParallelLayout.for_world(2, tensor=2))
    digest = load_together((model,), folder)
    save_huggingface(model, folder.with_name("export"))
    return digest


def test_loading_reading_and_the_writer_tell_the_same_digest(tmp_path: Path) -> None:
    folder = folders.write_folder(ref.PRE_LN, tmp_path / "model", "sharded bin")
    known = FileDigests(tmp_path / "known")
    expected = folder_digest(folder, known)
    assert run_ranks(2, _load_and_save, folder) == [expected, None]
    assert folder_digest(tmp_path / "export", known) == expected


def test_a_digest_is_of_all_weights_and_of_the_architecture(tmp_path: Path) -> None:
    known = FileDigests(tmp_path / "known")
    found = {
        folder_digest(folders.write_folder(config, tmp_path / name, head=head), known)
        for name, config, head in (
            ("language", ref.PRE_LN, Head.LANGUAGE_MODEL),
            ("scalar", ref.PRE_LN, Head.SCALAR),
            ("post", ref.POST_LN, Head.LANGUAGE_MODEL),
        )
    }
    assert len(found) == 3


def test_an_unchanged_folder_is_not_read_again_and_an_export_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_RECENT_NS", -(10**9))  # nothing here is older than the test
    folder, known = (
        folders.write_folder(ref.PRE_LN, tmp_path / "model"),
        FileDigests(tmp_path / "k"),
    )
    run_ranks(2, _load_and_save, folder)
    expected = folder_digest(folder, known)

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patch:
        patch.setattr(content, "read_tensor", refuse)
        (folder / "README.md").write_text("not of the model")
        assert folder_digest(folder, known) == expected
        assert folder_digest(tmp_path / "export", known) == expected
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert folder_digest(copy, known) == expected
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    os.utime(weights, ns=(0, (folder / weights.name).stat().st_mtime_ns))
    assert folder_digest(copy, known) != expected


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing|cannot be read|no weights"):
        folder_digest(tmp_path, FileDigests(tmp_path / "known"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        folder_digest(tmp_path / "absent", FileDigests(tmp_path / "known"))
    with pytest.raises(FileNotFoundError):
        weights_state(tmp_path / "absent")
