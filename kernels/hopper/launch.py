"""The `hopper` backend: launches the Gluon kernels on compute capability 9.0.

Forward and backward are warp-specialised kernels. Head dimension 256 has no Hopper backward (its dK and dV do not fit
into the registers of two warpgroups) and takes the portable one.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fm_longctx.kernels import portable
from fm_longctx.kernels.hopper.backward import backward_kernel
from fm_longctx.kernels.hopper.forward import forward_kernel
from fm_longctx.kernels.hopper.query_gradient import query_gradient_kernel
from fm_longctx.kernels.hopper.scaling import scale_kernel
from fm_longctx.kernels.schedule import TileRuns, all_tile_runs, tile_runs
from fm_longctx.kernels.statistics import row_statistics
from fm_longctx.mask import FlashMask

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
MAX_INTERVALS = 3
# Gluon is experimental: it changes between Triton releases. The GPU tests have passed on an H100 with 3.6.0 and 3.7.1.
TRITON_VERSIONS = ("3.6", "3.7")
# The rows of a block of the pass that computes dQ alone.
BLOCK_M = 128
Schedule = TileRuns
schedules = all_tile_runs


class Config(NamedTuple):
    block_n: int
    stages: int
    q_in_registers: bool = False
    out_buffer: bool = True
    """The output leaves by a buffer of its own, so that the next Q can come meanwhile."""
    lazy_up_to: int = -1
    """If not `steady`: the most intervals of a mask for which O is scaled behind a branch. With more, ptxas moves the
    wait for P V above the softmax (D 128), or it gained nothing (D 64), or it was not measured (D 256)."""
    steady: bool = False
    """Full tiles are computed without their maxima, and O is scaled behind a branch: with bfloat16 (softmax.py says why
    not with float16). With two consumers it gained nothing at D 64; not measured at D 256."""
    consumers: int = 2
    """Warpgroups of 64 rows each."""

    @property
    def block_m(self) -> int:
        return 64 * self.consumers

    @property
    def consumer_registers(self) -> int:
        """Of a thread; the producer keeps 24."""
        return {2: 240, 3: 160}[self.consumers]


# By head dimension; benchmarks/hopper.py times the alternatives.
FORWARD = {
    64: Config(128, 2, q_in_registers=True),
    128: Config(128, 2, q_in_registers=True, lazy_up_to=0, steady=True),
    256: Config(64, 2, out_buffer=False, lazy_up_to=0),
}
# Of masks without intervals, where another is faster. Their lists are long: what a third consumer wins in the loop is
# more than what a block of 192 rows loses at its list's ends; under documents and windows it is less, by 8 to 20%.
WITHOUT_INTERVALS = {64: Config(128, 2, steady=True, consumers=3)}


def forward_config(d: int, intervals: int) -> Config:
    """The configuration for head dimension d and masks of so many intervals."""
    return WITHOUT_INTERVALS.get(d, FORWARD[d]) if intervals == 0 else FORWARD[d]


def steady(config: Config, dtype: torch.dtype) -> bool:
    return config.steady and dtype == torch.bfloat16


class BackwardConfig(NamedTuple):
    block_m: int
    stages: int
    ahead: bool = False
    """Of the deterministic form: S of the next tile is computed before dK and dV of this one are done."""
    fused_ahead: bool = False
    """Of the other form: S of the next tile before dQ of this one has left, and dK before dQ. At D 64 3 to 9% faster on
    long lists and never slower; at D 128 not."""
    consumer_registers: int = 240


# By head dimension; benchmarks/hopper_backward.py times the alternatives.
BACKWARD = {64: BackwardConfig(128, 2, fused_ahead=True), 128: BackwardConfig(64, 2, ahead=True)}
# The columns of a backward CTA.
BLOCK_N = 128


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


def schedules_needed(
    q: Tensor, v: Tensor, mask: FlashMask, *, backward: bool, deterministic: bool
) -> list[tuple[int, int, bool]]:
    """(block_m, block_n, by_row) of every schedule that a pass over these inputs reads."""
    d = q.shape[-1]
    config = forward_config(d, mask.num_intervals)
    if not backward:
        return [(config.block_m, config.block_n, True)]
    if d not in BACKWARD:
        return portable.schedules_needed(q, v, mask, backward=True, deterministic=deterministic)
    by_column, by_row = (BACKWARD[d].block_m, BLOCK_N, False), (BLOCK_M, FORWARD[d].block_n, True)
    return [by_column] if _fused(q.shape[2], v.shape[2], mask.heads, deterministic) else [by_column, by_row]


def _fused(h: int, h_kv: int, mask_heads: int, deterministic: bool) -> bool:
    """Whether dQ is summed by the kernel that computes dK and dV: if all query heads of a group walk one list."""
    return not deterministic and (h == h_kv or mask_heads <= h_kv)


def _grid(items: int, device: torch.device) -> tuple[tuple[int], Tensor]:
    """A CTA a processor at most, and the counter by which they take the items that remain."""
    return (min(items, _processors(device)),), torch.zeros(1, dtype=torch.int32, device=device)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Rounds(NamedTuple):
    """In which order a kernel takes the lists of all heads. A round is a list for each processor."""

    abreast: int
    """Heads that are walked at once, at each place (longest lists first) all of them: together about a round. With
    fewer, whoever takes the last head's longest list would work alone at the end; what more heads read and add to is
    more than the L2 cache holds."""
    last: int
    """So many in the last group."""
    turns: int
    """Rounds that such a group takes; 0 if it is not about a whole number of them."""


def rounds(blocks: int, heads: int, shared: int, processors: int) -> Rounds:
    """heads: of all samples, each with `blocks` lists; `shared` of them always go together."""
    abreast = shared * max(1, round(processors / (shared * blocks)))
    turns = max(1, round(abreast * blocks / processors))
    if 5 * abs(abreast * blocks - turns * processors) > abreast * blocks:
        turns = 0
    return Rounds(abreast, heads % abreast or abreast, turns)


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
    """As `fm_longctx.attention.passes.attention_forward`."""
    assert softcap is None  # or `refusal` would have spoken
    (b, n_q, h, d), n_k = q.shape, k.shape[1]
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty((b, h, n_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or n_k == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    config = forward_config(d, mask.num_intervals)
    runs = tile_runs(mask, config.block_m, config.block_n, by_row=True)
    with torch.cuda.device_of(q):
        blocks = runs.order.shape[1]
        grid, counter = _grid(blocks * h * b, q.device)
        # The query heads of a group together: CTAs in flight read the same K and V.
        order = rounds(blocks, h * b, h // k.shape[2], _processors(q.device))
        forward_kernel[grid](
            _describe(q, 64),
            _describe(k, config.block_n),
            _describe(v, config.block_n),
            # Partial results in float32 do not fit into the queries' buffer: they go out by plain stores.
            _describe(out if out_dtype == q.dtype else q, 64),
            _describe_bounds(runs, config.block_n),
            out,
            lse,
            runs.runs,
            runs.first,
            runs.tiles,
            runs.order,
            counter,
            *out.stride()[:3],
            n_q,
            n_k,
            blocks,
            blocks * h * b,
            order.abreast,
            order.last,
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
            Q_IN_REGISTERS=config.q_in_registers,
            OUT_BUFFER=config.out_buffer,
            STEADY=steady(config, q.dtype),
            LAZY=steady(config, q.dtype) or mask.num_intervals <= config.lazy_up_to,
            CONSUMERS=config.consumers,
            CONSUMER_REGISTERS=config.consumer_registers,
            num_warps=4,
        )
    return out, lse


compute_delta = portable.compute_delta


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: FlashMask,
    *,
    scale: float,
    softcap: float | None = None,
    grad_dtype: torch.dtype,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fm_longctx.attention.passes.attention_backward`.

    dQ is summed in float32 by whichever column-block comes first; if `deterministic`, or if grouped query heads have
    masks of their own, a pass of its own computes it.
    """
    assert softcap is None  # or `refusal` would have spoken
    (b, n_q, h, d), (_, n_k, h_kv, _) = q.shape, k.shape
    if d not in BACKWARD:
        return portable.backward(dout, q, k, v, lse, delta, mask, scale=scale, grad_dtype=grad_dtype)
    dk, dv = (torch.empty(x.shape, dtype=grad_dtype, device=x.device) for x in (k, v))
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros(q.shape, dtype=grad_dtype, device=q.device), dk.zero_(), dv.zero_()
    dout = dout.to(q.dtype)
    config = BACKWARD[d]
    runs = tile_runs(mask, config.block_m, BLOCK_N, by_row=False)
    tma_store = grad_dtype == q.dtype
    fused = _fused(h, h_kv, mask.heads, deterministic)
    # Zeros: the kernel adds to it. Whole tiles of 64 rows, since each lies in an order of its own (`scale_kernel`).
    rows = triton.cdiv(n_q, 64) * 64
    dq_sum = torch.zeros((b, rows, h, d), dtype=torch.float32, device=q.device) if fused else None
    with torch.cuda.device_of(q):
        blocks = runs.order.shape[1]
        grid, counter = _grid(blocks * h_kv * b, q.device)
        order = rounds(blocks, h_kv * b, 1, _processors(q.device))
        backward_kernel[grid](
            _describe(q, config.block_m),
            _describe(k, 64),
            _describe(v, 64),
            _describe(dout, config.block_m),
            _describe_statistics(lse, delta, config.block_m),
            _describe(q, 64, 64) if dq_sum is None else _describe(dq_sum, 64, 64, swizzle=0),
            # float32 gradients do not fit into the buffers of 16-bit operands: they go out by plain stores.
            _describe(dk if tma_store else k, 64),
            _describe(dv if tma_store else v, 64),
            dk,
            dv,
            mask.starts,
            mask.ends,
            runs.runs,
            runs.first,
            runs.run_count,
            runs.tiles,
            runs.order,
            counter,
            *dk.stride()[:3],
            n_q,
            n_k,
            blocks,
            blocks * h_kv * b,
            order.abreast,
            order.last,
            # What one head reads and adds to is in the L2 cache anyway. And where all bits must be those of a walk that
            # skips nothing, lists have one direction.
            order.turns if fused and h > h_kv else 0,
            h,
            mask.batch,
            mask.heads,
            scale,
            KV_SHARE=h // h_kv,
            BLOCK_M=config.block_m,
            D=d,
            STAGES=config.stages,
            INTERVALS=mask.num_intervals,
            CAUSAL=mask.causal,
            TMA_STORE=tma_store,
            DQ=fused,
            ONE_LIST=mask.heads <= h_kv,
            AHEAD=config.fused_ahead if fused else config.ahead,
            CONSUMER_REGISTERS=config.consumer_registers,
            num_warps=4,
        )
    if dq_sum is None:
        dq = _query_gradient(dout, q, k, v, lse, delta, mask, scale, grad_dtype)
    else:
        dq = _scaled(dq_sum, scale, n_q, grad_dtype)
    return dq, dk, dv


