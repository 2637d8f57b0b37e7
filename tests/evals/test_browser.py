"""The page in a real browser: no error, no request, every plot drawn, nothing wider than a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlparse

import pytest
from report_runs import RUNS

from zoo.evals.core.report import write_html

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), "")
WIDTHS = (400, 1400)
# In a frame, as a headless window is never narrower than 500. The page says what it sees when it is laid out, the outer
# one takes that for its title, which --dump-dom prints.
PROBE = """<script>
addEventListener("load", () => {
  const drawn = [...document.querySelectorAll("figure svg")].filter((x) => x.getBoundingClientRect().height > 100);
  parent.postMessage({
    plots: document.querySelectorAll("figure").length, drawn: drawn.length,
    width: document.documentElement.scrollWidth, window: innerWidth,
  }, "*");
});
</script>"""
FRAME = """<!doctype html><title></title>
<script>addEventListener("message", (event) => { document.title = JSON.stringify(event.data); });</script>
<iframe src="page.html" style="border: 0; width: %dpx; height: 900px"></iframe>"""


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; Debian's package is `chromium`")
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_the_page(tmp_path: Path, width: int) -> None:
    page = write_html(RUNS, tmp_path / "page.html")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    frame, log = tmp_path / "frame.html", tmp_path / "net.json"
    frame.write_text(FRAME % width, encoding="utf-8")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = (
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *quiet),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1500,1000", f"--log-net-log={log}"),
        *("--virtual-time-budget=2000", "--dump-dom", frame.as_uri()),
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(title[1].replace("&quot;", '"'))
    assert seen["plots"] == seen["drawn"] == 9
    assert seen["width"] <= seen["window"] == width
    assert [url for url in requests(log) if urlparse(url).scheme not in ("file", "data")] == []


def requests(log: Path) -> list[str]:
    """The addresses of all requests that the page made."""
    data = json.loads(log.read_text())
    kind = data["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    events = [event["params"] for event in data["events"] if event["type"] == kind and "params" in event]
    return [event["url"] for event in events if "url" in event and event.get("initiator", "") != "not an origin"]
