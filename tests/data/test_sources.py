"""Documents: which files, in which order, and what is refused."""

import pytest

from fm_longctx.data import ByteTokenizer, TextFiles


@pytest.fixture
def folder(tmp_path):
    for name, text in {"b.txt": "bb", "a.txt": "a", "sub/c.md": "ccc", "empty.txt": "", ".hidden/d.txt": "d"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_folder_is_sorted_and_leaves_out_hidden_and_empty(folder):
    files = TextFiles.from_path(folder)
    assert files.names == ("a.txt", "b.txt", "sub/c.md")
    assert files.sizes == (1, 2, 3)
    assert [files.read(i) for i in range(len(files))] == [b"a", b"bb", b"ccc"]


def test_pattern_and_size_limit(folder):
    assert TextFiles.from_path(folder, pattern="*.txt").names == ("a.txt", "b.txt")
    assert TextFiles.from_path(folder, max_bytes=2).names == ("a.txt", "b.txt")


def test_one_file(folder):
    assert TextFiles.from_path(folder / "b.txt").read(0) == b"bb"


def test_missing_path_and_nothing_found(folder):
    with pytest.raises(ValueError, match=r"data path '.*nowhere' does not exist"):
        TextFiles.from_path(folder / "nowhere")
    with pytest.raises(ValueError, match="0 files matched"):
        TextFiles.from_path(folder, pattern="*.json")
    with pytest.raises(ValueError, match="of at most 1 bytes"):
        TextFiles.from_path(folder / "b.txt", max_bytes=1)


def test_a_file_that_changed_is_refused(folder):
    files = TextFiles.from_path(folder)
    (folder / "b.txt").write_text("longer")
    with pytest.raises(ValueError, match="2 bytes at the start, 6 now"):
        files.read(1)
    (folder / "b.txt").unlink()
    with pytest.raises(ValueError, match="cannot read document"):
        files.read(1)


def test_fingerprint_follows_names_and_sizes(folder):
    before = TextFiles.from_path(folder).fingerprint()
    assert TextFiles.from_path(folder).fingerprint() == before
    (folder / "a.txt").rename(folder / "z.txt")
    assert TextFiles.from_path(folder).fingerprint() != before


def test_standard_library_holds_no_tests_or_packages():
    files = TextFiles.python_stdlib()
    assert "asyncio/events.py" in files.names
    assert not [n for n in files.names if {"test", "tests", "site-packages"} & set(n.split("/"))]
    assert sum(files.sizes) > 2_000_000


def test_byte_tokens():
    tokenizer = ByteTokenizer()
    text = "naïve\n".encode()
    tokens = tokenizer.encode(text)
    assert tokens.tolist() == [256, *text, 257]
    assert len(tokens) == tokenizer.count(len(text))
    assert tokenizer.decode(tokens) == "naïve\n"