def _query_gradient(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: FlashMask,
    scale: float,
    grad_dtype: torch.dtype,
) -> Tensor:
    """dq of `backward`, by row-block of BLOCK_M: where the forward's are the same, it walks the forward's list."""
    (b, n_q, h, d), n_k = q.shape, k.shape[1]
    dq = torch.empty(q.shape, dtype=grad_dtype, device=q.device)
    config = FORWARD[d]
    runs = tile_runs(mask, BLOCK_M, config.block_n, by_row=True)
    with torch.cuda.device_of(q):
        query_gradient_kernel[(runs.order.shape[1], h, b)](
            _describe(q, 64),
            _describe(k, config.block_n),
            _describe(v, config.block_n),
            _describe(dout, 64),
            _describe(dq if grad_dtype == q.dtype else q, 64),
            _describe_bounds(runs, config.block_n),
            dq,
            lse.contiguous(),
            delta.contiguous(),
            runs.runs,
            runs.first,
            runs.tiles,
            runs.order,
            *dq.stride()[:3],
            n_q,
            n_k,
            h,
            mask.batch,
            mask.heads,
            scale,
            KV_SHARE=h // k.shape[2],
            BLOCK_N=config.block_n,
            D=d,
            STAGES=config.stages,
            INTERVALS=mask.num_intervals,
            CAUSAL=mask.causal,
            TMA_STORE=grad_dtype == q.dtype,
            CONSUMER_REGISTERS=config.consumer_registers,
            num_warps=4,
        )
    return dq


