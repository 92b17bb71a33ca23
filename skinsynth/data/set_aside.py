"""What is set aside: as a list for people, and how much of it is borne."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path

from skinsynth.data import isic, withdrawn
from skinsynth.errors import UserError
from skinsynth.files import write_text
from skinsynth.knobs import Config

NO_FAULT = (withdrawn.ASIDE, isic.AGAIN)  # that a patient withdrew is no fault of the data, and a row that stands there twice no image that is lost


def write(folder: Path, aside: list[dict[str, str]]) -> Path:
    """``set_aside.csv``: split (empty: it never reached one), key, reason. No file where there is nothing to list."""
    path = folder / "set_aside.csv"
    if aside:
        text = io.StringIO()
        writer = csv.DictWriter(text, ("split", "key", "reason"), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(aside)
        write_text(path, text.getvalue())
    return path


def check(cfg: Config, folder: Path, rows: int, aside: list[dict[str, str]], again: str) -> None:
    """Stops where more of the rows are unusable than the user allows; the list is written to ``folder``. ``again``: what must be deleted then.

    Raises:
        UserError: so many are; the reasons, the first names, where all are listed.
    """
    bad = [a for a in aside if a["reason"] not in NO_FAULT]
    if len(bad) <= cfg.prepare.max_bad * rows:
        return
    path = write(folder, aside)
    reasons = "; ".join(f"{n} x {reason}" for reason, n in Counter(a["reason"] for a in bad).most_common(6))
    first = ", ".join(a["key"] for a in bad[:5])
    raise UserError(f"{len(bad)} of {rows} images cannot be used, more than prepare.max_bad={cfg.prepare.max_bad:g} allows: {reasons}. "
                    f"The first: {first}. All are listed in {path}. Mend them, delete {again} and prepare again, or raise prepare.max_bad")
