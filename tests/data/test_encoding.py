from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megachat.data.config import DataConfig, SourceConfig, Stage
from megachat.data.encoding import Outcome, StageEncoder, TextRows, stage_columns
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError
from tests.data.samples import sentence, train_tiny

PROMPT, CHOSEN, REJECTED = " Human: sun rain Assistant:", " snow wind", " cloud"


def config(**changes: Any) -> DataConfig:
    options: dict[str, Any] = {
        "sources": (SourceConfig(name="mine", path=Path("x.jsonl")),),
        "max_prompt_tokens": 40,
        "max_tokens": 60,
    }
    return DataConfig(**(options | changes))


def encode(
    tokenizer: Tokenizer,
    stage: Stage,
    rows: list[tuple[str, str, str | None]],
    **changes: Any,
) -> tuple[list[dict[str, Any]], StageEncoder]:
    """The encoded rows as records, and the encoder with its counts."""
    encoder = StageEncoder(config(**changes), stage=stage, tokenizer=tokenizer)
    columns = encoder.encode(
        TextRows(
            source="mine",
            ids=list(range(100, 100 + len(rows))),
            prompts=[row[0] for row in rows],
            chosen=[row[1] for row in rows],
            rejected=[row[2] for row in rows],
        ),
        with_texts=False,
    )
    assert set(columns) == set(stage_columns(stage, with_texts=False))
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ], encoder


def ids(tokenizer: Tokenizer, *texts: str) -> list[int]:
    return [token for text in texts for token in tokenizer.encode(text)]


def test_supervised_row_is_prompt_answer_and_end(tokenizer: Tokenizer) -> None:
    (row,), encoder = encode(tokenizer, Stage.SFT, [(PROMPT, CHOSEN, None)])
    tokens = [*ids(tokenizer, PROMPT, CHOSEN), tokenizer.eos_id]
    prompt_length = len(ids(tokenizer, PROMPT))
    assert row == {
        "id": 100,
        "length": len(tokens),
        "prompt_length": prompt_length,
        "tokens": tokens,
    }
    assert encoder.tokens == len(tokens) and not encoder.counts


def test_pair_shares_its_prompt(tokenizer: Tokenizer) -> None:
    (row,), _ = encode(tokenizer, Stage.REWARD, [(PROMPT, CHOSEN, REJECTED)])
    prompt, eos = ids(tokenizer, PROMPT), tokenizer.eos_id
    assert row["chosen_tokens"] == [*prompt, *ids(tokenizer, CHOSEN), eos]
    assert row["rejected_tokens"] == [*prompt, *ids(tokenizer, REJECTED), eos]
    assert row["prompt_length"] == len(prompt)
    assert row["length"] == max(len(row["chosen_tokens"]), len(row["rejected_tokens"]))


def test_prompt_row_holds_the_prompt_alone(tokenizer: Tokenizer) -> None:
    (row,), _ = encode(tokenizer, Stage.PROMPTS, [(PROMPT, CHOSEN, None)])
    prompt = ids(tokenizer, PROMPT)
    assert row == {"id": 100, "length": len(prompt), "tokens": prompt}


@pytest.mark.parametrize("stage", list(Stage))
def test_rows_start_with_bos_where_the_tokenizer_says_so(
    tokenizer: Tokenizer, opt_like: Tokenizer, stage: Stage
) -> None:
    for used, extra in ((tokenizer, []), (opt_like, [2])):
        (row,), _ = encode(used, stage, [(PROMPT, CHOSEN, REJECTED)])
        tokens = row["chosen_tokens" if stage is Stage.REWARD else "tokens"]
        assert tokens[: len(extra) + 1] == [*extra, ids(used, PROMPT)[0]]


def test_bos_counts_as_part_of_the_prompt(opt_like: Tokenizer) -> None:
    length = len(ids(opt_like, PROMPT))
    rows, _ = encode(opt_like, Stage.PROMPTS, [(PROMPT, CHOSEN, None)], max_prompt_tokens=length)
    assert not rows
    (row,), _ = encode(
        opt_like, Stage.PROMPTS, [(PROMPT, CHOSEN, None)], max_prompt_tokens=length + 1
    )
    assert row["length"] == length + 1


def test_long_prompts_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    rows, encoder = encode(
        tokenizer,
        Stage.PROMPTS,
        [(PROMPT, CHOSEN, None), (" sun", CHOSEN, None)],
        max_prompt_tokens=3,
    )
    assert [row["id"] for row in rows] == [101]
    assert encoder.counts == {Outcome.LONG_PROMPT: 1}


def test_long_prompts_can_keep_their_end(opt_like: Tokenizer) -> None:
    (row,), encoder = encode(
        opt_like,
        Stage.PROMPTS,
        [(PROMPT, CHOSEN, None)],
        max_prompt_tokens=4,
        long_prompts="truncate_left",
    )
    assert row["tokens"] == [2, *ids(opt_like, PROMPT)[-3:]]
    assert encoder.counts == {Outcome.CUT_PROMPT: 1}


