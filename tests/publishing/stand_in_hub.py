"""As much of the model hub's HTTP API as an upload takes: it keeps what it is sent, and what it was asked with."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "b" * 40


class StandInHub(ThreadingHTTPServer):
    """Repositories by name, files by repository and path. `refuse` answers every request so, with its own token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.private: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuse: int | None = None
        self.drop_after_objects: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: StandInHub

    def do_GET(self) -> None:
        self.handle_request()

    def do_POST(self) -> None:
        self.handle_request()

    def do_PUT(self) -> None:
        digest = self.path.rpartition("/")[2]
        content = self.body()
        if self.server.drop_after_objects is not None and len(self.server.objects) >= self.server.drop_after_objects:
            self.answer(403, {"error": "no more today"})
            return
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.objects[digest] = content
        self.answer(200, {})

    def handle_request(self) -> None:
        path, hub = self.path.partition("?")[0], self.server
        body = self.body()
        hub.requests.append(f"{self.command} {path}")
        authorization = self.headers.get("Authorization")
        hub.tokens.add(authorization)
        if hub.refuse is not None:
            self.answer(
                hub.refuse, {"error": f"you sent {authorization}"}, {"X-Error-Message": f"sent {authorization}"}
            )
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in hub.private else 200
            hub.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            self.answer(status, {"url": f"{hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self.answer(200, {"files": [self.mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"transfer": "basic", "objects": [self.action(o) for o in json.loads(body)["objects"]]})
        elif "/branch/" in path:
            self.answer(200, {})
        elif "/commit/" in path:
            name, _, revision = path.removeprefix("/api/models/").partition("/commit/")
            self.commit(name, revision, body)
        elif (name := path.removeprefix("/api/models/")) not in hub.private:
            self.answer(404, {})
        else:
            self.answer(200, {"id": name, "sha": COMMIT, "private": hub.private[name], "siblings": []})

    @staticmethod
    def mode(file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.objects:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.server.url}/upload/{wanted['oid']}", "header": {}}}}

    def commit(self, name: str, revision: str, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[f"{revision}:{value['path']}"] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[f"{revision}:{value['path']}"] = self.server.objects[value["oid"]]
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(raw))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *arguments: object) -> None:
        pass
