"""A server on 127.0.0.1 that speaks as much of the Hub's protocol as its client needs to download a dataset.

Files are redirected to another host name, as the Hub redirects to its content network. Faults are put on paths and
used up one per request: `hub.faults["a.parquet"] = [Status(503), Cut(1000)]`.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Status:
    """Answer with a status and headers instead."""

    code: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """Close the connection after so many bytes."""

    bytes: int


@dataclass(frozen=True)
class Stall:
    """Send so many bytes, then nothing more."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Corrupt:
    """Send the right number of wrong bytes."""


@dataclass(frozen=True)
class Etag:
    """Announce another content."""

    etag: str


@dataclass(frozen=True)
class WholeFile:
    """Ignore the range that was asked for."""


Fault = Status | Cut | Stall | Corrupt | Etag | WholeFile
SIGNATURE = "X-Amz-Signature=5ec2e7"


def parquet(texts: list[str | None], column: str = "text", **columns: list[Any]) -> bytes:
    """A parquet file without page checksums, as most on the Hub are."""
    import pyarrow
    import pyarrow.parquet

    sink = BytesIO()
    table = pyarrow.table({column: pyarrow.array(texts, pyarrow.string()), **columns})
    pyarrow.parquet.write_table(table, sink, row_group_size=16, compression="zstd")
    return sink.getvalue()


def shard(number: int, rows: int = 40, chars: int = 400) -> list[str]:
    """Texts of a shard: words that hardly compress, so that files have some size."""
    source = random.Random(number)
    return [
        f"{number} {row} " + " ".join(f"{source.randrange(10**6)}" for _ in range(chars // 7)) for row in range(rows)
    ]


class Hub:
    """One repository at one commit, and whatever is wrong with the server."""

    def __init__(self, files: dict[str, bytes], repo: str = "org/set") -> None:
        self.repo, self.files = repo, files
        self.commit = "c0ffee" + "0" * 34
        self.card: dict[str, Any] = {}
        self.token: str | None = None  # that must be sent
        self.faults: dict[str, list[Fault]] = {}
        self.listing_faults: list[Fault] = []
        self.bytes_per_s: float | None = None
        self.vanish_after: int | None = None  # bytes of files, then nobody answers any more
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers by small names
        self.sent = 0
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def fetched(self, path: str) -> list[str]:
        """The ranges that were asked for of a file, `` for all of it; looks at its footer do not count."""
        with self._lock:
            asked = [
                headers.get("range", "") for _, at, headers in self.requests if urlsplit(at).path == f"/cdn/{path}"
            ]
        return [span for span in asked if not span or span.endswith("-")]

    def gone(self) -> bool:
        return self.vanish_after is not None and self.sent >= self.vanish_after

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read `Hub.requests`."""

    def do_GET(self) -> None:
        hub = self.hub
        if hub.gone():
            self.close_connection = True
            return
        with hub._lock:
            hub.requests.append(
                (self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
            )
        path = unquote(urlsplit(self.path).path)
        try:
            if path.startswith("/cdn/"):
                self._file(path.removeprefix("/cdn/"))
            elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self._answer(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
            elif path.startswith(f"/api/datasets/{hub.repo}/revision/"):
                self._listing(path.rpartition("/")[2])
            elif path.startswith(f"/datasets/{hub.repo}/resolve/"):
                self._redirect(path.removeprefix(f"/datasets/{hub.repo}/resolve/"))
            else:
                self._answer(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _listing(self, revision: str) -> None:
        hub = self.hub
        with hub._lock:
            fault = hub.listing_faults.pop(0) if hub.listing_faults else None
        if isinstance(fault, Status):
            self._answer(fault.code, fault.headers)
            return
        if revision not in ("main", hub.commit):
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [
            {
                "rfilename": path,
                "size": len(data),
                "blobId": hashlib.sha1(data).hexdigest(),
                "lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134},
            }
            for path, data in hub.files.items()
        ]
        body = {"id": hub.repo, "sha": hub.commit, "private": False, "disabled": False, "downloads": 0, "likes": 0}
        body |= {"tags": [], "siblings": [{"rfilename": "README.md", "size": 3}, *siblings], "cardData": hub.card}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def _redirect(self, rest: str) -> None:
        hub = self.hub
        revision, _, path = rest.partition("/")
        if path not in hub.files or revision != hub.commit:
            self._answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit})
            return
        digest, length = hashlib.sha256(hub.files[path]).hexdigest(), str(len(hub.files[path]))
        with hub._lock:
            faults = hub.faults.get(path, [])
            if faults and isinstance(faults[0], Etag):
                digest = faults.pop(0).etag
        self._answer(
            302,
            {
                "Location": f"http://localhost:{hub.port}/cdn/{path}?{SIGNATURE}",
                "X-Repo-Commit": hub.commit,
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": length,
            },
        )

    def _file(self, path: str) -> None:
        hub, whole = self.hub, self.hub.files[path]
        span = self.headers.get("Range", "")
        footer = "-" in span and not span.endswith("-")  # the look at a footer before anything is written
        with hub._lock:
            faults = hub.faults.get(path, [])
            fault = faults.pop(0) if faults and not footer else None
        if isinstance(fault, Status):
            self._answer(fault.code, fault.headers)
            return
        start, end = 0, len(whole)
        if span and not isinstance(fault, WholeFile):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(whole)
        if start >= len(whole):
            self._answer(416, {"Content-Range": f"bytes */{len(whole)}"})
            return
        body = whole[start:end]
        self.send_response(206 if start or footer else 200)
        if start or footer:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(whole).hexdigest()}"')
        self.end_headers()
        if isinstance(fault, Corrupt):
            body = bytes(byte ^ 1 for byte in body)
        for at in range(0, len(body), 8192):
            piece = body[at : at + 8192]
            if isinstance(fault, Cut | Stall) and at + len(piece) > fault.bytes:
                self.wfile.write(piece[: fault.bytes - at])
                self.wfile.flush()
                if isinstance(fault, Stall):
                    time.sleep(fault.seconds)
                self.close_connection = True
                return
            if hub.gone():
                self.close_connection = True
                return
            self.wfile.write(piece)
            with hub._lock:
                hub.sent += 0 if footer else len(piece)
            if hub.bytes_per_s:
                time.sleep(len(piece) / hub.bytes_per_s)
