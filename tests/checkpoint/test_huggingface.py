import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megachat.checkpoint import (
    MissingHead,
    is_complete,
    load_huggingface,
    read_config,
    save_huggingface,
)
from megachat.errors import CheckpointError, ConfigError
from megachat.model import OPT_MODELS, Head, OptConfig, OptModel
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.model import reference as ref


def _state(config: OptConfig, head: Head = Head.LANGUAGE_MODEL) -> dict[str, Tensor]:
    state = ref.huggingface_model(config, head).state_dict()
    return {name: value.clone() for name, value in state.items() if name != "lm_head.weight"}


def _write_config(config: OptConfig, folder: Path, head: Head = Head.LANGUAGE_MODEL) -> None:
    folder.mkdir(exist_ok=True)
    values = config.to_huggingface(head=head, dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps(values))


def _write_source(config: OptConfig, folder: Path, kind: str) -> None:
    """The same weights in each form that the hub has."""
    _write_config(config, folder)
    state = _state(config)
    names = sorted(state)
    halves = [names[::2], names[1::2]]
    if kind == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "bin without prefix":
        bare = {name.removeprefix("model."): value for name, value in state.items()}
        torch.save(bare, folder / "pytorch_model.bin")
    else:
        index = {}
        for number, part in enumerate(halves):
            tensors = {name: state[name] for name in part}
            if kind == "sharded safetensors":
                file = f"model-{number}.safetensors"
                save_file(tensors, folder / file)
            else:
                file = f"pytorch_model-{number}.bin"
                torch.save(tensors, folder / file)
            index |= dict.fromkeys(part, file)
        suffix = "model.safetensors" if kind == "sharded safetensors" else "pytorch_model.bin"
        (folder / f"{suffix}.index.json").write_text(json.dumps({"weight_map": index}))


KINDS = ("safetensors", "bin", "bin without prefix", "sharded safetensors", "sharded bin")


def _load_all_save_all(folder: Path) -> None:
    """Loads every kind under two layouts and writes it back from there."""
    for name, config in (("pre", ref.PRE_LN), ("post", ref.POST_LN)):
        for degrees in ({"tensor": 2, "pipeline": 2}, {"tensor": 1, "pipeline": 4}):
            layout = ParallelLayout.for_world(4, **degrees)
            model = ref.build_model(config, layout)
            for kind in KINDS:
                for parameter in model.parameters():
                    parameter.data.fill_(torch.nan)
                load_huggingface(model, folder / name / kind)
                limit = 20_000 if kind == "bin" else 10**9
                save_huggingface(
                    model, folder / "out" / f"{name} {layout} {kind}", max_shard_bytes=limit
                )


def _load_folder(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_every_kind_of_folder_survives_every_layout_bit_for_bit(tmp_path: Path) -> None:
    for name, config in (("pre", ref.PRE_LN), ("post", ref.POST_LN)):
        (tmp_path / name).mkdir()
        for kind in KINDS:
            _write_source(config, tmp_path / name / kind, kind)
    run_ranks(4, _load_all_save_all, tmp_path)
    exports = sorted((tmp_path / "out").iterdir())
    assert len(exports) == 2 * 2 * len(KINDS)
    for export in exports:
        expected = _state(ref.PRE_LN if export.name.startswith("pre") else ref.POST_LN)
        found = _load_folder(export)
        assert is_complete(export)
        assert (
            len(list(export.glob("*.safetensors")))
            == (7 if export.name.endswith(" bin") and "sharded" not in export.name else 1)
            or "bin" in export.name
        )
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{export.name}: {key}"
