"""The page of report.py in a real browser, headless Chromium, over the DevTools protocol.

    make test-report        REPORT_SCREENSHOTS=FOLDER keeps pictures of the pages that it looks at
"""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from test_report import HOSTILE, HOSTILE_CLASS, hostile, trained  # noqa: F401  (fixtures)

import report
from cli import launch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")]
COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
SIZES = [(width, scheme) for width in (375, 1440) for scheme in ("light", "dark")]


class Browser:
    """A headless Chromium and one page in it. Commands and answers go through pipes, ended by a zero byte."""

    def __init__(self, profile):
        ours, theirs = os.pipe(), os.pipe()              # it reads ours[0] as 3 and writes to theirs[1] as 4

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
        if self.session:
            command["sessionId"] = self.session
        os.write(self.to, json.dumps(command).encode() + b"\0")
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
        """What the console said, exceptions among it, and what was loaded but the page and data: URIs."""
        said = [event["params"] for event in self.events if event["method"] in COMPLAINTS]
        loaded = [event["params"]["request"]["url"] for event in self.events
                  if event["method"] == "Network.requestWillBeSent"]
        page, *others = [url for url in loaded if not url.startswith("data:")]
        return said + others

    def screenshot(self, path, whole=True):
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = dict(x=0, y=0, width=size["width"], height=size["height"] if whole else 800, scale=1)
        image = self.call("Page.captureScreenshot", captureBeyondViewport=whole, clip=clip)["data"]
        Path(path).write_bytes(base64.b64decode(image))

    def close(self):
        self.call("Browser.close")
        self.process.wait(60)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(trained, hostile, tmp_path_factory):  # noqa: F811
    """{name: path of a page}."""
    folder = tmp_path_factory.mktemp("pages")
    folders = {"fake": [trained], "hostile": [hostile], "comparison": [trained, hostile]}
    for name, runs in folders.items():
        with pytest.raises(SystemExit) as stop:
            launch(report.main, report.get_parser(), [*map(str, runs), "--output", f"{folder}/{name}.html"])
        assert not stop.value.code
    return {name: folder / f"{name}.html" for name in folders}


@pytest.mark.parametrize("width, scheme", SIZES)
@pytest.mark.parametrize("name", ["fake", "hostile", "comparison"])
def test_page_fits_and_loads(browser, pages, name, width, scheme):
    browser.open(pages[name], width, scheme)
    assert browser.ask("document.documentElement.scrollWidth") <= browser.ask("innerWidth") == width
    assert browser.complaints() == []
    broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth || !i.alt).length"
    assert browser.ask(broken) == 0
    assert name == "comparison" or browser.ask("document.images.length") > 20
    dark = browser.ask("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    if folder := os.environ.get("REPORT_SCREENSHOTS"):
        browser.screenshot(Path(folder) / f"{name}-{width}-{scheme}.png")


# the contrast of text with the background behind it, of WCAG 2
CONTRAST = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * linear(r / 255) + .7152 * linear(g / 255) + .0722 * linear(b / 255);
  const behind = element => {
    let layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(rgb(getComputedStyle(e).backgroundColor));
    const over = (under, [r, g, b, a = 1]) => [r, g, b].map((v, i) => a * v + (1 - a) * under[i]);
    return layers.reverse().reduce(over, [255, 255, 255]);
  };
  const low = [];
  for (const e of document.querySelectorAll("h1, h2, h3, p, li, dt, dd, td, th, a, button, caption")) {
    if (!e.textContent.trim()) continue;
    const a = light(rgb(getComputedStyle(e).color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) low.push([e.tagName, e.className, e.textContent.slice(0, 20), ratio]);
  }
  return low;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser, pages, scheme):
    browser.open(pages["fake"], 1440, scheme)
    assert browser.ask(CONTRAST) == []


@pytest.mark.parametrize("table, kind", [("table.matrix", "number"), ("#scores ~ div table", "number"),
                                         ("#scores ~ div table", "text")])
def test_tables_sort(browser, pages, table, kind):
    browser.open(pages["fake"])
    table = f"document.querySelector('{table}')"

    def values(i):
        return browser.ask(f"[...{table}.tBodies[0].rows].map(row => row.cells[{i}].dataset.value ?? "
                           f"row.cells[{i}].textContent)")
    i = 0
    if kind == "number":
        i = next(i for i in range(1, 11) if len(set(values(i))) > 1)
    order = "(a, b) => b - a" if kind == "number" else "(a, b) => a.localeCompare(b)"
    expected = browser.ask(f"{json.dumps(values(i))}.sort({order})")
    assert expected != expected[::-1]
    first, second = ("descending", "ascending") if kind == "number" else ("ascending", "descending")
    for direction, right in ((first, expected), (second, expected[::-1]), (first, expected)):
        browser.ask(f"{table}.tHead.rows[0].cells[{i}].querySelector('button').click()")
        assert browser.ask(f"{table}.tHead.rows[0].cells[{i}].ariaSort") == direction and values(i) == right
    other = "0" if i else "1"
    browser.ask(f"{table}.tHead.rows[0].cells[{other}].querySelector('button').click()")
    assert browser.ask(f"{table}.querySelectorAll('[aria-sort]').length") == 1 and browser.complaints() == []


def test_empty_cells_are_last(browser, pages):
    browser.open(pages["comparison"])
    head = "[...document.querySelectorAll('th')].find(th => th.textContent === 'loss')"
    for _ in range(2):
        browser.ask(f"{head}.querySelector('button').click()")
        last = "[...document.querySelector('tbody').rows].at(-1)"
        assert browser.ask(f"{last}.cells[{head}.cellIndex].textContent") == "–"


def test_everything_is_reached_by_tab_and_seen(browser, pages):
    browser.open(pages["fake"])
    # what can be scrolled or used; a closed <details> hides what is in it
    wanted = browser.ask("[...document.querySelectorAll('a, button, input, summary, [tabindex=\"0\"]')]"
                         ".filter(e => e.checkVisibility()).length")
    seen = []
    browser.ask("[...document.querySelectorAll('*')].forEach((e, i) => e.number = i)")
    for _ in range(wanted):
        browser.press("Tab", 9)
        seen.append(browser.ask("document.activeElement.number"))
        style, size = browser.ask("(style => [style.outlineStyle, style.outlineWidth])"
                                  "(getComputedStyle(document.activeElement))")
        assert style == "solid" and size == "3px"            # the focus is seen
    assert len(set(seen)) == wanted > 30 and seen == sorted(seen)
    browser.open(pages["fake"])
    browser.press("Tab", 9)
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", text="\r",
                 windowsVirtualKeyCode=13)
    assert browser.ask("location.hash") == "#main" and browser.ask("document.activeElement.id") == "main"


