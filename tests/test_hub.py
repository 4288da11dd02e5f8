"""Models on this disk, in the hub's cache and on a hub: the client's own code on a loopback hub."""

import errno
import fcntl
import json
import os
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from megachat import hub
from megachat.errors import CheckpointError
from megachat.hub import (
    Content,
    chosen_files,
    fetch,
    folder_on_disk,
    hub_is_reachable,
    lacking,
    local_folder,
)
from tests.harness import fake_hub
from tests.harness.fake_hub import COMMIT, FakeHub

NAME = "nobody/tiny"
INDEX = json.dumps(
    {
        "weight_map": {
            name: f"pytorch_model-0000{part}-of-00002.bin" for part, name in ((1, "a"), (2, "b"))
        }
    }
).encode()
SMALL = {"config.json": b'{"model_type": "opt"}', "vocab.json": b"{}", "merges.txt": b"a b"}
USELESS = {"README.md": b"read", "flax_model.msgpack": b"flax", "original/model.safetensors": b"x"}
SAFE = {"model.safetensors": b"safe weights"}
TORCH = {"pytorch_model.bin": b"torch weights"}
TORCH_PARTS = {
    "pytorch_model.bin.index.json": INDEX,
    "pytorch_model-00001-of-00002.bin": b"first part",
    "pytorch_model-00002-of-00002.bin": b"second part",
}


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose names resolve and that has no proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process talks to, with an empty cache."""
    with fake_hub.serve() as running:
        fake_hub.use(running, tmp_path / "cache", monkeypatch)
        yield running


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a way out; the folder of the hub's cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    return tmp_path / "cache"


def unresolved(*_: Any) -> None:
    raise OSError("name or service not known")


def lay_out(cache: Path, name: str, files: Sequence[str]) -> Path:
    """A snapshot as the hub's client lays it out: blobs, links to them, and what `main` is."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for each in (folder / "blobs", folder / "refs", snapshot):
        each.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(files):
        blob = folder / "blobs" / f"{number:040x}"
        blob.write_bytes(INDEX if file.endswith("index.json") else b"{}")
        (snapshot / file).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_hub_is_reachable_when_its_name_resolves(online: None) -> None:
    assert hub_is_reachable()


def test_hub_is_not_reachable_when_its_name_does_not_resolve(
    online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    assert not hub_is_reachable()


def test_proxy_resolves_names_itself(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "proxy:3128"})
    assert hub_is_reachable()


