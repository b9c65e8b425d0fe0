"""A hub on loopback, as much of it as downloads need: `api/models/…` and `…/resolve/…`."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"a commit").hexdigest()


@dataclass
class Hub:
    """Serves one folder as the repository `name` at `COMMIT`, and remembers what was asked for."""

    folder: Path
    name: str = "somebody/tiny"
    gated: bool = False
    cut: str | None = None  # This file's connection breaks off half-way,
    cuts: int = 1  # so many times.
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    address: str = ""

    @property
    def fetched(self) -> set[str]:
        """The files of which any byte was asked for."""
        return {path for method, path in map(str.split, self.asked) if method == "GET"}

    def listing(self) -> list[dict]:
        """Every file as `api/models/…/tree` tells of it."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": path.relative_to(self.folder).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.hub
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/tree/.+|/revision/.+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        if found is None or found[1] != hub.name:
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif (found[2] or "main").split("/")[-1] not in ("main", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif file:
            self._file(file[3], with_body)
        elif found[2] and found[2].startswith("/tree/"):
            self._send(200, {}, json.dumps(hub.listing()).encode())
        else:
            files = [{"rfilename": f["path"], "size": f["size"]} for f in hub.listing()]
            self._send(200, {}, json.dumps({"id": hub.name, "sha": COMMIT, "siblings": files}).encode())

    def _file(self, name: str, with_body: bool) -> None:
        hub = self.hub
        if hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo"})
            return
        hub.asked.append(f"{self.command} {name}")
        data = (hub.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        status, start = 200, 0
        if with_body and (asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")):
            hub.ranges.append(f"{name} {asked[1]}")
            status, start = 206, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        whole = data[start:]
        sent = whole
        if with_body and name == hub.cut and hub.cuts:
            hub.cuts -= 1
            sent = data[start : len(data) // 2]
        self._send(status, headers | {"Content-Length": str(len(whole))}, sent)
        self.close_connection = sent != whole

    def _send(self, status: int, headers: dict, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve on a free port of 127.0.0.1 until the end of the block."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
