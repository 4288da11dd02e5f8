import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from megachat.data import stage_data as module
from megachat.data.config import SourceConfig, Stage
from megachat.data.loaders import LoaderOptions, PreferenceLoader, PromptLoader, SftLoader
from megachat.data.stage_data import build_stage_data, training_texts
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError
from tests.data.samples import (
    data_config,
    local_config,
    pair,
    pairs,
    sentence,
    train_tiny,
    write_jsonl,
)
from tests.data.test_formats import RECORDS


def row_ids(data: module.StageData) -> tuple[set[int], set[int]]:
    """Identities of the training and of the held-out rows."""
    return (
        set(data.train.table.data.column("id").to_pylist()),
        set(data.validation.table.data.column("id").to_pylist()),
    )


def test_stages_and_their_held_out_rows_are_disjoint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = local_config(tmp_path, pairs(200))
    sizes, everything = {}, []
    for stage in Stage:
        data = build_stage_data(config, stage=stage, tokenizer=tokenizer)
        train, held_out = row_ids(data)
        sizes[stage] = (len(train), len(held_out))
        everything += [*train, *held_out]
    assert sizes == {Stage.SFT: (36, 4), Stage.REWARD: (72, 8), Stage.PROMPTS: (72, 8)}
    assert sorted(everything) == list(range(200))


def test_split_is_the_same_again_and_differs_by_seed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def rows(name: str, seed: int) -> tuple[set[int], set[int]]:
        config = local_config(tmp_path, pairs(60), seed=seed, cache_dir=tmp_path / name)
        return row_ids(build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer))

    assert rows("a", 1) == rows("b", 1)
    assert rows("a", 1) != rows("a", 2)


def test_row_identities_survive_other_limits_and_name_the_source(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    first = SourceConfig(name="a", path=write_jsonl(tmp_path / "a.jsonl", pairs(30)))
    second = SourceConfig(name="b", path=write_jsonl(tmp_path / "b.jsonl", pairs(30)))
    loose = data_config(tmp_path, first, second, split=(0, 0, 1), validation_share=0.0)
    data = build_stage_data(loose, stage=Stage.PROMPTS, tokenizer=tokenizer)
    assert row_ids(data)[0] == {*range(30), *((1 << 40) + row for row in range(30))}
    lengths = sorted(data.train.lengths.tolist())
    tight = loose.model_copy(update={"max_prompt_tokens": lengths[30]})
    fewer = build_stage_data(tight, stage=Stage.PROMPTS, tokenizer=tokenizer)
    assert row_ids(fewer)[0] < row_ids(data)[0]
    assert [part.num_rows for part in data.train.parts] == [30, 30]


def test_supervised_only_source_gives_nothing_to_the_other_stages(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(20))
    config = data_config(tmp_path, SourceConfig(name="mine", path=path, split=(10, 0, 0)))
    assert len(build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer).train) == 18
    with pytest.raises(DataError, match="data for reward: no rows left to train on") as caught:
        build_stage_data(config, stage=Stage.REWARD, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)


def test_source_with_its_own_validation_rows_keeps_all_training_rows(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    write_jsonl(tmp_path / "mine" / "train.jsonl", pairs(20))
    write_jsonl(tmp_path / "mine" / "test.jsonl", [pair(900 + row) for row in range(10)])
    config = data_config(
        tmp_path,
        SourceConfig(name="mine", path=tmp_path / "mine", split=(1, 0, 0)),
        max_validation_rows=6,
    )
    data = build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer)
    train, held_out = row_ids(data)
    assert train == set(range(20)) and not train & held_out
    prompts = {row.prompt for row in data.validation.texts()}
    assert len(prompts) == 6
    assert prompts <= {pair(900 + row)["prompt"] for row in range(10)}


