from pathlib import Path
from typing import Any

import pytest

from megachat.config import build_config, load_config
from megachat.data.config import DataConfig, LongPrompts, Recipe, SourceConfig
from megachat.errors import ConfigError

TOML = """
seed = 3
recipe = "deepspeed-chat"
long_prompts = "truncate_left"
cache_dir = "runs/cache"

[[sources]]
name = "Dahoas/rm-static"

[[sources]]
name = "my-chats"
path = "chats.jsonl"
split = [10, 0, 0]
weight = 2
"""


def build(**changes: Any) -> DataConfig:
    tree: dict[str, Any] = {"sources": [{"name": "Dahoas/rm-static"}]}
    return build_config(DataConfig, tree | changes, source="run.toml")


def test_toml_table_becomes_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(TOML)
    config = load_config(DataConfig, path=tmp_path / "data.toml")
    first, second = config.sources
    assert (config.recipe, config.long_prompts) == (
        Recipe.DEEPSPEED_CHAT,
        LongPrompts.TRUNCATE_LEFT,
    )
    assert (first.path, first.format_name) == (None, "Dahoas/rm-static")
    assert config.split_of(first) == (2.0, 4.0, 4.0)
    assert (second.path, second.format_name) == (Path("chats.jsonl"), None)
    assert config.split_of(second) == (10.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("my.jsonl", "my.jsonl"),
        ("/a/b/my.jsonl.gz", "my.jsonl.gz"),
        ("chitchat", "chitchat/"),
        ("folder/", "folder"),
    ],
)
def test_a_path_alone_names_its_source_and_says_nothing_of_its_rows(path: str, name: str) -> None:
    (source,) = build(sources=[{"path": path}]).sources
    assert (source.path, source.name, source.format_name) == (Path(path), name, None)


def test_format_of_a_local_copy_can_be_named() -> None:
    source = SourceConfig(name="copy", path=Path("copy"), format="stanfordnlp/SHP")
    assert source.format_name == "stanfordnlp/SHP"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ({"name": "Dahoas/rm-statik"}, r"did you mean Dahoas/rm-static\?"),
        ({"name": "x", "path": "x.json", "format": "shp"}, "format: unknown data set 'shp'"),
        ({"name": "local/jsonfile"}, "needs a path"),
        ({"name": "common"}, "or give a path"),
        ({}, "give a path of your own data, or the name of a known data set"),
        ({"path": "x.json", "columns": {"promt": "q"}}, "did you mean 'prompt'"),
        ({"path": "x.json", "render": "chad"}, "'verbatim' or 'chat'"),
        ({"name": "stanfordnlp/SHP", "columns": {"prompt": "q"}}, "are for rows of your own"),
        ({"name": "Dahoas/rm-static", "split": [0, 0, 0]}, "at least one of the shares"),
        ({"name": "Dahoas/rm-static", "split": [1, -1, 0]}, "greater than or equal to 0"),
        ({"name": "Dahoas/rm-static", "weight": 0}, "greater than 0"),
        ({"name": "Dahoas/rm-static", "wieght": 1}, "did you mean 'weight'"),
    ],
)
def test_bad_sources_are_refused_in_one_line(source: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        build(sources=[source])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"sources": []}, "at least 1 item"),
        ({"split": [0, 0, 0]}, "split: at least one of the three shares"),
        ({"max_tokens": 256, "max_prompt_tokens": 255}, "256 - max_prompt_tokens 255 = 1 leaves"),
        ({"max_answer_tokens": 2, "min_answer_tokens": 3}, "max_answer_tokens 2 is below"),
        ({"long_answers": "shorten"}, "'truncate' or 'drop'"),
        ({"validation_share": 1.0}, "less than 1"),
    ],
)
def test_bad_settings_are_refused_in_one_line(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        build(**change)
    assert "\n" not in str(caught.value)
