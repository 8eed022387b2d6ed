"""The report in a real Chromium: filters by keyboard, dark mode, a phone, no request and no error."""

from __future__ import annotations

import numpy as np
import pytest
from chromium import Chromium, find_chromium
from test_html_report import collect, dataset  # noqa: F401  (a fixture)

from the_mask.evaluation.html import write_report

EXECUTABLE = find_chromium()
pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium, e.g. Debian's package chromium")
pytest.importorskip("jinja2", reason="pip install 'the_mask[report]'")

SHOWN = "[...document.querySelectorAll('figure')].filter(f => f.offsetParent).length"
ROWS = """[...document.querySelectorAll("tr[data-class]")].filter((row) => row.offsetParent)
  .map((row) => row.cells[0].textContent.trim())"""
# WCAG's contrast of text and what is behind it, of every element with text of its own.
CONTRAST = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] / 255 + below[i] * (1 - top[3] / 255)).concat(255);
  const behind = (e) => { const own = rgba(getComputedStyle(e).backgroundColor);
    return e.parentElement ? over(own, behind(e.parentElement)) : over(own, [255, 255, 255, 255]); };
  const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (c) => .2126 * linear(c[0] / 255) + .7152 * linear(c[1] / 255) + .0722 * linear(c[2] / 255);
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!text || !e.offsetParent || e.matches("option, script")) continue;
    const below = behind(e), a = light(over(rgba(getComputedStyle(e).color), below)), b = light(below);
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName + " " + e.textContent.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
})()"""


@pytest.fixture
def report(dataset):  # noqa: F811
    runs = [collect(dataset / name, name)[0] for name in ("one", "two")]
    return write_report(dataset / "report.html", runs)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    with Chromium(str(EXECUTABLE), tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def browser(started):
    started.errors.clear()
    started.requests.clear()
    yield started
    assert started.errors == []
    assert started.requests
    assert all(address.startswith(("file:", "data:")) for address in started.requests), started.requests


def test_filters_by_keyboard_and_mouse(report, browser):
    browser.open(report)
    assert browser.evaluate(SHOWN) == 0  # run "one" has no wrong pixel
    # From the top of the page to the controls and through their values, without a mouse.
    for _ in range(10):
        browser.press("Tab")
        if browser.evaluate("document.activeElement.id") == "run":
            break
    assert browser.evaluate("document.activeElement.matches(':focus-visible')")
    browser.press("ArrowDown")
    assert browser.evaluate("document.getElementById('run').value") == "1"
    assert browser.evaluate(SHOWN) == 3  # one bad frame, two flickers
    assert browser.evaluate("document.getElementById('shown').innerText") == "3 frames shown"

    browser.evaluate("document.getElementById('class').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    assert set(browser.evaluate(ROWS)) == {"<b>car</b>"}
    assert browser.evaluate(SHOWN) == 3  # its cars were taken for road
    browser.press("ArrowDown")
    assert set(browser.evaluate(ROWS)) == {"sky & clouds"}
    assert browser.evaluate(SHOWN) == 0
    browser.press("Home")
    assert len(set(browser.evaluate(ROWS))) == 3

    browser.evaluate("document.getElementById('video').focus()")
    browser.press("ArrowDown")
    assert browser.evaluate("document.getElementById('video').value") == "a"
    assert browser.evaluate(SHOWN) == 0
    browser.press("ArrowDown")
    assert browser.evaluate(SHOWN) == 3

    second = "document.querySelectorAll('details')[1].open"
    assert not browser.evaluate(second)
    browser.click("details:nth-of-type(2) summary")
    assert browser.evaluate(second)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390], ids=["desk", "phone"])
def test_it_can_be_read(report, browser, width, dark):
    browser.open(report, width, dark=dark)
    browser.evaluate("document.getElementById('run').value = '1'; show()")
    browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    contrast, where = browser.evaluate(CONTRAST)
    assert contrast >= 4.5, (contrast, where)
    # Nothing but tables scrolls sideways, and rows of the summary are no towers of single words.
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.evaluate("Math.max(...[...document.querySelectorAll('section tr')].map(r => r.offsetHeight))") < 160
    assert browser.evaluate("[...document.images].every(i => !i.offsetParent || (i.complete && i.naturalWidth > 0))")
    picture = browser.screenshot()
    assert picture.shape[1] == width
    assert (np.median(picture) < 60) == dark
    assert picture.std() > 10
