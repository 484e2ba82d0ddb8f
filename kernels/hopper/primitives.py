"""Steps that the Hopper kernels share."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def hide_rows(
    s,
    o_m,
    n0,
    n_q,
    n_k,
    bounds,
    BLOCK_N: gl.constexpr,
    LAYOUT: gl.constexpr,
    CAUSAL: gl.constexpr,
    INTERVALS: gl.constexpr,
):
    """Scores `[64, BLOCK_N]` with the masked ones -inf; o_m `[64]` row indices, bounds in shared memory: start and end
    rows of each interval in turn."""
    o_m = gl.expand_dims(o_m, 1)
    o_n = gl.expand_dims(n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)), 0)
    # One select a condition: keeping a tile of booleans alive across them would spill.
    s = gl.where(o_n < n_k, s, float("-inf"))
    if CAUSAL:
        s = gl.where(o_m >= o_n - (n_k - n_q), s, float("-inf"))
    for i in gl.static_range(INTERVALS):
        start = bounds.slice(2 * i, 1, 0).load(LAYOUT)
        end = bounds.slice(2 * i + 1, 1, 0).load(LAYOUT)
        s = gl.where((o_m >= start) & (o_m < end), float("-inf"), s)
    return s
