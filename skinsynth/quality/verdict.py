"""What may be concluded from a comparison, and what may not, in plain sentences.

A difference is claimed for AUROC alone, named before anything is seen: where the interval leaves 0 out, and p, corrected for the number of
comparisons with the first arm, is at most 0.05; of two trainings of an arm never. All other figures are shown, none is tested for. Where an arm was
trained once only, a difference is one between trained networks: whether the images or the training's chance made it, nothing can tell.
"""

from __future__ import annotations

from typing import Any

from skinsynth.quality import compare

LEVEL = 0.05
FEW_POSITIVE = 100  # malignant test images below which the reader is warned
FEW_SEEDS = 5


def claimed(row: dict[str, Any]) -> bool:
    """True where an AUROC row of ``differences`` speaks of a difference. Not of two trainings of an arm: where these are alike by chance, both tests
    are too bold."""
    return apart(row) and min(row["seeds"]) != 2


def apart(row: dict[str, Any]) -> bool:
    """True where the interval leaves 0 out, and p as corrected says so, too."""
    return row["ci"] is not None and (row["ci"][0] > 0 or row["ci"][1] < 0) and row["p_holm"] is not None and row["p_holm"] <= LEVEL


def verdict(found: dict[str, Any], where: str = "this run") -> dict[str, Any]:
    """``headline`` (str), ``may`` and ``may_not`` (lists of str) of what ``compare`` gave. The first arm is what the others are held against.

    Without ``subgroups`` in ``found`` they were not looked at, and nothing is said of them.
    """
    first, rows = next(iter(found["arms"]), None), found.get("differences", [])
    main = [row for row in compare.main(rows, first) if row["value"] is not None]
    unpaired = _of_others([row["arms"][0] for row in rows if row["metric"] == "auroc" and row["arms"][1] == first and not row["paired"]], first)
    if not main:
        return {"headline": "There is nothing to compare yet.", "may": [],
                "may_not": ["It takes two trained arms and the same test images, of both classes, to say whether synthetic images help; "
                            "they are not here.", *unpaired]}
    comparisons, others = len(compare.tested(main)), [row for row in main if not row.get("same")]
    return {"headline": _headline(main, where), "may": [_figures(row, found["arms"], comparisons) for row in main],
            "may_not": [*unpaired, *_of_seeds(found["arms"]), *_of_zero(others), *_of_images(found), *_of_many(main, comparisons),
                        *_of_subgroups(found), "The numbers hold for these data and settings. Images of another clinic, camera or skin type were not "
                        "looked at, and nothing here is fit for a patient."]}


def _of_others(arms: list[str], first: str | None) -> list[str]:
    """Arms that were judged on other images differ by these too, whatever the interval says."""
    return [f"Nothing is concluded of {_listed(arms)}: other test images than those of {first}, which alone can make a difference."] if arms else []


def _headline(rows: list[dict[str, Any]], where: str) -> str:
    """What the arms of several trainings show; those of single ones after them, as what they are; last those that are the first arm itself."""
    same, rows = [row for row in rows if row.get("same")], [row for row in rows if not row.get("same")]
    single, several = [row for row in rows if min(row["seeds"]) == 1], [row for row in rows if min(row["seeds"]) > 1]
    found = _sentences(several, where, "{}")
    if single:
        once = [rows[0]["arms"][1]] * (rows[0]["seeds"][1] == 1) + [row["arms"][0] for row in single if row["seeds"][0] == 1]
        found += [f"One training each of {_listed(once)} was compared." if len(once) > 1 else f"Of {once[0]} one training alone was compared.",
                  *_sentences(single, where, "the trained {}"),
                  "That holds for these trained networks and says nothing of the method, since another training may turn out otherwise: train each "
                  "arm with several seeds (classify.seeds)."]
    if same:
        found.append(f"{_listed([row['arms'][0] for row in same])} and {same[0]['arms'][1]} have the very same predictions of every image: they "
                     "are the same trained networks, and there is nothing to compare.")
    return " ".join(found)


