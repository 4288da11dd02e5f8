"""Plans of reading, up to 175B on 64 ranks, without a process group."""

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megachat.checkpoint.load_plan import Batch, LoadPlan, piece_of, plan_load
from megachat.checkpoint.names import huggingface_names, huggingface_shape
from megachat.checkpoint.reader import StoredTensor
from megachat.model import OPT_MODELS, Head, OptConfig, parameter_specs
from megachat.model.specs import TensorSpec, stage_of
from megachat.parallel.layout import ParallelLayout
from tests.model.reference import POST_LN

BIG = OPT_MODELS["facebook/opt-175b"]


def _stored(
    specs: Sequence[TensorSpec], *, dtype: torch.dtype, file_bytes: int
) -> dict[str, StoredTensor]:
    """The specs' tensors as files have them that were written in the order of names."""
    found, number, offset = {}, 0, 1000
    shapes = {name: huggingface_shape(spec) for spec in specs for name in huggingface_names(spec)}
    for name, shape in sorted(shapes.items()):
        strides = [1] if len(shape) == 1 else [shape[1], 1]
        found[name] = StoredTensor(
            name=name,
            file=f"model-{number:05d}.safetensors",
            dtype=dtype,
            shape=shape,
            strides=tuple(strides),
            offset=offset,
        )
        offset += found[name].num_bytes
        if offset > file_bytes:
            number, offset = number + 1, 1000
    return found


def _shares(plan: LoadPlan) -> Mapping[tuple[int, int], list[Batch]]:
    """Batches by (stage, reader)."""
    shares: dict[tuple[int, int], list[Batch]] = {}
    for stage, rounds in enumerate(plan.stages):
        for round_ in rounds:
            for batch in round_:
                shares.setdefault((stage, batch.reader), []).append(batch)
    return shares


def _check(plan: LoadPlan, stored: Mapping[str, StoredTensor], config: OptConfig) -> None:
    total = sum(tensor.num_bytes for tensor in stored.values())
    assert plan.read_bytes == total
    read = Counter(
        part.name
        for batches in _shares(plan).values()
        for batch in batches
        for part, _, _ in batch.in_file_order()
    )
    assert read == dict.fromkeys((tensor.name for tensor in stored.values()), 1)
    for stage, rounds in enumerate(plan.stages):
        for round_ in rounds:
            readers = [batch.reader for batch in round_]
            assert readers == sorted(set(readers)) and set(readers) <= set(range(plan.layout.data))
            for batch in round_:
                for each in batch.reads:
                    owner = stage_of(each.spec, config, pipeline=plan.layout.pipeline)
                    assert owner == stage


@pytest.mark.parametrize(
    "layout",
    [
        ParallelLayout(tensor=8, pipeline=8),
        ParallelLayout(tensor=8, data=8),
        ParallelLayout(tensor=8, pipeline=4, data=2),
        ParallelLayout(pipeline=8, data=8),
    ],
    ids=str,
)
def test_64_ranks_read_175b_once_evenly_and_within_the_memory_of_a_tensor(
    layout: ParallelLayout,
) -> None:
    specs = parameter_specs(BIG, tensor=layout.tensor, head=Head.LANGUAGE_MODEL)
    stored = _stored(specs, dtype=torch.float16, file_bytes=10 * 10**9)
    plan = plan_load(specs, stored, config=BIG, layout=layout)
    _check(plan, stored, BIG)
    largest = max(tensor.num_bytes for tensor in stored.values())
    assert largest == BIG.vocab_size * BIG.hidden * 2
    shares = _shares(plan)
    assert len(shares) == layout.pipeline * layout.data  # one reader in each tensor group
    for stage in range(layout.pipeline):
        sizes = [
            sum(batch.read_bytes for batch in shares[stage, reader])
            for reader in range(layout.data)
        ]
        assert max(sizes) <= sum(sizes) / layout.data + largest
    for batches in shares.values():
        # Sending takes a copy of one parameter beside this.
        assert max(batch.kept_bytes for batch in batches) <= largest
        # Few handovers: batches are about as large as they may be.
        assert len(batches) <= 2 * sum(batch.read_bytes for batch in batches) / largest + 1
        places = [
            (part.file, part.offset) for batch in batches for part, _, _ in batch.in_file_order()
        ]
        assert places == sorted(places)


@settings(deadline=None, max_examples=40)
@given(
    layout=st.builds(
        ParallelLayout,
        tensor=st.sampled_from([1, 2, 4]),
        pipeline=st.sampled_from([1, 2, 4]),
        data=st.integers(1, 5),
    ),
    head=st.sampled_from(Head),
    file_bytes=st.integers(1, 100_000),
)
def test_every_layout_reads_every_tensor_once(
    layout: ParallelLayout, head: Head, file_bytes: int
) -> None:
    specs = parameter_specs(POST_LN, tensor=layout.tensor, head=head)
    stored = _stored(specs, dtype=torch.float32, file_bytes=file_bytes)
    _check(plan_load(specs, stored, config=POST_LN, layout=layout), stored, POST_LN)


@given(tensor=st.sampled_from([1, 2, 4]), multiple=st.sampled_from([1, 64, 128]))
def test_pieces_are_the_stored_parameter_cut_without_its_padding(
    tensor: int, multiple: int
) -> None:
    for spec in parameter_specs(
        POST_LN, tensor=tensor, head=Head.LANGUAGE_MODEL, vocab_multiple=multiple
    ):
        whole = torch.arange(spec.num_elements).view(spec.unpadded_shape)
        pieces = [whole[piece_of(spec, rank, tensor=tensor)] for rank in range(tensor)]
        if spec.shard_dim is None:
            assert all(torch.equal(piece, whole) for piece in pieces)
        else:
            assert torch.equal(torch.cat(pieces, dim=spec.shard_dim), whole)