def test_texts_of_held_out_prompts_belong_to_their_tokens(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = local_config(tmp_path, pairs(100), split=(0, 0, 1))
    data = build_stage_data(config, stage=Stage.PROMPTS, tokenizer=tokenizer)
    options = LoaderOptions(batch_size=3)
    for batch in PromptLoader(data.validation, options):
        for text, row_id, tokens, length in zip(
            data.validation.texts(batch.ids.tolist()),
            batch.ids.tolist(),
            batch.tokens.tolist(),
            batch.lengths.tolist(),
            strict=True,
        ):
            assert (text.id, text.prompt) == (row_id, pair(row_id)["prompt"])
            assert (text.chosen, text.rejected) == (
                pair(row_id)["chosen"],
                pair(row_id)["rejected"],
            )
            assert tokenizer.decode(tokens[:length]) == text.prompt


def test_texts_of_training_rows_or_unknown_rows_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = build_stage_data(
        local_config(tmp_path, pairs(30)), stage=Stage.PROMPTS, tokenizer=tokenizer
    )
    with pytest.raises(DataError, match=r"use StageData\.validation"):
        data.train.texts()
    with pytest.raises(DataError, match="held-out row 12345: no such row"):
        data.validation.texts([12345])
    assert data.validation.texts([]) == ()


def test_nothing_is_held_out_where_nothing_is_asked_for(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = local_config(tmp_path, pairs(30), split=(1, 0, 0), validation_share=0.0)
    data = build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer)
    assert (len(data.train), len(data.validation)) == (30, 0)
    assert data.validation.texts() == ()


def test_report_counts_every_record(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long = {"prompt": sentence(77777, words=40), "chosen": " sun"}
    single = {"prompt": "sun rain", "chosen": " snow wind"}
    rows = [*pairs(40), {"prompt": "x"}, long, single]
    config = local_config(tmp_path, rows, split=(0, 1, 0))
    data = build_stage_data(config, stage=Stage.REWARD, tokenizer=tokenizer)
    (source,) = data.report.sources
    assert (source.records, source.bad, source.train_rows + source.validation_rows) == (43, 1, 40)
    assert dict(source.outcomes) == {"dropped: no rejected answer": 2}
    (line,) = data.report.lines()
    assert line.startswith("mine: ") and "; 1 unusable; 2 dropped: no rejected answer" in line
    again = build_stage_data(config, stage=Stage.REWARD, tokenizer=tokenizer)
    assert again.report == data.report


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 0),
        ({"recipe": "deepspeed-chat"}, 0),
        ({"max_bad_share": 0.5}, 0),
        ({"max_tokens": 50}, 1),
        ({"seed": 2}, 1),
        ({"split": (1, 1, 1)}, 1),
        ({"long_answers": "drop"}, 1),
    ],
)
def test_tokenised_rows_are_reused_unless_something_changes_them(
    tmp_path: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    expected: int,
) -> None:
    build_stage_data(local_config(tmp_path, pairs(30)), stage=Stage.SFT, tokenizer=tokenizer)
    built: list[Any] = []
    original: Callable[..., None] = module.write_arrow
    monkeypatch.setattr(
        module, "write_arrow", lambda *values: built.append(values) or original(*values)
    )
    config = local_config(tmp_path, pairs(30)).model_validate(
        local_config(tmp_path, pairs(30)).model_dump() | change
    )
    build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer)
    assert len(built) == 2 * expected  # one file to train on, one held out


def test_other_tokenizer_and_other_rows_make_other_data(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = local_config(tmp_path, pairs(30), split=(1, 0, 0))
    first = build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer)
    other = train_tiny(tmp_path / "other", add_bos=True)
    second = build_stage_data(config, stage=Stage.SFT, tokenizer=other)
    assert (second.train.lengths == first.train.lengths + 1).all()
    third = build_stage_data(
        local_config(tmp_path, pairs(31), split=(1, 0, 0)), stage=Stage.SFT, tokenizer=tokenizer
    )
    assert len(third.train) + len(third.validation) == 31


def test_ranks_that_start_together_get_the_same_rows(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = local_config(tmp_path, pairs(50))
    start, found, written = threading.Barrier(4), [], []
    original: Callable[..., int] = module.write_arrow
    monkeypatch.setattr(
        module, "write_arrow", lambda *values: written.append(values) or original(*values)
    )

    def rank() -> None:
        start.wait()
        data = build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer)
        loader = SftLoader(data.train, LoaderOptions(batch_size=2))
        found.append([batch.tokens.tolist() for batch in loader])

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(found) == 4 and all(batches == found[0] for batches in found)
    assert len(written) == 2


def test_too_many_bad_rows_stop_also_when_cached(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*pairs(18), {"prompt": "x"}, {"prompt": "y"}]
    build_stage_data(
        local_config(tmp_path, rows, max_bad_share=0.1), stage=Stage.SFT, tokenizer=tokenizer
    )
    with pytest.raises(DataError, match="2 of 20 records are unusable"):
        build_stage_data(local_config(tmp_path, rows), stage=Stage.SFT, tokenizer=tokenizer)


def test_damaged_cache_says_what_to_delete(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = local_config(tmp_path, pairs(30))
    build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer)
    (damaged,) = config.cache_dir.glob("sft-*/train.arrow")
    damaged.write_bytes(b"nothing of use in here")
    with pytest.raises(DataError, match=r"delete .*sft-\w+ to build it again"):
        build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer)


def test_training_texts_leave_held_out_rows_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = local_config(tmp_path, pairs(100))
    texts = set(training_texts(config))
    held_out = {
        row.prompt + row.chosen
        for stage in Stage
        for row in build_stage_data(config, stage=stage, tokenizer=tokenizer).validation.texts()
    }
    assert len(texts) == 90 and len(held_out) == 10
    assert not texts & held_out
    assert len(list(training_texts(config, limit=7))) == 7


