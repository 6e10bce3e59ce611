"""A headless Chromium, driven by chromedriver over the WebDriver protocol with nothing but the standard library."""

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1200,1000"),
)


class Browser:
    """One browser for one test run. `logs` and `requests` say what the pages complained about and asked for."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None and DRIVER is not None
        self._driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self._driver.stdout is not None
        line = next(line for line in self._driver.stdout if "successfully on port" in line)
        port = int(line.rstrip().rstrip(".").rpartition(" ")[2])
        self._url = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{session['sessionId']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call("DELETE", "")
        self._driver.terminate()
        self._driver.wait()

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def open(self, url: str) -> None:
        """Loads a page."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the script, a function's body, returns in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """Clicks the first element that a CSS selector finds, as a mouse does: what covers it would get the click."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self._call("POST", f"/element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Types into the first element that a CSS selector finds."""
        self._call("POST", f"/element/{self._find(selector)}/value", {"text": text})

    def _find(self, selector: str) -> str:
        found: dict[str, str] = self._call("POST", "/element", {"using": "css selector", "value": selector})
        return found[_ELEMENT]

    def emulate_dark(self, dark: bool) -> None:
        """What the system prefers."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        command = {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [feature]}}
        self._call("POST", "/goog/cdp/execute", command)

    def logs(self) -> list[dict[str, Any]]:
        """The console's entries since the last call."""
        return list(self._call("POST", "/se/log", {"type": "browser"}))

    def requests(self) -> list[str]:
        """Every URL that was asked for since the last call.

        Left out are the browser's own pages, for its first tab may still be loading, and images that a page holds:
        they ask nothing of anybody.
        """
        entries = [
            json.loads(entry["message"])["message"] for entry in self._call("POST", "/se/log", {"type": "performance"})
        ]
        sent = [entry["params"]["request"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [request["url"] for request in sent if not request["url"].startswith(("chrome", "data:"))]