def _sentences(rows: list[dict[str, Any]], where: str, name: str) -> list[str]:
    """One each for those that are better than the first arm, that are worse, without a clear difference, of two trainings, and for the rest."""
    kinds: dict[str, list[str]] = {}
    for row in rows:
        kind = ("better" if row["value"] > 0 else "worse") if claimed(row) else "two" if apart(row) else "unclear" if row["ci"] else "unknown"
        kinds.setdefault(kind, []).append(name.format(row["arms"][0]))
    first = name.format(rows[0]["arms"][1]) if rows else ""
    found = [f"In {where}, {_listed(kinds[kind])} told malignant from benign {kind} than {first}." for kind in ("better", "worse") if kind in kinds]
    found += [f"There is no clear difference between {first} and {_listed(kinds['unclear'], 'or')}."] if "unclear" in kinds else []
    found += [f"Of {first} and {_listed(kinds['two'])} there are too few trainings to claim the difference that they show: two of an arm may be "
              "alike by chance; train each with three seeds or more (classify.seeds)."] if "two" in kinds else []
    return found + ([f"How {_listed(kinds['unknown'])} and {first} differ cannot be told: there is no interval."] if "unknown" in kinds else [])


def _listed(names: list[str], word: str = "and") -> str:
    return f" {word} ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _figures(row: dict[str, Any], arms: dict[str, Any], comparisons: int) -> str:
    (other, first), delong = row["arms"], row.get("delong")
    if row.get("same"):
        return f"AUROC {arms[first]['auroc']['value']:.3f} ({other} and {first}, which are the same trained networks)."
    interval = f"95 % interval {row['ci'][0]:+.3f} to {row['ci'][1]:+.3f}, {p_text(row['p'])}" if row["ci"] else "interval unknown"
    text = (f"AUROC {arms[other]['auroc']['value']:.3f} ({other}) against {arms[first]['auroc']['value']:.3f} ({first}): a difference of "
            f"{row['value']:+.3f}, {interval}")
    text += f" ({p_text(row['p_holm'])} with all {comparisons} comparisons in mind)" if row["p_holm"] != row["p"] else ""
    return text + (f"; DeLong's test, with the trained networks as they are: {p_text(delong['p'])}." if delong and delong["p"] is not None else ".")


def p_text(p: float | None) -> str:
    return "p unknown" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _of_seeds(arms: dict[str, Any]) -> list[str]:
    single = [arm for arm, row in arms.items() if len(row["auroc"]["seeds"]) == 1]
    fewest = min((len(row["auroc"]["seeds"]) for arm, row in arms.items() if arm not in single), default=FEW_SEEDS)
    found = []
    if single:
        whose = "per arm" if len(single) == len(arms) else f"of {_listed(single)}"
        found.append(f"One training run {whose} cannot prove an effect: another seed would give other numbers, and that variation is not in the "
                     "interval.")
    if fewest < FEW_SEEDS:
        found.append(f"{fewest} training runs per arm show only roughly how much training varies; the intervals are wider for it.")
    return found


def _of_zero(rows: list[dict[str, Any]]) -> list[str]:
    """No evidence of a difference is none of equality."""
    return [f"Nor is it shown that {row['arms'][0]} and {row['arms'][1]} are equal: "
            + (f"the interval holds everything from {row['ci'][0]:+.3f} to {row['ci'][1]:+.3f}." if row["ci"] else
               "there is no interval, since resamples of these patients do not differ, or too many lack a class.")
            for row in rows if not claimed(row)]


def _of_images(found: dict[str, Any]) -> list[str]:
    test = found["test"]
    if test["positive"] >= FEW_POSITIVE:
        return []
    return [f"Of {test['images']} test images {test['positive']} are malignant: with so few, sensitivities and the ends of the intervals are coarse."]


def _of_many(rows: list[dict[str, Any]], comparisons: int) -> list[str]:
    if all(row.get("same") for row in rows):
        return []
    all_of_them = f", p corrected for {comparisons} comparisons with {rows[0]['arms'][1]} (Holm)" if comparisons > 1 else ""
    return [f"AUROC alone was tested{all_of_them}. Among so many other figures some leave 0 out by chance: they describe, and prove nothing."]


def _of_subgroups(found: dict[str, Any]) -> list[str]:
    rows = found.get("subgroups")
    if rows is None:
        return []
    small = sum(row["small"] for row in rows)
    if not rows:
        return ["Nothing is said of subgroups: the predictions do not name sex, age or site."]
    return [f"{small} of {len(rows)} subgroups hold fewer than 10 images of a class: too few to say how the arms do there."] if small else []
