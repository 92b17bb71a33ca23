"""A shard whose making may be broken off and gone on with: for units that take long.

``save`` makes what was added so far survive, as two files that nobody takes for a shard: the tar as far as it goes, and its index.
The next writer of the shard copies them, whoever left them, and never touches them: their owner may be alive on another host.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from skinsynth.data.shards import ShardWriter
from skinsynth.files import owner, write_text

SAVED = ("keys", "members", "columns", "set_aside")
CHUNK = 1 << 22


class ResumableWriter(ShardWriter):
    """``state`` is what the last ``save`` was given, or ``{}`` where there is nothing to go on from."""

    state: dict[str, Any]

    def _begin(self) -> None:
        self.index = self.folder / f".{self.name}.json.{owner()}.tmp"
        self.state = {}
        for saved in sorted(filter(None, map(_read, self.folder.glob(f".{self.name}.json.*.tmp"))), key=lambda s: -s["offset"]):
            if self._copy(saved):
                break

    def _copy(self, saved: dict[str, Any]) -> bool:
        """False where the tar is not what the index says: then nothing is taken of it."""
        try:
            with open(saved["tar"], "rb") as tar:
                while self.offset < saved["offset"] and (chunk := tar.read(min(CHUNK, saved["offset"] - self.offset))):
                    self._write(chunk)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                raise
        if self.sha256.hexdigest() != saved["sha256"]:
            self.file.seek(0)
            self.file.truncate()
            self.offset, self.sha256 = 0, type(self.sha256)()
            return False
        for name in SAVED:
            setattr(self, name, saved[name])
        self.state = saved["state"]
        return True

    def save(self, state: dict[str, Any]) -> None:
        """What was added until now is kept if the process dies, and ``state`` with it."""
        self.file.flush()
        os.fsync(self.file.fileno())
        found = {name: getattr(self, name) for name in SAVED}
        write_text(self.index, json.dumps({"offset": self.offset, "sha256": self.sha256.hexdigest(), "state": state, **found}))

    def _leave(self) -> None:
        if not self.index.exists():  # nothing was saved, or all is done
            super()._leave()


def _read(index: Path) -> dict[str, Any] | None:
    try:
        return {**json.loads(index.read_text()), "tar": index.with_name(index.name.replace(".json.", ".tar.", 1))}
    except (FileNotFoundError, ValueError):
        return None
