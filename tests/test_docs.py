"""The pages in docs/ are so: their Python parses, that of the op's page runs, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# The others show what to change in a script of the reader's; their own tests run such scripts.
WHOLE = [page for page in PAGES if page.name == "attention.md"]


def python_of(page: Path) -> str:
    """The page's Python blocks as one script, each at its own line of the page, so that a traceback leads there."""
    lines, in_python = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            in_python = line == "```python"
            line = ""
        lines.append(line if in_python else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_parses(page):
    compile(python_of(page), str(page), "exec")


@pytest.mark.parametrize("page", WHOLE, ids=lambda page: page.name)
def test_the_python_runs(page, tmp_path, monkeypatch):
    assert python_of(page).strip()
    monkeypatch.chdir(tmp_path)
    exec(compile(python_of(page), str(page), "exec"), {"__name__": "__main__"})


def test_there_is_a_page_that_runs():
    assert WHOLE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|benchmarks|configs|launch|kernels|fm_longctx)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
