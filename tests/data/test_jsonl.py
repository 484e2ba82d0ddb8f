"""JSON lines: any record in one read, and a message that leads to the line."""

import json

import pytest

from fm_longctx.data import JsonLines


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "three"}\n\n  \n{"text": "four"}')
    (tmp_path / "a.jsonl").write_text(
        '{"text": "na\\u00efve", "more": [1]}\r\n{"text": "second \\n line"}\n', newline=""
    )
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.txt").write_text("not a record")
    return tmp_path


def test_every_line_of_every_file_in_order(folder):
    lines = JsonLines.from_path(folder)
    assert lines.names == ("a.jsonl", "b.jsonl", "empty.jsonl")
    assert [lines.read(i).decode() for i in range(len(lines))] == ["naïve", "second \n line", "three", "four"]
    assert lines.record(0) == {"text": "naïve", "more": [1]}
    with pytest.raises(IndexError):
        lines.record(4)


def test_one_file_and_another_field(folder):
    (folder / "c.jsonl").write_text(json.dumps({"body": "x"}))
    assert JsonLines.from_path(folder / "c.jsonl", field="body").read(0) == b"x"


def test_fingerprint_follows_lines_and_field(folder):
    before = JsonLines.from_path(folder).fingerprint()
    assert JsonLines.from_path(folder).fingerprint() == before
    assert JsonLines.from_path(folder, field="more").fingerprint() != before
    # As many bytes, other lines.
    (folder / "b.jsonl").write_bytes(b'{"text": "thr"}\n\n  \n{"text": "fourth"}')
    assert JsonLines.from_path(folder).fingerprint() != before


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "a"}\n{"text": ', r"bad.jsonl, the line at byte 14 \(record 1\), is not JSON"),
        ('{"text": "a"}\n[1]', "must hold an object, got list"),
        ('{"text": "a"}\n{"body": "b", "id": 1}', "has no text: it has the fields body, id. Set data.text_field"),
        ('{"text": "a"}\n{"text": 3}', "has no text: it has int under 'text'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    lines = JsonLines.from_path(tmp_path)
    assert lines.read(0) == b"a"
    with pytest.raises(ValueError, match=message):
        lines.read(1)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        JsonLines.from_path(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="0 files matched"):
        JsonLines.from_path(tmp_path)
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match="is compressed"):
        JsonLines.from_path(tmp_path / "a.jsonl.gz")
