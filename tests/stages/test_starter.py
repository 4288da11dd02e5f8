import tomllib
from pathlib import Path

import pytest

from megachat.config import build_config
from megachat.data.config import SourceConfig, Stage
from megachat.errors import ConfigError
from megachat.stages.config import RunConfig
from megachat.stages.starter import Starter, refuse_existing, starter, write_starter
from tests.data.samples import pairs, write_jsonl


def read(content: Starter) -> RunConfig:
    return build_config(RunConfig, tomllib.loads(content.text), source="run.toml")


@pytest.mark.parametrize(
    "name", ["my.jsonl", 'a "b" c.jsonl', "back\\slash.jsonl", "\u00e9 \u96e8.jsonl"]
)
def test_any_name_of_a_file_is_written_so_that_it_is_read_again(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, pairs(40))
    content = starter(tmp_path / "x", [SourceConfig(path=path)], scratch=tmp_path / "scratch")
    config = read(content)
    assert config.data.sources[0].path == path
    assert content.stages == tuple(Stage)


def test_several_files_share_one_configuration(tmp_path: Path) -> None:
    """Texts serve the first step alone; pairs serve all."""
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": f" {row['prompt']}"} for row in pairs(400)])
    path = write_jsonl(tmp_path / "p.jsonl", pairs(40))
    sources = [SourceConfig(path=texts), SourceConfig(path=path)]
    config = read(starter(tmp_path / "x", sources, scratch=tmp_path / "scratch"))
    assert [source.path for source in config.data.sources] == [texts, path]
    assert config.sft.batch_rows > config.reward.batch_pairs


def test_a_configuration_is_never_overwritten(tmp_path: Path) -> None:
    content = starter(tmp_path, [], scratch=tmp_path / "scratch")
    assert write_starter(tmp_path, content).read_text() == content.text
    for again in (lambda: write_starter(tmp_path, content), lambda: refuse_existing(tmp_path)):
        with pytest.raises(ConfigError, match="exists already"):
            again()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    content = starter(tmp_path, [], scratch=tmp_path / "scratch")
    with pytest.raises(ConfigError, match="file"):
        write_starter(tmp_path / "file" / "x", content)
