"""PPO steps whose log-probabilities kernels compute, beside plain torch's."""

import functools
from collections import Counter

import pytest
import torch
from torch import Tensor

from megachat.errors import KernelError
from megachat.generation.config import SamplingConfig
from megachat.ops.registry import Backend
from megachat.parallel.layout import ParallelLayout
from megachat.rlhf.config import PpoConfig
from tests.harness import run_ranks
from tests.kernels.emulated import KernelCalls, emulated_cuda
from tests.rlhf import tiny

LENGTHS = (3, 7, 5, 2, 9, 4, 6, 8)
CONFIG = PpoConfig(
    reward={"normalization": "running"}, epochs=2, minibatches=1, entropy_coef=0.02, clip_range=0.01
)
SAMPLING = SamplingConfig(max_new_tokens=6, temperature=0.7)
ROUND_OFF = 1e-5
"""fp32: the kernels add in another order and multiply by 1 / temperature instead of dividing."""
Outcome = tuple[dict[str, Tensor], list[dict[str, float]], dict[str, Tensor], Counter[str]]
"""An experience, metrics of two updates on it, the actor's weights after them, calls of kernels."""


def _outcome(tensor: int, dtype: torch.dtype, backend: Backend) -> Outcome:
    with emulated_cuda(), KernelCalls() as calls:
        trainer = tiny.trainer(
            CONFIG,
            actor=ParallelLayout(tensor=tensor),
            reward=ParallelLayout(data=tensor),
            reference_seed=9,
            sampling=SAMPLING,
            dtype=dtype,
            logprob_backend=backend,
        )
        experience = trainer.generate_experience(tiny.prompts(LENGTHS))
        reports = [trainer.train_rlhf(part) for part in trainer.minibatches(experience)]
    weights = tiny.own_weights(trainer.engine.actor.training.model)
    return (
        tiny.fields_of(experience),
        [report.metrics for report in reports],
        {name: weight for name, (_, weight) in weights.items()},
        calls.counts,
    )


@functools.cache
def _expected(tensor: int) -> list[Outcome]:
    return run_ranks(tensor, _outcome, tensor, torch.float32, Backend.REFERENCE)


@pytest.mark.parametrize(
    ("tensor", "backend"), [(1, Backend.CUDA), (2, Backend.CUDA), (2, Backend.CPU)]
)
def test_a_ppo_step_on_the_kernels_is_the_step_on_plain_torch(
    tensor: int, backend: Backend
) -> None:
    """Both updates clip, and the second starts from weights that the first one's gradient moved."""
    found = run_ranks(tensor, _outcome, tensor, torch.float32, backend)
    for mine, plain in zip(found, _expected(tensor), strict=True):
        for name, value in plain[0].items():
            torch.testing.assert_close(mine[0][name], value, atol=ROUND_OFF, rtol=ROUND_OFF)
        for metrics, other in zip(mine[1], plain[1], strict=True):
            assert metrics == pytest.approx(other, abs=ROUND_OFF, rel=1e-4)
        assert plain[1][1]["ppo/clip_fraction"] > 0 and plain[1][1]["ppo/entropy"] > 0
        for name, weight in plain[2].items():
            torch.testing.assert_close(mine[2][name], weight, atol=ROUND_OFF, rtol=0)
        # 8 rows in micro-batches of 3: scores of two roles and two updates.
        calls = {"token_logprobs_forward": 4 * 3, "token_logprobs_backward": 2 * 3}
        assert mine[3] == (calls if backend is Backend.CUDA else {})  # the CPU's are not dispatched
        assert not plain[3]


def test_in_bf16_both_backends_read_the_same_logits() -> None:
    """Scores differ by what float32 rounds, gradients by the rounding of bf16."""
    expected, found = (
        run_ranks(1, _outcome, 1, torch.bfloat16, backend)[0]
        for backend in (Backend.REFERENCE, Backend.CUDA)
    )
    for name in ("logprobs", "ref_logprobs", "advantages"):
        torch.testing.assert_close(found[0][name], expected[0][name], atol=1e-4, rtol=0)
    first, other = found[1][0], expected[1][0]
    for name in ("ppo/policy_loss", "ppo/entropy", "ppo/approx_kl"):
        assert first[name] == pytest.approx(other[name], abs=1e-4)
    norm = "ppo/actor_gradient_norm"
    assert first[norm] == pytest.approx(other[norm], rel=2e-2)


def _refusal(backend: Backend) -> str:
    """Of the four roles, without an emulator."""
    with pytest.raises(KernelError) as caught:
        tiny.trainer(CONFIG, logprob_backend=backend)
    return str(caught.value)


def test_a_backend_that_cannot_be_had_is_refused_before_anything_runs() -> None:
    assert "needs a model on an NVIDIA GPU" in run_ranks(1, _refusal, Backend.CUDA)[0]
