"""The pages in docs/ are so: their Python runs, from top to bottom of a page, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


def python_of(page: Path) -> str:
    """The page's Python blocks as one script, each at its own line of the page, so that a traceback leads there."""
    lines, in_python = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            in_python = line == "```python"
            line = ""
        lines.append(line if in_python else "")
    return "\n".join(lines)


def test_there_are_pages_with_python():
    assert PAGES and any(python_of(page).strip() for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(python_of(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|benchmarks|configs|launch|kernels|fm_longctx)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
