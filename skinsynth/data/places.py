"""Where each sample's files lie, in few bytes: every task opens the whole index of a dataset, which may be of a million images."""

from __future__ import annotations

from array import array
from bisect import bisect_left

NONE = -1  # no such file; no checksum (older parts)


class Places:
    """``[number]`` gives (shard number, extension -> [offset, bytes] and, but in older parts, CRC-32). 24 bytes a file. ``shards`` are ascending."""

    def __init__(self) -> None:
        self.shards = array("i")
        self._files: dict[str, array[int]] = {}  # extension -> offset, bytes, CRC-32 of one sample after the other

    def append(self, shard: int, members: dict[str, list[int]]) -> None:
        before = 3 * len(self.shards)
        self.shards.append(shard)
        for extension, (offset, size, *checksum) in members.items():
            column = self._files.setdefault(extension, array("q"))
            column.extend([NONE] * (before - len(column)))
            column.extend((offset, size, checksum[0] if checksum else NONE))

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> tuple[int, dict[str, list[int]]]:
        shard, found = self.shards[number], {}
        begin = 3 * (number % len(self.shards))
        for extension, column in self._files.items():
            place = column[begin:begin + 3]
            if place and place[0] != NONE:
                found[extension] = [value for value in place if value != NONE]
        return shard, found

    def of_shard(self, shard: int) -> range:
        """The numbers of the samples of one shard."""
        return range(bisect_left(self.shards, shard), bisect_left(self.shards, shard + 1))
