"""Stands in for a server with an OpenAI API: streams what it is told, and keeps what it was asked."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class SseServer:
    """In a thread. `pieces` are the deltas of every answer, sent `pause` seconds apart; `requests` what came in."""

    def __init__(self) -> None:
        self.pieces: list[dict[str, str]] = [
            {"role": "assistant", "content": ""},
            {"content": "Hel"},
            {"content": "lo."},
        ]
        self.pause = 0.0
        self.key: str | None = None
        self.status = 200
        self.breaks_off = False
        self.requests: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                if outer.key is not None and self.headers["Authorization"] != f"Bearer {outer.key}":
                    self.reply(401, {"error": "Unauthorized"})
                elif self.path == "/v1/models":
                    self.reply(200, {"data": [{"id": "a-model"}]})
                elif self.path == "/elsewhere/v1/models":
                    self.send_response(302)
                    self.send_header("Location", outer.url + "/v1/models")
                    self.end_headers()
                else:
                    self.reply(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                outer.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if outer.status != 200:
                    self.reply(outer.status, {"error": {"message": "the context is full"}})
                    return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b": a comment\n\n")
                for piece in outer.pieces:
                    event = {"choices": [{"index": 0, "delta": piece}]}
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                    time.sleep(outer.pause)
                if not outer.breaks_off:
                    self.wfile.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')

            def reply(self, status: int, content: dict[str, Any]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
