"""The `hopper` backend: launches the Gluon kernels on compute capability 9.0.

The forward is the warp-specialised kernel; the backward is the portable one until a Hopper one stands beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fm_longctx.kernels import portable
from fm_longctx.kernels.hopper.forward import forward_kernel
from fm_longctx.kernels.schedule import TileRuns, tile_runs
from fm_longctx.mask import FlashMask

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
MAX_INTERVALS = 3
# Gluon is experimental: it changes between Triton releases. These were run (3.6) on an H200.
TRITON_VERSIONS = ("3.6",)
BLOCK_M = 128
Schedule = TileRuns
schedule = tile_runs


class Config(NamedTuple):
    block_n: int
    stages: int
    ping_pong: bool
    consumer_registers: int = 240


# By head dimension; benchmarks/hopper.py times the alternatives.
FORWARD = {64: Config(128, 3, False), 128: Config(128, 2, False), 256: Config(64, 2, False)}


def refusal(q: Tensor, v: Tensor, intervals: int, softcap: float | None) -> str | None:
    """Why the kernels cannot run on these inputs, or None if they can."""
    version = ".".join(triton.__version__.split(".")[:2])
    d, d_v = q.shape[-1], v.shape[-1]
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"needs a GPU of compute capability 9.0 (H100, H200), got {q.device}"
    if version not in TRITON_VERSIONS:
        return f"was verified with Triton {' and '.join(TRITON_VERSIONS)}, this is {triton.__version__}"
    if q.dtype not in DTYPES:
        return f"takes bfloat16 or float16, got {q.dtype}"
    if d != d_v or d not in HEAD_DIMS:
        return f"takes head dimensions {HEAD_DIMS}, the same for q, k and v, got {d} and {d_v}"
    if softcap is not None:
        return f"takes no softcap, got {softcap}"
    if intervals > MAX_INTERVALS:
        return f"takes masks of up to {MAX_INTERVALS} intervals a column, got {intervals}"
    return None


def schedules_needed(q: Tensor, v: Tensor, *, backward: bool, deterministic: bool) -> list[tuple[int, int, bool]]:
    """(block_m, block_n, by_row) of every schedule that a pass over these inputs reads."""
    if backward:
        return portable.schedules_needed(q, v, backward=True, deterministic=deterministic)
    return [(BLOCK_M, FORWARD[q.shape[-1]].block_n, True)]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    *,
    scale: float,
    softcap: float | None = None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """As `fm_longctx.attention.passes.attention_forward`; `softcap` is None, as `refusal` sees to."""
    (b, n_q, h, d), n_k = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty((b, h, n_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or n_k == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    config = FORWARD[d]
    runs = tile_runs(mask, BLOCK_M, config.block_n, by_row=True)
    with torch.cuda.device_of(q):
        forward_kernel[(runs.order.shape[1], h, b)](
            _describe(q, 64),
            _describe(k, config.block_n),
            _describe(v, config.block_n),
            # Partial results in float32 do not fit into the queries' buffer: they go out by plain stores.
            _describe(out if out_dtype == q.dtype else q, 64),
            _describe_bounds(mask, config.block_n),
            out,
            lse,
            *runs,
            *out.stride()[:3],
            n_q,
            n_k,
            h,
            mask.batch,
            mask.heads,
            scale,
            KV_SHARE=h // k.shape[2],
            BLOCK_N=config.block_n,
            D=d,
            D_V=v.shape[-1],
            STAGES=config.stages,
            INTERVALS=mask.num_intervals,
            CAUSAL=mask.causal,
            TMA_STORE=out_dtype == q.dtype,
            PING_PONG=config.ping_pong,
            CONSUMER_REGISTERS=config.consumer_registers,
            num_warps=4,
        )
    return out, lse


compute_delta = portable.compute_delta
backward = portable.backward


def _describe(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of `[B, N, H, D]` that fetches `rows` positions of one head; TMA fills or clips beyond N."""
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    if x.stride(3) != 1 or not aligned or x.data_ptr() % 16:
        x = x.contiguous()
    box = [1, rows, 1, x.shape[3]]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def _describe_bounds(mask: FlashMask, block_n: int) -> TensorDescriptor:
    """Descriptor of start and end rows of every interval in turn, `[B * H_mask * rows, N_k]`, cached on the mask.

    TMA wants boxes of a power of two rows and row strides of 16 bytes, so both are padded.
    """
    if "bounds" not in mask.cache:
        rows = max(2, triton.next_power_of_2(2 * mask.num_intervals))
        shape = (mask.batch, mask.heads, rows, -(-mask.num_columns // 4) * 4)
        bounds = torch.zeros(shape, dtype=torch.int32, device=mask.device)
        for i in range(mask.num_intervals):
            bounds[:, :, 2 * i, : mask.num_columns] = mask.starts[:, :, i]
            bounds[:, :, 2 * i + 1, : mask.num_columns] = mask.ends[:, :, i]
        mask.cache["bounds"] = bounds
    bounds = mask.cache["bounds"]
    rows = bounds.shape[2]
    flat = bounds.view(-1, bounds.shape[3])
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, block_n], layout)
