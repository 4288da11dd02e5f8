"""HuggingFace folders of tiny models, written with HuggingFace's own libraries."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megachat.model import Head, OptConfig
from tests.model import reference as ref

KINDS = ("safetensors", "bin", "bin without prefix", "sharded safetensors", "sharded bin")
"""The forms that the hub has."""


def state(config: OptConfig, head: Head = Head.LANGUAGE_MODEL) -> dict[str, Tensor]:
    """The reference's tensors under HuggingFace's names, the tied output left out."""
    tensors = ref.huggingface_model(config, head).state_dict()
    return {name: value.clone() for name, value in tensors.items() if name != "lm_head.weight"}


def write_config(config: OptConfig, folder: Path, head: Head = Head.LANGUAGE_MODEL) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = config.to_huggingface(head=head, dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps(values))


def write_folder(
    config: OptConfig,
    folder: Path,
    kind: str = "safetensors",
    head: Head = Head.LANGUAGE_MODEL,
    changes: Mapping[str, Tensor] | None = None,
) -> Path:
    """A whole model folder of one kind, some tensors replaced or added."""
    write_config(config, folder, head)
    tensors = {**state(config, head), **(changes or {})}
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "bin without prefix":
        bare = {name.removeprefix("model."): value for name, value in tensors.items()}
        torch.save(bare, folder / "pytorch_model.bin")
    else:
        _write_shards(tensors, folder, safe=kind == "sharded safetensors")
    return folder


def _write_shards(tensors: dict[str, Tensor], folder: Path, *, safe: bool) -> None:
    names, weight_map = sorted(tensors), {}
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        file = f"model-{number}.safetensors" if safe else f"pytorch_model-{number}.bin"
        if safe:
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = "model.safetensors.index.json" if safe else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors
