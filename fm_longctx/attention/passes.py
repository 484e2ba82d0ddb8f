"""The raw passes, forward and backward, without autograd: what the op and context parallelism are built from."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fm_longctx.attention import reference
from fm_longctx.kernels import portable
from fm_longctx.mask import FlashMask

BACKENDS = ("hopper", "triton", "reference")
"""Fastest first."""


def load_backend(name: str) -> ModuleType:
    """The module of a backend: `refusal`, `Schedule`, `schedules`, `schedules_needed` and the passes `forward`,
    `compute_delta` and `backward`."""
    if name == "hopper":
        # Only when it is wanted: the Gluon dialect that it is written in is not part of every Triton.
        from fm_longctx.kernels.hopper import launch

        return launch
    return portable if name == "triton" else reference


def resolve_backend(backend: str | None, q: Tensor, v: Tensor, intervals: int, softcap: float | None = None) -> str:
    """The backend to run: the named one; or, if None, on a GPU the fastest that can, `reference` elsewhere.

    Where that is not `hopper` on a GPU made for it, a warning says why, once for each reason.

    Args:
        intervals: the most intervals a column of any mask that q and v will meet.

    Raises:
        ValueError: an unknown name, or a backend that cannot take these inputs, with the reason. A named backend never
            gives way to another.
    """
    if backend is None:
        if q.device.type != "cuda":
            return "reference"
        reasons = {}
        for name in BACKENDS:
            reasons[name] = load_backend(name).refusal(q, v, intervals, softcap)
            if reasons[name] is None:
                break
        refused = reasons["hopper"] is not None and torch.cuda.get_device_capability(q.device) == (9, 0)
        # While torch.compile traces, a warning would break the graph.
        if refused and not torch.compiler.is_compiling():
            _announce(f"backend=None takes {name!r}: 'hopper', the fastest on this GPU, {reasons['hopper']}.")
        return name
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)} or None, got {backend!r}.")
    reason = load_backend(backend).refusal(q, v, intervals, softcap)
    if reason is not None:
        raise ValueError(f"backend={backend!r} {reason}. Name another, or pass backend=None to let the op choose.")
    return backend


@cache
def _announce(text: str) -> None:
    warnings.warn(text, stacklevel=4)


@torch.compiler.assume_constant_result
def torch_is_strict() -> bool:
    """Whether `torch.use_deterministic_algorithms` would have an indeterminate operation raise."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    """The backends choose the precision of each product themselves."""
    # Asking is cheap, and turning off what is off is not.
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def build_schedules(
    q: Tensor, v: Tensor, mask: FlashMask, *, backend: str, backward: bool, deterministic: bool
) -> tuple[list[tuple[int, int, bool]], list[tuple[Tensor, ...]]]:
    """The tile schedules that a forward and, if `backward`, its backward read, cached on the mask; and their keys.

    The passes would build what they miss; all of them together take the time of one.
    """
    module = load_backend(backend)
    keys = module.schedules_needed(q, v, mask, backward=False, deterministic=deterministic)
    if backward:
        keys = keys + module.schedules_needed(q, v, mask, backward=True, deterministic=deterministic)
    keys = list(dict.fromkeys(keys))
    return keys, module.schedules(mask, keys)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: FlashMask,
    *,
    scale: float,
    backend: str,
    softcap: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q `[B, N_q, H, D]` to k `[B, N_k, H_kv, D]` and v `[B, N_k, H_kv, D_v]` under the mask.

    N_q and N_k may be 0. Returns out `[B, N_q, H, D_v]` (q's dtype, or `out_dtype`) and lse `[B, H, N_q]`, float32 and
    natural log; a row without a visible column has out 0 and lse -inf.
    """
    with _no_autocast(q.device.type):
        return load_backend(backend).forward(
            q, k, v, mask, scale=scale, softcap=softcap, out_dtype=out_dtype or q.dtype
        )


def attention_delta(out: Tensor, dout: Tensor, dlse: Tensor | None = None, *, backend: str) -> Tensor:
    """What the softmax's backward subtracts, `[B, H, N_q]`: rowsum(out * dout) - dlse, in float32 at least.

    out, dout `[B, N_q, H, D_v]`, out of the complete (merged) result; dlse `[B, H, N_q]`, the gradient of its lse.
    """
    return load_backend(backend).compute_delta(out, dout, dlse)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: FlashMask,
    *,
    scale: float,
    backend: str,
    softcap: float | None = None,
    grad_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv for the gradient dout `[B, N_q, H, D_v]`, shaped as q, k, v, in their dtype or `grad_dtype`.

    lse and delta `[B, H, N_q]` belong to the complete result, of which k, v and mask may be one part. Rows whose lse is
    -inf get gradient 0. `deterministic` asks for bitwise repeatable results.
    """
    with _no_autocast(q.device.type):
        return load_backend(backend).backward(
            dout,
            q,
            k,
            v,
            lse,
            delta,
            mask,
            scale=scale,
            softcap=softcap,
            grad_dtype=grad_dtype or q.dtype,
            deterministic=deterministic,
        )
