"""Files of JSON lines that grow with a run, and outlive a full disk."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)


class JsonLines:
    """Appends records to a file, a line each, on the disk as soon as they are added.

    A line for which there is no room waits, and is written with a later one once there is: a checkpoint that is being
    written can fill the disk for a moment. No line is ever cut.

    Args:
        path: made if it is not there.
        start: lines of later steps are dropped, and those that a kill has cut.
    """

    def __init__(self, path: Path, *, start: int) -> None:
        self.path = path
        self.waiting = b""
        """What could not be written so far."""
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _is_kept(line, start)]
            if len(kept) < len(lines):
                # Never without the lines that stay, whatever happens meanwhile.
                beside = path.with_name(f".{path.name}.partial")
                beside.write_text("".join(kept))
                os.replace(beside, path)
        self.file = path.open("ab", buffering=0)

    def add(self, record: Mapping[str, Any]) -> bool:
        """Whether everything is on the disk now; if not, lines wait.

        Raises:
            OSError: anything but a full disk.
        """
        return self._write(json.dumps(dict(record)).encode() + b"\n")

    def close(self) -> int:
        """Lines that are lost, because there was no room to the end."""
        self._write(b"")
        self.file.close()
        return self.waiting.count(b"\n")

    def _write(self, more: bytes) -> bool:
        self.waiting += more
        end = self.file.seek(0, os.SEEK_END)
        left = memoryview(self.waiting)
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            if error.errno not in _FULL:
                raise
            self.file.truncate(end)
            return False
        self.waiting = b""
        return True


def _is_kept(line: str, start: int) -> bool:
    """A kill can leave half a line."""
    try:
        return line.endswith("\n") and bool(json.loads(line)["step"] <= start)
    except (ValueError, KeyError):
        return False
