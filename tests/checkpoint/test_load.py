"""Who reads what, and what becomes of it when a disk is slow or breaks."""

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megachat.checkpoint import load_huggingface, load_together, save_huggingface
from megachat.checkpoint.safetensors_file import SafetensorsFile
from megachat.errors import CheckpointError
from megachat.model import Head, OptConfig
from megachat.model.opt import OptModel
from megachat.parallel import groups
from megachat.parallel.layout import ParallelLayout
from tests.checkpoint import folders
from tests.checkpoint.disk import Read, broken, peak_memory, slow, watched_disk
from tests.harness import run_ranks
from tests.model import reference as ref

DEGREES: tuple[dict[str, int], ...] = (
    {"pipeline": 4},
    {},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2},
)


def _differences(model: OptModel) -> list[str]:
    """Parameters of this rank that are not the reference's."""
    weights = ref.by_spec_name(folders.state(model.config, model.head), model.config)
    return [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(
            parameter, ref.own_part(model, name, weights[model.local_specs()[name].name])
        )
    ]


KINDS = ("safetensors", "bin")
ROOMY = replace(ref.PRE_LN, vocab_size=160)
"""Its largest parameter takes more than those of attention together, as in every OPT."""


def _reads_of_every_layout(folder: Path) -> dict[tuple[int, str], list[Read]]:
    found = {}
    for number, degrees in enumerate(DEGREES):
        model = ref.build_model(ROOMY, ParallelLayout.for_world(4, **degrees))
        for kind in KINDS:
            with watched_disk() as disk:
                load_huggingface(model, folder / kind)
            found[number, kind] = disk.reads
    return found


def test_each_tensor_is_read_once_by_one_rank_in_order(tmp_path: Path) -> None:
    for kind in KINDS:
        folders.write_folder(ROOMY, tmp_path / kind, kind)
    sizes = sorted(value.nbytes for value in folders.state(ROOMY).values())
    ranks = run_ranks(4, _reads_of_every_layout, tmp_path)
    for number, degrees in enumerate(DEGREES):
        layout = ParallelLayout.for_world(4, **degrees)
        for kind in KINDS:
            by_rank = [rank[number, kind] for rank in ranks]
            assert sorted(read.num_bytes for reads in by_rank for read in reads) == sizes
            everything = {(read.file, read.offset) for reads in by_rank for read in reads}
            assert len(everything) == len(sizes)
            for rank, reads in enumerate(by_rank):
                assert bool(reads) == (layout.coordinate(rank).tensor == 0), (layout, rank)
                places = [(read.file, read.offset) for read in reads]
                assert places == sorted(places)


def _load_and_save_on_a_slow_disk(folder: Path) -> list[str]:
    """Everything on groups whose collectives may take less time than the disk."""
    original = SafetensorsFile.append

    def slow_append(file: SafetensorsFile, name: str, value: torch.Tensor) -> None:
        if name.endswith("layers.2.fc1.weight"):
            time.sleep(4)
        original(file, name, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "GROUP_TIMEOUT", timedelta(seconds=3))
        patch.setattr(SafetensorsFile, "append", slow_append)
        model = ref.build_model(ref.PRE_LN, ParallelLayout.for_world(4, tensor=2))
        disk = slow(4, at=1) if dist.get_rank() == 2 else slow(0, at=0)
        with watched_disk(disk):
            load_huggingface(model, folder)
        save_huggingface(model, folder.with_name("saved"))
        return _differences(model)


def test_a_disk_may_take_longer_than_a_collective(tmp_path: Path) -> None:
    folder = folders.write_folder(ref.PRE_LN, tmp_path / "model")
    assert run_ranks(4, _load_and_save_on_a_slow_disk, folder) == [[]] * 4
    expected, found = folders.state(ref.PRE_LN), folders.read_folder(tmp_path / "saved")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def _load_from_broken_disks(folder: Path) -> list[str]:
    """What this rank hears when one reader breaks: at its first and at a later read."""
    messages = []
    for degrees in ({"tensor": 2, "pipeline": 2}, {"pipeline": 2}, {}):
        model = ref.build_model(ref.PRE_LN, ParallelLayout.for_world(4, **degrees))
        for rank, at in ((0, 0), (2, 3)):
            with watched_disk(broken(at=at) if dist.get_rank() == rank else slow(0, at=0)):
                try:
                    load_huggingface(model, folder)
                except CheckpointError as error:
                    messages.append(str(error))
        load_huggingface(model, folder)  # nobody is out of step
        messages += _differences(model)
    return messages


