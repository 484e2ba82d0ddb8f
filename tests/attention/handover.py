"""A word handed from one warp to others by mbarriers alone, in the right order, for racecheck to be tried on.

    compute-sanitizer --tool racecheck python -m tests.attention.handover

The Hopper kernels hand over what the producer knows of a tile in this way (`write_word`, `read_word`). What the tool
reports of this kernel it reports of them for the same reason, and says nothing about their order.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from fm_longctx.kernels.hopper.primitives import read_word, write_word

ROUNDS = 16


@gluon.jit
def _write(word_s, full, empty, rounds):
    for i in range(rounds):
        mbarrier.wait(empty, (i & 1) ^ 1)
        write_word(word_s.index(0), 3 * i)
        mbarrier.arrive(full, count=1)


@gluon.jit
def _read(p_out, word_s, full, empty, rounds):
    for i in range(rounds):
        mbarrier.wait(full, i & 1)
        word = read_word(word_s.index(0))
        mbarrier.arrive(empty, count=1)
        gl.store(p_out + i, word)


@gluon.jit
def handover_kernel(p_out, rounds):
    word_s = gl.allocate_shared_memory(gl.int32, [1, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [(_read, (p_out, word_s, full, empty, rounds)), (_write, (word_s, full, empty, rounds))], [1], [24]
    )


def main() -> None:
    out = torch.full((ROUNDS,), -1, dtype=torch.int32, device="cuda")
    handover_kernel[(2,)](out, ROUNDS, num_warps=4)
    assert out.tolist() == [3 * i for i in range(ROUNDS)], out.tolist()
    print(f"{ROUNDS} words handed over")


if __name__ == "__main__":
    main()
