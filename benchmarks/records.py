"""The rows of a benchmark, a JSON line each, written as they are measured, so that a rerun goes on where one ended."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


class Cell(Protocol):
    """What is measured, by a name of its own."""

    @property
    def key(self) -> str: ...

    @property
    def identity(self) -> Row:
        """The key, and what rows say of the cell."""


class Records:
    """A file of rows. A row belongs to a cell, a competitor, a device and a commit; one of each counts, the last.

    What was measured at another commit is missing here; `latest` makes one table of several commits.

    Args:
        path: where rows are appended; made with its folder at the first.
        about: `benchmarks.environment.environment()` of this run; device, commit and versions go into every row.
        others: more files of rows to take as measured; never written.
    """

    def __init__(self, path: Path, about: dict[str, str], others: Sequence[Path] = ()) -> None:
        self.path, self.about = path, about
        self._rows: dict[tuple[str, ...], Row] = {}
        for file in others:
            if not file.exists():
                raise ValueError(f"there is no {file} to go on from.")
        if path.exists():
            _drop_cut_line(path)
        for file in (*others, *([path] if path.exists() else [])):
            for row in read(file):
                self._rows[_key(row)] = row

    def rows(self) -> list[Row]:
        """Those of this device and commit."""
        return [row for row in self._rows.values() if all(row[x] == self.about[x] for x in ("device", "commit"))]

    def missing(self, cell: Cell, names: Iterable[str], *, retry: bool = False) -> list[str]:
        """The competitors that have no row for the cell; with `retry` also those that failed or were wrong."""
        return [name for name in names if not self._has(cell, name, retry)]

    def _has(self, cell: Cell, name: str, retry: bool) -> bool:
        row = self._rows.get(_key(self._identity(cell) | {"competitor": name}))
        return row is not None and not (retry and row["status"] in ("failed", "wrong"))

    def add(self, cell: Cell, row: Row) -> Row:
        whole = self._identity(cell) | row
        self._rows[_key(whole)] = whole
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        return whole

    def _identity(self, cell: Cell) -> Row:
        return cell.identity | self.about


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest(rows: Sequence[Row]) -> list[Row]:
    """One row a cell and competitor, of the last row's device: the last measured at any commit, in the first's place.

    A refusal does not replace what was measured: that a peer is not installed today says nothing of its speed.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["device"] != rows[-1]["device"]:
            continue
        name = (row["key"], row["competitor"])
        if row["status"] != "refused" or name not in found:
            found[name] = row
    return list(found.values())


def _drop_cut_line(path: Path) -> None:
    """A process that was killed while it wrote leaves a line without an end."""
    text = path.read_text()
    if text and not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])


def _key(row: Row) -> tuple[str, ...]:
    return (row["key"], row["competitor"], row["device"], row["commit"])
