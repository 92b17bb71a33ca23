"""What is known of an image, in words."""

from dataclasses import replace

import pytest
from conftest import REAL

from skinsynth.data import isic
from skinsynth.data.captions import caption
from skinsynth.data.isic import Row


def test_captions_say_what_is_known() -> None:
    assert caption(Row("a", 1, sex="female", age=60, site="upper extremity", diagnosis="melanoma")) == (
        "a dermoscopy image of a melanoma on the upper extremity of a woman in her 60s")
    assert caption(Row("a", 0, sex="male", age=15, site="head/neck", diagnosis="unknown")) == (
        "a dermoscopy image of a benign skin lesion on the head or neck of a boy in his teens")
    assert caption(Row("a", 0, age=85, diagnosis="actinic keratosis")) == "a dermoscopy image of an actinic keratosis of a person in their 80s"
    assert caption(Row("a", 0, sex="female", age=5)) == "a dermoscopy image of a benign skin lesion of a girl under 10"
    assert caption(Row("a", 0, sex="male")) == "a dermoscopy image of a benign skin lesion of a man"
    assert caption(Row("a", 1)) == "a dermoscopy image of a malignant skin lesion"


@pytest.mark.skipif(not (REAL / "isic2020_groundtruth.csv").exists(), reason=f"{REAL} with the ISIC 2020 ground truth is not here")
def test_isic_2020_has_some_hundred_captions() -> None:
    rows, _ = isic.read_metadata(REAL / "isic2020_groundtruth.csv")
    assert len({caption(row) for row in rows}) == 361
    assert len({caption(replace(rows[0], age=year)) for year in range(100)}) == 11  # where ages are known to the year
