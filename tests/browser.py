"""Headless Chromium, spoken to over its own protocol: enough to look at a page."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage "
    "--hide-scrollbars --no-first-run --disable-extensions"
    " --disable-background-networking --disable-component-update"
    " --disable-sync --remote-debugging-port=0"
    " --remote-allow-origins=*"
)


def chromium() -> str | None:
    found = (shutil.which(name) for name in NAMES)
    return os.environ.get("CHROMIUM") or next(filter(None, found), None)


class Browser:
    """One tab. `events` holds what the page reported since the last `open`."""

    def __init__(self, timeout: float = 30):
        import websocket  # jupyter-server brings it

        self.folder = tempfile.mkdtemp(prefix="book-browser-")
        command = [chromium(), *FLAGS.split(), f"--user-data-dir={self.folder}"]
        self.process = subprocess.Popen(
            [*command, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port_file = Path(self.folder, "DevToolsActivePort")
        self._wait(lambda: port_file.exists() and port_file.read_text().count("\n"))
        port = port_file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(t for t in json.load(answer) if t["type"] == "page")
        self.socket = websocket.create_connection(
            tab["webSocketDebuggerUrl"], timeout=timeout, suppress_origin=True
        )
        self.numbers, self.events = itertools.count(1), []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _wait(ready, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise TimeoutError(f"the browser was not ready after {seconds} s")
            time.sleep(0.05)

    def call(self, method: str, **params) -> dict:
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def js(self, expression: str):
        """The value of a JavaScript expression; a promise is awaited."""
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def open(self, url: str, width: int = 1280, theme: str = "light") -> None:
        """Open a page at a width, and wait until its formulas stand."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": theme}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events = []
        self.call("Page.navigate", url=url)
        end = time.monotonic() + self.socket.gettimeout()
        while not self.said("Page.loadEventFired") and time.monotonic() < end:
            self.events.append(json.loads(self.socket.recv()))
        self.js(
            "Promise.resolve(window.MathJax && MathJax.startup.promise).then(() => 1)"
        )

    def said(self, method: str) -> list[dict]:
        return [e["params"] for e in self.events if e.get("method") == method]

    def screenshot(self, path: str | Path, whole: bool = False) -> None:
        answer = self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole
        )
        Path(path).write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)
