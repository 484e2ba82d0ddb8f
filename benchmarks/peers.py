"""The competitors: each turns one mask and one set of inputs into a forward that autograd can go back through.

All get the same q, k, v and dout `[B, N, H, D]`; those that want `[B, H, N, D]` get contiguous copies, made outside the
timing, as are masks and tile schedules. Settings are those of each project's own benchmarks: FlexAttention compiled for
static shapes with its block mask; SDPA held to one backend; FlashAttention-4 with cu_seqlens for packed documents and
its own window for the sliding one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.cells import Cell, Scenario
from benchmarks.mask_mods import block_mask, empty_block_mask
from fm_longctx import flashmask_attention
from fm_longctx.attention.passes import load_backend
from fm_longctx.mask import FlashMask


class Inputs(NamedTuple):
    """q and dout `[B, N, H, D]`, k and v `[B, N, H_kv, D]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


class Run(NamedTuple):
    """A competitor made ready."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    """What the gradients are taken of: q, k, v. Empty: forward only."""
    dout: Tensor
    public: Callable[[Tensor], Tensor]
    """Its layout -> `[B, N, H, D]`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user may choose for the peers."""

    dense_limit: int = 8192
    """Longest N at which SDPA runs with an N x N mask: its memory and time grow as N^2."""
    dense_cases: tuple[str, ...] = ("causal_document", "pack")
    """The masks that it is timed on: its cost does not depend on the mask, so that one says all."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    name: str
    refusal: Callable[[Cell, Scenario, str], str | None]
    """Why it cannot run this mask; None if it can."""
    prepare: Callable[[Inputs, Scenario], Run]
    warm: Callable[[Inputs, Scenario], Run] | None = None
    """The same compilation as `prepare`, with next to nothing to compute; None: nothing worth compiling ahead."""
    load: Callable[[], object] | None = None
    """Imports of seconds, which a process can do before it measures; None: none."""


OURS = ("hopper", "triton", "reference")


def competitors(names: Sequence[str], settings: Settings) -> list[Peer]:
    """The competitors of these names, in this order.

    Raises:
        ValueError: an unknown name.
    """
    known = {peer.name: peer for peer in (*map(_ours, OURS), *_flex(), *_sdpa(), _dense(settings), _fa4())}
    for name in names:
        if name not in known:
            raise ValueError(f"unknown competitor {name!r}; there are {', '.join(known)}.")
    return [known[name] for name in names]


def _ours(backend: str) -> Peer:
    def refusal(cell: Cell, scenario: Scenario, device: str) -> str | None:
        # The backends look at shape, dtype and device only.
        q = torch.empty((cell.batch, 1, cell.heads, cell.d), dtype=dtype_on(device), device=device)
        return load_backend(backend).refusal(q, q, scenario.case.mask.num_intervals, None)

    def run(inputs: Inputs, mask: FlashMask) -> Run:
        q, k, v = leaves = _leaves(inputs)
        on_device = mask.to(inputs.q.device)
        return Run(lambda: flashmask_attention(q, k, v, on_device, backend=backend), leaves, inputs.dout, _same)

    return Peer(
        name=backend,
        refusal=refusal,
        prepare=lambda inputs, scenario: run(inputs, scenario.case.mask),
        warm=lambda inputs, scenario: run(inputs, hidden_like(scenario.case.mask)),
    )


def hidden_like(mask: FlashMask) -> FlashMask:
    """A mask of the same shape and number of intervals that hides everything, if it has an interval to do it with."""
    if mask.num_intervals == 0:
        return mask
    starts, ends = (torch.full_like(mask.starts, mask.num_rows) for _ in range(2))
    starts[:, :, 0] = torch.arange(mask.num_columns, dtype=torch.int32) if mask.causal else 0
    return FlashMask.from_canonical(starts, ends, causal=mask.causal, num_rows=mask.num_rows)


def _flex() -> list[Peer]:
    """`flex` takes its block shapes from Inductor's table for the GPU; `flex_tuned` times all that Inductor knows.

    No kernel options: under ROWS_GUARANTEED_SAFE a row whose first block hides all of it, as in packed documents, takes
    exp2(-inf + inf) = NaN, whatever it sees later; PRESCALE_QK rounds q a second time.
    """

    def run(inputs: Inputs, scenario: Scenario, make_block_mask: Callable[..., Any], mode: str | None) -> Run:
        on_gpu = inputs.q.device.type == "cuda"
        device, n = str(inputs.q.device), inputs.q.shape[1]
        mask_mod = scenario.mask_mod(device)
        blocks = None if mask_mod is None else make_block_mask(mask_mod, n, device)
        leaves, dout = _heads_first(inputs)
        attend: Any = _compiled_flex(mode)
        if not on_gpu:
            # Not compiled, and no backward: it has none on a CPU.
            attend, leaves = flex_attention, [x.detach() for x in leaves]
        gqa = inputs.q.shape[2] != inputs.k.shape[2]

        def forward() -> Tensor:
            return attend(*leaves, block_mask=blocks, enable_gqa=gqa)

        return Run(forward, leaves if on_gpu else [], dout, _swap)

    tuned = "max-autotune-no-cudagraphs"
    return [
        Peer(
            name="flex",
            refusal=lambda cell, scenario, device: None,
            prepare=lambda inputs, scenario: run(inputs, scenario, block_mask, None),
            warm=lambda inputs, scenario: run(inputs, scenario, empty_block_mask, None),
        ),
        # Not warmed: it would choose by timings under an empty mask, on a GPU shared with the other workers.
        Peer(
            name="flex_tuned",
            refusal=lambda cell, scenario, device: None,
            prepare=lambda inputs, scenario: run(inputs, scenario, block_mask, tuned),
        ),
    ]


@cache
def _compiled_flex(mode: str | None) -> Any:
    """One for all cells: what a process has compiled for a cell it finds again when it measures it."""
    # fullgraph: an error instead of the unfused form, which holds N x N scores.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, mode=mode)


def _sdpa() -> list[Peer]:
    def refusal(cell: Cell, scenario: Scenario, device: str) -> str | None:
        if scenario.plain is None:
            return "takes full and causal masks only"
        return None if torch.device(device).type == "cuda" else "runs on a GPU only"

    def prepare(inputs: Inputs, scenario: Scenario, backend: SDPBackend) -> Run:
        leaves, dout = _heads_first(inputs)
        q, k, v = leaves
        causal, gqa = scenario.plain == "causal", inputs.q.shape[2] != inputs.k.shape[2]

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

        return Run(forward, leaves, dout, _swap)

    cudnn = partial(prepare, backend=SDPBackend.CUDNN_ATTENTION)
    return [
        # Its execution plans take seconds to make. It knows no mask that hides everything, so warming is running.
        Peer(name="cudnn", refusal=refusal, prepare=cudnn, warm=cudnn),
        Peer(name="flash", refusal=refusal, prepare=partial(prepare, backend=SDPBackend.FLASH_ATTENTION)),
    ]


def _dense(settings: Settings) -> Peer:
    def refusal(cell: Cell, scenario: Scenario, device: str) -> str | None:
        if cell.n > settings.dense_limit:
            return f"an N x N mask: run up to N {settings.dense_limit}"
        if cell.case not in settings.dense_cases:
            return f"its cost does not depend on the mask: run on {', '.join(settings.dense_cases)}"
        return None

    def prepare(inputs: Inputs, scenario: Scenario) -> Run:
        leaves, dout = _heads_first(inputs)
        q, k, v = leaves
        position = torch.arange(inputs.q.shape[1], device=inputs.q.device)
        visible = scenario.case.visible(position[:, None], position[None, :])[None, None]
        gqa = inputs.q.shape[2] != inputs.k.shape[2]

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=gqa)

        return Run(forward, leaves, dout, _swap)

    return Peer(name="dense", refusal=refusal, prepare=prepare)


def _fa4() -> Peer:
    def refusal(cell: Cell, scenario: Scenario, device: str) -> str | None:
        if scenario.plain is None and scenario.documents is None and scenario.window is None:
            return "takes full, causal, sliding-window and packed-document masks only"
        if torch.device(device).type != "cuda":
            return "runs on a GPU only"
        # Looked for, not imported: that takes seconds, and one that cannot be imported failed.
        if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
            return "flash-attn-4 is not installed"
        return None

    def prepare(inputs: Inputs, scenario: Scenario) -> Run:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func  # type: ignore[import-not-found]

        if scenario.documents is None:
            leaves = _leaves(inputs)
            # (keys before the row's own, keys after it)
            window = (None, None) if scenario.window is None else (scenario.window - 1, 0)
            attend = partial(flash_attn_func, causal=scenario.plain != "full", window_size=window)
            return Run(lambda: _first(attend(*leaves)), leaves, inputs.dout, _same)
        lengths, causal = scenario.documents
        batch, n = inputs.q.shape[:2]
        ends = torch.tensor(lengths * batch, device=inputs.q.device).cumsum(0)
        cu_seqlens = F.pad(ends, (1, 0)).int()
        leaves = _leaves(Inputs(*(x.flatten(0, 1) for x in inputs)))
        attend = partial(
            flash_attn_varlen_func,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max(lengths),
            max_seqlen_k=max(lengths),
            causal=causal,
        )
        dout = inputs.dout.flatten(0, 1)
        return Run(lambda: _first(attend(*leaves)), leaves, dout, lambda x: x.unflatten(0, (batch, n)))

    return Peer(
        name="fa4",
        refusal=refusal,
        prepare=prepare,
        # It compiles for any batch and for whatever the mask holds; one sample alone may have strides of its own.
        warm=lambda inputs, scenario: prepare(Inputs(*(x[:2] for x in inputs)), scenario),
        load=lambda: import_module("flash_attn.cute"),
    )


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output, of what may be (output, LSE)."""
    return result[0] if isinstance(result, tuple) else result


def dtype_on(device: str) -> torch.dtype:
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def make_inputs(cell: Cell, device: str) -> Inputs:
    """Random inputs of the cell's shape, a function of the cell alone."""
    generator = torch.Generator(device).manual_seed(cell.n + cell.d + cell.seed)

    def draw(heads: int) -> Tensor:
        shape = (cell.batch, cell.n, heads, cell.d)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype_on(device))

    return Inputs(draw(cell.heads), draw(cell.kv_heads), draw(cell.kv_heads), draw(cell.heads))


def _leaves(inputs: Inputs) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in inputs[:3]]


def _heads_first(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """q, k, v as leaves and dout, contiguous `[B, H, N, D]`."""
    q, k, v, dout = (x.transpose(1, 2).contiguous() for x in inputs)
    return [x.requires_grad_() for x in (q, k, v)], dout


def _same(x: Tensor) -> Tensor:
    return x


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)
