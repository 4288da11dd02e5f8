"""What the four roles say about a rollout, against HuggingFace's models row by row."""

import pytest
import torch
from torch import Tensor

from megachat.model import Head
from megachat.parallel.layout import ParallelLayout
from megachat.records import Rollout
from megachat.rlhf.scoring import FinalScores, ResponseLogprobs, ResponseValues
from megachat.training.engine import ForwardEngine
from tests.harness import run_ranks
from tests.model import reference as ref

CONFIG = ref.PRE_LN
PROMPT_LENGTHS, RESPONSE_LENGTHS = (3, 1, 9, 5, 2), (4, 7, 1, 6, 3)
TEMPERATURE = 0.7
LAYOUTS = (
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(tensor=2, data=2),
    ParallelLayout(pipeline=4),
    ParallelLayout(data=4),
)


def _rollout() -> Rollout:
    """Ragged rows in which pad, BOS and EOS ids are tokens like any other; noise beyond the end."""
    prompt_lengths, response_lengths = (
        torch.tensor(lengths) for lengths in (PROMPT_LENGTHS, RESPONSE_LENGTHS)
    )
    lengths = prompt_lengths + response_lengths
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, CONFIG.vocab_size, (5, int(lengths.max())), generator=generator)
    tokens[:, 2], tokens[:, 4] = CONFIG.pad_id, CONFIG.eos_id
    return Rollout(
        tokens=tokens,
        lengths=lengths,
        prompt_lengths=prompt_lengths,
        logprobs=torch.zeros(5, max(RESPONSE_LENGTHS)),
        finished=torch.zeros(5, dtype=torch.bool),
    )


def _scores() -> dict[str, dict[str, Tensor]]:
    """All three scores under all layouts of a world of four."""
    rollout = _rollout()
    columns = rollout.logprobs.shape[1]
    found = {}
    for layout in LAYOUTS:
        engines = {
            head: ForwardEngine(
                ref.build_model(
                    CONFIG, layout, head=head, reference=ref.huggingface_model(CONFIG, head)
                ),
                micro_batch_rows=2,
            )
            for head in Head
        }
        policy = engines[Head.LANGUAGE_MODEL]
        logprobs = ResponseLogprobs(
            response_len=columns,
            temperature=TEMPERATURE,
            group=policy.groups.tensor,
            vocab_start=policy.vocab_start,
        )
        found[str(layout)] = {
            "logprobs": policy.score(rollout, logprobs),
            "values": engines[Head.SCALAR].score(rollout, ResponseValues(response_len=columns)),
            "scores": engines[Head.SCALAR].score(rollout, FinalScores()),
        }
    return found


@torch.no_grad()
def _expected() -> dict[str, Tensor]:
    """The same from HuggingFace's models, one unpadded row at a time."""
    rollout = _rollout()
    policy = ref.huggingface_model(CONFIG)
    scorer = ref.huggingface_model(CONFIG, Head.SCALAR)
    logprobs, values = torch.zeros(5, 7), torch.zeros(5, 7)
    scores = torch.zeros(5, 1)
    for row, (prompt, response) in enumerate(zip(PROMPT_LENGTHS, RESPONSE_LENGTHS, strict=True)):
        tokens = rollout.tokens[row, : prompt + response]
        ahead = (policy(tokens[None]).logits[0] / TEMPERATURE).log_softmax(dim=-1)
        outputs = scorer.score(scorer.model(tokens[None]).last_hidden_state)[0, :, 0]
        for column in range(response):
            logprobs[row, column] = ahead[prompt + column - 1, tokens[prompt + column]]
            values[row, column] = outputs[prompt + column - 1]
        scores[row, 0] = outputs[-1]
    return {"logprobs": logprobs, "values": values, "scores": scores}


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, Tensor]]]:
    """The scores as each rank sees them."""
    return run_ranks(4, _scores)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_of_every_layout_gets_huggingfaces_numbers_in_row_order(
    layout: ParallelLayout, found: list[dict[str, dict[str, Tensor]]]
) -> None:
    expected = _expected()
    for rank in found:
        for name, values in rank[str(layout)].items():
            torch.testing.assert_close(values, expected[name], atol=2e-6, rtol=1e-5)


def test_nothing_is_said_about_columns_beyond_a_response(
    found: list[dict[str, dict[str, Tensor]]],
) -> None:
    """The tokens there are noise, so exact zeros show that no mask was inferred from ids."""
    beyond = ~_rollout().response_mask
    for scores in found[0].values():
        assert not scores["logprobs"][beyond].any() and not scores["values"][beyond].any()
        assert scores["logprobs"][~beyond].ne(0).all() and scores["values"][~beyond].ne(0).all()
