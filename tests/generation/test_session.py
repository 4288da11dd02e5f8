"""The whole engine on many prompts: HuggingFace's tokens, and answers that depend on nothing else.

How memory and time are used (block size, pool size, batch limits, chunks, sharing, preemption) must
not show in an answer; its log-probs must be those that the training path recomputes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megachat.errors import CapacityError, ConfigError
from megachat.generation.config import GenerationConfig, SamplingConfig
from megachat.generation.generator import Generator, StreamedToken
from megachat.generation.kv_cache import block_bytes
from megachat.generation.session import SessionStatistics
from megachat.model import OptConfig
from megachat.model.opt import OptModel
from megachat.ops.registry import Backend
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch, Rollout
from megachat.rlhf.scoring import ResponseLogprobs
from megachat.training.engine import ForwardEngine
from tests.generation import reference as gen
from tests.generation.reference import CONFIGS
from tests.harness import run_ranks
from tests.kernels.emulated import emulated_cuda
from tests.model import reference as ref

NUM_PROMPTS, NEW_TOKENS = 200, 8
SAMPLED = SamplingConfig(max_new_tokens=NEW_TOKENS)
GREEDY = SamplingConfig(max_new_tokens=NEW_TOKENS, temperature=0.0)
PENALIZED = SamplingConfig(max_new_tokens=NEW_TOKENS, repetition_penalty=1.7, top_p=0.9)
DEFAULT = GenerationConfig(kv_cache_gb=0.05)
BF16_STEP = 2.0**-8


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to spend memory and time."""

    block_size: int = 4
    num_blocks: int = 1000
    max_sequences: int = 64
    prefill_tokens: int = 4096

    def config(self, config: OptConfig, *, tensor: int, dtype: torch.dtype) -> GenerationConfig:
        size = block_bytes(config, tensor=tensor, block_size=self.block_size, dtype=dtype)
        return GenerationConfig(
            kv_cache_gb=(self.num_blocks + 0.5) * size / 1e9,
            block_size=self.block_size,
            max_sequences=self.max_sequences,
            prefill_tokens=self.prefill_tokens,
        )


