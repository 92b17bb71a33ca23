"""The table of a split that a person reads: what it says is what the manifests hold."""

from __future__ import annotations

from typing import Any

from skinsynth.data import summary


def sample(group: str, **more: Any) -> dict[str, Any]:
    return {"group": group, "patient_id": group, "sex": None, "age": None, "site": None, "diagnosis": None, **more}


TRAIN = [sample("P1", age=40, sex="female", site="torso", diagnosis="nevus"), sample("P1", age=45, sex="female", site="head/neck", diagnosis="nevus"),
         sample("P2", age=80, sex="male", site="torso"), sample("P3", sex="male", site="torso", diagnosis="nevus|atypical")]


def manifest(split: str, **classes: list[dict[str, Any]]) -> dict[str, Any]:
    found = {label[1:]: summary.statistics(samples) for label, samples in classes.items()}
    return {"split": split, "count": sum(map(len, classes.values())), "groups": 3, "patients": 1234, "statistics": found}


def test_statistics_count_what_is_known_and_what_is_not() -> None:
    assert summary.statistics(TRAIN) == {
        "images": 4, "groups": 3, "patients": 3, "age": {"known": 3, "mean": 55.0, "min": 40, "max": 80}, "sex": {"female": 2, "male": 2},
        "site": {"head/neck": 1, "torso": 3}, "diagnosis": {"nevus": 2, "nevus|atypical": 1, "unknown": 1}}
    nothing = summary.statistics([sample("P1", patient_id=None)])
    assert nothing["patients"] == 0
    assert nothing["age"] == {"known": 0, "mean": None, "min": None, "max": None}


def test_one_row_per_split_and_class() -> None:
    rows = summary.rows([manifest("train", c0=TRAIN, c1=TRAIN[:1]), manifest("test", c0=TRAIN[:1], c1=[sample("P9", age=0)])])
    assert rows[0] == ("train", "benign", "4", "80.0 %", "3", "3", "55.0 (40-80)", "50.0 %", "50.0 %", "torso 75.0 %, head/neck 25.0 %",
                       "nevus 50.0 %, nevus|atypical 25.0 %, unknown 25.0 %")
    assert [row[:4] for row in rows[1:]] == [("train", "malignant", "1", "50.0 %"), ("test", "benign", "1", "20.0 %"),
                                             ("test", "malignant", "1", "50.0 %")]
    assert rows[3][6:] == ("0.0 (0-0)", "0.0 %", "0.0 %", "unknown 100.0 %", "unknown 100.0 %")
    assert summary.rows([manifest("train", c0=[sample("P1")])])[0][6] == "unknown"


def test_the_markdown_has_a_cell_for_every_column() -> None:
    text = summary.markdown("set: 64 px, seed 0", [manifest("train", c0=TRAIN, c1=TRAIN[:1])], ["5 rows, 0 set aside"])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {len(summary.COLUMNS) + 1}
    assert len(table) == 4
    assert "nevus/atypical 25.0 %" in table[2]
    assert text.startswith("# set: 64 px, seed 0\n")
    assert text.endswith("- train: 5 images, 3 groups, 1,234 patients\n- 5 rows, 0 set aside\n")
