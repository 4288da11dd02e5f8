"""One test per known flaw of DeepSpeed-Chat (commit 83757d9c) that concerns `megachat.data`."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megachat.data.config import SourceConfig, Stage
from megachat.data.loaders import LoaderOptions, PreferenceLoader, PromptLoader, SftLoader
from megachat.data.stage_data import build_stage_data
from megachat.data.tokenizer import Tokenizer
from tests.data.samples import data_config, local_config, pair, pairs, sentence

MEGABYTE = 1 << 20


@pytest.mark.parametrize("with_bos", [False, True])
def test_f5_every_stage_ends_in_the_same_token(
    tmp_path: Path, tokenizer: Tokenizer, opt_like: Tokenizer, with_bos: bool
) -> None:
    """They end SFT rows in `</s>` and reward rows in the text "<|endoftext|>"."""
    used = opt_like if with_bos else tokenizer
    config = local_config(tmp_path, pairs(60))
    options = LoaderOptions(batch_size=8)
    sft = build_stage_data(config, stage=Stage.SFT, tokenizer=used).train
    for supervised in SftLoader(sft, options):
        last = supervised.tokens.gather(1, supervised.lengths[:, None] - 1)
        assert (last == used.eos_id).all()
        assert supervised.loss_mask.gather(1, supervised.lengths[:, None] - 1).all()
    reward = build_stage_data(config, stage=Stage.REWARD, tokenizer=used).train
    for pair_batch in PreferenceLoader(reward, options):
        last = pair_batch.tokens.gather(2, pair_batch.lengths[..., None] - 1)
        assert (last == used.eos_id).all()


def test_f2_padding_is_never_read_as_a_token(tmp_path: Path, opt_like: Tokenizer) -> None:
    """With pad == eos == bos their training mask hides the first token; lengths do not."""
    config = local_config(tmp_path, pairs(60))
    data = build_stage_data(config, stage=Stage.PROMPTS, tokenizer=opt_like).train
    for batch in PromptLoader(data, LoaderOptions(batch_size=8)):
        columns = torch.arange(batch.tokens.shape[1])
        real = columns < batch.lengths[:, None]
        assert (batch.tokens[:, 0] == opt_like.bos_id).all()
        assert (batch.tokens[~real] == opt_like.pad_id).all()
        assert (batch.tokens[real] != opt_like.pad_id).all()


def test_f10_every_data_rank_gets_the_same_number_of_rows(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Rows are dropped before batches exist, so no rank can come short of a mini-batch."""
    too_long = [pair(row) | {"prompt": f" {sentence(row, words=40)}"} for row in range(37)]
    config = local_config(tmp_path, [*pairs(61), *too_long], split=(0, 0, 1))
    data = build_stage_data(config, stage=Stage.PROMPTS, tokenizer=tokenizer)
    dropped = data.report.sources[0].outcomes["dropped: prompt longer than max_prompt_tokens"]
    assert dropped == 37
    for data_ranks in (1, 2, 4):
        loader = PromptLoader(data.train, LoaderOptions(batch_size=8))
        batches = list(loader)
        assert len(batches) == len(loader)
        per_rank = [
            [batch.select(torch.arange(rank, 8, data_ranks)).num_rows for batch in batches]
            for rank in range(data_ranks)
        ]
        assert all(rows == per_rank[0] for rows in per_rank)


def test_f11_every_epoch_has_another_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Their sampler is never told the epoch, so every epoch repeats the first one's order."""
    config = local_config(tmp_path, pairs(60), split=(0, 0, 1))
    data = build_stage_data(config, stage=Stage.PROMPTS, tokenizer=tokenizer).train
    loader = PromptLoader(data, LoaderOptions(batch_size=9))
    orders = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        orders.append(tuple(row for batch in loader for row in batch.ids.tolist()))
    assert len(set(orders)) == 4
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


@contextmanager
def anonymous_memory() -> Iterator[list[int]]:
    """Samples the process's own memory in bytes, mapped files left out, while the body runs."""
    samples: list[int] = []
    done = threading.Event()

    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    def sample() -> None:
        while not done.wait(0.005):
            samples.append(now())

    samples.append(now())
    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["array.json", "lines.jsonl"])
def test_complaint_29_big_files_do_not_fill_the_memory(
    tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    """Their loader needs 512 GB for a JSON of 1.1 GB. Here 64 MB go through in a few."""
    path = tmp_path / kind
    filler = " tree" * 3000
    with path.open("w", encoding="utf-8") as file:
        file.write("[" if kind == "array.json" else "")
        for row in range(4200):
            between = ",\n" if kind == "array.json" else "\n"
            row_text = json.dumps({"prompt": sentence(row), "chosen": f" {row}{filler}"})
            file.write((between if row else "") + row_text)
        file.write("]" if kind == "array.json" else "")
    assert path.stat().st_size > 60 * MEGABYTE
    config = data_config(
        tmp_path,
        SourceConfig(name="big", path=path),
        split=(0, 0, 1),
        max_validation_rows=100,
    )
    build_stage_data(  # libraries allocate their pools on first use
        local_config(tmp_path, pairs(20)), stage=Stage.PROMPTS, tokenizer=tokenizer
    )
    with anonymous_memory() as samples:
        data = build_stage_data(config, stage=Stage.PROMPTS, tokenizer=tokenizer)
        loader = PromptLoader(data.train, LoaderOptions(batch_size=64))
        rows = sum(batch.num_rows for batch in loader)
    assert rows == 4096 and len(data.validation) == 100
    growth = (max(samples) - samples[0]) / MEGABYTE
    assert growth < 40, f"{growth:.0f} MB for a file of {path.stat().st_size / MEGABYTE:.0f} MB"
