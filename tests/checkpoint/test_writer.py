import json
import shutil
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megachat.checkpoint import draft, is_complete, save_huggingface, writer
from megachat.checkpoint.names import huggingface_names
from megachat.checkpoint.safetensors_file import SafetensorsFile
from megachat.checkpoint.save_plan import plan_files
from megachat.errors import MegachatError
from megachat.model import Head, OptConfig, parameter_specs
from megachat.parallel.layout import ParallelLayout
from tests.checkpoint import folders
from tests.harness import run_ranks
from tests.model import reference as ref

CONFIGS = {"pre": ref.PRE_LN, "post": ref.POST_LN}
LAYOUTS: tuple[dict[str, int], ...] = (
    {},
    {"tensor": 2},
    {"tensor": 2, "pipeline": 2},
    {"pipeline": 4},
)


@settings(deadline=None)
@given(limit=st.integers(1, 200_000), bytes_each=st.sampled_from([torch.float32, torch.bfloat16]))
def test_files_hold_every_tensor_once_within_the_limit(limit: int, bytes_each: torch.dtype) -> None:
    specs = parameter_specs(ref.POST_LN, tensor=2, head=Head.SCALAR)
    files = plan_files(specs, dtype=bytes_each, max_shard_bytes=limit)
    assert tuple(spec for file in files for spec in file.specs) == specs
    for file in files:
        sizes = [prod(spec.unpadded_shape) * bytes_each.itemsize for spec in file.specs]
        assert file.num_bytes == sum(sizes)
        assert sum(sizes) <= limit or len(sizes) == 1
    assert len({file.name for file in files}) == len(files)
    assert (files[0].name == "model.safetensors") == (len(files) == 1)


def _save_every_way(folder: Path) -> None:
    for name, config in CONFIGS.items():
        for head in Head:
            reference = ref.huggingface_model(config, head)
            for number, degrees in enumerate(LAYOUTS):
                layout = ParallelLayout.for_world(4, **degrees)
                model = ref.build_model(config, layout, head=head, reference=reference)
                save_huggingface(model, folder / name / head / str(number))
                save_huggingface(
                    model, folder / name / head / f"{number} sharded", max_shard_bytes=9_000
                )


