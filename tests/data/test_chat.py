"""The exported chat template against the rows of training; the oracle is transformers."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megachat.data.chat import ChatConfig, Speaker, Turn, answer_of, prompt_of
from megachat.data.config import SourceConfig, Stage
from megachat.data.loaders import LoaderOptions, SftLoader
from megachat.data.stage_data import build_stage_data
from megachat.data.tokenizer import Tokenizer
from tests.data.samples import data_config, sentence, train_tiny, write_jsonl

CHATS = [
    ChatConfig(),
    ChatConfig(system="<sys>", human="<human> ", assistant="<bot>"),
    ChatConfig(human=' "quoted\\" {{ \n', assistant="\tanswer \u00e9\U0001f327:"),
]


def conversation(number: int) -> list[dict[str, str]]:
    """System, two questions, two answers; white space and line breaks inside."""
    return [
        {"role": "system", "content": sentence(number, words=2)},
        {"role": "user", "content": f"{sentence(number + 1)}\n\n{sentence(number + 2)}  "},
        {"role": "assistant", "content": f"\t{sentence(number + 3)}\n"},
        {"role": "user", "content": sentence(number + 4)},
        {"role": "assistant", "content": f" {sentence(number + 5)} {{{{ x }}}}"},
    ]


def test_turns_stand_behind_their_markers() -> None:
    turns = [
        Turn(speaker=Speaker.SYSTEM, text="Be kind."),
        Turn(speaker=Speaker.HUMAN, text="Hi"),
        Turn(speaker=Speaker.ASSISTANT, text="Hello"),
        Turn(speaker=Speaker.HUMAN, text="Why?"),
    ]
    assert prompt_of(turns, ChatConfig()) + answer_of("So.") == (
        "\n\nSystem: Be kind.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: So."
    )


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_the_exported_template_gives_the_rows_of_training(
    tmp_path: Path, chat: ChatConfig, add_bos: bool
) -> None:
    tokenizer = train_tiny(tmp_path / "trained", add_bos=add_bos)
    tokenizer.save(tmp_path / "exported", chat=chat)
    assert "chat_template" in json.loads((tmp_path / "exported/tokenizer_config.json").read_text())
    library = AutoTokenizer.from_pretrained(str(tmp_path / "exported"))
    messages = [conversation(number * 10) for number in range(3)]
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": each} for each in messages])
    config = data_config(
        tmp_path,
        SourceConfig(path=path, split=(1, 0, 0)),
        chat=chat,
        validation_share=0.0,
        max_prompt_tokens=400,
        max_tokens=600,
    )
    data = build_stage_data(
        config, stage=Stage.SFT, tokenizer=Tokenizer.load(tmp_path / "exported")
    )
    (batch,) = SftLoader(data.train, LoaderOptions.for_evaluation(batch_size=3))
    for row, length, said in zip(
        batch.tokens.tolist(), batch.lengths.tolist(), messages, strict=True
    ):
        whole = library.apply_chat_template(said, tokenize=True, return_dict=False)
        assert row[:length] == whole
        prompt = library.apply_chat_template(
            said[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert row[: len(prompt)] == prompt


def test_an_unknown_role_is_refused_by_the_template(tmp_path: Path) -> None:
    tokenizer = train_tiny(tmp_path / "trained")
    tokenizer.save(tmp_path / "exported", chat=ChatConfig())
    library = AutoTokenizer.from_pretrained(str(tmp_path / "exported"))
    with pytest.raises(Exception, match="unknown role tool"):
        library.apply_chat_template([{"role": "tool", "content": "x"}])
