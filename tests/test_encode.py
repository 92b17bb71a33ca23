from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from skinsynth.data import codec, concepts, shards
from skinsynth.data.concepts import Source
from skinsynth.data.dataset import Dataset
from skinsynth.data.shards import ShardWriter, write_manifest
from skinsynth.files import read_json
from skinsynth.knobs import Concept, Config, Images
from skinsynth.stages.encode import _readable


def test_with_skip_a_bad_image_has_no_latents_and_is_noted(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train", 0) as shard:
        for i in range(4):
            shard.add(f"k{i}", {"jpg": codec.encode_jpeg(np.full((16, 16, 3), 50 * i, np.uint8), 95)}, target=0)
    write_manifest(tmp_path / "train", 1)
    train = Dataset.open(tmp_path / "train")
    os.truncate(tmp_path / "train/00000.tar", train.places[3][1]["jpg"][0] + 9)
    with ShardWriter(tmp_path / "latents", 0) as shard:
        assert _readable(Dataset.open(tmp_path / "train", tolerate=True), [1, 3], shard) == [1]
    part = read_json(shards.part_path(tmp_path / "latents", 0))
    size = train.places[3][1]["jpg"][1]
    assert part["set_aside"] == [{"key": "k3", "reason": f"is cut off: its jpg has 9 bytes of {size}"}]


def test_the_prompts_of_the_sources_are_embedded_once_each_and_the_empty_one() -> None:
    found = [Source("one", (0, 1), ("b", "a"), False, (2,)), Source("two", (2,), ("b",), True, (1,))]
    assert concepts.prompts(found) == ["", "a", "b"]


def test_instance_images_are_class_images_only_where_the_others_are_too_few(tmp_path: Path) -> None:
    """Of one filter; a wider one says that the class is all that there is."""
    with ShardWriter(tmp_path / "train", 0) as shard:
        for i in range(40):
            shard.add(f"k{i}", {"jpg": b""}, target=i % 2)
    write_manifest(tmp_path / "train", 1)
    train = Dataset.open(tmp_path / "train")
    for count, where, shared in ((15, {"target": 1}, 0), (18, {"target": 1}, 3), (None, {"target": 1}, 5), (35, {}, None)):
        cfg = Config()
        cfg.finetune.global_batch = 4
        cfg.finetune.concepts = {"mel": Concept("a sks", "a lesion", Images({"target": 1}, 5), Images(dict(where), count))}
        instance, others = concepts.sources(cfg, train)
        assert len(instance.samples) == 5
        both = set(instance.samples) & set(others.samples)
        assert len(both) == shared if shared is not None else both
