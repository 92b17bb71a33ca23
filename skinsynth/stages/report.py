"""report: what came out, for people (``index.html``, one file) and for scripts (``report.json``). A pure reader of the run.

``report.json`` holds no times, paths or versions: a run that was interrupted gives the same bytes as one that was not.
"""

from __future__ import annotations

from skinsynth.files import write_json, write_text
from skinsynth.knobs import Config
from skinsynth.pages import cards, page, results
from skinsynth.run import RunDir, Task

NODE = "report"


def report(cfg: Config, run: RunDir, task: Task) -> None:
    """Writes ``report/report.json`` and ``report/index.html``, a datasheet beside the synthetic set and a model card beside the weights.

    What is missing from the run is said on the page, and the report of such a run does not count as done.

    Raises:
        UserError: predictions that are damaged, or of other test images than the first arm's.
    """
    summary = results.summary(cfg, run)
    folder = run.path / "report"
    write_json(folder / "report.json", summary)
    write_text(folder / "index.html", page.render(cfg, run, summary))
    cards.write(cfg, run, summary)
    if results.missing(cfg, run):
        run.done_path(NODE).unlink(missing_ok=True)
    else:
        run.finish(NODE, {"arms": len(summary["arms"])}, [folder / "report.json", folder / "index.html"])