def _scaled(x: Tensor, scale: float, n_q: int, dtype: torch.dtype) -> Tensor:
    """`scale * x` in dtype `[B, n_q, H, D]`, x being the sum of dQ; in place if they are of one dtype and size."""
    b, rows, h, d = x.shape
    out = x if (n_q, dtype) == (rows, x.dtype) else torch.empty((b, n_q, h, d), dtype=dtype, device=x.device)
    with torch.cuda.device_of(x):
        scale_kernel[(rows // 64, h, b)](x, out, scale, n_q, x.stride(0), out.stride(0), h * d, D=d)
    return out


def _describe_statistics(lse: Tensor, delta: Tensor, block_m: int) -> TensorDescriptor:
    """Descriptor that fetches lse (in units of log2) and delta of one row-block; both `[B, H, N_q]`."""
    stats = row_statistics(lse, delta, block_m)
    layout = _layout(swizzle=0, bits=32, rank=2)
    return TensorDescriptor(stats, list(stats.shape), list(stats.stride()), [2, block_m], layout)


def _describe(x: Tensor, rows: int, columns: int | None = None, *, swizzle: int = 128) -> TensorDescriptor:
    """Descriptor of `[B, N, H, D]` that moves `rows` positions of one head; TMA fills or clips beyond N.

    columns: how many of D at a time; all if not given. swizzle: in shared memory, 0 if rows lie there as they are.
    """
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for s in x.stride()[:3])
    if x.stride(3) != 1 or not aligned or x.data_ptr() % 16:
        # Not contiguous(): of a contiguous tensor it returns the same, wherever that begins.
        x = x.clone(memory_format=torch.contiguous_format)
    box = [1, rows, 1, columns or x.shape[3]]
    layout = _layout(swizzle=swizzle, bits=8 * x.element_size(), rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def _describe_bounds(runs: TileRuns, block_n: int) -> TensorDescriptor:
    """Descriptor of the interval bounds of `block_n` columns of one mask group."""
    _, rows, columns = runs.bounds.shape
    flat = runs.bounds.view(-1, columns)
    layout = _layout(swizzle=0, bits=32, rank=2)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, block_n], layout)


@cache
def _layout(*, swizzle: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
    # To make one takes longer than the rest of a descriptor.
    return gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=rank)