PLAIN = Way()
WAYS = {
    "plain": PLAIN,
    "blocks of one": replace(PLAIN, block_size=1),
    "large blocks": replace(PLAIN, block_size=32),
    "small batch": replace(PLAIN, max_sequences=3),
    "small chunks": replace(PLAIN, prefill_tokens=5),
    "preemption": replace(PLAIN, num_blocks=9),
    "everything": Way(block_size=2, num_blocks=22, max_sequences=8, prefill_tokens=5),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One call of `generate`."""

    rollout: Rollout
    statistics: SessionStatistics
    rescored: Tensor
    """What the training path says about the response tokens."""


def _prompts(config: OptConfig, count: int, *, distinct: int) -> PromptBatch:
    """Random prompts of 1 to 12 tokens, of which `distinct` differ."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 13, (distinct,), generator=generator)
    tokens = torch.randint(4, config.vocab_size, (distinct, 12), generator=generator)
    rows = torch.arange(count) % distinct
    return PromptBatch(tokens=tokens[rows], lengths=lengths[rows], ids=torch.arange(count))


def _generator(model: OptModel, config: GenerationConfig = DEFAULT) -> Generator:
    return Generator(model, stop_ids=gen.STOPS, suppressed_ids=(1,), config=config)


def _rescore(model: OptModel, rollout: Rollout, sampling: SamplingConfig) -> Tensor:
    engine = ForwardEngine(model, micro_batch_rows=8)
    return engine.score(
        rollout,
        ResponseLogprobs(
            response_len=rollout.logprobs.shape[1],
            temperature=sampling.temperature or 1.0,
            group=engine.groups.tensor,
            vocab_start=engine.vocab_start,
        ),
    )


def _outcome(
    model: OptModel,
    prompts: PromptBatch,
    *,
    way: Way,
    sampling: SamplingConfig,
    num_samples: int = 1,
) -> Outcome:
    settings = way.config(
        model.config, tensor=model.groups.layout.tensor, dtype=model.options.dtype
    )
    generator = _generator(model, settings)
    rollout = generator.generate(prompts, sampling=sampling, seed=5, num_samples=num_samples)
    assert generator.statistics is not None
    generator.cache.release()
    assert generator.cache.resident_bytes == 0
    return Outcome(
        rollout=rollout,
        statistics=generator.statistics,
        rescored=_rescore(model, rollout, sampling),
    )


def _greedy_tokens(names: tuple[str, ...]) -> Mapping[str, list[list[int]]]:
    """Our answers to all prompts, which run through several waves and chunks."""
    found = {}
    for name in names:
        config = CONFIGS[name]
        model = ref.build_model(config, ParallelLayout(), reference=gen.oracle(config))
        prompts = _prompts(config, NUM_PROMPTS, distinct=NUM_PROMPTS)
        way = Way(num_blocks=120, max_sequences=48, prefill_tokens=100)
        found[name] = _rows(_outcome(model, prompts, way=way, sampling=GREEDY).rollout)
    return found


def _outcomes(
    dtype: torch.dtype, tensor: int, ways: tuple[str, ...] = tuple(WAYS)
) -> dict[tuple[str, str], Outcome]:
    """Some ways for both architectures, with few distinct prompts so that they share blocks."""
    outcomes = {}
    for name, config in CONFIGS.items():
        model = ref.build_model(
            config, ParallelLayout(tensor=tensor), reference=gen.oracle(config), dtype=dtype
        )
        prompts = _prompts(config, 16, distinct=10)
        for title in ways:
            outcomes[name, title] = _outcome(model, prompts, way=WAYS[title], sampling=SAMPLED)
        for title, way in (("penalty", PLAIN), ("penalty everything", WAYS["everything"])):
            outcomes[name, title] = _outcome(model, prompts, way=way, sampling=PENALIZED)
        few = prompts.select(torch.arange(6))
        for title in ("plain", "everything"):
            outcomes[name, f"samples {title}"] = _outcome(
                model, few, way=WAYS[title], sampling=SAMPLED, num_samples=3
            )
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], Outcome]:
    """fp32 on one rank."""
    (found,) = run_ranks(1, _outcomes, torch.float32, 1)
    return found


def _rows(rollout: Rollout) -> list[list[int]]:
    return [
        row[start:end].tolist()
        for row, start, end in zip(
            rollout.tokens, rollout.prompt_lengths, rollout.lengths, strict=True
        )
    ]


@torch.no_grad()
def _huggingface_answers(config: OptConfig) -> list[list[int]]:
    """HuggingFace's greedy answers, prompts of one length at a time so that none is padded."""
    oracle = gen.oracle(config)
    prompts = _prompts(config, NUM_PROMPTS, distinct=NUM_PROMPTS)
    answers: list[list[int]] = [[]] * NUM_PROMPTS
    for length in prompts.lengths.unique().tolist():
        rows = (prompts.lengths == length).nonzero()[:, 0]
        tokens = prompts.tokens[rows, :length]
        found = oracle.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=list(gen.STOPS),
            pad_token_id=1,
            suppress_tokens=[1],
        )
        for row, answer in zip(rows.tolist(), found[:, length:].tolist(), strict=True):
            stops = [index for index, token in enumerate(answer) if token in gen.STOPS]
            answers[row] = answer[: stops[0] + 1 if stops else NEW_TOKENS]
    return answers


def test_greedy_answers_to_200_random_prompts_equal_huggingface() -> None:
    (found,) = run_ranks(1, _greedy_tokens, tuple(CONFIGS))
    for name, config in CONFIGS.items():
        expected = _huggingface_answers(config)
        assert found[name] == expected
        assert len({len(answer) for answer in expected}) > 4


