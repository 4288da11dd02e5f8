"""`Generator.generate` under several layouts, against HuggingFace and against the training path."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor, nn

from megachat.errors import MegachatError
from megachat.generation.config import SamplingConfig
from megachat.generation.generator import Generator
from megachat.model import Head, OptConfig
from megachat.ops.registry import Backend
from megachat.parallel.layout import ParallelLayout
from megachat.records import PromptBatch, Rollout
from megachat.rlhf.scoring import ResponseLogprobs
from megachat.training.engine import ForwardEngine
from tests.generation import reference as gen
from tests.generation.reference import CONFIGS, Case
from tests.harness import run_ranks
from tests.model import reference as ref

SINGLE, TP2, DP2 = ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(data=2)
PP2 = ParallelLayout(pipeline=2)
LAYOUTS = (SINGLE, TP2, DP2)
BACKENDS = (Backend.REFERENCE, Backend.CPU)
GREEDY = Case(
    sampling=SamplingConfig(max_new_tokens=8, temperature=0.0), stop_ids=(), suppressed_ids=()
)
SAMPLED = Case(sampling=SamplingConfig(max_new_tokens=8))
CASES = {
    "sampled": SAMPLED,
    "again": SAMPLED,
    "other seed": replace(SAMPLED, seed=12),
    "other ids": replace(SAMPLED, first_id=2000),
    "some": replace(SAMPLED, rows=(4, 1)),
    "one": replace(SAMPLED, rows=(2,)),
    "reversed": replace(SAMPLED, rows=tuple(reversed(SAMPLED.rows))),
    "wide": replace(SAMPLED, width=19),
    "truncated": replace(
        SAMPLED,
        sampling=SamplingConfig(max_new_tokens=8, temperature=0.7, top_k=20, top_p=0.8),
    ),
    "suppressed": replace(
        SAMPLED,
        sampling=SamplingConfig(max_new_tokens=8, temperature=3.0),
        suppressed_ids=tuple(range(1, 130, 2)),
    ),
    "min 5": replace(SAMPLED, sampling=SamplingConfig(max_new_tokens=8, min_new_tokens=5)),
}
RESCORED = ("sampled", "wide", "truncated", "suppressed")
"""Cases whose answers the training layouts recompute."""
BF16_STEP = 2.0**-8
"""Distance of neighbouring bf16 numbers, relative to the next lower power of two."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one layout answers to a case, and what training layouts say about the answer."""

    rollout: Rollout
    rescored: Mapping[str, Tensor]
    """Log-probs of the response tokens by the layout that recomputed them."""


Answers = Mapping[tuple[str, str, ParallelLayout], Answer]
"""By configuration, case and layout of the generating model."""


def _rescore(engine: ForwardEngine, rollout: Rollout, temperature: float) -> Tensor:
    function = ResponseLogprobs(
        response_len=rollout.logprobs.shape[1],
        temperature=temperature,
        group=engine.groups.tensor,
        vocab_start=engine.vocab_start,
    )
    return engine.score(rollout, function)


def _answer(
    layouts: tuple[ParallelLayout, ...],
    scorers: tuple[ParallelLayout, ...],
    cases: Mapping[str, Mapping[str, Case]],
    dtype: torch.dtype,
    backend: Backend,
) -> Answers:
    """All cases of all configurations under the layouts of one world."""
    answers = {}
    for name, config in CONFIGS.items():
        oracle = gen.oracle(config)
        models = {
            layout: ref.build_model(config, layout, reference=oracle, dtype=dtype)
            for layout in {*layouts, *scorers}
        }
        engines = {layout: ForwardEngine(models[layout], micro_batch_rows=3) for layout in scorers}
        for layout in layouts:
            for title, case in cases[name].items():
                rollout = gen.generator(models[layout], case, backend=backend).generate(
                    gen.prompts(config, case), sampling=case.sampling, seed=case.seed
                )
                temperature = case.sampling.temperature or 1.0
                rescored = {
                    str(scorer): _rescore(engine, rollout, temperature)
                    for scorer, engine in engines.items()
                    if title in RESCORED
                }
                answers[name, title, layout] = Answer(rollout=rollout, rescored=rescored)
    return answers


def _differences(found: Rollout, expected: Rollout) -> list[str]:
    """Fields that are not bit for bit equal."""
    return [
        field.name
        for field in fields(Rollout)
        if not torch.equal(getattr(found, field.name), getattr(expected, field.name))
    ]


def _huggingface_answers(config: OptConfig, oracle: nn.Module, case: Case) -> list[list[int]]:
    """Greedy ones to all prompts of a case."""
    batch = gen.prompts(config, case)
    return [
        gen.greedy(oracle, row[:length], sampling=case.sampling, stop_ids=case.stop_ids)
        for row, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)
    ]


Greedy = Mapping[tuple[str, str], list[list[int]]]
"""HuggingFace's answers by configuration and greedy case."""


