from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megachat.data.arrow import open_arrow, write_arrow
from megachat.data.blending import Part
from megachat.data.config import Recipe, Stage
from megachat.data.encoding import stage_columns
from megachat.data.loaders import (
    LastBatch,
    LoaderOptions,
    Order,
    PreferenceLoader,
    PromptLoader,
    SftLoader,
    endless,
)
from megachat.data.stage_data import TokenSet
from megachat.errors import ConfigError, DataError

PAD = 1


def token_set(
    folder: Path,
    stage: Stage,
    rows: Sequence[dict[str, Any]],
    *,
    parts: tuple[Part, ...] | None = None,
    recipe: Recipe = Recipe.ANSWERS,
) -> TokenSet:
    """Rows written as the package writes them."""
    columns = stage_columns(stage, with_texts=False)
    path = folder / f"{stage}-{len(list(folder.iterdir()))}.arrow"
    write_arrow(path, columns, iter([{name: [row[name] for row in rows] for name in columns}]))
    return TokenSet(
        stage=stage,
        table=open_arrow(path),
        parts=parts or (Part(source="a", num_rows=len(rows), weight=1.0),),
        pad_id=PAD,
        recipe=recipe,
    )


def prompt_rows(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Row i consists of `lengths[i]` tokens 10 + i."""
    return [
        {"id": 1000 + row, "length": length, "tokens": [10 + row] * length}
        for row, length in enumerate(lengths)
    ]


def prompts(folder: Path, lengths: Sequence[int], **options: Any) -> PromptLoader:
    rows = token_set(folder, Stage.PROMPTS, prompt_rows(lengths))
    return PromptLoader(rows, LoaderOptions(**options))


def ids(batches: Sequence[Any]) -> list[int]:
    return [number for batch in batches for number in (batch.ids - 1000).tolist()]


def test_rows_are_padded_on_the_right_with_explicit_lengths(tmp_path: Path) -> None:
    (batch,) = prompts(tmp_path, [2, 3, 1], batch_size=3, order=Order.SEQUENTIAL)
    assert batch.tokens.tolist() == [[10, 10, PAD], [11, 11, 11], [12, PAD, PAD]]
    assert batch.lengths.tolist() == [2, 3, 1]
    assert batch.ids.tolist() == [1000, 1001, 1002]
    assert {field.dtype for field in (batch.tokens, batch.lengths, batch.ids)} == {torch.int64}


def test_width_is_a_multiple_of_what_sequence_parallelism_needs(tmp_path: Path) -> None:
    loader = prompts(tmp_path, [2, 5], batch_size=2, length_multiple=4)
    assert next(iter(loader)).tokens.shape == (2, 8)


def sft_row() -> dict[str, Any]:
    return {"id": 1, "length": 5, "prompt_length": 3, "tokens": [7, 8, 9, 20, 2]}


@pytest.mark.parametrize(
    ("recipe", "targets"),
    [
        (Recipe.ANSWERS, [False, False, False, True, True]),
        (Recipe.DEEPSPEED_CHAT, [False, True, True, True, True]),
    ],
)
def test_recipe_decides_which_tokens_are_targets(
    tmp_path: Path, recipe: Recipe, targets: list[bool]
) -> None:
    """The end of sequence always is one, padding and the first token never are."""
    short = {"id": 2, "length": 3, "prompt_length": 1, "tokens": [7, 20, 2]}
    rows = token_set(tmp_path, Stage.SFT, [sft_row(), short], recipe=recipe)
    loader = SftLoader(rows, LoaderOptions.for_evaluation(batch_size=2))
    (batch,) = loader
    assert batch.loss_mask.tolist() == [targets, [False, True, True, False, False]]
    assert batch.tokens[1].tolist() == [7, 20, 2, PAD, PAD]


def test_pairs_stand_chosen_first_in_one_width(tmp_path: Path) -> None:
    row = {
        "id": 1,
        "length": 4,
        "prompt_length": 2,
        "chosen_tokens": [7, 8, 2],
        "rejected_tokens": [7, 8, 9, 2],
    }
    rows = token_set(tmp_path, Stage.REWARD, [row])
    (batch,) = PreferenceLoader(rows, LoaderOptions(batch_size=1))
    assert batch.tokens.tolist() == [[[7, 8, 2, PAD], [7, 8, 9, 2]]]
    assert batch.lengths.tolist() == [[3, 4]]
    assert batch.prompt_lengths.tolist() == [2]
    assert batch.tokens.is_contiguous()


def test_every_rank_sees_the_same_batches(tmp_path: Path) -> None:
    rows = token_set(tmp_path, Stage.PROMPTS, prompt_rows([3] * 40))
    options = LoaderOptions(batch_size=8, bucket_window=2)
    first, second = (list(PromptLoader(rows, options)) for _ in range(2))
    assert [batch.tokens.tolist() for batch in first] == [batch.tokens.tolist() for batch in second]


def test_order_depends_on_seed_and_epoch(tmp_path: Path) -> None:
    rows = token_set(tmp_path, Stage.PROMPTS, prompt_rows([1] * 30))
    orders = []
    for seed in (1, 2):
        loader = PromptLoader(rows, LoaderOptions(batch_size=5, seed=seed))
        for epoch in (0, 1, 0):
            loader.set_epoch(epoch)
            orders.append(ids(list(loader)))
            assert sorted(orders[-1]) == list(range(30))
    assert orders[0] == orders[2] and orders[3] == orders[5]
    assert orders[0] != orders[1] and orders[0] != orders[3]


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    num_rows=st.integers(1, 30),
    batch_size=st.integers(1, 8),
    last=st.sampled_from(list(LastBatch)),
    window=st.integers(0, 3),
    order=st.sampled_from(list(Order)),
)
def test_number_of_batches_is_what_len_says(
    tmp_path: Path, num_rows: int, batch_size: int, last: LastBatch, window: int, order: Order
) -> None:
    rows = token_set(tmp_path, Stage.PROMPTS, prompt_rows(range(1, num_rows + 1)))
    options = LoaderOptions(batch_size=batch_size, last=last, bucket_window=window, order=order)
    if last is LastBatch.DROP and num_rows < batch_size:
        with pytest.raises(DataError, match=f"{num_rows} rows do not make one batch"):
            PromptLoader(rows, options)
        return
    loader = PromptLoader(rows, options)
    batches = list(loader)
    assert len(batches) == len(loader)
    sizes = {batch.num_rows for batch in batches}
    assert sizes == {batch_size} or last is LastBatch.SHORT
    seen = ids(batches)
    if last is LastBatch.DROP:
        assert len(set(seen)) == len(seen) == len(loader) * batch_size
    else:
        assert set(seen) == set(range(num_rows))


def test_last_batch_is_filled_with_rows_of_the_same_epoch(tmp_path: Path) -> None:
    loader = prompts(tmp_path, [1] * 5, batch_size=3, last=LastBatch.FILL, order=Order.SEQUENTIAL)
    assert ids(list(loader)) == [0, 1, 2, 3, 4, 0]


def test_batch_larger_than_the_set_can_be_filled(tmp_path: Path) -> None:
    loader = prompts(tmp_path, [1] * 2, batch_size=5, last=LastBatch.FILL, order=Order.SEQUENTIAL)
    assert ids(list(loader)) == [0, 1, 0, 1, 0]


def test_buckets_make_batches_of_similar_length(tmp_path: Path) -> None:
    lengths = [1 + (row * 7919) % 50 for row in range(256)]

    def padded(window: int) -> int:
        loader = prompts(tmp_path, lengths, batch_size=8, bucket_window=window)
        return sum(batch.tokens.numel() for batch in loader)

    assert sum(lengths) <= padded(16) < 0.75 * padded(0)


def test_weights_blend_the_sources(tmp_path: Path) -> None:
    parts = (
        Part(source="a", num_rows=10, weight=2.0),
        Part(source="b", num_rows=10, weight=0.5),
    )
    rows = token_set(tmp_path, Stage.PROMPTS, prompt_rows([1] * 20), parts=parts)
    loader = PromptLoader(rows, LoaderOptions(batch_size=5))
    seen = ids(list(loader))
    assert len(loader) == 5
    assert sum(number < 10 for number in seen) == 20
    assert sum(number >= 10 for number in seen) == 5
    assert len(PromptLoader(rows, LoaderOptions.for_evaluation(batch_size=5))) == 4


def test_iteration_resumes_inside_an_epoch(tmp_path: Path) -> None:
    loader = prompts(tmp_path, [1] * 20, batch_size=4, bucket_window=2)
    loader.set_epoch(3)
    whole = ids(list(loader))
    loader.set_epoch(3, first_batch=2)
    assert ids(list(loader)) == whole[8:]


def test_endless_batches_go_through_the_epochs(tmp_path: Path) -> None:
    loader = prompts(tmp_path, [1] * 10, batch_size=4)
    expected = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        expected += list(loader)
    assert ids(list(islice(endless(loader), 6))) == ids(expected)
    assert ids(list(islice(endless(loader, first_step=3), 3))) == ids(expected[3:])


def test_rows_of_another_stage_are_refused(tmp_path: Path) -> None:
    rows = token_set(tmp_path, Stage.PROMPTS, prompt_rows([1]))
    with pytest.raises(ConfigError, match="SftLoader reads rows of stage 'sft', not of 'prompts'"):
        SftLoader(rows, LoaderOptions(batch_size=1))


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 1, "length_multiple": 0}])
def test_impossible_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        LoaderOptions(**options)


def test_batches_do_not_share_memory(tmp_path: Path) -> None:
    loader = prompts(tmp_path, [2] * 4, batch_size=2, order=Order.SEQUENTIAL)
    first: Tensor = next(iter(loader)).tokens
    first.fill_(0)
    assert next(iter(loader)).tokens.tolist() == [[10, 10], [11, 11]]
