import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megachat.checkpoint.reader import open_weights, read_json
from megachat.errors import CheckpointError
from tests.checkpoint import folders
from tests.model.reference import PRE_LN


@pytest.mark.parametrize("kind", folders.KINDS)
def test_slices_of_every_kind_of_folder_are_read_as_written(tmp_path: Path, kind: str) -> None:
    stored = open_weights(folders.write_folder(PRE_LN, tmp_path, kind))
    expected = folders.state(PRE_LN)
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        cut = tuple(slice(1, size - 1) for size in value.shape)
        assert stored[name].shape == tuple(value.shape)
        assert torch.equal(stored[name].read(cut), value[cut])


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    folders.write_folder(PRE_LN, tmp_path, "bin")
    folders.write_folder(PRE_LN, tmp_path, "safetensors")
    assert {tensor.path.name for tensor in open_weights(tmp_path).values()} == {"model.safetensors"}


class _Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (os.mkdir, (str(self._victim),))


def test_a_torch_file_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save(
        {"weight": torch.ones(2), "evil": _Malicious(victim)}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match="could run code"):
        open_weights(tmp_path)
    assert not victim.exists()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded safetensors", "sharded bin"])
@pytest.mark.parametrize(
    "damage",
    [_truncate, lambda path: path.write_bytes(b"\0" * 100), lambda path: path.write_bytes(b"")],
)
def test_a_damaged_file_is_named_in_one_line(
    tmp_path: Path, kind: str, damage: Callable[[Path], object]
) -> None:
    folders.write_folder(PRE_LN, tmp_path, kind)
    path = max(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"weight": 3}, {1: torch.ones(2)}])
def test_a_torch_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="state dict"):
        open_weights(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2, dtype=torch.int8)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"weight holds torch\.int8"):
        open_weights(tmp_path)["weight"].read((slice(0, 2),))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "a file of the same folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "a file of the same folder"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors: missing"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=words):
        open_weights(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    folders.write_folder(PRE_LN, tmp_path, "sharded safetensors")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.decoder.more"] = "model-1.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"promises model\.decoder\.more in model-1"):
        open_weights(tmp_path)


def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json: cannot read"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"binary\.json: not valid JSON"):
        read_json(tmp_path / "binary.json")
