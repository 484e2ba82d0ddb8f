"""Lines of metrics: kept on a full disk, never cut, and those of later steps dropped when a run resumes."""

import errno
import json

import pytest

from fm_longctx.train.json_lines import JsonLines
from fm_longctx.train.metrics import Reporter


class Disk:
    """A file that has room for so many bytes."""

    def __init__(self, file, room, error=errno.ENOSPC):
        self.file, self.room, self.error = file, room, error

    def write(self, data):
        if not self.room:
            raise OSError(self.error, "no")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def steps(path):
    assert path.read_text().endswith("\n")
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_full_disk_makes_lines_wait(tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = JsonLines(path, start=0)
    assert lines.add({"step": 1})
    lines.file = Disk(lines.file, 5)
    assert not lines.add({"step": 2}) and not lines.add({"step": 3})
    assert steps(path) == [1]
    lines.file.room = 1000
    assert lines.add({"step": 4}) and steps(path) == [1, 2, 3, 4]
    lines.file.room = 0
    assert not lines.add({"step": 5})
    assert lines.close() == 1 and steps(path) == [1, 2, 3, 4]


def test_another_error_is_none_of_ours(tmp_path):
    lines = JsonLines(tmp_path / "lines.jsonl", start=0)
    lines.file = Disk(lines.file, 0, errno.EIO)
    with pytest.raises(OSError, match="no"):
        lines.add({"step": 1})


def test_a_resumed_run_drops_what_it_does_again_and_a_cut_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 1')
    lines = JsonLines(path, start=2)
    assert steps(path) == [1, 2] and [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]
    lines.add({"step": 3})
    lines.close()
    assert steps(path) == [1, 2, 3]


def test_what_waits_is_said_once_and_what_is_lost_at_the_end(tmp_path, capsys):
    with Reporter(tmp_path, start=0, steps=9, log_every=5, rank=0) as reporter:
        reporter.file.file = Disk(reporter.file.file, 0)
        for step in (1, 2):
            reporter._add(reporter.file, {"step": step})
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"no room on the disk: lines of {tmp_path}/metrics.jsonl wait until there is",
        f"no room on the disk: the last 2 lines of {tmp_path}/metrics.jsonl are lost",
    ]
