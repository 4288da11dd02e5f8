"""What the stage loops share: their length, which held-out rows are evaluated, exported files."""

import logging

import pytest
import torch

from megachat.data.config import Stage
from megachat.data.loaders import PreferenceLoader, PromptLoader, SftLoader
from megachat.data.stage_data import TokenSet, build_stage_data
from megachat.data.tokenizer import Tokenizer
from megachat.errors import DataError
from megachat.stages import loop
from megachat.stages.config import RlhfSection, RunConfig, SftSection
from megachat.stages.context import tokenizer_folder
from megachat.stages.loop import (
    export_files,
    held_out_batches,
    plan_steps,
    warn_of_long_warmup,
)
from megachat.training.schedules import OptimizerConfig


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


def test_the_key_that_ends_a_stage_is_named_loudly_where_it_cuts_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="megachat.stages.loop")
    assert plan_steps(Stage.SFT, SftSection(max_steps=100), steps_per_epoch=4) == 100
    assert plan_steps(Stage.PROMPTS, RlhfSection(), steps_per_epoch=4) == 4
    section = SftSection(max_steps=100, epochs=2)
    assert plan_steps(Stage.SFT, section, steps_per_epoch=4) == 8
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "sft: 100 steps of 4 an epoch, ended by sft.max_steps"),
        ("INFO", "prompts: 4 steps of 4 an epoch, ended by rlhf.epochs"),
        (
            "WARNING",
            "sft: 8 steps of 4 an epoch: sft.epochs 2 ends the stage before the 100 steps of "
            "max_steps: raise it or leave it out",
        ),
    ]


def test_a_warm_up_beyond_the_end_of_a_stage_is_told(caplog: pytest.LogCaptureFixture) -> None:
    optimizers = {
        "actor_optimizer": OptimizerConfig(warmup_steps=40),
        "critic_optimizer": OptimizerConfig(warmup_steps=10),
    }
    warn_of_long_warmup(Stage.PROMPTS, optimizers, num_updates=10)
    (record,) = caplog.records
    assert record.getMessage() == (
        "rlhf.actor_optimizer.warmup_steps 40 is more than the 10 updates of the stage: the "
        "learning rate ends at 25 % of its peak"
    )
