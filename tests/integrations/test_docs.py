"""The pages on the plugs: their examples are Python, their links exist, and the section's table has every key."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from fm_longctx.integrations.deepspeed import FlashMaskSection

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("page", ["transformers.md", "deepspeed.md"])
def test_examples_parse_and_are_short(page):
    text = (DOCS / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        ast.parse(block)
        assert len(block.splitlines()) <= 10
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DOCS / link).exists(), link


def test_the_sections_keys_are_the_table():
    section = (DOCS / "deepspeed.md").read_text().split("## The section")[1].split("##")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `?\"?(\w+)\"?`? \|", section, re.MULTILINE))
    assert rows == {f.name: "null" if f.default is None else str(f.default) for f in fields(FlashMaskSection)}
