"""Stages end at the memory that they began with, whether they succeed or fail."""

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megachat.data.config import Stage
from megachat.errors import CapacityError, PhaseError
from megachat.generation import generator as generator_module
from megachat.generation.generator import Generator
from megachat.generation.graphs import DecodeGraphs
from megachat.generation.kv_cache import PagedKvCache
from megachat.generation.runner import ModelRunner
from megachat.hybrid.engine import HybridEngine
from megachat.model.opt import OptModel
from megachat.parallel.heap import keep_freed_memory
from megachat.reshard.arena import WeightArena
from megachat.stages import rlhf
from megachat.training.engine import ForwardEngine
from megachat.training.zero1 import Zero1Optimizer
from tests.generation.tape import TapeRecorder
from tests.harness import run_ranks
from tests.stages import tiny_run

KINDS = (
    OptModel, ForwardEngine, Zero1Optimizer, HybridEngine, WeightArena, Generator, ModelRunner,
    DecodeGraphs, PagedKvCache,
)  # fmt: skip
SHORT = (
    "sft.max_steps=1", "sft.batch_rows=2", "sft.evaluation_rows=2",
    "reward.max_steps=1", "reward.batch_pairs=2", "reward.evaluation_rows=2",
    "rlhf.max_steps=1", "rlhf.batch_prompts=2", "rlhf.evaluation_rows=2",
    "rlhf.ppo.minibatches=1", "rlhf.ppo.reward.normalization_samples=2",
    "rlhf.old_logprobs=recompute", "rlhf.generation.kv_cache_gb=0.02",
    "models.actor.precision=bf16", "models.reward.precision=fp32",
)  # fmt: skip
"""The least that goes through all stages, in both dtypes."""
LARGE = (
    "models.actor.shape.hidden=640", "models.actor.shape.layers=4", "models.actor.shape.heads=10",
)  # fmt: skip
"""20 M parameters: what an optimizer that stays behind holds is far above the noise."""


@contextlib.contextmanager
def _recorded_and_seen() -> Iterator[list[weakref.ref[Any]]]:
    """Records decode steps on tapes, and notes every object of those kinds that is built."""
    seen: list[weakref.ref[Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_module, "recorder_for", lambda _: TapeRecorder())
        for kind in KINDS:
            patch.setattr(kind, "__init__", _noting(kind.__init__, seen))
        yield seen


def _noting(build: Any, seen: list[weakref.ref[Any]]) -> Any:
    def init(self: Any, *args: Any, **options: Any) -> None:
        seen.append(weakref.ref(self))
        build(self, *args, **options)

    return init


def _resident_bytes() -> int:
    """Of this process, without memory that has been freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def _resident_after_stages(folder: Path) -> tuple[list[int], list[str], int]:
    """Bytes before the first stage and after each; what of a stage is alive; what was built."""
    keep_freed_memory()  # as in production
    with _recorded_and_seen() as seen:
        tiny_run.run(folder, [*SHORT, f"run.output={folder / 'warm'}"])
        resident = [_resident_bytes()]
        overrides = [*SHORT, *LARGE, f"run.output={folder / 'large'}"]
        for stage in Stage:
            tiny_run.run(folder, overrides, [stage])
            resident.append(_resident_bytes())
    alive = [type(thing).__name__ for ref in seen if (thing := ref()) is not None]
    return resident, alive, len(seen)


def test_memory_after_each_stage_is_within_two_percent_of_what_it_was_before(
    tmp_path: Path,
) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    ((before, *after), alive, built) = run_ranks(1, _resident_after_stages, tmp_path)[0]
    assert built > 2 * len(KINDS) and alive == []
    for stage, resident in zip(Stage, after, strict=True):
        assert resident < 1.02 * before, (stage, before, after)


def _fail_in_ppo(folder: Path) -> tuple[list[str], list[str]]:
    """What is still open after a stage that failed, and what is alive later."""

    def fail(*_: Any, **__: Any) -> None:
        raise CapacityError("no block is left")

    with _recorded_and_seen() as seen, pytest.MonkeyPatch.context() as patch:
        tiny_run.run(folder, SHORT, [Stage.SFT, Stage.REWARD])
        assert [ref() for ref in seen if ref() is not None] == []
        seen.clear()
        patch.setattr(rlhf, "ppo_step", fail)
        usable: list[str] = []
        try:
            tiny_run.run(folder, SHORT, [Stage.PROMPTS])
        except CapacityError:
            for ref in seen:  # the traceback keeps the stage's variables
                thing = ref()
                if thing is not None and not isinstance(thing, OptModel):
                    with contextlib.suppress(PhaseError):
                        thing.check_open()
                        usable.append(type(thing).__name__)
    thing = None
    gc.collect()
    alive = [type(thing).__name__ for ref in seen if (thing := ref()) is not None]
    return usable, alive


def test_a_stage_that_fails_ends_what_it_has_built(tmp_path: Path) -> None:
    tiny_run.write_rows(tmp_path / "rows.jsonl")
    assert run_ranks(1, _fail_in_ppo, tmp_path) == [([], [])]
