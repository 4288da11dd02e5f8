import socket
import urllib.request
from typing import Any

import pytest
from huggingface_hub import constants

from megachat.data.hub import hub_is_reachable


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
