"""A real browser for tests: headless Chromium, which chromedriver drives by the WebDriver protocol over HTTP."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is on this machine
TAB, ENTER, DOWN = "\ue004", "\ue007", "\ue015"


def needed() -> tuple[str, str]:
    """The paths of Chromium and of its driver; skips the test where one is missing."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver, of which one is not installed")
    return chromium, driver


class Browser:
    """One window of Chromium. What is asked for and not there is a ``RuntimeError`` with the driver's words."""

    def __init__(self, address: str, chromium: str, dark: bool = False):
        flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--blink-settings=preferredColorScheme=0"] * dark
        options = {"binary": chromium, "args": flags}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.address = address
        made = self.send("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.address += f"/session/{made['sessionId']}"

    def send(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        """One command of the protocol; returns its value."""
        body = None if content is None else json.dumps(content).encode()
        asked = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with DIRECT.open(asked, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(json.load(e)["value"]["message"]) from None

    def open(self, address: str) -> None:
        """Load a page."""
        self.send("POST", "/url", {"url": address})

    def size(self, width: int, height: int) -> None:
        """Make the page so wide and so high, in CSS pixels, as a phone would."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        content = {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics}
        self.send("POST", "/goog/cdp/execute", content)

    def js(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.send("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, css: str) -> None:
        """Click the first element."""
        found = self.send("POST", "/element", {"using": "css selector", "value": css})
        self.send("POST", f"/element/{found[ELEMENT]}/click", {})

    def press(self, keys: str) -> None:
        """Press keys, whatever has the focus."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.send("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def texts(self, css: str) -> list[str]:
        """The text of each element that can be seen."""
        found = "[...document.querySelectorAll(arguments[0])].filter(e => e.offsetParent)"
        return self.js(f"return {found}.map(e => e.innerText.trim())", css)

    def console(self) -> list[str]:
        """What was written to the console since the last call: errors of scripts and of loading."""
        return [line["message"] for line in self.send("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path) -> None:
        """What can be seen, as a PNG."""
        path.write_bytes(base64.b64decode(self.send("GET", "/screenshot")))


@contextlib.contextmanager
def browsing(dark: bool = False) -> Iterator[Browser]:
    """A browser, which is closed at the end."""
    chromium, driver = needed()
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = (re.search(r"successfully on port (\d+)", line) for line in process.stdout)
            port = next(found[1] for found in said if found)
            browser = Browser(f"http://127.0.0.1:{port}", chromium, dark)
            try:
                yield browser
            finally:
                browser.send("DELETE", "")
        finally:
            process.terminate()
