"""The runner: packed steps give the logits of HuggingFace at every position, also over tiles."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megachat.errors import KernelError
from megachat.generation.config import GenerationConfig
from megachat.generation.generator import Generator
from megachat.generation.kv_cache import PagedKvCache
from megachat.generation.packed import DecodeRows, PackedStep, PrefillRows
from megachat.generation.runner import ModelRunner
from megachat.generation.weights import GenerationWeights
from megachat.ops.all_reduce import group_sum
from megachat.ops.registry import Backend
from megachat.parallel.collectives import all_gather_last_dim
from megachat.parallel.layout import ParallelLayout
from tests.generation.reference import CONFIGS
from tests.harness import run_ranks
from tests.model import reference as ref

LENGTHS = (9, 1, 4)
BLOCK_SIZE = 4


def _tiled(weights: GenerationWeights, tiles: int) -> GenerationWeights:
    """The row-parallel weights cut into tiles, as they lie after a gather."""

    def cut(weight: Tensor) -> Tensor:
        return torch.stack(weight[0].chunk(tiles, dim=1))

    layers = tuple(
        replace(layer, proj_weight=cut(layer.proj_weight), fc2_weight=cut(layer.fc2_weight))
        for layer in weights.layers
    )
    return replace(weights, layers=layers)


def _step(
    cache: PagedKvCache, tokens: Tensor, *, starts: Tensor, counts: Tensor, num_decode: int
) -> PackedStep:
    """Row r's tokens `starts[r] : starts[r] + counts[r]`; the first rows have one each."""
    row = torch.arange(len(counts)).repeat_interleave(counts)
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    positions = starts[row] + torch.arange(len(row)) - offsets[row]
    tables = cache.tables
    decode = DecodeRows(tables=tables[:num_decode], lengths=starts[:num_decode] + 1)
    prefill = PrefillRows(
        tables=tables[num_decode:],
        starts=starts[num_decode:],
        offsets=offsets[num_decode:] - num_decode,
    )
    return PackedStep(
        tokens=tokens[row, positions],
        positions=positions,
        slots=cache.positions_of(tables[row], positions),
        decode=decode if num_decode else None,
        prefill=prefill if num_decode < len(counts) else None,
        outputs=None,
    )


def _logits(
    weights: GenerationWeights, tokens: Tensor, dtype: torch.dtype, backend: Backend
) -> list[Tensor]:
    """Logits `[tokens, vocab]` of four packed steps: chunks, a mixture, and decoding alone."""
    cache = PagedKvCache(
        weights.config,
        tensor=weights.tensor_degree,
        num_bytes=1 << 20,
        block_size=BLOCK_SIZE,
        max_sequences=3,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    cache.tables[:, :4] = torch.tensor([[7, 2, 0, 5], [3, 11, 8, 1], [9, 4, 6, 10]])
    add_up = group_sum(weights.groups.tensor, backend, device=torch.device("cpu"))
    runner = ModelRunner(weights, cache, backend=backend, add_up=add_up)
    found = []
    starts = torch.zeros(3, dtype=torch.int64)
    for counts, num_decode in (((1, 5, 3), 0), ((1, 2, 4), 1), ((1, 1, 2), 2), ((1, 1, 1), 3)):
        step = _step(
            cache, tokens, starts=starts, counts=torch.tensor(counts), num_decode=num_decode
        )
        logits = all_gather_last_dim(runner.forward(step), weights.groups.tensor)
        found += list(logits[:, : weights.config.vocab_size].float())
        starts = starts + torch.tensor(counts)
    return found


def _compare(tensor: int, backend: Backend) -> dict[str, float]:
    """Largest errors against HuggingFace, and of tiled against untiled weights."""
    gaps = {"huggingface": 0.0, "tiles": 0.0, "bf16 tiles": 0.0}
    tokens = torch.randint(0, 131, (3, 12), generator=torch.Generator().manual_seed(2))
    for config in CONFIGS.values():
        oracle = ref.huggingface_model(config)
        with torch.no_grad():
            whole = oracle(tokens).logits
        expected = [
            whole[row, position]
            for starts, counts in (
                ((0, 0, 0), (1, 5, 3)),
                ((1, 5, 3), (1, 2, 4)),
                ((2, 7, 7), (1, 1, 2)),
                ((3, 8, 9), (1, 1, 1)),
            )
            for row in range(3)
            for position in range(starts[row], starts[row] + counts[row])
        ]
        for dtype, key in ((torch.float32, "tiles"), (torch.bfloat16, "bf16 tiles")):
            model = ref.build_model(
                config, ParallelLayout(tensor=tensor), reference=oracle, dtype=dtype
            )
            weights = GenerationWeights.from_model(model)
            found = _logits(weights, tokens, dtype, backend)
            tiled = _logits(_tiled(weights, 2), tokens, dtype, backend)
            gaps[key] = max(gaps[key], _gap(tiled, found))
            if dtype is torch.float32:
                gaps["huggingface"] = max(gaps["huggingface"], _gap(found, expected))
    return gaps


def _gap(found: list[Tensor], expected: list[Tensor]) -> float:
    assert len(found) == len(expected)
    return max(
        (a - b).abs().max().item() / b.abs().max().item()
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.CPU])
def test_packed_steps_give_the_logits_of_huggingface_whatever_the_tiles(backend: Backend) -> None:
    """Chunked prompts, prompts beside running rows, running rows alone; one and two ranks."""
    for tensor in (1, 2):
        for gaps in run_ranks(tensor, _compare, tensor, backend):
            assert gaps["huggingface"] < 1e-5
            assert gaps["tiles"] < 1e-5
            # Each product is rounded once to 8 bits, tiled or not; a rare tie goes the other way.
            assert gaps["bf16 tiles"] < 2.0**-7


def _without_a_compiler(folder: str) -> str:
    """What a runner says that cannot have its kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", folder)
        patch.setenv("HOME", folder)  # where no library was built before
        model = ref.build_model(ref.PRE_LN, ParallelLayout(), seed=0)
        settings = GenerationConfig(kv_cache_gb=1e-3, backend=Backend.CPU)
        with pytest.raises(KernelError) as caught:
            Generator(model, stop_ids=(2,), config=settings)
        settings = GenerationConfig(kv_cache_gb=1e-3, backend=Backend.REFERENCE)
        Generator(model, stop_ids=(2,), config=settings)
    return str(caught.value)


def test_without_a_compiler_generation_is_refused_at_once_and_the_reference_still_works(
    tmp_path: Path,
) -> None:
    (message,) = run_ranks(1, _without_a_compiler, str(tmp_path))
    assert "need g++" in message and 'backend = "reference"' in message