def test_a_disk_that_breaks_on_one_rank_gives_all_ranks_its_message(tmp_path: Path) -> None:
    folder = folders.write_folder(ref.PRE_LN, tmp_path / "model")
    ranks = run_ranks(4, _load_from_broken_disks, folder)
    assert ranks[0] == ranks[1] == ranks[2] == ranks[3]
    assert len(ranks[0]) == 6
    for message in ranks[0]:
        assert message.startswith(f"{folder}/model.safetensors: model.decoder.")
        assert message.endswith("[Errno 5] Input/output error")


def _load_two_at_once(folder: Path) -> tuple[int, list[str]]:
    layout = ParallelLayout.for_world(2, tensor=2)
    policy = ref.build_model(ref.PRE_LN, layout, vocab_multiple=192)
    reference = ref.build_model(ref.PRE_LN, layout)
    assert policy.padded_vocab != reference.padded_vocab
    with watched_disk() as disk:
        load_together((policy, reference), folder)
    return disk.num_bytes, _differences(policy) + _differences(reference)


def test_two_models_take_one_reading_though_their_padding_differs(tmp_path: Path) -> None:
    folder = folders.write_folder(ref.PRE_LN, tmp_path / "model")
    size = sum(value.nbytes for value in folders.state(ref.PRE_LN).values())
    assert run_ranks(2, _load_two_at_once, folder) == [(size, []), (0, [])]


WIDE = OptConfig(
    vocab_size=6000, max_positions=64, hidden=768, ffn=3072, layers=3, heads=12, embed_dim=768
)
"""103 MB of weights, of which the largest parameter takes 18."""


def _peaks(folder: Path) -> tuple[int, int, int]:
    """(largest parameter, how much loading took, how much exporting took) on this rank.

    The least of three each: pages that the allocator gives back and takes again only add.
    """
    model = ref.build_model(WIDE, ParallelLayout.for_world(2, tensor=2), seed=0)
    largest = max(spec.num_elements for spec in model.global_specs()) * 4
    loading, exporting = [], []
    for _ in range(3):
        with peak_memory() as grown:
            save_huggingface(model, folder)
        exporting += grown
        with peak_memory() as grown:
            load_huggingface(model, folder)
        loading += grown
    return largest, min(loading), min(exporting)


def test_a_rank_holds_no_more_than_two_of_the_largest_parameters(tmp_path: Path) -> None:
    slack = 12 * 2**20  # pages of the allocator; a third of these parameters would be 17.6 MiB
    for largest, loading, exporting in run_ranks(2, _peaks, tmp_path / "model"):
        assert loading <= 2 * largest + slack
        assert exporting <= 2 * largest + slack


def _load_into_bf16(folder: Path) -> list[str]:
    model = ref.build_model(
        ref.POST_LN, ParallelLayout.for_world(2, tensor=2), head=Head.SCALAR, dtype=torch.bfloat16
    )
    load_huggingface(model, folder)
    weights = ref.by_spec_name(folders.state(ref.POST_LN, Head.SCALAR), ref.POST_LN)
    return [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(
            parameter,
            ref.own_part(model, name, weights[model.local_specs()[name].name]).bfloat16(),
        )
    ]


def test_weights_are_rounded_once_into_the_dtype_of_the_model(tmp_path: Path) -> None:
    folder = folders.write_folder(ref.POST_LN, tmp_path / "model", head=Head.SCALAR)
    assert run_ranks(2, _load_into_bf16, folder) == [[], []]