def _check_export(export: Path, config: OptConfig, head: Head) -> None:
    expected, found = folders.state(config, head), folders.read_folder(export)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), f"{export}: {key}"
    assert is_complete(export)
    assert (export / "generation_config.json").exists() == (head is Head.LANGUAGE_MODEL)
    weights = sorted(path.name for path in export.glob("*.safetensors"))
    if export.name.endswith("sharded"):
        index = json.loads((export / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
        assert sorted(set(index["weight_map"].values())) == weights
        assert len(weights) > 5
    else:
        assert weights == ["model.safetensors"]


@torch.no_grad()
def _check_in_transformers(export: Path, config: OptConfig, head: Head) -> None:
    reference, tokens = ref.huggingface_model(config, head), ref.random_batches(config, 1)[0]
    if head is Head.LANGUAGE_MODEL:
        loaded = AutoModelForCausalLM.from_pretrained(export).eval()
        assert loaded.generation_config.eos_token_id == config.eos_id
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(export).eval()
        assert loaded.config.num_labels == 1
    for parameter in loaded.parameters():
        # They lie in the mapped file, at any address; where that is not a multiple of a cache
        # line, BLAS may add in another order than for the reference.
        parameter.data = parameter.clone()
    assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


def test_exports_of_every_layout_are_bit_exact_and_load_in_transformers(tmp_path: Path) -> None:
    run_ranks(4, _save_every_way, tmp_path)
    for name, config in CONFIGS.items():
        for head in Head:
            exports = sorted((tmp_path / name / head).iterdir())
            assert len(exports) == 2 * len(LAYOUTS)
            for export in exports:
                _check_export(export, config, head)
            for export in exports[:2]:
                _check_in_transformers(export, config, head)


def _score_and_save(folder: Path, tokens: Tensor) -> Tensor:
    model = ref.build_model(ref.POST_LN, ParallelLayout(), head=Head.SCALAR, seed=4)
    save_huggingface(model, folder)
    return model(tokens).detach()


@torch.no_grad()
def test_score_at_the_last_token_is_what_transformers_computes(tmp_path: Path) -> None:
    config = ref.POST_LN
    tokens, lengths = torch.full((3, 9), config.pad_id), (4, 9, 6)
    for row, length in enumerate(lengths):
        tokens[row, :length] = torch.arange(10, 10 + length) + row
        tokens[row, length - 1] = config.eos_id
    [scores] = run_ranks(1, _score_and_save, tmp_path / "reward", tokens)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    found = loaded(tokens, attention_mask=(tokens != config.pad_id).long()).logits.squeeze(-1)
    own = torch.stack([scores[row, length - 1] for row, length in enumerate(lengths)])
    torch.testing.assert_close(own, found)


def _save_as_bf16(folder: Path, sources: list[Path]) -> None:
    model = ref.build_model(
        ref.PRE_LN, ParallelLayout.for_world(dist.get_world_size(), tensor=2), seed=4
    )
    for source in sources:
        extra = {"tokenizer.json": source}
        save_huggingface(model, folder, dtype=torch.bfloat16, extra_files=extra)


def test_another_dtype_and_extra_files_are_honoured_and_an_earlier_export_replaced(
    tmp_path: Path,
) -> None:
    sources = [tmp_path / "old", tmp_path / "new"]
    for source in sources:
        source.write_text(source.name)
    target = tmp_path / "deep" / "model"
    run_ranks(4, _save_as_bf16, target, sources)
    assert {value.dtype for value in folders.read_folder(target).values()} == {torch.bfloat16}
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert (target / "tokenizer.json").read_text() == "new"
    assert is_complete(target)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_an_export_that_lost_a_file_or_part_of_one_is_not_complete(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.write_text("{}")
    run_ranks(2, _save_as_bf16, tmp_path / "whole", [source])

    def spoiled(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "whole", tmp_path / name))

    (spoiled("a") / "config.json").unlink()
    (spoiled("b") / "model.safetensors").write_bytes(b"half")
    (spoiled("c") / writer.MARKER_FILE).unlink()
    (spoiled("d") / writer.MARKER_FILE).write_text("{")
    (spoiled("e") / writer.MARKER_FILE).write_text("{}")
    assert is_complete(tmp_path / "whole")
    assert not any(is_complete(tmp_path / name) for name in "abcde")
    assert not is_complete(tmp_path / "absent")


def _error_of_saving(folder: Path, degrees: dict[str, int], **options: Any) -> tuple[str, str]:
    """The error that this rank gets."""
    model = ref.build_model(ref.PRE_LN, ParallelLayout.for_world(4, **degrees), seed=4)
    try:
        save_huggingface(model, folder, max_shard_bytes=9_000, **options)
    except MegachatError as error:
        return type(error).__name__, str(error)
    return "none", ""


def _save_on_a_disk_that_fills_up(folder: Path) -> list[tuple[str, str]]:
    original = SafetensorsFile.finish

    def full_disk(file: SafetensorsFile) -> None:
        if "00003" in str(file._path):
            raise OSError(28, "No space left on device")
        original(file)

    SafetensorsFile.finish = full_disk  # type: ignore[method-assign]
    return [_error_of_saving(folder, degrees) for degrees in LAYOUTS]


def test_a_disk_that_fills_up_while_writing_ends_every_rank_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    target = tmp_path / "model"
    ranks = run_ranks(4, _save_on_a_disk_that_fills_up, target)
    for errors in zip(*ranks, strict=True):
        assert len(set(errors)) == 1
        assert errors[0][0] == "CheckpointError"
        assert f"{target}: cannot write" in errors[0][1] and "No space left" in errors[0][1]
    assert list(tmp_path.iterdir()) == []


def _save_on_a_small_disk(folder: Path) -> tuple[str, str]:
    draft.shutil = SimpleNamespace(  # type: ignore[assignment]
        disk_usage=lambda _: SimpleNamespace(free=1000), rmtree=shutil.rmtree
    )
    return _error_of_saving(folder, {"tensor": 2})


def test_a_disk_that_is_too_small_is_refused_before_any_work(tmp_path: Path) -> None:
    errors = run_ranks(4, _save_on_a_small_disk, tmp_path / "model")
    assert {kind for kind, _ in errors} == {"CapacityError"}
    assert "but the disk has 1000 free" in errors[0][1]
    assert list(tmp_path.iterdir()) == []


def _save_to_bad_targets(folder: Path) -> list[tuple[str, str]]:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("file", {}),
        ("file/model", {}),
        ("folder", {}),
        ("a", {"extra_files": {"t.json": folder / "absent"}}),
        ("b", {"extra_files": {"../t": folder / "file"}}),
    ]
    return [_error_of_saving(folder / name, {"pipeline": 2}, **options) for name, options in cases]


def test_targets_that_cannot_be_written_are_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    expected = (
        "exists and is not a folder",
        "cannot write",
        "holds thesis.txt and is no earlier export",
        "no such file",
        "cannot be copied as ../t",
    )
    ranks = run_ranks(4, _save_to_bad_targets, tmp_path)
    for words, errors in zip(expected, zip(*ranks, strict=True), strict=True):
        assert len(set(errors)) == 1
        assert errors[0][0] == "CheckpointError"
        assert words in errors[0][1]
        assert "\n" not in errors[0][1]
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_names_in_the_plan_are_those_of_the_index() -> None:
    specs = parameter_specs(ref.PRE_LN, tensor=1, head=Head.LANGUAGE_MODEL)
    files = plan_files(specs, dtype=torch.float32, max_shard_bytes=9_000)
    names = [name for file in files for spec in file.specs for name in huggingface_names(spec)]
    assert len(names) == len(set(names)) == len(folders.state(ref.PRE_LN))