@pytest.mark.parametrize("name", CONFIGS)
def test_how_memory_and_time_are_spent_does_not_show_in_an_answer(
    name: str, outcomes: dict[tuple[str, str], Outcome]
) -> None:
    pairs = [("plain", title) for title in WAYS]
    pairs += [("penalty", "penalty everything"), ("samples plain", "samples everything")]
    for reference, title in pairs:
        expected, found = (outcomes[name, key].rollout for key in (reference, title))
        assert _rows(found) == _rows(expected), title
        assert torch.equal(found.finished, expected.finished)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
    assert outcomes[name, "preemption"].statistics.preemptions > 0
    assert outcomes[name, "everything"].statistics.preemptions > 0
    assert outcomes[name, "plain"].statistics.preemptions == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_what_the_training_path_recomputes(
    name: str, outcomes: dict[tuple[str, str], Outcome]
) -> None:
    for (config, title), outcome in outcomes.items():
        if config == name:
            gap = (outcome.rescored - outcome.rollout.logprobs).abs().max().item()
            assert gap <= 1e-5, title
            assert len(outcome.rollout.response_lengths.unique()) >= 3, title


@pytest.mark.parametrize("name", CONFIGS)
def test_samples_of_a_prompt_are_independent_answers_side_by_side(
    name: str, outcomes: dict[tuple[str, str], Outcome]
) -> None:
    """The first is the one that `generate` gives when one is asked for."""
    rollout = outcomes[name, "samples plain"].rollout
    single = outcomes[name, "plain"].rollout
    rows = _rows(rollout)
    assert rows[::3] == _rows(single)[:6]
    assert torch.equal(rollout.prompt_lengths, single.prompt_lengths[:6].repeat_interleave(3))
    assert sum(a != b for a, b in zip(rows[::3], rows[1::3], strict=True)) >= 5
    assert sum(a != b for a, b in zip(rows[1::3], rows[2::3], strict=True)) >= 5


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_prompts_and_samples_share_what_is_computed(
    name: str, outcomes: dict[tuple[str, str], Outcome]
) -> None:
    lengths = outcomes[name, "plain"].rollout.prompt_lengths
    shared = sum((length - 1) // 4 * 4 for length in lengths[10:].tolist())
    assert outcomes[name, "plain"].statistics.prefill_tokens == int(lengths.sum()) - shared
    samples = outcomes[name, "samples plain"].statistics
    assert samples.prefill_tokens == int(lengths[:6].sum())
    assert samples.preemptions == 0


def test_answers_and_log_probs_do_not_depend_on_the_tensor_degree(
    outcomes: dict[tuple[str, str], Outcome],
) -> None:
    first, second = run_ranks(2, _outcomes, torch.float32, 2, ("plain", "everything"))
    for key, found in first.items():
        expected = outcomes[key].rollout
        assert _rows(found.rollout) == _rows(expected), key
        assert torch.equal(found.rollout.logprobs, second[key].rollout.logprobs)
        torch.testing.assert_close(found.rollout.logprobs, expected.logprobs, atol=1e-5, rtol=0)
        assert (found.rescored - found.rollout.logprobs).abs().max().item() <= 1e-5, key


@pytest.mark.parametrize("tensor", [1, 2])
def test_bf16_log_probs_differ_from_the_training_path_by_rounding_only(tensor: int) -> None:
    """Both paths round every activation to 8 bits: at most four steps of the largest logit."""
    found = run_ranks(tensor, _outcomes, torch.bfloat16, tensor, ("everything",))[0]
    for (name, title), outcome in found.items():
        with torch.no_grad():
            largest = gen.oracle(CONFIGS[name])(outcome.rollout.tokens).logits.abs().max()
        gap = (outcome.rescored - outcome.rollout.logprobs).abs().max().item()
        assert gap <= 4 * BF16_STEP * largest.item(), (name, title)


def _streamed() -> tuple[list[StreamedToken], list[StreamedToken], Rollout, int]:
    """A whole stream, one that is left early, and the same prompts answered at once afterwards."""
    model = ref.build_model(ref.PRE_LN, ParallelLayout(), reference=gen.oracle(ref.PRE_LN))
    prompts = _prompts(ref.PRE_LN, 5, distinct=5)
    generator = _generator(model)
    whole = list(generator.stream(prompts, sampling=SAMPLED, seed=5))
    stream = generator.stream(prompts, sampling=SAMPLED, seed=5)
    some = [next(stream) for _ in range(7)]
    stream.close()
    rollout = generator.generate(prompts, sampling=SAMPLED, seed=5)
    return whole, some, rollout, generator.cache.resident_bytes


def test_a_stream_gives_the_tokens_of_generate_as_they_come() -> None:
    ((whole, some, rollout, resident),) = run_ranks(1, _streamed)
    assert some == whole[:7]
    for row, answer in enumerate(_rows(rollout)):
        tokens = [token for token in whole if token.row == row]
        assert [token.token for token in tokens] == answer
        assert [token.is_last for token in tokens] == [False] * (len(answer) - 1) + [True]
        logprobs = torch.tensor([token.logprob for token in tokens])
        torch.testing.assert_close(logprobs, rollout.logprobs[row, : len(answer)])
    # Prompts come together, then one token each: nobody waits for another's whole answer.
    assert [token.row for token in whole[:5]] == [0, 1, 2, 3, 4]
    assert resident > 0


def _on_cuda(tensor: int) -> list[tuple[Rollout, Rollout]]:
    """Answers of the CUDA kernels, on their emulator, beside those of plain torch."""
    config = replace(ref.PRE_LN, hidden=128, heads=2, ffn=64, layers=1, embed_dim=128)
    model = ref.build_model(
        config, ParallelLayout(tensor=tensor), reference=gen.oracle(config), vocab_multiple=256
    )
    prompts, answers = _prompts(config, 6, distinct=4), []
    way = Way(block_size=16)
    for sampling in (PENALIZED, PENALIZED.model_copy(update={"top_k": 20, "min_new_tokens": 4})):
        pair = []
        for backend in (Backend.CUDA, Backend.REFERENCE):
            settings = way.config(config, tensor=tensor, dtype=torch.float32)
            with emulated_cuda():
                generator = _generator(model, settings.model_copy(update={"backend": backend}))
                pair.append(generator.generate(prompts, sampling=sampling, seed=5))
        answers.append((pair[0], pair[1]))
    return answers


@pytest.mark.parametrize("tensor", [1, 2])
def test_cuda_kernels_penalise_and_truncate_what_was_said_as_torch_does(tensor: int) -> None:
    for answers in run_ranks(tensor, _on_cuda, tensor):
        for found, expected in answers:
            assert _rows(found) == _rows(expected)
            torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)
        assert _rows(answers[0][0]) != _rows(answers[1][0])


