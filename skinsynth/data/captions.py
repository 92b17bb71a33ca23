"""What is known of an image, in words."""

from __future__ import annotations

import re

from skinsynth.data.isic import Row

SITES = {"head/neck": "on the head or neck", "head and neck": "on the head or neck", "palms/soles": "on the palm or sole",
         "oral/genital": "in the oral or genital area", "anogenital region": "in the anogenital region", "genital": "in the genital area",
         "acral": "on acral skin"}  # others: "on the ..."


def caption(row: Row) -> str:
    """One sentence of what is known, for text-conditioned training. Ages by the decade: a dataset then has some hundred captions, and
    each text need be encoded only once."""
    known = phrases(row)
    named = known["diagnosis"] or f"{'malignant' if row.target else 'benign'} skin lesion"
    return " ".join(word for word in (f"a dermoscopy image of {_article(named)}", known["site"], known["person"]) if word)


def phrases(row: Row) -> dict[str, str]:
    """The words for ``diagnosis``, ``site`` and ``person``, each empty where it is unknown."""
    diagnosis = row.diagnosis.replace("_", " ") if row.diagnosis and row.diagnosis != "unknown" else ""
    site = SITES.get(row.site, f"on the {row.site}") if row.site else ""
    return {"diagnosis": diagnosis, "site": site, "person": _person(row.age, row.sex)}


def _person(age: int | None, sex: str | None) -> str:
    if age is None and sex not in ("male", "female"):
        return ""
    young = age is not None and age < 18
    person = {"male": "boy" if young else "man", "female": "girl" if young else "woman"}.get(sex or "", "child" if young else "person")
    return f"of a {person}" + ("" if age is None else f" {_decade(age, sex)}")


def _decade(age: int, sex: str | None) -> str:
    """``in her 40s`` for 40 to 49 years."""
    whose = {"male": "his", "female": "her"}.get(sex or "", "their")
    return "under 10" if age < 10 else f"in {whose} teens" if age < 20 else f"in {whose} {age // 10 * 10}s"


def _article(noun: str) -> str:
    return f"an {noun}" if re.match(r"[aeiouAEIOU]", noun) else f"a {noun}"
