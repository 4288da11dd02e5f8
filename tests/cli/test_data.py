"""What `megachat data` prints about small files; the figures are counted by hand."""

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megachat.cli.main import app
from tests.data.samples import pair, pairs, train_tiny, write_jsonl

MESSAGES = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
DIALOGUES = {
    "chosen": "\n\nHuman: Why?\n\nAssistant: So.",
    "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tiny(folder)
    return folder


def run(*arguments: str | Path) -> list[str]:
    result = CliRunner().invoke(app, ["data", *(str(argument) for argument in arguments)])
    assert result.exit_code == 0, result.output
    return [line.strip() for line in result.stdout.splitlines()]


def error_of(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["data", *(str(argument) for argument in arguments)])
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if "Error: " in line]
    assert errors == result.stderr.strip().splitlines()[-1:]
    return errors[0]


def test_a_file_of_pairs_is_shown_for_each_step(tmp_path: Path, tokenizer: Path) -> None:
    bad = '{"prompt": "x", "chosen": " half \\ud83d"}'
    path = write_jsonl(tmp_path / "my.jsonl", [*pairs(40), bad])
    lines = run(path, "--tokenizer", tokenizer)
    assert f"lengths by tokenizer: {tokenizer}" in lines
    assert "format     common: 41 of the first 41 records have prompt, chosen and, for pairs, " in (
        "\n".join(lines)
    )
    assert "rows       40 of 41 records" in lines
    assert any(f"{path} row 41: chosen is not valid text: U+D83D" in line for line in lines)
    assert "can serve  sft 40, reward 40, prompts 40 rows" in lines
    assert "split      sft 20%, reward 40%, prompts 40%" in lines
    row = pair(0)
    assert f"row 1: {row['prompt']}[[{row['chosen']}</s>]]" in lines
    assert f"row 1, rejected: {row['prompt']}{row['rejected']}[[</s>]]" in lines
    assert f"row 1: {row['prompt']}" in lines
    limits = "limits: data.max_prompt_tokens = 256, data.max_tokens = 512"
    assert sum(line.startswith(limits) for line in lines) == 3


def test_limits_of_a_run_show_what_they_cut_and_drop(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "run.toml").write_text(f"""
[tokenizer]
path = "{tokenizer}"
[data]
max_prompt_tokens = 20
max_tokens = 26
[[data.sources]]
path = "{tmp_path}/my.jsonl"
[models.actor.shape]
layers = 2
hidden = 32
heads = 4
[models.reward]
model = "sft"
""")
    short = {"prompt": " sun", "chosen": " rain", "rejected": " snow"}
    long_answer = {"prompt": " sun", "chosen": " rain" * 40, "rejected": " snow"}
    long_prompt = {"prompt": " sun" * 40, "chosen": " rain", "rejected": " snow"}
    write_jsonl(tmp_path / "my.jsonl", [short] * 5 + [long_answer] * 3 + [long_prompt] * 2)
    lines = run("--config", tmp_path / "run.toml", "--stage", "sft")
    assert "3 kept: answer truncated" in lines
    assert "2 dropped: prompt longer than max_prompt_tokens" in lines
    assert not any(line.startswith("reward:") for line in lines)


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("chat.jsonl", {"conversations": MESSAGES}, "messages"),
        ("alpaca.json", {"instruction": "Why?", "input": "", "output": "So."}, "alpaca"),
        ("text.jsonl", {"text": "Why?"}, "text"),
        ("hh.jsonl.gz", DIALOGUES, "dialogues"),
    ],
)
def test_every_kind_of_file_is_recognised(
    tmp_path: Path, tokenizer: Path, name: str, row: object, expected: str
) -> None:
    rows = [row] * 4
    is_array = name.endswith(".json")
    data = (json.dumps(rows) if is_array else "\n".join(map(json.dumps, rows))).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    lines = run(tmp_path / name, "--tokenizer", tokenizer)
    assert any(line.startswith(f"format     {expected}: 4 of the first 4") for line in lines)
    if expected != "text":
        assert any("\\n\\nHuman: " in line for line in lines), "line breaks are written out"


def test_a_table_is_shown_by_named_columns(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "faq.csv").write_text("question,answer\nWhy?, So.\nHow?, Thus.\n")
    columns = ("--column", "prompt=question", "--column", "chosen=answer")
    lines = run(tmp_path / "faq.csv", "--tokenizer", tokenizer, *columns)
    assert "split      sft 33%, prompts 67%" in lines
    assert "expected KNOWN=YOURS" in error_of(tmp_path / "faq.csv", "--column", "prompt")
    assert "did you mean 'prompt'" in error_of(tmp_path / "faq.csv", "--column", "promt=question")
    assert "unknown format" in error_of(tmp_path / "faq.csv")


def test_what_cannot_be_shown_is_one_line(tmp_path: Path) -> None:
    assert "nothing to look at" in error_of()
    assert "absent.jsonl" in error_of(tmp_path / "absent.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    assert "expected one of sft, reward, prompts" in error_of(tmp_path / "a.jsonl", "--stage", "x")
    assert "--set needs --config" in error_of(tmp_path / "a.jsonl", "--set", "data.seed=1")