def test_long_prompts_can_stop_the_run(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data set mine: prompt of \d+ tokens, more than .* 3"):
        encode(
            tokenizer,
            Stage.PROMPTS,
            [(PROMPT, CHOSEN, None)],
            max_prompt_tokens=3,
            long_prompts="error",
        )


def test_truncated_answer_gets_no_end(tokenizer: Tokenizer) -> None:
    """It did not end there; a model must not learn that it did."""
    answer = ids(tokenizer, CHOSEN)
    prompt = ids(tokenizer, PROMPT)
    (row,), encoder = encode(
        tokenizer, Stage.SFT, [(PROMPT, CHOSEN, None)], max_answer_tokens=len(answer)
    )
    assert row["tokens"] == prompt + answer
    assert encoder.counts == {Outcome.CUT_ANSWER: 1}
    (row,), _ = encode(
        tokenizer,
        Stage.SFT,
        [(PROMPT, CHOSEN, None)],
        max_answer_tokens=len(answer),
        eos_on_truncated=True,
    )
    assert row["tokens"] == [*prompt, *answer[:-1], tokenizer.eos_id]


def test_answer_that_just_fits_keeps_its_end(tokenizer: Tokenizer) -> None:
    room = len(ids(tokenizer, CHOSEN)) + 1
    (row,), encoder = encode(tokenizer, Stage.SFT, [(PROMPT, CHOSEN, None)], max_answer_tokens=room)
    assert row["tokens"][-1] == tokenizer.eos_id and not encoder.counts


def test_long_answers_can_be_dropped(tokenizer: Tokenizer) -> None:
    rows, encoder = encode(
        tokenizer,
        Stage.SFT,
        [(PROMPT, sentence(1, words=30), None), (PROMPT, CHOSEN, None)],
        long_answers="drop",
        max_answer_tokens=len(ids(tokenizer, CHOSEN)) + 1,
    )
    assert [row["id"] for row in rows] == [101]
    assert encoder.counts == {Outcome.LONG_ANSWER: 1}


def test_short_answers_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    rows, encoder = encode(
        tokenizer,
        Stage.SFT,
        [(PROMPT, CHOSEN, None), (PROMPT, " sun", None)],
        min_answer_tokens=len(ids(tokenizer, CHOSEN)) + 1,
    )
    assert [row["id"] for row in rows] == [100]
    assert encoder.counts == {Outcome.SHORT_ANSWER: 1}


def test_pairs_without_a_rejected_answer_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    rows, encoder = encode(
        tokenizer, Stage.REWARD, [(PROMPT, CHOSEN, None), (PROMPT, CHOSEN, REJECTED)]
    )
    assert [row["id"] for row in rows] == [101]
    assert encoder.counts == {Outcome.NO_REJECTED: 1}


def test_pairs_that_truncation_makes_equal_are_dropped_and_counted(tokenizer: Tokenizer) -> None:
    common = " snow wind cloud"
    rows, encoder = encode(
        tokenizer,
        Stage.REWARD,
        [(PROMPT, f"{common} river", f"{common} stone")],
        max_answer_tokens=len(ids(tokenizer, common)),
    )
    assert not rows
    assert encoder.counts == {Outcome.NO_DIFFERENCE: 1}
    assert encoder.tokens == 0


def test_prompt_that_normalises_to_nothing_is_dropped(tmp_path: Path) -> None:
    folding = train_tiny(tmp_path, whitespace="fold")
    rows, encoder = encode(folding, Stage.PROMPTS, [("\u0001", CHOSEN, None)])
    assert not rows and encoder.counts == {Outcome.EMPTY_PROMPT: 1}


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    stage=st.sampled_from(list(Stage)),
    words=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    max_prompt=st.integers(2, 20),
    answer_room=st.integers(2, 20),
    long_prompts=st.sampled_from(["drop", "truncate_left"]),
    long_answers=st.sampled_from(["drop", "truncate"]),
    eos_on_truncated=st.booleans(),
    bos=st.booleans(),
)
def test_limits_hold_for_every_row(
    tokenizer: Tokenizer,
    opt_like: Tokenizer,
    stage: Stage,
    words: tuple[int, int, int],
    max_prompt: int,
    answer_room: int,
    long_prompts: str,
    long_answers: str,
    eos_on_truncated: bool,
    bos: bool,
) -> None:
    used = opt_like if bos else tokenizer
    texts = [f" {sentence(number, words=count)}" for number, count in enumerate(words)]
    rows, encoder = encode(
        used,
        stage,
        [(texts[0], texts[1], texts[2])],
        max_prompt_tokens=max_prompt,
        max_tokens=max_prompt + answer_room,
        long_prompts=long_prompts,
        long_answers=long_answers,
        eos_on_truncated=eos_on_truncated,
    )
    dropped = [outcome for outcome in encoder.counts if outcome.value.startswith("dropped")]
    assert len(rows) + len(dropped) == 1
    for row in rows:
        assert row.get("prompt_length", row["length"]) <= max_prompt
        assert row["length"] <= max_prompt + answer_room
        for name in ("tokens", "chosen_tokens", "rejected_tokens"):
            body = row.get(name, [])[1 if bos else 0 : -1]
            assert used.eos_id not in body and used.pad_id not in row.get(name, [])
