"""Stands in for vLLM's server: started as `python stand_in_server.py MODEL --port N …`, behaves as STAND_IN says.

`STAND_IN` is JSON: `delay` seconds until it listens, `die` a text to end with, `exit_code`, `ignore_term`, `log_prob`
for every token, `status` of completions, `worker` a file for the process id of a child, `record` a file for requests.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BEHAVIOUR = json.loads(os.environ.get("STAND_IN", "{}"))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "stand-in"}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "record" in BEHAVIOUR:
            with Path(BEHAVIOUR["record"]).open("a") as file:
                file.write(json.dumps(request | {"authorization": self.headers["Authorization"]}) + "\n")
        if BEHAVIOUR.get("status", 200) != 200:
            self.answer(BEHAVIOUR["status"], {"error": {"message": "no such luck"}})
            return
        choice: dict[str, Any] = {"text": " there was a hammer"}
        if request.get("echo"):
            tokens = len(request["prompt"]) + request["max_tokens"]
            choice["logprobs"] = {"token_logprobs": [None] + [BEHAVIOUR["log_prob"]] * (tokens - 1)}
        self.answer(200, {"choices": [choice]})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    print("arguments:", json.dumps(sys.argv[1:]), flush=True)
    if BEHAVIOUR.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    if "worker" in BEHAVIOUR:
        child = subprocess.Popen(["sleep", "600"])
        Path(BEHAVIOUR["worker"]).write_text(str(child.pid))
    time.sleep(BEHAVIOUR.get("delay", 0))
    if "die" in BEHAVIOUR:
        print(BEHAVIOUR["die"], flush=True)
        sys.exit(BEHAVIOUR.get("exit_code", 1))
    options = dict(zip(sys.argv, sys.argv[1:], strict=False))
    server = ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler)
    print("listening", flush=True)
    server.serve_forever()


main()
