"""Pictures: written, and telling skipped, partial, full and each rank's rows apart."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import fm_longctx.mask
from fm_longctx import FlashMask
from fm_longctx.mask import causal, causal_document, document, draw, full, random_eviction, sliding_window

SKIPPED, PARTIAL, FULL = (to_rgb(colour) for colour in ("#eef0f3", "#f2a65a", "#2b5c8a"))


def drawn_cells(monkeypatch, mask, tmp_path, **options):
    """The cell colours of a picture, taken where they are handed to the figure, as hex strings."""
    taken = []
    figure = draw._figure
    monkeypatch.setattr(draw, "_figure", lambda image, *rest: (taken.append(image), figure(image, *rest))[1])
    mask.draw(tmp_path / "mask.png", **options)
    return taken[0]


def pixels_like(picture, colour):
    return int((np.abs(picture[..., :3] - np.array(colour)).max(-1) < 0.02).sum())


def test_states_have_their_own_colours(monkeypatch, tmp_path):
    cells = drawn_cells(monkeypatch, causal_document([4, 6]), tmp_path, block=2)
    assert cells.shape == (5, 5, 3)
    for r in range(5):
        for c in range(5):
            visible = PARTIAL if r == c else FULL
            expected = SKIPPED if c > r or r >= 2 > c else visible
            assert tuple(cells[r, c]) == expected, (r, c)


def test_one_visible_score_makes_a_tile_partial_and_one_masked_too(monkeypatch, tmp_path):
    lone = torch.zeros(16, 16, dtype=torch.bool)
    lone[3, 9] = True
    for visible, rest in ((lone, SKIPPED), (~lone, FULL)):
        cells = drawn_cells(monkeypatch, FlashMask.from_dense(visible), tmp_path, block=8)
        assert tuple(cells[0, 1]) == PARTIAL
        assert tuple(cells[0, 0]) == tuple(cells[1, 0]) == tuple(cells[1, 1]) == rest


def test_the_strip_shows_owners_of_rows_that_see_nothing(tmp_path):
    path = tmp_path / "mask.png"
    blind = FlashMask.from_dense(torch.zeros(8, 8, dtype=torch.bool))
    blind.draw(path, rank_of_row=[0, 0, 0, 0, 1, 1, 1, 1])
    picture = imread(path)
    colours = draw.palette(2)
    near = [np.abs(picture[..., :3] - colour).max(-1) < 0.02 for colour in colours]
    strip = (near[0].sum(0) > 100) & (near[1].sum(0) > 100)
    assert strip.any()
    upper, lower = (rank[:, strip].nonzero()[0].mean() for rank in near)
    assert upper < lower


def test_small_masks_draw_every_score(monkeypatch, tmp_path):
    mask = sliding_window(7, 3)
    cells = drawn_cells(monkeypatch, mask, tmp_path)
    visible = mask.to_dense()[0, 0].numpy()
    assert np.array_equal((cells == np.array(FULL)).all(-1), visible)
    assert np.array_equal((cells == np.array(SKIPPED)).all(-1), ~visible)


def test_ranks_have_their_own_colours(monkeypatch, tmp_path):
    owner = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0])
    cells = drawn_cells(monkeypatch, full(8), tmp_path, rank_of_row=owner)
    colour_of = {}
    for row, rank in enumerate(owner.tolist()):
        assert (cells[row] == cells[row, 0]).all()
        assert colour_of.setdefault(rank, tuple(cells[row, 0])) == tuple(cells[row, 0])
    assert len(set(colour_of.values())) == 3 and SKIPPED not in colour_of.values()
    # A partial tile is a lighter tint, the hue's own.
    partial = drawn_cells(monkeypatch, causal(8), tmp_path, block=2, rank_of_row=owner.tolist())
    tinted, own = partial[1, 1], partial[1, 0]
    assert tuple(own) == colour_of[1] and (tinted > own).any() and (tinted >= own).all()
    assert tuple(partial[0, 1]) == SKIPPED


def test_a_cell_of_several_ranks_takes_the_one_with_most_rows(monkeypatch, tmp_path):
    cells = drawn_cells(monkeypatch, full(8), tmp_path, block=4, rank_of_row=[1, 0, 1, 1, 0, 0, 1, 1])
    alone = drawn_cells(monkeypatch, full(8), tmp_path, block=4, rank_of_row=[1, 1, 1, 1, 0, 0, 0, 0])
    assert np.array_equal(cells, alone)


@pytest.mark.parametrize("world_size", [1, 10, 11, 64])
def test_many_ranks_differ(monkeypatch, tmp_path, world_size):
    cells = drawn_cells(monkeypatch, full(64), tmp_path, rank_of_row=torch.arange(64) % world_size)
    assert len({tuple(colour) for colour in cells[:, 0]}) == world_size


def test_png_holds_the_colours(tmp_path):
    path = tmp_path / "mask.png"
    causal_document([40, 60, 28]).draw(path, block=8, title="three documents")
    picture = imread(path)
    assert picture.shape[0] > 400 and picture.shape[1] > 400
    for colour in (SKIPPED, PARTIAL, FULL):
        assert pixels_like(picture, colour) > 1000
    # More is skipped than full, and full than partial: 16 x 16 tiles of which 16-odd lie on the diagonal.
    assert pixels_like(picture, SKIPPED) > pixels_like(picture, FULL) > pixels_like(picture, PARTIAL)
    full(128).draw(path, block=8)
    assert pixels_like(imread(path), PARTIAL) < 1000


def test_svg(tmp_path):
    path = tmp_path / "mask.svg"
    document([3, 2]).draw(str(path), title="two documents")
    text = path.read_text()
    assert text.lstrip().startswith("<?xml") and "two documents" in text and text.rstrip().endswith("</svg>")


def test_default_title_says_the_size(monkeypatch, tmp_path):
    titles = []
    figure = draw._figure
    monkeypatch.setattr(draw, "_figure", lambda *args: (titles.append(args[-1]), figure(*args))[1])
    causal(1000, num_rows=500).draw(tmp_path / "mask.png")
    assert titles == ["500 rows x 1,000 columns, 75.0% visible"]


def test_long_masks_draw_in_tiles(monkeypatch, tmp_path):
    cells = drawn_cells(monkeypatch, causal_document([50_000, 1, 81_071]), tmp_path)
    assert 320 < cells.shape[0] <= 640
    assert tuple(cells[-1, 0]) == SKIPPED and tuple(cells[0, 0]) == PARTIAL and tuple(cells[-1, -3]) == FULL


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1), (3, 4000)])
def test_any_shape_draws(tmp_path, shape):
    n_q, n_k = shape
    path = tmp_path / "mask.png"
    causal(n_k, num_rows=n_q).draw(path, rank_of_row=[0] * n_q)
    assert path.stat().st_size > 1000


def test_batch_and_head_choose_the_matrix(monkeypatch, tmp_path):
    mask = random_eviction(16, batch=2, heads=2, seed=1)
    cells = drawn_cells(monkeypatch, mask, tmp_path, batch=1, head=0)
    assert np.array_equal((cells == np.array(FULL)).all(-1), mask.to_dense()[1, 0].numpy())


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("mask.pdf", {}, r"path must end in .png or .svg, got '.*mask.pdf'"),
        ("mask", {}, "path must end in .png or .svg"),
        ("mask.png", {"block": 0}, "block must be an integer >= 1, got 0"),
        ("mask.png", {"block": 2.0}, "block must be an integer >= 1, got 2.0"),
        ("mask.png", {"batch": 1}, r"batch must be in \[0, 1\) for this mask, got 1"),
        ("mask.png", {"head": -1}, r"head must be in \[0, 1\) for this mask, got -1"),
        ("mask.png", {"rank_of_row": [0, 1]}, r"each of the 5 rows a rank >= 0, got torch.int64 \[2\]"),
        ("mask.png", {"rank_of_row": [0, 1, 0, -1, 0]}, r"a rank >= 0, got torch.int64 \[5\] with minimum -1"),
        ("mask.png", {"rank_of_row": torch.zeros(5)}, r"a rank >= 0, got torch.float32 \[5\]"),
    ],
)
def test_refuses(tmp_path, path, options, message):
    with pytest.raises(ValueError, match=message):
        causal_document([3, 2]).draw(tmp_path / path, **options)
    assert not (tmp_path / path).exists()


def test_the_room_imports_no_kernels_ranks_or_pyplot():
    """A dataloader worker builds masks; a library leaves the caller's pyplot alone."""
    allowed = {"torch", "numpy", "fm_longctx", "matplotlib", *sys.stdlib_module_names}
    for file in Path(fm_longctx.mask.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert name.split(".")[0] in allowed, f"{file.name} imports {name}"
                assert not name.startswith(("torch.distributed", "matplotlib.pyplot")), f"{file.name} imports {name}"
                if name.startswith("fm_longctx"):
                    assert name.startswith("fm_longctx.mask"), f"{file.name} imports {name}"


def test_drawing_leaves_the_mask_alone(tmp_path):
    mask = causal_document([3, 2])
    before = mask.fingerprint()
    mask.draw(tmp_path / "mask.png")
    assert mask.fingerprint() == before and mask.cache == {} and isinstance(mask, FlashMask)