def _refusals() -> list[str]:
    model = ref.build_model(ref.PRE_LN, ParallelLayout(), seed=0)
    prompts = replace(_prompts(ref.PRE_LN, 3, distinct=3), lengths=torch.tensor([2, 12, 5]))
    settings = Way(num_blocks=4).config(ref.PRE_LN, tensor=1, dtype=torch.float32)
    messages = []
    with pytest.raises(CapacityError) as caught:
        _generator(model, settings).generate(prompts, sampling=SAMPLED, seed=0)
    messages.append(str(caught.value))
    with pytest.raises(ConfigError) as refused:
        _generator(model).generate(prompts, sampling=SAMPLED, seed=0, num_samples=0)
    return [*messages, str(refused.value)]


def test_a_cache_too_small_for_one_sequence_is_refused_with_the_numbers() -> None:
    """12 + 8 tokens, of which the last is never computed, need five blocks of four."""
    ((capacity, samples),) = run_ranks(1, _refusals)
    size = block_bytes(ref.PRE_LN, tensor=1, block_size=4, dtype=torch.float32)
    assert capacity.startswith(
        "a prompt of 12 tokens and a response of up to 8 need 5 blocks of 4 tokens, "
        f"{5 * size} bytes, but the key-value cache has 4: raise kv_cache_gb above "
    )
    assert "num_samples is 0" in samples
