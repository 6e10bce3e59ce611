"""A pico model with its quantized copy, and servers on loopback whose answers a test writes."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from served import Handler

import fourge


@pytest.fixture(scope="session")
def models(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    output = tmp_path_factory.mktemp("quantized") / "out"
    sets: dict[str, Any] = {"num_calibration_samples": 4, "num_probe_samples": 1, "max_seq_length": 24}
    fourge.quantize(str(pico()), output, calibration="random", threads=1, **sets)
    return pico(), output


@pytest.fixture
def authorizations() -> list[str | None]:
    """What every request to `serve`'s servers was authorized by."""
    return []


@pytest.fixture
def serve(authorizations: list[str | None]) -> Iterator[Callable[[Handler], str]]:
    """Serves what a function of path and body answers; gives the URL."""
    running: list[ThreadingHTTPServer] = []

    def start(answer: Handler) -> str:
        class Requests(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, body: dict[str, Any] | None) -> None:
                authorizations.append(self.headers["Authorization"])
                content = json.dumps(answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()
