"""The page of report.py in a real browser, headless Chromium, over the DevTools protocol.

    make test-report        or: python -m pytest -m browser; REPORT_SCREENSHOTS=FOLDER keeps pictures of the page
"""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from processes import run
from test_report import hostile_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")]
SIZES = [(width, scheme) for width in (375, 1440) for scheme in ("light", "dark")]


class Browser:
    """A headless Chromium and one page in it. Commands and answers go through pipes, ended by a zero byte."""

    def __init__(self, profile):
        ours, theirs = os.pipe(), os.pipe()              # they read from ours[0] as 3 and write to theirs[1] as 4

        def connect():
            a, b = os.dup(ours[0]), os.dup(theirs[1])    # 3 or 4 may be among them
            os.dup2(a, 3)
            os.dup2(b, 4)
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             "--disable-dev-shm-usage", f"--user-data-dir={profile}", "about:blank"],
            close_fds=False, preexec_fn=connect, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        self.to, self.answers, self.number, self.events = ours[1], os.fdopen(theirs[0], "rb"), 0, []
        os.close(ours[0])
        os.close(theirs[1])                              # so that a dead browser ends the reading
        self.buffer, self.session = b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            part = self.answers.raw.read(1 << 16)
            assert part, "the browser has ended"
            self.buffer += part
        one, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(one)

    def call(self, method, **params):
        """The result of a command; events that come before it are kept."""
        self.number += 1
        command = dict(id=self.number, method=method, params=params)
        os.write(self.to, json.dumps(command | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def open(self, path, width=1440, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
                  mobile=width < 500)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        deadline = time.time() + 60
        while self.ask("document.readyState") != "complete" or self.ask("location.href") == "about:blank":
            assert time.time() < deadline, "the page does not load"

    def ask(self, expression):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key, code):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def complaints(self):
        """Errors and warnings on the console, and addresses that are no data: URI."""
        said = [event["params"] for event in self.events
                if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]
        loaded = [event["params"]["request"]["url"] for event in self.events
                  if event["method"] == "Network.requestWillBeSent"]
        return said + [url for url in loaded if not url.startswith(("data:", "file:"))] + loaded[1:] * (
            sum(url.startswith("file:") for url in loaded) > 1)

    def screenshot(self, path, whole=True):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = dict(x=0, y=0, width=size["width"], height=size["height"] if whole else 800, scale=1)
        image = self.call("Page.captureScreenshot", captureBeyondViewport=whole, clip=clip)["data"]
        Path(path).write_bytes(base64.b64decode(image))

    def close(self):
        self.call("Browser.close")
        self.process.wait(60)
