import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save_file

from megachat.checkpoint import reader
from megachat.checkpoint.reader import list_weights, read_json, read_tensor
from megachat.errors import CheckpointError
from tests.checkpoint import folders
from tests.model.reference import PRE_LN


@pytest.mark.parametrize("kind", folders.KINDS)
def test_tensors_of_every_kind_of_folder_are_read_as_written(tmp_path: Path, kind: str) -> None:
    stored = list_weights(folders.write_folder(PRE_LN, tmp_path, kind))
    expected = folders.state(PRE_LN)
    assert stored.keys() == expected.keys()
    for name, value in expected.items():
        assert stored[name].shape == tuple(value.shape)
        assert stored[name].num_bytes == value.nbytes
        assert torch.equal(read_tensor(tmp_path, stored[name]), value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tensors_keep_dtype_and_order_of_elements(
    tmp_path: Path, dtype: torch.dtype, suffix: str
) -> None:
    base = torch.randn(6, 8).to(dtype)
    tensors = {"matrix": base, "number": base[2, 3].clone(), "none": torch.empty(0, 4, dtype=dtype)}
    if suffix == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        # Views of one storage, as a state dict with tied or transposed weights has them.
        tensors |= {"turned": base.t(), "part": base[1:4, 2:6], "again": base}
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    stored = list_weights(tmp_path)
    assert stored.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(read_tensor(tmp_path, stored[name]), value), name
        assert stored[name].dtype is dtype


def test_a_tensor_is_one_read_of_its_own_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.write_folder(PRE_LN, tmp_path)
    counted: list[tuple[int, int]] = []
    original = reader.read_into

    def counting(file: BinaryIO, target: memoryview) -> int:
        counted.append((file.tell(), len(target)))
        return original(file, target)

    monkeypatch.setattr(reader, "read_into", counting)
    for stored in list_weights(tmp_path).values():
        counted.clear()
        read_tensor(tmp_path, stored)
        assert counted == [(stored.offset, stored.num_bytes)]


def test_a_read_that_comes_in_pieces_is_put_together() -> None:
    content, target = bytes(range(100)), bytearray(100)

    class Pieces(io.BytesIO):
        """Gives seven bytes at a time, as a file system may."""

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            return super().readinto(buffer[:7])

    assert reader.read_into(Pieces(content), memoryview(target)) == 100
    assert target == content
    assert reader.read_into(Pieces(content[:30]), memoryview(target)) == 30


def test_a_file_that_became_shorter_is_named_with_both_sizes(tmp_path: Path) -> None:
    folders.write_folder(PRE_LN, tmp_path)
    stored = max(list_weights(tmp_path).values(), key=lambda tensor: tensor.offset)
    path = tmp_path / stored.file
    path.write_bytes(path.read_bytes()[: stored.offset + 5])
    with pytest.raises(CheckpointError, match=rf"ends after 5 of {stored.num_bytes} bytes"):
        read_tensor(tmp_path, stored)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        read_tensor(tmp_path, stored)


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    folders.write_folder(PRE_LN, tmp_path, "bin")
    folders.write_folder(PRE_LN, tmp_path, "safetensors")
    assert {tensor.file for tensor in list_weights(tmp_path).values()} == {"model.safetensors"}


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
        list_weights(tmp_path)
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
        list_weights(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        list_weights(tmp_path)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"weight": 3}, {1: torch.ones(2)}])
def test_a_torch_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="state dict"):
        list_weights(tmp_path)


def test_a_dtype_that_nobody_knows_is_named(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, dtype=torch.uint16)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="weight holds U16: expected one of F64, F32"):
        list_weights(tmp_path)


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
        list_weights(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    folders.write_folder(PRE_LN, tmp_path, "sharded safetensors")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.decoder.more"] = "model-1.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"promises model\.decoder\.more in model-1"):
        list_weights(tmp_path)


def test_a_json_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json: cannot read"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"binary\.json: not valid JSON"):
        read_json(tmp_path / "binary.json")
