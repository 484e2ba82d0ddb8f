"""The `triton` backend: launches the portable kernels. NVIDIA sm_80 and later; on a CPU under Triton's interpreter."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fm_longctx.kernels.backward import backward_kv_kernel, backward_q_kernel
from fm_longctx.kernels.blocks import Block, Blocks, choose
from fm_longctx.kernels.delta import compute_delta as compute_delta
from fm_longctx.kernels.forward import forward_kernel
from fm_longctx.kernels.schedule import TileRuns, all_tile_runs, tile_runs
from fm_longctx.kernels.statistics import row_statistics
from fm_longctx.mask import FlashMask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
# Intervals a column for which the kernels are unrolled; for more, one kernel loops over however many there are.
MAX_UNROLLED = 4
Schedule = TileRuns
schedules = all_tile_runs
_INTERPRETED = isinstance(forward_kernel, InterpretedFunction)


def refusal(q: Tensor, v: Tensor, intervals: int, softcap: float | None) -> str | None:
    """Why the kernels cannot run on these inputs, or None if they can. Any number of intervals will do."""
    d = max(q.shape[-1], v.shape[-1])
    if q.dtype not in DTYPES:
        return f"takes float32, float16 or bfloat16, got {q.dtype}"
    if d > MAX_HEAD_DIM:
        return f"takes head dimensions up to {MAX_HEAD_DIM}, got {d}"
    if _INTERPRETED:
        return None
    if q.device.type != "cuda":
        return (
            f"needs a CUDA device, got {q.device} (or TRITON_INTERPRET=1 set before Python starts, to interpret the "
            "kernels on a CPU: slow, for tests)"
        )
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return None


def schedules_needed(
    q: Tensor, v: Tensor, mask: FlashMask, *, backward: bool, deterministic: bool
) -> list[tuple[int, int, bool]]:
    """(block_m, block_n, by_row) of every schedule that a pass over these inputs reads."""
    blocks = _blocks(q, v, mask)
    if not backward:
        return [(blocks.forward.m, blocks.forward.n, True)]
    return [(blocks.query.m, blocks.query.n, True), (blocks.key.m, blocks.key.n, False)]


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
    (b, n_q, h, _), d_v = q.shape, v.shape[-1]
    out = torch.empty((b, n_q, h, d_v), dtype=out_dtype, device=q.device)
    lse = torch.empty((b, h, n_q), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    block = _fetching(_blocks(q, v, mask).forward, k, v)
    runs = tile_runs(mask, block.m, block.n, by_row=True)
    with torch.cuda.device_of(q):
        forward_kernel[(runs.order.shape[1], h, b)](
            q,
            _rows_of(k, block.n, block),
            _rows_of(v, block.n, block),
            out,
            lse,
            runs.bounds,
            runs.runs,
            runs.first,
            runs.run_count,
            runs.order,
            *_strides(q, k, v, out),
            *runs.bounds.stride()[:2],
            *_sizes(q, k, mask),
            scale,
            softcap or 0.0,
            **_constants(q, k, v, mask, softcap),
            BLOCK_M=block.m,
            BLOCK_N=block.n,
            EVEN=block.tma or k.shape[1] % block.n == 0,
            TMA=block.tma,
            LATE=block.late,
            STEADY=block.steady,
            num_warps=block.warps,
            num_stages=block.stages,
            maxnreg=block.registers,
        )
    return out, lse


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
    """As `fm_longctx.attention.passes.attention_backward`. Deterministic whether asked to be or not."""
    arguments = (dout.to(q.dtype), q, k, v, lse, delta, mask)
    dq = query_gradient(*arguments, scale=scale, softcap=softcap, grad_dtype=grad_dtype)
    dk, dv = key_gradients(*arguments, scale=scale, softcap=softcap, grad_dtype=grad_dtype)
    return dq, dk, dv


def query_gradient(
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
) -> Tensor:
    """dq of `backward`."""
    dq = torch.empty(q.shape, dtype=grad_dtype, device=q.device)
    if q.numel() == 0 or k.shape[1] == 0:
        return dq.zero_()
    q, k, v, dout = (_rows_contiguous(x) for x in (q, k, v, dout))
    block = _fetching(_blocks(q, v, mask).query, k, v)
    runs = tile_runs(mask, block.m, block.n, by_row=True)
    with torch.cuda.device_of(q):
        backward_q_kernel[(runs.order.shape[1], q.shape[2], q.shape[0])](
            q,
            _rows_of(k, block.n, block),
            _rows_of(v, block.n, block),
            dout,
            lse.contiguous(),
            delta.contiguous(),
            dq,
            runs.bounds,
            runs.runs,
            runs.first,
            runs.run_count,
            runs.order,
            *_strides(q, k, v, dout, dq),
            *runs.bounds.stride()[:2],
            *_sizes(q, k, mask),
            scale,
            softcap or 0.0,
            **_constants(q, k, v, mask, softcap),
            BLOCK_M=block.m,
            BLOCK_N=block.n,
            EVEN=block.tma or k.shape[1] % block.n == 0,
            TMA=block.tma,
            LATE=block.late,
            num_warps=block.warps,
            num_stages=block.stages,
            maxnreg=block.registers,
        )
    return dq


def key_gradients(
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
) -> tuple[Tensor, Tensor]:
    """dk, dv of `backward`."""
    dk, dv = (torch.empty(x.shape, dtype=grad_dtype, device=x.device) for x in (k, v))
    if q.numel() == 0 or k.shape[1] == 0:
        return dk.zero_(), dv.zero_()
    q, k, v, dout = (_rows_contiguous(x) for x in (q, k, v, dout))
    block = _fetching(_blocks(q, v, mask).key, q, dout)
    runs = tile_runs(mask, block.m, block.n, by_row=False)
    stats = row_statistics(lse, delta, block.m)
    with torch.cuda.device_of(q):
        backward_kv_kernel[(runs.order.shape[1], k.shape[2], k.shape[0])](
            _rows_of(q, block.m, block),
            k,
            v,
            _rows_of(dout, block.m, block),
            TensorDescriptor.from_tensor(stats, [1, block.m]) if block.tma else stats,
            dk,
            dv,
            runs.bounds,
            runs.runs,
            runs.first,
            runs.run_count,
            runs.order,
            *_strides(q, k, v, dout, dk, dv),
            *runs.bounds.stride()[:2],
            *_sizes(q, k, mask),
            scale,
            softcap or 0.0,
            **_constants(q, k, v, mask, softcap),
            BLOCK_M=block.m,
            BLOCK_N=block.n,
            EVEN=block.tma or q.shape[1] % block.m == 0,
            TMA=block.tma,
            num_warps=block.warps,
            num_stages=block.stages,
            maxnreg=block.registers,
        )
    return dk, dv


def _blocks(q: Tensor, v: Tensor, mask: FlashMask) -> Blocks:
    shape = mask.num_intervals, mask.causal, mask.num_columns
    capability = None if _INTERPRETED else torch.cuda.get_device_capability(q.device)
    head_dim = max(q.shape[-1], v.shape[-1])
    return choose(capability, q.element_size(), head_dim, *shape, q.dtype == torch.bfloat16)


def _fetching(block: Block, *tensors: Tensor) -> Block:
    """The block, without TMA where heads of these `[B, N, H, D]` are not multiples of the 16 bytes that it needs."""
    fits = all(x.shape[3] * x.element_size() % 16 == 0 for x in tensors)
    return block if fits else block._replace(tma=False)


def _rows_of(x: Tensor, rows: int, block: Block) -> Tensor | TensorDescriptor:
    """What `fetch_rows` takes: x, or with TMA a descriptor that fetches `rows` positions of one head of it."""
    if not block.tma:
        return x

    def fits(stride: int) -> bool:
        return stride > 0 and stride * x.element_size() % 16 == 0

    if x.data_ptr() % 16 or any(n > 1 and not fits(s) for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)):
        x = x.clone(memory_format=torch.contiguous_format)
    # The stride of a dimension of size 1 may be anything.
    strides = [s if fits(s) else x.shape[3] for s in x.stride()[:3]]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, _padded(x.shape[3])])


def _rows_contiguous(x: Tensor) -> Tensor:
    """The kernels take any strides but the last, which must be 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _sizes(q: Tensor, k: Tensor, mask: FlashMask) -> tuple[int, int, int, int, int, int]:
    return q.shape[1], k.shape[1], q.shape[2], mask.batch, mask.heads, mask.num_intervals


def _constants(q: Tensor, k: Tensor, v: Tensor, mask: FlashMask, softcap: float | None) -> dict[str, int | bool]:
    d, d_v = q.shape[-1], v.shape[-1]
    return {
        "KV_SHARE": q.shape[2] // k.shape[2],
        "CAUSAL": mask.causal,
        "INTERVALS": mask.num_intervals if mask.num_intervals <= MAX_UNROLLED else -1,
        "SOFTCAP": softcap is not None,
        "D": d,
        "D_V": d_v,
        "BLOCK_D": _padded(d),
        "BLOCK_DV": _padded(d_v),
        "UPCAST": _INTERPRETED and q.dtype == torch.bfloat16,
    }


def _padded(d: int) -> int:
    return max(16, triton.next_power_of_2(d))
