"""The pages are so: their Python parses or runs, links lead somewhere, commands and config keys are those there are."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from fm_longctx.train.config_load import fields

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# The others show what to change in a script of the reader's; their own tests run such scripts.
WHOLE = [page for page in PAGES if page.name in ("attention.md", "context_parallel.md", "data.md")]
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks/notes").glob("*.md"))]
SCRIPTS = sorted(path for folder in ("launch", "examples", "benchmarks") for path in (ROOT / folder).glob("*.py"))
KEYS = frozenset(fields())
FILES = ("py", "md", "jsonl", "png")


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
    one_rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in one_rank.items():  # as torchrun would
        monkeypatch.setenv(name, value)
    exec(compile(python_of(page), str(page), "exec"), {"__name__": "__main__"})


def test_there_are_pages_that_run():
    assert len(WHOLE) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|benchmarks|configs|launch|kernels|fm_longctx)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def text_of(path: Path) -> str:
    """A page, or what a script says of itself."""
    text = path.read_text()
    return (ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text


def commands_of(text: str) -> list[list[str]]:
    """The words of each `python` and `torchrun` command, which stands at the start of a line or between backquotes."""
    whole = re.sub(r" *\\\n *", " ", text)
    found = re.findall(r"^ *(?:[A-Z_]+=\S+ )*((?:python|torchrun) .*)$", whole, re.MULTILINE)
    found += re.findall(r"`((?:python|torchrun) [^`]*)`", whole)
    return [re.split(r" {2,}| # | > ", " ".join(command.split("\n")))[0].split() for command in found]


@pytest.mark.parametrize("path", [*TEXTS, *SCRIPTS], ids=lambda path: path.name)
def test_commands_name_scripts_and_options_that_there_are(path):
    for words in commands_of(text_of(path)):
        if "-m" in words:
            module, *options = words[words.index("-m") + 1 :]
            if not module.startswith(("benchmarks", "tests")):
                continue
            script = ROOT / f"{module.replace('.', '/')}.py"
        else:
            scripts = [i for i, word in enumerate(words) if word.endswith(".py") and "/" in word]
            if not scripts:
                continue  # a script of the reader's
            script, options = ROOT / words[scripts[-1]], words[scripts[-1] + 1 :]
        assert script.exists(), words
        known = option_names(script)
        for option in options:
            name = option.partition("=")[0]
            assert not name.startswith("--") or name in known or name[2:] in KEYS, (name, words)


def option_names(script: Path) -> set[str]:
    """The options that a script, or the module of ours that it hands its arguments to, spells out."""
    text = script.read_text()
    for module in re.findall(r"^from (fm_longctx\.train\.\w+) import main", text, re.MULTILINE):
        text += (ROOT / f"{module.replace('.', '/')}.py").read_text()
    names = set(re.findall(r"\"(--[a-z][\w-]*)\"", text))
    if 'f"--{name}"' in text:  # made from a list of names
        names |= {f"--{name}" for name in re.findall(r"\"([a-z][\w-]*)\"", text)}
    return names | {"--help"} | {f"--no-{name[2:]}" for name in names if "BooleanOptionalAction" in text}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_keys_of_the_config_exist(path):
    text, sections = path.read_text(), {key.partition(".")[0] for key in KEYS}
    for key in re.findall(r"`([a-z_]+\.[a-z_]+)(?:: [^`]*)?`", text):
        section, _, name = key.partition(".")
        assert section not in sections or name in FILES or key in KEYS, key
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for section, values in yaml.safe_load(block).items():
            assert section in sections and {f"{section}.{name}" for name in values} <= KEYS, block
