"""The softmax of the Hopper forward's tiles: most of them go without their rows' maxima, and `softmax` says why.

Scores are `[64, columns]` of one warpgroup. A row's anchor is what its exponentials are relative to.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def sum_in_thread(p, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """`[ROWS, COLUMNS]` to `[ROWS, 8]`: what a thread holds of a row is added up; its quad's four parts stay apart."""
    return gl.sum(gl.reshape(p, [ROWS, COLUMNS // 8, 8]), 1)


@gluon.jit
def anchors(s, b_top, scale_log2, STEADY: gl.constexpr, LAZY: gl.constexpr):
    """New anchors by the maxima of s; if LAZY, only where p would exceed 256; if STEADY, in steps of 2^-12.

    Orders can be added to such a number without rounding, and p of the maximum is still 1 in bfloat16. (From 2048 on,
    where there are no such steps in float32, it is left as it is: rounding can then depend on the tiles visited.)
    """
    b_max = gl.max(s, 1) * scale_log2
    if STEADY:
        b_max = gl.where(gl.abs(b_max) < 2048.0, gl.floor(b_max * 4096.0) * (1.0 / 4096.0), b_max)
    if LAZY:
        return gl.where(b_max - b_top > 8.0, b_max, b_top)
    return gl.maximum(b_top, b_max)


@gluon.jit
def raise_anchors(b_top, b_sum, LAYOUT: gl.constexpr):
    """Anchors for the next tile: where a sum has reached 2^24, so much higher that it is 1 to 2 in their units.

    Where it has reached 2^100, NaN: the factor by which it would decay comes near to the least that there is.
    """
    b_sum = gl.convert_layout(gl.sum(b_sum, 1), LAYOUT)
    orders = (b_sum.to(gl.int32, bitcast=True) >> 23) - 127
    b_next = gl.where(orders >= 24, b_top + orders.to(gl.float32), b_top)
    return gl.where(orders >= 100, float("nan"), b_next)


@gluon.jit
def softmax(s, b_top, b_new, b_sum, scale_log2, BLOCK_N: gl.constexpr):
    """p relative to the anchors b_new, the (split) sums relative to them, and the factor by which older results decay.

    A row's anchor is what its p are relative to, in units of log2: p = 2^(s scale_log2 - anchor). Results do not depend
    on it but by rounding, as long as p, the sums and O are numbers and do not vanish. The usual anchor, the maximum so
    far, is one of many, and what it takes to know it, 64 comparisons of a thread and two exchanges within its quad
    before the first exponential, is a tenth of a tile's time. The STEADY kernel does without:

    - A row's first anchor is the maximum of the first tile in which it sees a column. A full tile shows every row a
      column, so that this has to be looked for in the OPENING tiles only. A row that has seen none keeps -inf, p and
      sum 0. So an anchor is at most the maximum so far or, once raised, log2 of the columns above it: p that count do
      not vanish, since float32 and bfloat16 reach to 2^-126. float16 does not; it keeps the maxima. But a full tile may
      show a row nothing but scores of -inf: an item with such a row is computed AGAIN, as below.
    - When the sum has reached 2^24, the anchor is raised by the sum's binary order, and O and the sum decay by as much.
      That is one exchange a tile, and nothing waits for it before the next tile's exponentials.
    - Within one tile p may outgrow that: the sum reaches 2^100 where a score is 50 to 70 above all that the row saw
      before. Its anchor becomes NaN then, and so does what follows. O may overflow before, by large v. Consumers look
      for what is no number when an item ends, and the producer has them compute the item AGAIN, with maxima in every
      tile. So inf and NaN in the inputs lead to what they lead to with maxima.
    - Which tiles are visited changes no bit: what is done to a row in a tile depends on that row alone. Where nothing
      is visible, p is 0 and the anchor stays, unless it is about to be raised: which the next tile would do as well,
      by as much, and the item's end. And an anchor's rises are whole numbers and exact (`anchors`), so that decays are
      powers of two, exact whenever they are applied.
    """
    # A row that has seen no column yet: any finite anchor, -inf would give NaN.
    b_anchor = gl.where(b_new == float("-inf"), 0.0, b_new)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(b_anchor, 1))
    # The difference first: an unchanged anchor decays by exactly 1, so a tile that is hidden changes no bit.
    b_decay = gl.exp2(b_top - b_anchor)
    split_decay = gl.expand_dims(gl.convert_layout(b_decay, gl.SliceLayout(1, b_sum.type.layout)), 1)
    return p, b_sum * split_decay + sum_in_thread(p, 64, BLOCK_N), b_decay
