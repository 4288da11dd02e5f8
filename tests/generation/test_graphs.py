"""Recorded decode steps answer as computed ones do, over phases, and hold no value of the host."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megachat.generation import generator as generator_module
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.generator import Generator
from megachat.generation.graphs import CudaGraphRecorder, rows_bucket
from megachat.generation.runner import ModelRunner
from megachat.hybrid.engine import HybridEngine
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.layout import ParallelLayout
from megachat.records import Rollout
from tests.generation import reference as gen
from tests.generation.tape import HostValueError, TapeRecorder
from tests.harness import run_ranks
from tests.hybrid import test_engine as hybrid
from tests.kernels.emulated import emulated_cuda
from tests.model import reference as ref

CASE = gen.Case(sampling=SamplingConfig(max_new_tokens=8))
FEW = replace(CASE, rows=(4, 1))
SETTINGS = GenerationConfig(kv_cache_gb=1e-3, block_size=4, prefill_tokens=8)
OF_A_GPU = replace(ref.PRE_LN, hidden=128, heads=2, ffn=64, layers=1, embed_dim=128)
"""Heads of a size for which there are CUDA kernels."""


def _generator(
    model: OptModel, recorder: TapeRecorder | None, settings: GenerationConfig = SETTINGS
) -> Generator:
    """A generator whose device records as `recorder` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_module, "recorder_for", lambda _: recorder)
        return Generator(model, stop_ids=CASE.stop_ids, suppressed_ids=(1,), config=settings)


def _rollout(generator: Generator, model: OptModel, case: gen.Case) -> Rollout:
    return generator.generate(
        gen.prompts(model.config, case), sampling=case.sampling, seed=case.seed
    )


def _gap(found: Rollout, expected: Rollout) -> float:
    """Largest difference of log-probs of equal answers."""
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    return (found.logprobs - expected.logprobs).abs().max().item()


@dataclass(frozen=True, kw_only=True)
class Found:
    gap: float
    recordings: int
    replays: int
    steps: int
    later_recordings: int
    """By a smaller batch, most of whose buckets the first one has come through."""
    repeated_recordings: int
    """By the first batch once more."""


def _record(name: str, tensor: int) -> Found:
    config = gen.CONFIGS[name]
    model = ref.build_model(config, ParallelLayout(tensor=tensor), reference=gen.oracle(config))
    recorder = TapeRecorder()
    recorded, plain = _generator(model, recorder), _generator(model, None)
    gap = _gap(_rollout(recorded, model, CASE), _rollout(plain, model, CASE))
    first = recorder.recordings
    statistics = recorded.statistics
    assert statistics is not None
    gap = max(gap, _gap(_rollout(recorded, model, FEW), _rollout(plain, model, FEW)))
    later = recorder.recordings
    gap = max(gap, _gap(_rollout(recorded, model, CASE), _rollout(plain, model, CASE)))
    return Found(
        gap=gap,
        recordings=first,
        replays=recorder.replays,
        steps=statistics.steps,
        later_recordings=later - first,
        repeated_recordings=recorder.recordings - later,
    )


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", gen.CONFIGS)
def test_replayed_steps_give_the_answers_of_computed_ones(name: str, tensor: int) -> None:
    """Ragged prompts, rows that end early, batches that shrink through the buckets."""
    for found in run_ranks(tensor, _record, name, tensor):
        assert found.gap < 1e-5
        assert found.recordings > 1
        assert found.replays > found.steps // 2
        assert found.later_recordings <= 2
        assert found.repeated_recordings == 0


def _record_cuda_kernels(tensor: int) -> tuple[float, int, set[str]]:
    """Gap against plain torch; replays; which of our operations are on the tapes."""
    layout = ParallelLayout(tensor=tensor)
    model = ref.build_model(OF_A_GPU, layout, reference=gen.oracle(OF_A_GPU))
    recorder = TapeRecorder()
    settings = SETTINGS.model_copy(update={"backend": Backend.CUDA, "block_size": 16})
    with emulated_cuda():
        found = _rollout(_generator(model, recorder, settings), model, FEW)
    names = {str(call.function) for tape in recorder.tapes for call in tape.calls}
    gap = _gap(found, _rollout(_generator(model, None), model, FEW))
    return gap, recorder.replays, {name for name in names if name.startswith("megachat.")}


@pytest.mark.parametrize("tensor", [1, 2])
def test_steps_of_cuda_kernels_are_recorded_and_replayed(tensor: int) -> None:
    """On their emulator: launches see device memory and sizes, and no value of a step."""
    expected = {
        f"megachat.{name}.default"
        for name in (
            "bias_residual_layer_norm",
            "kv_append",
            "paged_attention_decode",
            "tiled_linear_bias_relu",
        )
    }
    if tensor > 1:
        expected.add("megachat.all_reduce.default")
    for gap, replays, names in run_ranks(tensor, _record_cuda_kernels, tensor):
        assert gap < 1e-5
        assert replays > 1
        assert names == expected


