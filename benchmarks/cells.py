"""What is measured: the cells of each section of benchmarks/attention.py, and the mask of each in every form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from benchmarks.cases import Case, cases, causal_document_case, document_lengths
from benchmarks.mask_mods import MaskMod, cached_draw, case_mask_mod, causal_document_mod
from benchmarks.packs import pack
from benchmarks.sparsity import BLOCK, band_mask_mod, band_of_blocks, document_lengths_at

SECTIONS = ("cases", "sparsity", "memory", "schedule", "packs")
PAPER_CASES = (
    "full",
    "causal",
    "sliding_window",
    "causal_document",
    "document",
    "shared_question",
    "global_sliding_window",
    "causal_blockwise",
    "prefix_lm_document",
    "prefix_lm_causal",
    "qk_sparse",
    "random_eviction",
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One mask at one shape; all competitors run on it in one process. Every sample of the batch has the same mask."""

    section: str
    case: str
    """A paper case, `band_of_blocks@<percent>`, `causal_document@<percent>`, or `pack`."""
    n: int
    d: int
    heads: int
    kv_heads: int
    batch: int
    seed: int = 0

    @property
    def key(self) -> str:
        heads = f"h{self.heads}:{self.kv_heads}"
        return f"{self.section}/{self.case}/n{self.n}/d{self.d}/{heads}/b{self.batch}/s{self.seed}"

    @property
    def identity(self) -> dict[str, object]:
        """What a row says of its cell."""
        names = ("key", "section", "case", "n", "d", "heads", "kv_heads", "batch", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def compilation(self) -> tuple[object, ...]:
        """Cells that agree in this share their compiled kernels."""
        return (self.case.split("@")[0], self.n, self.d, self.heads, self.kv_heads, self.batch)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A mask in the forms that the competitors take."""

    case: Case
    mask_mod: Callable[[str], MaskMod | None]
    """Device -> FlexAttention's function; None where nothing is hidden."""
    plain: Literal["full", "causal"] | None
    """What kernels without a mask can do, if this mask is that."""
    documents: tuple[list[int], bool] | None
    """(lengths, causal): what variable-length kernels can do, if this mask is that."""
    window: int | None = None
    """The keys that a row sees, itself the last of them, if this mask is a causal window."""


@lru_cache(maxsize=2)
def _cases(n: int, seed: int) -> dict[str, Case]:
    return {case.name: case for case in cases(n, seed)}


@lru_cache(maxsize=2)
def scenario(case: str, n: int, seed: int) -> Scenario:
    name, _, percent = case.partition("@")
    if name == "band_of_blocks":
        block = min(BLOCK, max(1, n // 16))
        return Scenario(
            case=band_of_blocks(n, float(percent), block),
            mask_mod=lambda device: band_mask_mod(n, float(percent), device, block),
            plain=None,
            documents=None,
        )
    if name == "pack" or percent:
        return _packed(case, pack(n, seed) if name == "pack" else document_lengths_at(n, float(percent)))
    causal_of = {"causal_document": True, "document": False}
    return Scenario(
        case=_cases(n, seed)[name],
        mask_mod=lambda device: case_mask_mod(name, n, seed, device),
        plain=name if name in ("full", "causal") else None,  # type: ignore[arg-type]
        documents=(document_lengths(n, seed), causal_of[name]) if name in causal_of else None,
        window=cached_draw(n, seed).window if name == "sliding_window" else None,
    )


def _packed(name: str, lengths: list[int]) -> Scenario:
    return Scenario(
        case=causal_document_case(lengths, name),
        mask_mod=lambda device: causal_document_mod(lengths, device),
        plain=None,
        documents=(lengths, True),
    )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large each section is."""

    cases: tuple[str, ...] = PAPER_CASES
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    head_dims: tuple[int, ...] = (64, 128)
    tokens: int = 131072
    """A batch has tokens / n samples, at least one."""
    hidden: int = 4096
    """Query heads times D in `cases` and `sparsity`."""
    sparsity_length: int = 32768
    sparsity_steps: tuple[int, ...] = tuple(range(0, 101, 10))
    document_steps: tuple[int, ...] = (50, 60, 70, 80, 90, 95)
    memory_lengths: tuple[int, ...] = tuple(2**i for i in range(13, 21))
    memory_heads: int = 4
    """Few, so that forward and backward fit the card at 1M tokens."""
    schedule_lengths: tuple[int, ...] = tuple(2**i for i in range(10, 21))
    schedule_heads: int = 32
    pack_heads: tuple[tuple[int, int], ...] = ((64, 8), (32, 4))
    pack_lengths: tuple[int, ...] = (32768, 131072)
    pack_seeds: tuple[int, ...] = (0, 1)


PRESETS = {
    "full": Sizes(),
    "quick": Sizes(
        cases=("causal", "causal_document", "global_sliding_window"),
        lengths=(8192,),
        head_dims=(128,),
        sparsity_length=8192,
        sparsity_steps=(0, 50, 100),
        document_steps=(50, 90),
        memory_lengths=(8192, 32768),
        schedule_lengths=(1024, 8192),
        pack_heads=((32, 4),),
        pack_lengths=(8192,),
        pack_seeds=(0,),
    ),
    # For a CPU: every path, no figure worth keeping.
    "smoke": Sizes(
        cases=("full", "causal_document"),
        lengths=(256,),
        head_dims=(16,),
        tokens=512,
        hidden=32,
        sparsity_length=256,
        sparsity_steps=(0, 100),
        document_steps=(70,),
        memory_lengths=(128, 256),
        memory_heads=1,
        schedule_lengths=(128, 256),
        schedule_heads=2,
        pack_heads=((4, 2),),
        pack_lengths=(256,),
        pack_seeds=(0,),
    ),
}


def section_cells(section: str, sizes: Sizes) -> list[Cell]:
    """The cells of a section, in the order in which they are measured."""
    d = sizes.head_dims[-1]

    def cell(case: str, n: int, d: int, heads: int, kv_heads: int, batch: int, seed: int = 0) -> Cell:
        return Cell(
            section=section, case=case, n=n, d=d, heads=heads, kv_heads=kv_heads, batch=max(1, batch), seed=seed
        )

    if section == "cases":
        return [
            cell(case, n, d, sizes.hidden // d, sizes.hidden // d, sizes.tokens // n)
            for n in sizes.lengths
            for d in sizes.head_dims
            for case in sizes.cases
        ]
    if section == "sparsity":
        n, h = sizes.sparsity_length, sizes.hidden // d
        names = [f"band_of_blocks@{percent}" for percent in sizes.sparsity_steps]
        names += [f"causal_document@{percent}" for percent in sizes.document_steps]
        return [cell(name, n, d, h, h, sizes.tokens // n) for name in names]
    if section == "memory":
        return [cell("pack", n, d, sizes.memory_heads, sizes.memory_heads, 1) for n in sizes.memory_lengths]
    if section == "schedule":
        return [cell("pack", n, d, sizes.schedule_heads, sizes.schedule_heads, 1) for n in sizes.schedule_lengths]
    if section == "packs":
        return [
            cell("pack", n, d, heads, kv_heads, sizes.tokens // n, seed)
            for heads, kv_heads in sizes.pack_heads
            for n in sizes.pack_lengths
            for seed in sizes.pack_seeds
        ]
    raise ValueError(f"unknown section {section!r}; there are {', '.join(SECTIONS)}.")