@pytest.fixture(scope="module")
def greedy_cases() -> tuple[dict[str, dict[str, Case]], Greedy]:
    """Greedy decoding with a stop token that some rows emit early, and with a shortest length."""
    cases, answers = {}, {}
    for name, config in CONFIGS.items():
        oracle = gen.oracle(config)
        first = _huggingface_answers(config, oracle, GREEDY)
        stops = (first[0][2], first[3][0])
        shortest = SamplingConfig(max_new_tokens=8, temperature=0.0, min_new_tokens=4)
        more = {
            "greedy stop": replace(GREEDY, stop_ids=stops),
            "greedy min 4": replace(GREEDY, stop_ids=stops, sampling=shortest),
        }
        cases[name] = {"greedy": GREEDY, **more}
        answers[name, "greedy"] = first
        for title, case in more.items():
            answers[name, title] = _huggingface_answers(config, oracle, case)
    return cases, answers


@pytest.fixture(scope="module")
def cases(
    greedy_cases: tuple[dict[str, dict[str, Case]], Greedy],
) -> dict[str, dict[str, Case]]:
    """All cases by configuration."""
    return {name: {**CASES, **extra} for name, extra in greedy_cases[0].items()}


@pytest.fixture(scope="module")
def greedy(greedy_cases: tuple[dict[str, dict[str, Case]], Greedy]) -> Greedy:
    return greedy_cases[1]


@pytest.fixture(scope="module", params=BACKENDS)
def answers(request: pytest.FixtureRequest, cases: dict[str, dict[str, Case]]) -> Answers:
    """The fp32 answers of all layouts; every rank of a layout says the same."""
    how = (cases, torch.float32, request.param)
    (single,) = run_ranks(1, _answer, (SINGLE,), (SINGLE,), *how)
    first, second = run_ranks(2, _answer, (TP2, DP2), (TP2, DP2, PP2), *how)
    for key, answer in first.items():
        assert not _differences(second[key].rollout, answer.rollout), key
    return single | first


