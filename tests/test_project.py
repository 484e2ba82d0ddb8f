"""What the README says is so: its example runs, its tree exists, its commands are targets of the Makefile."""

import re
from pathlib import Path

from fm_longctx.mask import FlashMask, builders

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert (tmp_path / "mask.png").stat().st_size > 1000
    assert names["out"].shape == names["q"].shape == names["q"].grad.shape
    # The line that the README shows for this mask is the one it prints.
    (shown,) = re.findall(r"# (FlashMask\(.*?), \.\.\.\)", example)
    assert capsys.readouterr().out.startswith(shown)


def test_files_and_links_exist():
    tree = README.split("## The tree")[1].split("```")[1]
    folder = Path()
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if line.startswith("  "):
            assert (folder / name).exists(), name
        else:
            folder = ROOT / name
            assert folder.exists(), name
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for config in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / config).exists(), config


def test_commands_are_targets():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= named <= set(targets)


def test_the_masks_named_are_the_masks_there_are():
    section = README.split("## Masks")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)", section))
    assert set(builders.__all__) <= named
    others = named - set(builders.__all__) - {"fm_longctx", "FlashMask"}
    assert all(hasattr(FlashMask, name) for name in others), others


def test_the_kernels_folder_is_a_link_and_no_package():
    link = ROOT / "fm_longctx" / "kernels"
    assert link.is_symlink() and link.resolve() == (ROOT / "kernels").resolve()
    assert not (ROOT / "kernels" / "__init__.py").exists()
