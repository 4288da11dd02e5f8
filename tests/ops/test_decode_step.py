"""The fused decode step against the same step op by op, and against plain torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megachat.errors import KernelError
from megachat.generation.kv_cache import PagedKvCache, block_bytes
from megachat.generation.packed import DecodeRows, PackedStep
from megachat.generation.runner import ModelRunner, decode_model
from megachat.generation.weights import GenerationWeights
from megachat.model.config import OptConfig
from megachat.ops.all_reduce import group_sum
from megachat.ops.decode_step import MOST_ROWS, CpuDecodeStep
from megachat.ops.registry import Backend
from megachat.parallel.layout import ParallelLayout
from tests.harness import run_ranks
from tests.model import reference as ref

PRE_LN = OptConfig(
    vocab_size=131, max_positions=80, hidden=48, ffn=88, layers=3, heads=4, embed_dim=48,
    init_std=0.2,
)  # fmt: skip
POST_LN = replace(PRE_LN, embed_dim=20, layer_norm_first=False)
CONFIGS = {"pre-LN": PRE_LN, "post-LN": POST_LN}
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 70, 2, 16, 17, 33, 5)
"""Tokens of each sequence, the new one included."""
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""Op by op, only the first LayerNorm may round differently. One of 8 bits may then flip."""
AGAINST_TORCH = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}
"""Of three layers, each of some ten rounded results, whose sums torch orders otherwise."""


@dataclass(frozen=True)
class Found:
    """What one way of computing a step makes of the same cache."""

    logits: Tensor
    pool: Tensor


def _weights(
    config: OptConfig, *, tensor: int, dtype: torch.dtype, tiles: int
) -> GenerationWeights:
    """Weights of which each row-parallel one lies in tiles, as after a gather."""
    model = ref.build_model(config, ParallelLayout(tensor=tensor), seed=5, dtype=dtype)
    weights = GenerationWeights.from_model(model)
    layers = tuple(
        replace(
            layer,
            proj_weight=torch.stack(layer.proj_weight[0].chunk(tiles, dim=1)),
            fc2_weight=torch.stack(layer.fc2_weight[0].chunk(tiles, dim=1)),
        )
        for layer in weights.layers
    )
    return replace(weights, layers=layers)