def test_a_bucket_has_at_most_seven_rows_too_many_and_small_ones_are_exact() -> None:
    buckets = [rows_bucket(rows) for rows in range(1, 257)]
    assert [rows_bucket(rows) for rows in (1, 2, 4, 8)] == [1, 2, 4, 8]
    assert all(rows <= bucket < rows + 8 for rows, bucket in enumerate(buckets, start=1))
    assert len(set(buckets)) == 4 + 31


def _over_phases() -> tuple[list[float], int, int]:
    """Gaps against an actor without recordings over three phases; recordings after one and all."""
    recorder = TapeRecorder()
    pair = ParallelLayout(tensor=2), 1
    actors: list[HybridEngine] = []
    for chosen in (recorder, None):
        actor = hybrid.build(hybrid.PRE_LN, *pair, torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generator_module, "recorder_for", lambda _, chosen=chosen: chosen)
            actor.eval()
            assert actor.generator is not None
        actors.append(actor.train())
    gaps, first = [], 0
    for step in range(3):
        rollouts = []
        for actor in actors:
            with actor.generation() as generator:
                rollouts.append(
                    generator.generate(hybrid.prompts(), sampling=hybrid.SAMPLING, seed=1)
                )
            hybrid.train_step(actor.training, step)
        gaps.append(_gap(*rollouts))
        first = first or recorder.recordings
    return gaps, first, recorder.recordings


def test_recordings_outlive_training_phases_and_see_the_new_weights() -> None:
    """The arena gives memory back between phases and changes its content, not its addresses."""
    for gaps, first, last in run_ranks(2, _over_phases):
        assert max(gaps) < 1e-5
        assert first > 0
        assert last <= first + 4  # of buckets that the first answers did not come through


def _after_a_move() -> tuple[int, int, float]:
    config = ref.PRE_LN
    model = ref.build_model(config, ParallelLayout(), reference=gen.oracle(config))
    recorder = TapeRecorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_module, "recorder_for", lambda _: recorder)
        generator = Generator(model, stop_ids=CASE.stop_ids, suppressed_ids=(1,), config=SETTINGS)
        _rollout(generator, model, FEW)
        before = recorder.recordings
        parameter = next(p for name, p in model.named_parameters() if "fc1.weight" in name)
        parameter.data = parameter.data.roll(1, 0)  # other memory, other weights
        found = _rollout(generator, model, FEW)
    expected = _rollout(_generator(model, None), model, FEW)
    return before, recorder.recordings, _gap(found, expected)


def test_weights_that_moved_in_memory_are_recorded_again() -> None:
    ((before, after, gap),) = run_ranks(1, _after_a_move)
    assert after > before > 0
    assert gap < 1e-5


def _refusals() -> list[str]:
    """What the tape says of steps that no graph could hold."""
    recorder = TapeRecorder()
    x = torch.arange(4.0)
    steps = {
        "item": lambda: x * x.max().item(),
        "mask": lambda: x[x > 1],
        "host": lambda: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "branch": lambda: x if x.any() else -x,
    }
    said = []
    for compute in steps.values():
        with pytest.raises(HostValueError) as caught:
            recorder.record(compute)
        said.append(str(caught.value))
    return said


def test_the_stand_in_refuses_what_a_graph_cannot_hold() -> None:
    assert len(_refusals()) == 4


def _with_a_host_value() -> float:
    """Gap of a runner that reads a length on the host, recorded where the tape cannot see it."""
    config = ref.PRE_LN
    model = ref.build_model(config, ParallelLayout(), reference=gen.oracle(config))
    plain = _rollout(_generator(model, None), model, FEW)
    original = ModelRunner._embed

    def baked(self: ModelRunner, tokens: Tensor, positions: Tensor) -> Tensor:
        return original(self, tokens, torch.full_like(positions, positions.numpy()[0].item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRunner, "_embed", baked)
        wrong = _rollout(_generator(model, TapeRecorder()), model, FEW)
    lengths = wrong.logprobs.shape[1], plain.logprobs.shape[1]
    shared = slice(0, min(lengths))
    return (wrong.logprobs[:, shared] - plain.logprobs[:, shared]).abs().max().item()


def test_a_value_baked_into_a_recording_shows_in_the_answers() -> None:
    """The comparison of answers has teeth: replays with a stale position are far off."""
    (gap,) = run_ranks(1, _with_a_host_value)
    assert gap > 1e-2


@pytest.mark.gpu
def test_cuda_graphs_replay_a_step() -> None:
    device = torch.device("cuda", 0)
    x = torch.ones(3, device=device)
    recording = CudaGraphRecorder(device).record(lambda: x * 2)
    assert recording.output.tolist() == [2.0, 2.0, 2.0]
    x.fill_(5.0)
    recording.replay()
    assert recording.output.tolist() == [10.0, 10.0, 10.0]
