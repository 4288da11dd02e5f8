"""The hybrid engine on a GPU: one rank with NCCL, mapped memory, CUDA graphs, compiled kernels."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megachat.hybrid.phases import MemoryMeasures
from megachat.ops.registry import Backend
from megachat.parallel.launch import LaunchConfig, Worker, launch
from tests.hybrid.tasks import (
    FP32_GAP,
    LARGE,
    MOST_REPLICAS,
    OF_A_GPU,
    SINGLE,
    Outcome,
    answers_of,
    bf16_deviation,
    build,
    few_blocks,
    outcome_of,
    prompts_of,
    reference_of,
)

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)
VARIANTS = [(backend, graphs) for backend in (Backend.REFERENCE, Backend.CUDA) for graphs in (0, 1)]
"""Who computes, and whether decode steps are recorded and replayed."""
Key = tuple[int, torch.dtype, Backend, int]


def _on_a_gpu(entry: Callable[[Worker], Any], tmp_path: Path) -> Any:
    """What one rank with a GPU returns."""
    launch(LaunchConfig(processes=1, device="cuda"), _keep, entry, tmp_path / "result")
    return pickle.loads((tmp_path / "result").read_bytes())


def _keep(worker: Worker, entry: Callable[[Worker], Any], output: Path) -> None:
    assert worker.device.type == "cuda"
    output.write_bytes(pickle.dumps(entry(worker)))


def _answer(worker: Worker) -> dict[Key, list[Outcome]]:
    """Every architecture, dtype and variant, twice: what was recorded first is replayed then."""
    prompts, found = prompts_of(OF_A_GPU, MOST_REPLICAS), {}
    few = few_blocks(OF_A_GPU, prompts, 1)
    for number in range(len(OF_A_GPU.configs)):
        for dtype in DTYPES:
            for backend, graphs in VARIANTS:
                engine = build(
                    OF_A_GPU,
                    (number, SINGLE, dtype),
                    num_blocks=few,
                    backend=backend,
                    graphs=bool(graphs),
                )
                both = [outcome_of(engine, prompts) for _ in range(2)]
                found[number, dtype, backend, graphs] = [
                    replace(outcome, gaps=outcome.gaps.cpu()) for outcome in both
                ]
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Key, list[Outcome]]:
    found: dict[Key, list[Outcome]] = _on_a_gpu(_answer, tmp_path_factory.mktemp("gpu"))
    return found


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(OF_A_GPU.configs)), ids=["pre-LN", "post-LN"])
def test_paged_decode_on_a_gpu_says_what_training_recomputes_there(
    outcomes: dict[Key, list[Outcome]],
    number: int,
    dtype: torch.dtype,
    variant: tuple[Backend, int],
) -> None:
    """In fp32 with the very tokens that a CPU draws."""
    reference = reference_of(OF_A_GPU)[number]
    deviation = bf16_deviation(OF_A_GPU.configs[number], reference.largest_logit)
    for outcome in outcomes[number, dtype, *variant]:
        assert outcome.statistics is not None and outcome.statistics.preemptions > 0
        largest, mean = outcome.gaps.max().item(), outcome.gaps.mean().item()
        if dtype is torch.bfloat16:
            assert largest <= 5 * deviation and mean <= deviation
        else:
            assert largest <= FP32_GAP
            assert answers_of(outcome.rollout) == answers_of(reference.rollout)


def _phases(worker: Worker) -> tuple[int, int, list[int], list[int]]:
    """Bytes of the pool, of a granule, and those that are free while training and generating."""
    engine = build(
        OF_A_GPU,
        (0, SINGLE, torch.float32),
        num_blocks=LARGE,
        backend=Backend.CUDA,
        measures=MemoryMeasures(offload_optimizer=True, reuse_gradients=True),
    )
    prompts, training, generating = prompts_of(OF_A_GPU, MOST_REPLICAS), [], []
    for _ in range(4):
        outcome_of(engine, prompts)
        training.append(torch.cuda.mem_get_info(worker.device)[0])
        with engine.generation() as generator:
            generator.cache.acquire()
            pool = generator.cache.resident_bytes
            generating.append(torch.cuda.mem_get_info(worker.device)[0])
    return pool, generator.cache.pool.nbytes, training, generating


def test_the_cache_takes_memory_of_the_gpu_while_it_generates_and_gives_it_back(
    tmp_path: Path,
) -> None:
    """The first rounds warm up: graphs, workspaces of libraries, torch's own cache."""
    pool, num_bytes, training, generating = _on_a_gpu(_phases, tmp_path)
    assert num_bytes <= pool
    assert training[-1] == training[-2] and generating[-1] == generating[-2]
    assert training[-1] - generating[-1] == pool
