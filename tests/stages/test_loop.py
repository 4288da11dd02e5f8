"""What the stage loops share: which held-out rows are evaluated, and the files of an export."""

import pytest
import torch

from megachat.data.config import Stage
from megachat.data.loaders import PreferenceLoader, PromptLoader, SftLoader
from megachat.data.stage_data import TokenSet, build_stage_data
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError
from megachat.stages import loop
from megachat.stages.config import RunConfig
from megachat.stages.context import tokenizer_folder
from megachat.stages.loop import export_files, held_out_batches


def _rows(config: RunConfig, stage: Stage) -> TokenSet:
    tokenizer = Tokenizer.load(tokenizer_folder(config))
    return build_stage_data(config.data, stage=stage, tokenizer=tokenizer).validation


@pytest.mark.parametrize("count", [1, 4, 5, 8, 10_000])
def test_the_first_held_out_rows_come_once_each_in_a_fixed_order(
    count: int, finished: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(finished, Stage.PROMPTS)
    monkeypatch.setattr(loop, "_EVALUATION_ROWS", 4)
    batches = held_out_batches(PromptLoader, rows, count=count)
    ids = torch.cat([batch.ids for batch in batches]).tolist()
    assert ids == rows.table.data.column("id").to_pylist()[:count]
    assert len(ids) == min(count, len(rows))
    assert all(batch.num_rows == 4 for batch in batches[:-1])


@pytest.mark.parametrize(
    ("loader", "stage"), [(SftLoader, Stage.SFT), (PreferenceLoader, Stage.REWARD)]
)
def test_every_stage_has_held_out_rows(
    loader: type[SftLoader], stage: Stage, finished: RunConfig
) -> None:
    batches = held_out_batches(loader, _rows(finished, stage), count=3)
    assert [batch.num_rows for batch in batches] == [3]


def test_a_stage_without_held_out_rows_is_refused(finished: RunConfig) -> None:
    data = finished.data.model_copy(update={"validation_share": 0.0})
    rows = _rows(finished.model_copy(update={"data": data}), Stage.SFT)
    with pytest.raises(DataError, match="no held-out rows to evaluate on: raise data.validation"):
        held_out_batches(SftLoader, rows, count=3)


def test_an_export_takes_the_tokenizer_along(finished: RunConfig) -> None:
    files = export_files(finished)
    assert {"tokenizer.json", "tokenizer_config.json", "sentencepiece.model"} <= set(files)
    assert all(path.is_file() and path.name == name for name, path in files.items())
