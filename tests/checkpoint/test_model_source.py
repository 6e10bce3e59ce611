"""Models found where they are: a directory, the hub cache, and a hub that is a small local server."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from fourge.checkpoint.source import locate
from fourge.errors import InputError

COMMIT = "a" * 40
FILES = {
    **{name: name.encode() for name in ("model.safetensors", "config.json", "tokenizer.model", "LICENSE")},
    **{name: name.encode() for name in ("chat_template.jinja", "README.md", "merges.txt")},
}
NOT_WANTED = {
    **dict.fromkeys(("pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth"), b""),
    **dict.fromkeys(("original/params.json", "onnx/model.onnx", "model.gguf", ".gitattributes"), b""),
}

LOCATE = """
import json, sys
from fourge.checkpoint.source import locate
from fourge.errors import InputError
answers = []
for model, revision in json.loads(sys.argv[1]):
    try:
        answers.append(["found", str(locate(model, revision))])
    except InputError as error:
        answers.append(["refused", str(error)])
print("ANSWERS" + json.dumps(answers))
"""


def ask(cache: Path, *requests: tuple[str, str | None], **environment: str) -> list[list[str]]:
    """`locate` of every request in a fresh process: huggingface_hub reads its environment at import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    no_proxy = {"no_proxy": "*", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LOCATE, json.dumps(requests)],
        env=kept | no_proxy | {"HF_HUB_CACHE": str(cache), "HF_HOME": str(cache.parent)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[list[str]] = json.loads(result.stdout.partition("ANSWERS")[2])
    assert all("\n" not in message for _, message in answers)
    return answers


class FakeHub(BaseHTTPRequestHandler):
    """As much of the hub's API as a download takes: `org/model`, and `org/gated`, which nobody may see."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        contents = FILES | NOT_WANTED
        if path.startswith("/api/models/org/gated"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/busy"):
            self.answer(418, b"{}", {})
        elif path == "/api/models/org/model/revision/main":
            self.answer_json({"id": "org/model", "sha": COMMIT, "siblings": []})
        elif path.startswith("/api/models/org/model/revision/"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/org/model/tree/{COMMIT}":
            self.answer_json([self.entry(name, content) for name, content in contents.items()])
        elif path.startswith(prefix := f"/org/model/resolve/{COMMIT}/"):
            content = contents[path.removeprefix(prefix)]
            etag = sha256(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def entry(name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": sha256(content).hexdigest()}

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a running fake hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A hub cache that holds `org/cached` at `main`, and of `org/part` nothing but a reference."""
    hub = tmp_path / "home" / "hub"
    model = hub / "models--org--cached"
    snapshot = model / "snapshots" / COMMIT
    for folder in (model / "blobs", model / "refs", snapshot, hub / "models--org--part" / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "blobs" / "0").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0")
    (hub / "models--org--part" / "refs" / "main").write_text(COMMIT)
    return hub


class TestLocal:
    def test_directory_is_taken_as_it_is(self, tmp_path: Path) -> None:
        assert locate(str(tmp_path)) == tmp_path

    def test_directory_wins_over_a_hub_id(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "org" / "model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert locate("org/model") == Path("org/model")

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "model").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert locate("~/model") == tmp_path / "model"

    def test_revision_of_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=f"--revision v1: {tmp_path} is a local directory"):
            locate(str(tmp_path), "v1")

    def test_file(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(InputError, match=f"{tmp_path}/model.safetensors: a file, .* give the directory"):
            locate(str(tmp_path / "model.safetensors"))

    @pytest.mark.parametrize("model", ["/no/such/directory", "./none", "a/b/c", "two words"])
    def test_neither_a_directory_nor_an_id(self, model: str) -> None:
        with pytest.raises(InputError, match="no such directory, and not a hub id"):
            locate(model)


class TestOffline:
    def test_cache_answers_and_nothing_else(self, cache: Path, hub: str) -> None:
        answers = ask(
            cache,
            *(("org/cached", None), ("org/cached", "main"), ("org/cached", COMMIT)),
            *(("org/cached", "v2"), ("org/part", None), ("org/model", None)),
            HF_HUB_OFFLINE="1",
            HF_ENDPOINT=hub,
        )
        snapshot = str(cache / "models--org--cached" / "snapshots" / COMMIT)
        assert answers[:3] == [["found", snapshot]] * 3
        for (state, message), model in zip(answers[3:], ("org/cached", "org/part", "org/model"), strict=True):
            assert state == "refused"
            assert message.startswith(model)
            assert "HF_HUB_OFFLINE is set" in message
            assert str(cache) in message
            assert f"hf download {model}" in message
        assert "revision v2" in answers[3][1]

    def test_hub_out_of_reach(self, cache: Path) -> None:
        (cached, missing) = ask(cache, ("org/cached", None), ("org/model", None), HF_ENDPOINT="http://127.0.0.1:9")
        assert cached[0] == "found"
        assert missing[0] == "refused"
        assert "the hub cannot be reached" in missing[1]


class TestHub:
    def test_downloads_what_a_checkpoint_is_made_of(self, cache: Path, hub: str) -> None:
        ((state, snapshot),) = ask(cache, ("org/model", None), HF_ENDPOINT=hub)
        assert state == "found"
        found = {path.name: path.read_bytes() for path in Path(snapshot).rglob("*") if path.is_file()}
        assert found == FILES
        assert ask(cache, ("org/model", None), HF_HUB_OFFLINE="1") == [["found", snapshot]]

    def test_refusals(self, cache: Path, hub: str) -> None:
        gated, revision, unknown, busy = ask(
            cache,
            *(("org/gated", None), ("org/model", "v9"), ("org/unknown", None), ("org/busy", None)),
            HF_ENDPOINT=hub,
        )
        assert gated[1].startswith(f"org/gated: gated; ask for access at {hub}/org/gated")
        assert revision[1].startswith("--revision v9: org/model has no such")
        assert unknown[1].startswith("org/unknown: neither a local directory nor a model on the hub")
        assert busy[1].startswith("org/busy: ")
        assert {state for state, _ in (gated, revision, unknown, busy)} == {"refused"}
