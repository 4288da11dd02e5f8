"""What was written is what is read: a changed bit is refused by name, on every rank."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megachat.checkpoint import load, load_huggingface, load_together, save_huggingface
from megachat.checkpoint.checksums import MARKER_FILE, check_file, read_checksums
from megachat.errors import CheckpointError
from megachat.model import Head
from megachat.parallel.layout import ParallelLayout
from tests.checkpoint import folders
from tests.harness import run_ranks
from tests.model import reference as ref

SHARD_BYTES = 9_000
"""Cuts the tiny model into several files."""


def _save(folder: Path, degrees: dict[str, int], world_size: int) -> None:
    layout = ParallelLayout.for_world(world_size, **degrees)
    reference = ref.huggingface_model(ref.PRE_LN, Head.LANGUAGE_MODEL)
    model = ref.build_model(ref.PRE_LN, layout, reference=reference)
    save_huggingface(model, folder, max_shard_bytes=SHARD_BYTES)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of one rank; tests copy it before they spoil it."""
    folder = tmp_path_factory.mktemp("export") / "model"
    run_ranks(1, _save, folder, {}, 1)
    return folder


def _marker(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / MARKER_FILE).read_text())
    return values


def test_the_writer_leaves_a_digest_of_every_tensor_and_every_small_file(export: Path) -> None:
    marker = _marker(export)
    assert marker["format"] == 2
    weights = {path.name for path in export.glob("*.safetensors")}
    assert set(marker["tensors"]) == weights and len(weights) > 3
    for file in weights:
        expected = {}
        for name, value in load_file(export / file).items():
            text = f"torch.float32 {list(value.shape)}\n".encode()
            expected[name] = hashlib.sha256(text + value.numpy().tobytes()).hexdigest()
        assert marker["tensors"][file] == expected
    small = {path.name for path in export.iterdir()} - weights - {MARKER_FILE}
    assert marker["sha256"] == {
        name: hashlib.sha256((export / name).read_bytes()).hexdigest() for name in small
    }


def test_every_layout_writes_the_same_digests(export: Path, tmp_path: Path) -> None:
    run_ranks(4, _save, tmp_path / "model", {"tensor": 2, "pipeline": 2}, 4)
    assert _marker(tmp_path / "model") == _marker(export)
    for path in export.iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()


def _load_anyhow(folder: Path) -> str | None:
    """The refusal of a folder on this rank."""
    model = ref.build_model(ref.PRE_LN, ParallelLayout.for_world(2))
    try:
        load_huggingface(model, folder)
    except CheckpointError as error:
        return str(error)
    return None


def _flip(path: Path, place: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def _last_tensor(path: Path) -> str:
    """The tensor whose bytes end a file."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    return str(max(header, key=lambda name: header[name]["data_offsets"][1]))


SPOILED: dict[str, Callable[[Path], None]] = {
    "weights": lambda folder: _flip(sorted(folder.glob("*.safetensors"))[-1], -1),
    "index": lambda folder: _flip(folder / "model.safetensors.index.json", -3, 16),
    "config": lambda folder: _flip(folder / "config.json", -3, 16),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_flipped_bit_is_refused_by_name_on_all_ranks(
    what: str, export: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(export, folder)
    SPOILED[what](folder)
    first, second = run_ranks(2, _load_anyhow, folder)
    assert first == second and first is not None and "\n" not in first
    last = sorted(export.glob("*.safetensors"))[-1]
    name = {
        "weights": f"{last.name}: {_last_tensor(last)}",
        "index": "model.safetensors.index.json",
        "config": "config.json",
    }[what]
    assert first.startswith(f"{folder / name}: has changed since it was written (sha256 ")
    assert f"delete its {MARKER_FILE}" in first


def test_a_folder_is_taken_as_it_is_without_its_marker(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(export, folder)
    SPOILED["weights"](folder)
    (folder / MARKER_FILE).unlink()
    assert run_ranks(2, _load_anyhow, folder) == [None, None]


def test_an_export_of_the_version_before_has_no_checksums(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(export, folder)
    old = {"format": 1, "files": _marker(folder)["files"]}
    (folder / MARKER_FILE).write_text(json.dumps(old))
    assert read_checksums(folder) is None
    assert run_ranks(2, _load_anyhow, folder) == [None, None]


@pytest.mark.parametrize(
    "marker",
    [
        "{",
        "[]",
        "{}",
        '{"format": 3}',
        '{"format": 2, "sha256": {"config.json": 1}, "tensors": {}}',
        '{"format": 2, "sha256": {}, "tensors": {"model.safetensors": 1}}',
    ],
)
def test_broken_checksums_are_one_line(marker: str, tmp_path: Path) -> None:
    (tmp_path / MARKER_FILE).write_text(marker)
    with pytest.raises(CheckpointError, match=MARKER_FILE) as caught:
        check_file(tmp_path, "config.json")
    assert "\n" not in str(caught.value)


def test_a_tensor_that_the_checksums_do_not_know_is_refused(export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(export, folder)
    marker = _marker(folder)
    file = sorted(marker["tensors"])[0]
    name, _ = marker["tensors"][file].popitem()
    (folder / MARKER_FILE).write_text(json.dumps(marker))
    first, _ = run_ranks(2, _load_anyhow, folder)
    assert f"{folder / file}: {name} is not among the checksums" in str(first)


def _digests_of_every_kind(folder: Path) -> list[tuple[int, str | None]]:
    found = []
    for kind in folders.KINDS:
        count, original = [0], load.checked_digest

        def counted(*args: Any, count: list[int] = count, original: Any = original) -> str:
            count[0] += 1
            return str(original(*args))

        model = ref.build_model(ref.PRE_LN, ParallelLayout.for_world(2))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load, "checked_digest", counted)
            digest = load_together((model,), folder / kind)
        found.append((count[0], digest))
    return found


def test_a_model_has_one_digest_in_every_form_and_nobody_hashes_what_another_reads(
    tmp_path: Path,
) -> None:
    for kind in folders.KINDS:
        folders.write_folder(ref.PRE_LN, tmp_path / kind, kind)
    total = len(folders.state(ref.PRE_LN))
    first, second = run_ranks(2, _digests_of_every_kind, tmp_path)
    assert all(mine + other == total for (mine, _), (other, _) in zip(first, second, strict=True))
    assert len({digest for _, digest in first}) == 1 and first[0][1] is not None
    assert all(digest is None for _, digest in second)
    assert all(count < total for count, _ in first)