def _cache(
    weights: GenerationWeights, *, block_size: int, rows: int = len(LENGTHS)
) -> PagedKvCache:
    """A cache full of keys and values, in which rows own blocks in no order."""
    config, dtype, tensor = weights.config, weights.words.dtype, weights.tensor_degree
    columns = -(-config.max_positions // block_size)
    size = block_bytes(config, tensor=tensor, block_size=block_size, dtype=dtype)
    cache = PagedKvCache(
        config,
        tensor=tensor,
        num_bytes=size * columns * rows,
        block_size=block_size,
        max_sequences=rows,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    generator = torch.Generator().manual_seed(block_size)
    cache.acquire()
    cache.pool.copy_(torch.randn(cache.pool.shape, generator=generator))
    order = torch.randperm(columns * rows, generator=generator)
    cache.tables.copy_(order.view(rows, columns))
    return cache


def _step(cache: PagedKvCache, lengths: tuple[int, ...], *, op_by_op: bool) -> PackedStep:
    """One new token a row; a step that names its outputs is computed op by op."""
    generator = torch.Generator().manual_seed(len(lengths))
    positions = torch.tensor(lengths) - 1
    tables = cache.tables[: len(lengths)]
    return PackedStep(
        tokens=torch.randint(0, 131, (len(lengths),), generator=generator),
        positions=positions,
        slots=cache.positions_of(tables, positions),
        decode=DecodeRows(tables=tables, lengths=positions + 1),
        prefill=None,
        outputs=torch.arange(len(lengths)) if op_by_op else None,
    )


def _run(weights: GenerationWeights, backend: Backend, *, block_size: int, op_by_op: bool) -> Found:
    cache = _cache(weights, block_size=block_size)
    add_up = group_sum(weights.groups.tensor, backend, device=torch.device("cpu"))
    runner = ModelRunner(weights, cache, backend=backend, add_up=add_up)
    logits = runner.forward(_step(cache, LENGTHS, op_by_op=op_by_op))
    return Found(logits=logits.clone(), pool=cache.pool)


def _gap(found: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().item()
    return (found.float() - expected.float()).abs().max().item() / scale


def _compare(tensor: int) -> Iterator[tuple[str, float, float]]:
    """Names a case and gives its largest error and the bound."""
    for name, config in CONFIGS.items():
        for dtype in DTYPES:
            for block_size, tiles in ((1, 1), (16, 2), (64, 1)):
                weights = _weights(config, tensor=tensor, dtype=dtype, tiles=tiles)
                vocab = weights.local_vocab
                fused, single, torchs = (
                    _run(weights, backend, block_size=block_size, op_by_op=op_by_op)
                    for backend, op_by_op in (
                        (Backend.CPU, False),
                        (Backend.CPU, True),
                        (Backend.REFERENCE, True),
                    )
                )
                assert torch.equal(fused.logits[:, vocab:], torchs.logits[:, vocab:])
                for other, bound in ((single, ROUNDING[dtype]), (torchs, AGAINST_TORCH[dtype])):
                    title = f"{name} {dtype} {block_size} {tiles}"
                    yield title, _gap(fused.logits[:, :vocab], other.logits[:, :vocab]), bound
                    yield f"{title} pages", _gap(fused.pool, other.pool), bound


def _largest(tensor: int, threads: int) -> list[tuple[str, float, float]]:
    torch.set_num_threads(threads)
    return list(_compare(tensor))


@pytest.mark.parametrize(("tensor", "threads"), [(1, 1), (1, 2), (2, 1)])
def test_a_fused_step_is_the_step_op_by_op(tensor: int, threads: int) -> None:
    """Both norm orders, both dtypes, tiles, block sizes, ragged lengths; one and two ranks."""
    for cases in run_ranks(tensor, _largest, tensor, threads):
        assert len(cases) == 48
        for title, gap, bound in cases:
            assert gap <= bound, title


def _rows_alone_and_together() -> None:
    """Among few rows, logits depend in no bit on the rows beside or the number of threads."""
    weights = _weights(PRE_LN, tensor=1, dtype=torch.bfloat16, tiles=1)
    cache = _cache(weights, block_size=4)
    step = CpuDecodeStep(decode_model(weights, cache, None), most_rows=len(LENGTHS))
    whole = _step(cache, LENGTHS, op_by_op=False)
    assert whole.decode is not None
    results = []
    for rows, threads in ((slice(0, 7), 1), (slice(0, 7), 2), (slice(2, 7), 1), (slice(1, 2), 2)):
        torch.set_num_threads(threads)
        found = step.run(
            whole.tokens[rows],
            positions=whole.positions[rows],
            slots=whole.slots[rows],
            tables=whole.decode.tables[rows],
            lengths=whole.decode.lengths[rows],
        )
        results.append((rows, found.clone()))
    expected = results[0][1]
    for rows, found in results[1:]:
        assert torch.equal(found, expected[rows])


def test_a_row_gets_the_same_logits_whatever_is_beside_it_and_however_many_threads() -> None:
    run_ranks(1, _rows_alone_and_together)


def _refusals() -> list[str]:
    weights = _weights(PRE_LN, tensor=1, dtype=torch.float32, tiles=1)
    cache = _cache(weights, block_size=4)
    model = decode_model(weights, cache, None)
    step = CpuDecodeStep(model, most_rows=3)
    rows = _step(cache, LENGTHS, op_by_op=False)
    assert rows.decode is not None
    tables, lengths = rows.decode.tables, rows.decode.lengths
    inputs = {"positions": rows.positions, "slots": rows.slots, "tables": tables}
    found = []
    with pytest.raises(KernelError) as caught:
        step.run(rows.tokens, lengths=lengths, **inputs)
    found.append(str(caught.value))
    with pytest.raises(KernelError) as caught:
        few = {name: tensor[:2] for name, tensor in inputs.items()}
        step.run(rows.tokens[:2], lengths=lengths[:2].int(), **few)
    found.append(str(caught.value))
    with pytest.raises(KernelError) as caught:
        CpuDecodeStep(replace(model, words=model.words.half()), most_rows=3)
    found.append(str(caught.value))
    turned = replace(model.layers[0], fc1_weight=model.layers[0].fc1_weight.t().contiguous().t())
    with pytest.raises(KernelError) as caught:
        CpuDecodeStep(replace(model, layers=(turned, *model.layers[1:])), most_rows=3)
    found.append(str(caught.value))
    many = CpuDecodeStep(model, most_rows=10 * MOST_ROWS)
    assert many.most_rows == MOST_ROWS
    return found


def test_what_the_kernel_would_misread_is_refused() -> None:
    (messages,) = run_ranks(1, _refusals)
    parts = (
        "7 rows, at most 3",
        "needs contiguous torch.int64",
        "no CPU kernel for torch.float16",
        "rows must be contiguous",
    )
    for message, part in zip(messages, parts, strict=True):
        assert part in message and "\n" not in message