def test_offline_mode_is_honoured(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()


def test_folder_on_this_disk_comes_before_the_hub(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == fetch(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("find", [local_folder, fetch])
@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c", "missing"])
def test_what_cannot_be_a_hub_name_is_a_missing_folder(name: str, find: Any, offline: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        find(name)


@pytest.mark.parametrize("weights", [SAFE, TORCH, TORCH_PARTS])
def test_a_model_that_was_fetched_is_found_without_a_network(
    weights: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the hub's client, asked for the whole repository, finds files missing."""
    with fake_hub.serve() as running:
        fake_hub.use(running, tmp_path, monkeypatch)
        running.repositories[f"models/{NAME}"] = SMALL | USELESS | weights
        assert folder_on_disk(NAME) is None
        folder = fetch(NAME)
        asked = len(running.requests)
        assert fetch(NAME) == folder and len(running.requests) == asked
    assert {path.name for path in folder.iterdir()} == {*SMALL, *weights}
    assert folder_on_disk(NAME) == local_folder(NAME) == folder
    assert local_folder(NAME, Content.TOKENIZER) == folder
    for name, content in (SMALL | weights).items():
        assert (folder / name).read_bytes() == content
    with pytest.raises(LocalEntryNotFoundError):
        snapshot_download(NAME, local_files_only=True)


def test_of_weights_in_two_formats_the_safetensors_are_downloaded(served: FakeHub) -> None:
    served.repositories[f"models/{NAME}"] = SMALL | USELESS | TORCH | TORCH_PARTS | SAFE
    fetch(NAME)
    assert set(served.downloaded) == {f"{NAME}/{name}" for name in (*SMALL, *SAFE)}


def test_a_tokenizer_comes_without_weights_and_the_model_later(served: FakeHub) -> None:
    served.repositories[f"models/{NAME}"] = SMALL | SAFE
    folder = fetch(NAME, Content.TOKENIZER)
    assert {path.name for path in folder.iterdir()} == set(SMALL)
    assert folder_on_disk(NAME) is None and folder_on_disk(NAME, Content.TOKENIZER) == folder
    assert fetch(NAME) == folder == folder_on_disk(NAME)
    assert sorted(served.downloaded) == sorted(f"{NAME}/{name}" for name in (*SMALL, *SAFE))


def test_an_interrupted_download_is_named_and_completed(served: FakeHub) -> None:
    served.repositories[f"models/{NAME}"] = SMALL | TORCH_PARTS
    missing = fetch(NAME) / "pytorch_model-00002-of-00002.bin"
    missing.resolve().unlink()
    missing.unlink()
    assert folder_on_disk(NAME) is None
    with pytest.raises(
        CheckpointError, match=f"not whole in .*{missing.name} is missing"
    ) as caught:
        local_folder(NAME)
    assert "megachat fetch" in str(caught.value) and "\n" not in str(caught.value)
    served.downloaded.clear()
    assert fetch(NAME) == folder_on_disk(NAME)
    assert served.downloaded == [f"{NAME}/{missing.name}"]


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (["config.json", "model.safetensors"], None),
        (["config.json", "pytorch_model.bin", "vocab.json"], None),
        (["config.json", *TORCH_PARTS], None),
        (["config.json", *list(TORCH_PARTS)[:2]], "pytorch_model-00002-of-00002.bin"),
        (["config.json", "tokenizer.json"], "model.safetensors"),
        (["model.safetensors", "tokenizer.json"], "config.json"),
    ],
)
def test_a_cache_of_any_age_is_looked_into(
    files: list[str], missing: str | None, offline: Path
) -> None:
    """Older clients left no list of the repository's files, by which newer ones judge."""
    snapshot = lay_out(offline, NAME, files)
    assert lacking(snapshot, Content.MODEL) == missing
    if missing is None:
        assert local_folder(NAME) == fetch(NAME) == snapshot
        return
    for find in (local_folder, fetch):
        with pytest.raises(CheckpointError, match=f"{missing} is missing.*cannot be reached"):
            find(NAME)


def test_missing_model_is_one_line_where_there_is_no_network(offline: Path) -> None:
    for find in (local_folder, fetch):
        with pytest.raises(CheckpointError, match="cannot be reached from here") as caught:
            find("facebook/opt-125m")
        assert "\n" not in str(caught.value) and "megachat fetch" in str(caught.value)
        assert str(offline) in str(caught.value)
    assert folder_on_disk("nobody/no-such-model") is None
    assert folder_on_disk("/missing/model") is None


def test_a_model_that_the_hub_does_not_have_is_one_line(served: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=f"model {NAME}: not given by the hub") as caught:
        fetch(NAME)
    assert "\n" not in str(caught.value)


def test_a_cache_without_file_locks_is_one_line(
    served: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes the lock: this program before it fetches, or the hub's client at each file."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    served.repositories[f"models/{NAME}"] = SMALL | SAFE
    monkeypatch.setattr(fcntl, "flock", refuse)
    for take in (lambda: fetch(NAME), lambda: hub.fetching().__enter__()):
        with pytest.raises(CheckpointError, match="no file locks.*set HF_HOME") as caught:
            take()
        assert str(hub.hub_cache()) in str(caught.value) and "\n" not in str(caught.value)


def test_a_repository_without_weights_is_one_line(served: FakeHub) -> None:
    served.repositories[f"models/{NAME}"] = SMALL
    with pytest.raises(CheckpointError, match=r"the hub's copy has no model\.safetensors"):
        fetch(NAME)


def test_opt_175b_is_on_no_hub_and_the_message_says_where_the_weights_come_from(
    served: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for find in (local_folder, fetch):
        with pytest.raises(CheckpointError, match="is on no hub.*form in .*metaseq") as caught:
            find("facebook/opt-175b")
        assert "\n" not in str(caught.value)
    assert served.requests == []
    monkeypatch.chdir(tmp_path)
    own = Path("facebook/opt-175b")
    own.mkdir(parents=True)
    assert fetch("facebook/opt-175b") == own


def test_files_are_chosen_by_what_is_needed() -> None:
    everything = [*SMALL, *USELESS, *TORCH, *TORCH_PARTS, *SAFE]
    assert set(chosen_files(everything, Content.MODEL)) == {*SMALL, *SAFE}
    assert set(chosen_files(everything, Content.TOKENIZER)) == set(SMALL)
    assert set(chosen_files([*SMALL, *TORCH_PARTS], Content.MODEL)) == {*SMALL, *TORCH_PARTS}
    parts = ["model.safetensors.index.json", "model-00001-of-00001.safetensors"]
    assert set(chosen_files([*SMALL, *parts, *TORCH], Content.MODEL)) == {*SMALL, *parts}


def test_an_index_that_cannot_be_read_is_no_model(offline: Path) -> None:
    snapshot = lay_out(offline, NAME, ["config.json", *TORCH_PARTS])
    (snapshot / "pytorch_model.bin.index.json").resolve().write_text("{broken")
    assert hub.folder_on_disk(NAME) is None
