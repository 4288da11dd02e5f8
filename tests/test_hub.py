import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from megachat import hub
from megachat.errors import CheckpointError
from megachat.hub import folder_on_disk, hub_is_reachable, local_folder


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose names resolve and that has no proxy."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])


def unresolved(*_: Any) -> None:
    raise OSError("name or service not known")


def test_hub_is_reachable_when_its_name_resolves() -> None:
    assert hub_is_reachable()


def test_hub_is_not_reachable_when_its_name_does_not_resolve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    assert not hub_is_reachable()


def test_proxy_resolves_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "proxy:3128"})
    assert hub_is_reachable()


def test_offline_mode_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()


def test_folder_on_this_disk_comes_before_the_hub(tmp_path: Path) -> None:
    assert local_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c", "missing"])
def test_what_cannot_be_a_hub_name_is_a_missing_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        local_folder(name)


def test_cached_model_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot(name: str, *, local_files_only: bool = False) -> str:
        assert local_files_only, name
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert local_folder("facebook/opt-125m") == tmp_path


def test_missing_model_is_one_line_where_there_is_no_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def snapshot(_: str, **__: Any) -> str:
        raise LocalEntryNotFoundError("nothing cached")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(CheckpointError, match="cannot be reached from here") as caught:
        local_folder("facebook/opt-125m")
    assert "\n" not in str(caught.value)


def test_a_folder_on_disk_is_found_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    assert folder_on_disk(str(tmp_path)) == tmp_path
    assert folder_on_disk("nobody/no-such-model") is None
    assert folder_on_disk("/missing/model") is None
