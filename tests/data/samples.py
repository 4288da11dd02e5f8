"""Small rows, files and tokenizers that the tests of the data package share."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megachat.data.config import DataConfig, SentencePieceConfig, SourceConfig
from megachat.data.tokenizer import Tokenizer, train_sentencepiece

WORDS = (
    "sun rain snow wind cloud river stone tree leaf bird fish horse bread apple water fire "
    "house door window table chair road hill lake song word book paper night day"
).split()


def sentence(number: int, *, words: int = 5) -> str:
    """A sentence that differs from that of any other small number."""
    digits = [(number // len(WORDS) ** place) % len(WORDS) for place in range(words)]
    return " ".join(WORDS[digit] for digit in digits)


def pair(number: int) -> dict[str, str]:
    """A row of the common format."""
    return {
        "prompt": f" Human: {sentence(number)} Assistant:",
        "chosen": f" {sentence(number + 7)}",
        "rejected": f" {sentence(number + 11)}",
    }


def pairs(count: int) -> list[dict[str, str]]:
    """Different rows of the common format."""
    return [pair(number) for number in range(count)]


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Writes one JSON value per line; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
    return path


def corpus() -> Iterator[str]:
    """Text for a tiny vocabulary."""
    for number in range(300):
        row = pair(number * 37)
        yield row["prompt"] + row["chosen"]
        yield f"<human> {sentence(number * 41)}<bot> {sentence(number * 43)}"


def train_tiny(folder: Path, **changes: Any) -> Tokenizer:
    """A sentencepiece tokenizer of a few dozen pieces."""
    options: Mapping[str, Any] = {"vocab_size": 56, "character_coverage": 1.0} | changes
    return train_sentencepiece(corpus(), SentencePieceConfig(**options), folder)


def data_config(tmp_path: Path, *sources: SourceConfig, **changes: Any) -> DataConfig:
    """Settings with a cache of their own."""
    options: dict[str, Any] = {
        "sources": sources,
        "cache_dir": tmp_path / "cache",
        "max_prompt_tokens": 32,
        "max_tokens": 64,
    }
    return DataConfig(**(options | changes))


def local_config(tmp_path: Path, rows: Iterable[Any], **changes: Any) -> DataConfig:
    """Settings for one JSONL file of common rows, all of it for every stage by default."""
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return data_config(tmp_path, SourceConfig(name="mine", path=path), **changes)
