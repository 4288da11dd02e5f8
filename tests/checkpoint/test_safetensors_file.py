from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megachat.checkpoint.safetensors_file import SafetensorsFile, TensorEntry

TENSORS = {
    "z": torch.randn(3, 5).bfloat16(),
    "a": torch.randn(7),
    "turned": torch.randn(4, 6).half().t(),
    "one": torch.randn(1, 1),
}


def _entries() -> list[TensorEntry]:
    return [
        TensorEntry(name=name, dtype=value.dtype, shape=tuple(value.shape))
        for name, value in TENSORS.items()
    ]


def test_the_library_reads_what_was_written_tensor_by_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with SafetensorsFile(path, _entries()) as file:
        assert not path.exists()
        for name, value in TENSORS.items():
            file.append(name, value)
        file.finish()
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(found[name], value) and found[name].dtype is value.dtype
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_tensor_out_of_order_or_of_another_shape_is_a_bug(tmp_path: Path) -> None:
    with SafetensorsFile(tmp_path / "x", _entries()) as file:
        with pytest.raises(AssertionError, match="in the place of"):
            file.append("a", TENSORS["a"])
        with pytest.raises(AssertionError, match="in the place of"):
            file.append("z", TENSORS["z"].t())
        file.append("z", TENSORS["z"])
        with pytest.raises(AssertionError, match="3 tensors were not written"):
            file.finish()


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("mine")
    with SafetensorsFile(path, _entries()) as file, pytest.raises(FileExistsError):
        file.append("z", TENSORS["z"])
    assert path.read_text() == "mine"