def _rows(rollout: Rollout) -> list[list[int]]:
    """The response tokens of each row."""
    return [
        row[start:end].tolist()
        for row, start, end in zip(
            rollout.tokens, rollout.prompt_lengths, rollout.lengths, strict=True
        )
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_equal_huggingface_for_ragged_prompts(
    name: str,
    layout: ParallelLayout,
    answers: Answers,
    greedy: Greedy,
    cases: dict[str, dict[str, Case]],
) -> None:
    titles = [title for config, title in greedy if config == name]
    assert titles == ["greedy", "greedy stop", "greedy min 4"]
    for title in titles:
        expected = greedy[name, title]
        assert _rows(answers[name, title, layout].rollout) == expected, title
        lengths = {len(row) for row in expected}
        stops = cases[name][title].stop_ids
        assert lengths == {8} if not stops else min(lengths) < 8 == max(lengths)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_equal_huggingface_at_the_temperature_without_truncation(
    name: str, layout: ParallelLayout, answers: Answers
) -> None:
    oracle = gen.oracle(CONFIGS[name])
    for title in ("sampled", "truncated"):
        rollout = answers[name, title, layout].rollout
        for row in range(rollout.num_rows):
            expected = gen.logprobs(
                oracle,
                rollout.tokens[row, : rollout.lengths[row]],
                prompt_length=int(rollout.prompt_lengths[row]),
                temperature=CASES[title].sampling.temperature,
            )
            found = rollout.logprobs[row, : len(expected)]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
            assert not rollout.logprobs[row, len(expected) :].any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_sampled_log_probs_equal_what_every_training_layout_recomputes(
    name: str, layout: ParallelLayout, answers: Answers
) -> None:
    for title in RESCORED:
        answer = answers[name, title, layout]
        assert len(answer.rescored) == (1 if layout == SINGLE else 3)
        for scorer, rescored in answer.rescored.items():
            gap = (rescored - answer.rollout.logprobs).abs().max().item()
            assert gap <= 1e-5, (title, scorer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_log_probs_differ_from_the_training_layout_by_rounding_only(backend: Backend) -> None:
    """Both paths round every activation to 8 bits; the bound is four steps of the largest logit."""
    cases = {name: {"sampled": SAMPLED} for name in CONFIGS}
    answers = run_ranks(2, _answer, (TP2, DP2), (TP2, DP2), cases, torch.bfloat16, backend)[0]
    for (name, _, layout), answer in answers.items():
        oracle = gen.oracle(CONFIGS[name])
        with torch.no_grad():
            largest = oracle(answer.rollout.tokens).logits.abs().max().item()
        for scorer, rescored in answer.rescored.items():
            gap = (rescored - answer.rollout.logprobs).abs().max().item()
            assert gap <= 4 * BF16_STEP * largest, (name, layout, scorer)


@pytest.mark.parametrize("layout", (TP2, DP2), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_do_not_depend_on_data_or_tensor_degree(
    name: str, layout: ParallelLayout, answers: Answers
) -> None:
    for title in CASES:
        expected, found = (answers[name, title, each].rollout for each in (SINGLE, layout))
        assert _rows(found) == _rows(expected), title
        assert not set(_differences(found, expected)) - {"logprobs"}
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_answer_does_not_depend_on_the_other_prompts_of_the_batch(
    name: str, layout: ParallelLayout, answers: Answers
) -> None:
    """Fewer prompts, another order, a wider batch: the same prompt id gets the same answer."""
    whole = answers[name, "sampled", layout].rollout
    for title in ("some", "one", "reversed", "wide"):
        rollout = answers[name, title, layout].rollout
        for row, original in enumerate(CASES[title].rows):
            assert _rows(rollout)[row] == _rows(whole)[original], title
            columns = min(rollout.logprobs.shape[1], whole.logprobs.shape[1])
            torch.testing.assert_close(
                rollout.logprobs[row, :columns],
                whole.logprobs[original, :columns],
                atol=1e-5,
                rtol=0,
            )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_f1_rollouts_are_sampled_and_two_seeds_differ(
    layout: ParallelLayout, answers: Answers
) -> None:
    """Not greedy, and yet a function of the seed and of each prompt's identity."""
    for name in CONFIGS:
        sampled, again, other, renamed, greedy = (
            answers[name, title, layout].rollout
            for title in ("sampled", "again", "other seed", "other ids", "greedy")
        )
        assert not _differences(again, sampled)
        rows = _rows(sampled)
        assert all(a != b for a, b in zip(rows, _rows(other), strict=True))
        assert all(a != b for a, b in zip(rows, _rows(renamed), strict=True))
        # A response of one token may well be the likeliest one.
        assert all(a != b[: len(a)] for a, b in zip(rows, _rows(greedy), strict=True) if len(a) > 1)


def test_suppressed_ids_never_appear(answers: Answers) -> None:
    for (_, title, _), answer in answers.items():
        if title == "suppressed":
            forbidden = set(CASES[title].suppressed_ids)
            assert not forbidden & {token for row in _rows(answer.rollout) for token in row}


def test_responses_follow_their_prompts_and_end_at_the_first_stop_token(
    answers: Answers, cases: dict[str, dict[str, Case]]
) -> None:
    ended, lengths = set(), set()
    for (name, title, _), answer in answers.items():
        rollout, case = answer.rollout, cases[name][title]
        batch = gen.prompts(CONFIGS[name], case)
        assert torch.equal(rollout.prompt_lengths, batch.lengths)
        shortest, longest = case.sampling.min_new_tokens, case.sampling.max_new_tokens
        for row, response in enumerate(_rows(rollout)):
            prompt = slice(0, int(batch.lengths[row]))
            assert torch.equal(rollout.tokens[row, prompt], batch.tokens[row, prompt])
            assert not any(token in case.stop_ids for token in response[:-1])
            finished = response[-1] in case.stop_ids
            assert bool(rollout.finished[row]) is finished
            assert finished or len(response) == longest
            assert shortest <= len(response) <= longest
            ended.add(finished)
            lengths.add(len(response))
        assert rollout.logprobs.shape[1] == int(rollout.response_lengths.max())
        assert rollout.tokens.shape[1] == int(rollout.lengths.max())
    assert ended == {True, False} and len(lengths) == 8


def _refusals() -> list[tuple[str, str]]:
    """(type, message) of what this rank raises for each bad call, under DP2 and PP2."""
    config = ref.PRE_LN
    generator = gen.generator(ref.build_model(config, DP2, seed=0), SAMPLED)
    good = gen.prompts(config, SAMPLED)
    empty = replace(good, lengths=good.lengths.where(good.ids != 1003, torch.tensor(0)))
    unknown, negative = good.tokens.clone(), good.tokens.clone()
    unknown[2, 4], negative[0, 0] = config.vocab_size, -1
    longer = SamplingConfig(max_new_tokens=9)
    calls: list[tuple[PromptBatch, SamplingConfig]] = [
        (good, longer),
        (empty, SAMPLED.sampling),
        (replace(good, tokens=unknown), SAMPLED.sampling),
        (replace(good, tokens=negative), SAMPLED.sampling),
    ]
    found = []
    for batch, sampling in calls:
        with pytest.raises(MegachatError) as caught:
            generator.generate(batch, sampling=sampling, seed=0)
        found.append((type(caught.value).__name__, str(caught.value)))
    with pytest.raises(MegachatError) as caught:
        Generator(ref.build_model(config, PP2, seed=0, head=Head.LANGUAGE_MODEL), stop_ids=(2,))
    return [*found, (type(caught.value).__name__, str(caught.value))]


def test_prompts_that_do_not_fit_are_refused_on_every_rank_alike() -> None:
    """A rank that is not dealt the bad prompt must not wait for the one that is."""
    first, second = run_ranks(2, _refusals)
    assert first == second
    expected = [
        ("CapacityError", "21 positions, but the model has 20"),
        ("DataError", "prompt 1003 is empty"),
        ("DataError", "to 131, the model's vocabulary from 0 to 130"),
        ("DataError", "range from -1 to "),
        ("LayoutError", "2 pipeline stages: use pipeline degree 1"),
    ]
    for (kind, message), (expected_kind, part) in zip(first, expected, strict=True):
        assert kind == expected_kind
        assert part in message and "\n" not in message