def test_all_stages_load_as_records(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = local_config(tmp_path, pairs(60))
    options = LoaderOptions(batch_size=4)
    sft = next(iter(SftLoader(build(config, Stage.SFT, tokenizer), options)))
    assert sft.loss_mask.sum() > 0
    reward = next(iter(PreferenceLoader(build(config, Stage.REWARD, tokenizer), options)))
    assert reward.tokens.shape[:2] == (4, 2)
    prompts = next(iter(PromptLoader(build(config, Stage.PROMPTS, tokenizer), options)))
    assert prompts.ids.shape == (4,)


def build(config: Any, stage: Stage, tokenizer: Tokenizer) -> module.TokenSet:
    return build_stage_data(config, stage=stage, tokenizer=tokenizer).train


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_local_copy_of_every_public_data_set_becomes_batches(
    tmp_path: Path, tokenizer: Tokenizer, name: str
) -> None:
    record, row = RECORDS[name]
    saved = datasets.Dataset.from_list([record] * 10)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "saved")
    config = data_config(
        tmp_path,
        SourceConfig(name=name, path=tmp_path / "saved"),
        split=(1, 1, 0),
        max_prompt_tokens=64,
        max_tokens=96,
    )
    data = build_stage_data(config, stage=Stage.SFT, tokenizer=tokenizer)
    expected = [*tokenizer.encode(row.prompt), *tokenizer.encode(row.chosen), tokenizer.eos_id]
    for batch in SftLoader(data.train, LoaderOptions(batch_size=5)):
        assert batch.tokens.tolist() == [expected] * 5
    if row.rejected is None:
        with pytest.raises(DataError, match="pairs of chosen and rejected answers"):
            build_stage_data(config, stage=Stage.REWARD, tokenizer=tokenizer)
        return
    reward = build_stage_data(config, stage=Stage.REWARD, tokenizer=tokenizer)
    (pairs_batch,) = PreferenceLoader(reward.train, LoaderOptions(batch_size=5))
    end = int(pairs_batch.lengths[0, 1])
    assert pairs_batch.tokens[0, 1, :end].tolist() == [
        *tokenizer.encode(row.prompt),
        *tokenizer.encode(row.rejected),
        tokenizer.eos_id,
    ]


def test_steps_that_rows_cannot_serve_get_none_of_them(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The default split would lose eight of ten texts, and four of ten answers without a pair."""
    texts = SourceConfig(path=write_jsonl(tmp_path / "t.jsonl", [{"text": " sun rain"}] * 20))
    answers = SourceConfig(
        path=write_jsonl(
            tmp_path / "a.jsonl",
            [{"prompt": f" {sentence(row)}", "chosen": " sun"} for row in range(30)],
        )
    )
    config = data_config(tmp_path, texts, answers, validation_share=0.0)
    sizes = {
        stage: [part.num_rows for part in build(config, stage, tokenizer).parts]
        for stage in (Stage.SFT, Stage.PROMPTS)
    }
    assert sizes == {Stage.SFT: [20, 10], Stage.PROMPTS: [0, 20]}
    with pytest.raises(DataError, match="it needs pairs of chosen and rejected answers"):
        module.require_rows(config, list(Stage))
    module.require_rows(config, [Stage.SFT, Stage.PROMPTS])


def test_a_split_of_a_source_that_would_waste_rows_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": " sun rain"}] * 20)
    config = data_config(tmp_path, SourceConfig(path=path, split=(1, 1, 0)))
    with pytest.raises(DataError, match=r"gives rows to reward, but its rows can serve sft only"):
        build(config, Stage.SFT, tokenizer)
    elsewhere = data_config(tmp_path, SourceConfig(path=path), split=(0, 1, 0))
    with pytest.raises(DataError, match="give the source a split of its own"):
        build(elsewhere, Stage.SFT, tokenizer)


@pytest.mark.parametrize("kind", ["tokenizer", "opt_like"])
def test_texts_alone_are_trained_from_their_first_token_on(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Without a beginning of sequence, nothing predicts the first token."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": " sun rain"}] * 4)
    config = data_config(tmp_path, SourceConfig(path=path), validation_share=0.0)
    (batch,) = SftLoader(build(config, Stage.SFT, tokenizer), LoaderOptions(batch_size=4))
    begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
    row = [*begin, *tokenizer.encode(" sun rain"), tokenizer.eos_id]
    assert batch.tokens.tolist() == [row] * 4
    assert batch.loss_mask.tolist() == [[False] + [True] * (len(row) - 1)] * 4
