"""Refuses kernels and packages that a run asks for and that cannot be had here; builds nothing."""

from collections.abc import Iterator

import torch

from megachat.data.config import Stage
from megachat.errors import KernelError, MegachatError
from megachat.model.config import NormBackend
from megachat.ops.registry import Backend
from megachat.preflight.models import told
from megachat.stages.config import GroundTruth, RunConfig


def check_backends(
    config: RunConfig, stages: frozenset[Stage], device: torch.device
) -> Iterator[MegachatError]:
    """Refuses kernels that the stages compute with and that are not here and cannot be built.

    Args:
        config: The run.
        stages: What is going to run.
        device: What they compute on.
    """
    asked: dict[str, Backend] = {}
    if stages:
        asked["models.actor.logprob_backend"] = config.models.actor.logprob_backend
    if Stage.PROMPTS in stages:
        asked["rlhf.generation.backend"] = config.rlhf.generation.backend
    for key, backend in asked.items():
        if backend is not Backend.REFERENCE:
            from megachat.ops.backends import check

            with told() as problems:
                check(backend, device)
            yield from (KernelError(f"{key}: {problem}") for problem in problems)


def check_packages(config: RunConfig, stages: frozenset[Stage]) -> Iterator[MegachatError]:
    """Refuses what is optional, is asked for and is not installed."""
    for name, role in (("actor", config.models.actor), ("reward", config.models.reward)):
        if stages and role.norm_backend is not NormBackend.TORCH:
            from megachat.model.layers import norm_kernel  # seconds, for those who ask for apex

            with told() as problems:
                norm_kernel(role.norm_backend)
            yield from (KernelError(f"models.{name}: {problem}") for problem in problems)
    if Stage.PROMPTS in stages and config.rlhf.judge is GroundTruth.UPBEAT:
        from megachat.data.chitchat import positive_words

        with told() as problems:
            positive_words()
        yield from (type(each)(f'rlhf.judge "upbeat": {each}') for each in problems)
