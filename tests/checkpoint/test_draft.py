from pathlib import Path

import pytest

from megachat.checkpoint.draft import MARKER_FILE, Draft, is_complete, writing
from megachat.errors import CapacityError, CheckpointError


def _finished(target: Path, text: str) -> Draft:
    source = target.with_name("source.txt")
    source.write_text(text)
    draft = Draft.start(target, needed=0, extra_files={"extra.txt": source})
    (draft.path / "weights").write_text(text)
    assert not (target / MARKER_FILE).exists() or not (target / "weights").read_text() == text
    draft.finish({"config.json": {"text": text}}, tensors={})
    source.unlink()
    return draft


def test_the_target_is_the_old_folder_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("first", "second"):
        _finished(target, text)
        assert is_complete(target)
        assert (target / "weights").read_text() == (target / "extra.txt").read_text() == text
    assert list(tmp_path.iterdir()) == [target]


def test_a_discarded_draft_leaves_the_earlier_export(tmp_path: Path) -> None:
    target = tmp_path / "model"
    _finished(target, "first")
    draft = Draft.start(target, needed=0, extra_files={})
    (draft.path / "weights").write_text("half")
    draft.discard()
    assert is_complete(target) and (target / "weights").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_a_draft_that_cannot_start_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(CapacityError, match=r"take 1000000000000000000 bytes, but the disk has"):
        Draft.start(target, needed=10**18, extra_files={})
    with pytest.raises(CheckpointError, match="no such file"):
        Draft.start(target, needed=0, extra_files={"a": tmp_path / "absent"})
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_while_writing_is_one_line_with_the_target(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}: cannot write: a bug$"):
        with writing(tmp_path):
            raise ValueError("a bug\nof two lines")
    with pytest.raises(CapacityError, match="^too small$"), writing(tmp_path):
        raise CapacityError("too small")
