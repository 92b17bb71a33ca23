"""The report in a real browser, headless Chromium, at the widths of a desk and of a phone: pictures load, nothing is logged, nothing sticks out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_pages import stop
from test_report import make

from skinsynth.files import write_json
from skinsynth.pages import several
from skinsynth.run import Task
from skinsynth.stages import report as stage

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH to open the report in")

LOOK = """
<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument;
  page.querySelectorAll("details").forEach(d => d.open = true);
  if (location.hash === "#print") for (const sheet of page.styleSheets) for (const rule of sheet.cssRules)
    if (rule.media && rule.media.mediaText === "print") rule.media.mediaText = "all", page.documentElement.style.scrollbarWidth = "none";
  const box = e => e.getBoundingClientRect(), wide = frame.contentWindow.innerWidth;
  const inside = e => e.closest(".wide, pre, svg, .skip") !== null;
  const pictures = [...page.images].map(i => i.complete && i.naturalWidth > 0);
  const sticking = [...page.querySelectorAll("body *")].filter(e => !inside(e) && box(e).right > wide + 1).map(e => e.tagName + "." + e.className);
  const scrollers = [...page.querySelectorAll(".wide, pre")].filter(e => e.scrollWidth > e.clientWidth + 1);
  page.querySelector("a").focus();
  document.title = JSON.stringify({pictures, sticking, scroll: page.documentElement.scrollWidth - page.documentElement.clientWidth, width: wide,
    unreachable: scrollers.filter(e => e.tabIndex < 0).length, scrollers: scrollers.length, skip: box(page.activeElement).left >= 0,
    cut: scrollers.filter(e => e.matches(".wide")).map(e => `${e.ariaLabel}: ${e.scrollWidth} of ${e.clientWidth}`),
    navigated: getComputedStyle(page.querySelector("nav") || page.body).display !== "none",
    text: parseFloat(getComputedStyle(page.body).fontSize)});
});
</script>"""


A4 = 718  # CSS pixels: 210 mm less the centimetre on either side that browsers leave


def look(page: Path, folder: Path, width: int, printed: bool = False) -> tuple[dict, str]:
    """(what a script outside of the page saw of it in a frame of that width, what the browser logged). ``printed``: by its rules for print."""
    frame = folder / f"frame-{width}.html"
    frame.write_text(f'<!DOCTYPE html><meta charset="utf-8"><title></title><iframe width="{width}" height="800" src="{page.name}"></iframe>{LOOK}')
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--allow-file-access-from-files",
                           f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom", frame.as_uri() + "#print" * printed],
                          capture_output=True, text=True, timeout=120, check=False)
    title = re.search("<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-2000:]
    assert title.group(1), done.stderr[-2000:]
    return json.loads(html.unescape(title.group(1))), "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with everything, one of a run that is not complete, one of which the set did not pass, and one of two, as plain files side by side."""
    folder = tmp_path_factory.mktemp("browser")
    cfg, run = make(folder / "whole", arms=("real", "half", "more"), strengths=(0.6, 1.0, 1.6))
    stage.report(cfg, run, Task())
    broken_cfg, broken = make(folder / "broken")
    shutil.rmtree(broken.node("screen"))
    broken.done_path("classify/hybrid").unlink()
    write_json(broken.failed_path("classify/hybrid"), {"node": "classify/hybrid", "message": "a/very/long/path/" * 30})
    stage.report(broken_cfg, broken, Task())
    stopped_cfg, stopped = make(folder / "stopped")
    shutil.rmtree(stopped.path / "classify")
    stop(stopped)
    stage.report(stopped_cfg, stopped, Task())
    found = {"stopped": stopped.path / "report/index.html", "whole": run.path / "report/index.html", "broken": broken.path / "report/index.html",
             "several": several.reports([run.path, broken.path], folder / "several")}
    return {name: Path(shutil.copy(path, folder / f"{name}.html")) for name, path in found.items()}


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize(("name", "least"), [("whole", 8), ("broken", 4), ("stopped", 5), ("several", 1)])
def test_it_is_seen_as_it_is_meant(pages: dict[str, Path], name: str, least: int, width: int) -> None:
    seen, logged = look(pages[name], pages[name].parent, width)
    assert logged == ""
    assert len(seen["pictures"]) >= least
    assert all(seen["pictures"])
    assert seen["width"] == width
    assert (seen["sticking"], seen["scroll"]) == ([], 0)
    assert seen["unreachable"] == 0
    assert seen["scrollers"] > 0 or width > 360, "nothing scrolls on a phone: are the tables there?"
    assert seen["skip"], "the link that skips to the report is not seen when it has the focus"
    assert seen["text"] >= 16


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of five arms, with names as long as people give them."""
    folder = tmp_path_factory.mktemp("print")
    cfg, run = make(folder / "run", arms=("real", "half", "more", "mostly-synthetic", "synthetic-first"), strengths=(0.6, 1.0, 1.6, 1.2, 1.1))
    stage.report(cfg, run, Task())
    return Path(shutil.copy(run.path / "report/index.html", folder / "five.html"))


def test_on_paper_no_table_is_cut_off(five: Path) -> None:
    """Nobody can scroll there."""
    seen, logged = look(five, five.parent, A4, printed=True)
    assert (logged, seen["width"], seen["navigated"]) == ("", A4, False)
    assert (seen["cut"], seen["sticking"]) == ([], [])
    seen, _ = look(five, five.parent, A4)
    assert seen["navigated"]
    assert seen["cut"], "on a screen of that width they scroll: are the tables there?"


def test_the_look_finds_what_is_wrong(tmp_path: Path) -> None:
    """The test's own eyes: a picture that does not load, an error on the console, and a box that is too wide."""
    page = tmp_path / "bad.html"
    page.write_text('<!DOCTYPE html><body><a href="#">x</a><img src="none.png"><div class="big" style="width: 900px">x</div>'
                    '<script>console.error("oh")</script></body>')
    seen, logged = look(page, tmp_path, 360)
    assert seen["pictures"] == [False]
    assert "DIV.big" in seen["sticking"]
    assert seen["scroll"] > 500
    assert "oh" in logged
