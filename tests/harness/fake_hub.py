"""A hub on loopback: serves folders of this disk in the protocol that the hub's client speaks.

What the client leaves in its cache is then its own work, and what it asks for can be counted.
"""

import hashlib
import http.server
import json
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = Mapping[str, bytes]


@dataclass(kw_only=True)
class FakeHub:
    """Repositories by `models/owner/name` or `datasets/owner/name`, and what was asked for."""

    url: str
    repositories: dict[str, Files] = field(default_factory=dict)
    downloaded: list[str] = field(default_factory=list)
    """Files whose content was sent, as `owner/name/file`."""
    requests: list[str] = field(default_factory=list)
    """Methods and paths."""


def use(hub: FakeHub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """From now on the clients of this process talk to this hub and keep what it gives in a folder.

    They read their settings from the environment when they are imported; these are the same values.
    """
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
    patch.setattr(urllib.request, "getproxies", dict)


def files_of(folder: Path) -> Files:
    """The files of a folder, to be served."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@contextmanager
def serve() -> Iterator[FakeHub]:
    """A running hub without repositories."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = FakeHub(url=f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers what the client asks when it lists and downloads a repository."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:  # noqa: N802 (the name is the base class's)
        self._answer(with_body=True)

    def do_HEAD(self) -> None:  # noqa: N802
        self._answer(with_body=False)

    def do_POST(self) -> None:  # noqa: N802
        length = int(self.headers.get("Content-Length", "0"))
        text = self.rfile.read(length).decode()
        wanted = urllib.parse.parse_qs(text).get("paths") or []
        if text.startswith("{"):
            wanted = json.loads(text)["paths"]
        self._answer(with_body=True, wanted=wanted)

    def _answer(self, *, with_body: bool, wanted: list[str] | None = None) -> None:
        hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        hub.requests.append(f"{self.command} {path}")
        parts = path.split("/")
        if parts[0] == "api":
            name, rest = "/".join(parts[1:4]), parts[4:]
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            name, rest = "/".join([kind, *parts[:2]]), parts[2:]
        files = hub.repositories.get(name)
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body=with_body)
        elif rest[:1] == ["resolve"]:
            self._file(name, files, "/".join(rest[2:]), with_body=with_body)
        elif rest[:1] == ["tree"]:
            query = urllib.parse.urlsplit(self.path).query.lower()
            self._json(_tree(files, "/".join(rest[2:]), recursive="recursive=true" in query))
        elif rest[:1] == ["paths-info"]:
            self._json([_entry(each, files) for each in wanted or () if each in files])
        elif rest[:1] in ([], ["revision"]):
            identity = "/".join(name.split("/")[1:])
            siblings = [{"rfilename": each} for each in files]
            self._json({"id": identity, "sha": COMMIT, "siblings": siblings, "private": False})
        else:
            self._send(404, b"{}", {}, with_body=with_body)

    def _file(self, name: str, files: Files, path: str, *, with_body: bool) -> None:
        hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        if path not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, b"", headers, with_body=with_body)
            return
        if with_body:
            hub.downloaded.append(f"{name.partition('/')[2]}/{path}")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_identity(files[path])}"'}
        self._send(200, files[path], headers, with_body=with_body)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(
        self, status: int, body: bytes, headers: Mapping[str, str], *, with_body: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body and self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: Files, below: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders under a folder; its direct ones only, unless recursive."""
    start = f"{below}/" if below else ""
    inside = [path for path in files if path.startswith(start)]
    found = [_entry(path, files) for path in inside if recursive or "/" not in path[len(start) :]]
    folders = {start + path[len(start) :].rpartition("/")[0] for path in inside}
    if not recursive:
        folders = {folder[: len(start)] + folder[len(start) :].split("/")[0] for folder in folders}
    empty = hashlib.sha1(b"").hexdigest()
    return found + [
        {"type": "directory", "path": folder, "size": 0, "oid": empty}
        for folder in sorted(folders)
        if folder.strip("/") != below
    ]


def _entry(path: str, files: Files) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(files[path]), "oid": _identity(files[path])}


def _identity(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