def test_the_map_shows_an_image(browser, pages):
    browser.open(pages["hostile"])
    shown = "[...document.querySelectorAll('.peek img')].map(i => [i.src, i.alt])[0]"
    before = browser.ask(shown)
    browser.ask("document.querySelector('input').focus()")
    browser.press("ArrowRight", 39)
    after = browser.ask(shown)
    assert after != before and browser.ask("document.querySelector('output').textContent") == after[1]
    assert browser.ask("document.querySelector('input').ariaValueText") == after[1]
    marks = browser.ask("JSON.parse(document.querySelector('.explore script').textContent)")
    assert after == [marks[1]["src"], marks[1]["text"]]
    at = marks[7]["x"], marks[7]["y"]
    browser.ask("svg = document.querySelector('svg:has(.mark)'); svg.scrollIntoView()")
    point = f"new DOMPoint({at[0]}, {at[1]}).matrixTransform(svg.getScreenCTM())"
    x, y = browser.ask(f"[{point}.x, {point}.y]")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    near = [mark["text"] for mark in marks if (mark["x"], mark["y"]) == at]
    assert browser.ask("document.querySelector('output').textContent") in near
    texts = [mark["text"] for mark in marks]
    assert any(HOSTILE in text for text in texts) and any(HOSTILE_CLASS in text for text in texts)
    assert browser.ask("[...document.images].every(i => i.src.startsWith('data:'))")
    assert browser.complaints() == []


def test_without_scripts_all_is_there(browser, pages):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(pages["fake"])
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    text = browser.ask("document.body.innerText")
    assert "What it found" in text and not browser.ask("document.querySelector('label').checkVisibility()")
    assert browser.ask("document.querySelector('.peek img').naturalWidth") > 0


def test_the_policy_stops_what_is_injected(browser, pages):
    """Were a name to become an element after all, it would not run and not load."""
    path = pages["hostile"].with_name("injected.html")
    text = pages["hostile"].read_text()
    path.write_text(text.replace("</main>", f"{HOSTILE}<script>window.hurt = 1</script></main>"))
    browser.open(path)
    assert browser.ask("window.hurt") is None and browser.complaints()


def test_it_prints(browser, pages):
    browser.open(pages["fake"])
    printed = base64.b64decode(browser.call("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF") and 2 <= printed.count(b"/Type /Page\n") <= 20
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert not browser.ask("document.querySelector('nav').checkVisibility()")
    browser.call("Emulation.setEmulatedMedia", media="")
