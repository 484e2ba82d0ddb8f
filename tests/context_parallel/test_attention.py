"""Context-parallel attention on gloo ranks against dense float64 attention in one process: outputs and gradients."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import cases
from fm_longctx import ContextParallel, FlashMask, ShardPlan, context_parallel_attention
from fm_longctx.context_parallel import attention as module
from fm_longctx.context_parallel import exchange
from fm_longctx.mask import builders
from tests.attention.oracle import Result, assert_within_budget, dense_attention, gradients, random_inputs
from tests.distributed import run_ranks

CASES = [case.name for case in cases(64)]
LENGTH = 101  # divisible by nothing


def visible_by_rule(case, n):
    index = torch.arange(n)
    return case.visible(index[:, None], index[None, :])[None, None]


def run_attention(masks, inputs, *, recompute=False, in_worker=False, backend=None, refetch=False, **options):
    """On one rank: its rows, and for each mask out, dq, dk, dv of its part of the inputs (q, k, v, dout)."""
    group, rank = dist.group.WORLD, dist.get_rank()
    results = []
    for mask in masks:
        plan = ShardPlan.build(mask, dist.get_world_size(), **options)
        context = ContextParallel(group, plan.local(rank)) if in_worker else ContextParallel(group, plan, mask)
        q, k, v, dout = (plan.shard(x, rank, 1) for x in inputs)
        q, k, v = (x.requires_grad_() for x in (q, k, v))

        def attend(q, k, v, context=context):
            return context_parallel_attention(q, k, v, context, backend=backend, refetch=refetch)

        out = checkpoint(attend, q, k, v, use_reentrant=False) if recompute else attend(q, k, v)
        out.backward(dout)
        results.append((plan.rows(rank), out.detach(), q.grad, k.grad, v.grad))
    return results


def assembled(by_rank):
    """Global out, dq, dk, dv of each mask; a row that no rank returned is NaN."""
    results = []
    for shards in zip(*by_rank, strict=True):
        n = sum(len(rows) for rows, *_ in shards)
        whole = []
        for part in range(1, 5):
            shape = list(shards[0][part].shape)
            shape[1] = n
            x = torch.full(shape, torch.nan, dtype=shards[0][part].dtype)
            for shard in shards:
                x[:, shard[0]] = shard[part]
            whole.append(x)
        results.append(Result(whole[0], torch.zeros(0), *whole[1:]))
    return results


def expected(inputs, visible):
    q, k, v, dout = (x.double() for x in inputs)
    result = gradients(lambda *x: dense_attention(*x, visible, 1 / math.sqrt(q.shape[-1])), q, k, v, dout)
    return result._replace(lse=torch.zeros(0))


def make_inputs(n=LENGTH, dtype=torch.float64, **shape):
    q, k, v = (x.cpu() for x in random_inputs(rows=n, dtype=dtype, **shape))
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=torch.Generator().manual_seed(9)).to(dtype)
    return q, k, v, dout


def assert_equal_to_dense(result, inputs, visible):
    """float64 in, float64 throughout: nothing but the order of additions differs."""
    for name, got, want in zip(Result._fields, result, expected(inputs, visible), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_mask_case(world_size):
    chosen = cases(LENGTH, seed=4)
    inputs = make_inputs(heads=4, kv_heads=2, d=8)
    results = assembled(run_ranks(world_size, run_attention, [case.mask for case in chosen], inputs, chunk_size=4))
    for case, result in zip(chosen, results, strict=True):
        assert_equal_to_dense(result, inputs, visible_by_rule(case, LENGTH))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_mask_for_each_sample_and_head(world_size):
    generator = torch.Generator().manual_seed(world_size)
    inputs = make_inputs(batch=2, heads=4, kv_heads=2, d=8, d_v=6)
    masks, visibles = [], []
    for heads in (1, 2, 4):
        # Runs of seven rows: a few intervals a column; how many there are is what attention and planning cost.
        visible = torch.rand(2, heads, -(-LENGTH // 7), LENGTH, generator=generator) < 0.3
        visible = visible.repeat_interleave(7, dim=2)[:, :, :LENGTH].clone()
        visible[0, :, 40:60] = False  # rows that see nothing in one sample
        visible[1, 0, :, 70:] = False
        visible[:, :, 90] = False  # and one that sees nothing in any
        visibles.append(visible)
        masks.append(FlashMask.from_dense(visible, max_intervals=LENGTH))
    documents = FlashMask.from_position_ids(torch.stack([torch.arange(LENGTH) % 40, torch.arange(LENGTH) % 17]))
    visibles.append(documents.to_dense())
    masks.append(documents)
    results = assembled(run_ranks(world_size, run_attention, masks, inputs))
    for visible, result in zip(visibles, results, strict=True):
        assert_equal_to_dense(result, inputs, visible)
    assert all((result.out[:, 90] == 0).all() and (result.dq[:, 90] == 0).all() for result in results[:3])


def test_a_mask_that_hides_everything():
    inputs = make_inputs(heads=1, d=8)
    mask = FlashMask.from_dense(torch.zeros(LENGTH, LENGTH, dtype=torch.bool))
    (result,) = assembled(run_ranks(3, run_attention, [mask], inputs))
    assert all((x == 0).all() for x in result)


@pytest.mark.parametrize("n", [1, 2, 3, 63])
def test_fewer_tokens_than_ranks_and_odd_lengths(n):
    inputs = make_inputs(n=n, heads=2, d=8)
    masks = [builders.causal(n), builders.full(n)]
    results = assembled(run_ranks(4, run_attention, masks, inputs))
    for mask, result in zip(masks, results, strict=True):
        assert_equal_to_dense(result, inputs, mask.to_dense())


@pytest.mark.parametrize("num_stages, own_stage", [(2, 0), (3, 1), (4, 0)])
def test_more_stages_give_the_same(num_stages, own_stage):
    inputs = make_inputs(heads=2, kv_heads=1, d=8)
    masks = [builders.document([50, 51]), builders.sliding_window(LENGTH, 20)]
    results = assembled(
        run_ranks(4, run_attention, masks, inputs, chunk_size=3, num_stages=num_stages, own_stage=own_stage)
    )
    for mask, result in zip(masks, results, strict=True):
        assert_equal_to_dense(result, inputs, mask.to_dense())


@pytest.mark.parametrize(
    "dtype, backend",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "triton"), (torch.float16, "triton")],
)
def test_low_precision_is_no_worse_than_dense(dtype, backend):
    """With triton: received keys and values are strided views of one buffer, which the kernels must read as such."""
    if backend and torch.cuda.is_available():
        pytest.skip("the ranks are CPU processes, and kernels run on a CPU under Triton's interpreter only")
    inputs = make_inputs(heads=4, kv_heads=2, d=16, dtype=dtype)
    mask = builders.causal_document([37, 64])
    q, k, v, dout = inputs
    low = gradients(lambda *x: dense_attention(*x, mask.to_dense(), 1 / 4), q, k, v, dout)
    (result,) = assembled(run_ranks(3, run_attention, [mask], inputs, chunk_size=4, backend=backend))
    assert all(x.dtype == dtype for x in (result.out, result.dq, result.dk, result.dv))
    assert_within_budget(result, expected(inputs, mask.to_dense()), low._replace(lse=torch.zeros(0)))


def test_recomputation_and_repetition_change_no_bit():
    """Non-reentrant checkpointing attends twice on every rank; parts made in a loader's worker are the same parts."""
    inputs = make_inputs(heads=4, kv_heads=2, d=8, dtype=torch.float32)
    mask = builders.document([50, 51])
    (once,) = assembled(run_ranks(3, run_attention, [mask], inputs, num_stages=3))
    for options in ({}, {"recompute": True}, {"in_worker": True}, {"refetch": True}):
        (again,) = assembled(run_ranks(3, run_attention, [mask], inputs, num_stages=3, **options))
        assert all(a.equal(b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_separate(causal):
    """Over two ranks each document gets what it gets alone in one process."""
    lengths = [37, 11, 53]
    inputs = make_inputs(heads=2, kv_heads=1, d=8)
    mask = FlashMask.from_lengths(lengths, causal=causal)
    (packed,) = assembled(run_ranks(2, run_attention, [mask], inputs, chunk_size=5))
    parts = [
        expected(
            [x[:, at : at + n] for x in inputs],
            torch.ones(1, 1, n, n).tril().bool() if causal else torch.ones(1, 1, n, n).bool(),
        )
        for at, n in ((0, 37), (37, 11), (48, 53))
    ]
    for i in (0, 2, 3, 4):
        torch.testing.assert_close(packed[i], torch.cat([part[i] for part in parts], dim=1), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "world_size, head_parallel, heads, kv_heads",
    [(2, 2, 4, 2), (4, 2, 4, 2), (4, 4, 4, 2), (6, 2, 4, 1), (6, 3, 6, 3), (6, 6, 6, 2)],
)
def test_heads_and_rows_are_shared_by_a_mesh(world_size, head_parallel, heads, kv_heads):
    """Ulysses x ring: more members than key/value heads, uneven runs of rows, masks of several heads."""
    n = 41
    inputs = make_inputs(n=n, batch=2, heads=heads, kv_heads=kv_heads, d=8, d_v=6)
    generator = torch.Generator().manual_seed(world_size)
    masks, visibles = [], []
    for mask_heads in sorted({kv_heads, heads}):
        visible = torch.rand(2, mask_heads, n, n, generator=generator) < 0.3
        visible[:, :, 30] = False
        visibles.append(visible)
        masks.append(FlashMask.from_dense(visible, max_intervals=n))
    masks.append(builders.prefix_tree([-1, 0, 1, 1, 0], [14, 10, 3, 5, 9]))
    visibles.append(masks[-1].to_dense())
    by_rank = run_ranks(world_size, run_attention, masks, inputs, head_parallel=head_parallel, timeout=200)
    for visible, result in zip(visibles, assembled(by_rank), strict=True):
        assert_equal_to_dense(result, inputs, visible)


@pytest.mark.parametrize("world_size", [5, 6, 7, 8])
def test_more_ranks(world_size):
    inputs = make_inputs(heads=2, kv_heads=1, d=8)
    masks = [builders.causal_document([37, 11, 53]), builders.global_sliding_window(LENGTH, 5, 9)]
    by_rank = run_ranks(world_size, run_attention, masks, inputs, chunk_size=4, num_stages=3, timeout=200)
    for mask, result in zip(masks, assembled(by_rank), strict=True):
        assert_equal_to_dense(result, inputs, mask.to_dense())


@pytest.mark.parametrize("strategy", ["zigzag", "contiguous"])
def test_every_strategy(strategy):
    inputs = make_inputs(heads=2, kv_heads=1, d=8)
    mask = builders.document([50, 51])
    (result,) = assembled(run_ranks(3, run_attention, [mask], inputs, strategy=strategy, num_stages=3))
    assert_equal_to_dense(result, inputs, mask.to_dense())


TREE = ([-1, 0, 1, 1, 0, 4], [30, 14, 9, 21, 16, 11])


def test_branches_of_a_prefix_tree_equal_their_own_sequences():
    """Each leaf with its ancestors, alone in one process, gives the leaf's rows of the packed tree over three ranks."""
    parents, lengths = TREE
    inputs = make_inputs(heads=2, kv_heads=1, d=8)
    (tree,) = assembled(run_ranks(3, run_attention, [builders.prefix_tree(parents, lengths)], inputs, chunk_size=5))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for node in range(len(parents)):
        path, at = [], node
        while at >= 0:
            path.insert(0, at)
            at = parents[at]
        index = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in path])
        q, k, v, _ = (x[:, index].double() for x in inputs)
        n = len(index)
        alone = dense_attention(q, k, v, torch.ones(1, 1, n, n).tril().bool(), 1 / math.sqrt(8))[0]
        own = slice(n - lengths[node], n)
        torch.testing.assert_close(tree.out[:, index[own]], alone[:, own], rtol=1e-11, atol=1e-11)


def calls_of_kernels(mask, **options):
    """How many forward and backward passes a rank launches."""
    counts = [0, 0]
    names = ("attention_forward", "attention_backward")
    originals = [getattr(module, name) for name in names]

    def watch(i):
        def watched(*args, **kwargs):
            counts[i] += 1
            return originals[i](*args, **kwargs)

        return watched

    try:
        for i, name in enumerate(names):
            setattr(module, name, watch(i))
        run_attention([mask], make_inputs(heads=1, d=8), **options)
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(module, name, original)
    return counts


def test_stages_without_a_visible_score_launch_nothing():
    # Each rank's document ends where its rows end: three stages, of which only the first has anything.
    separate = builders.document([34, 34, 33])
    assert run_ranks(3, calls_of_kernels, separate, strategy="contiguous", num_stages=3) == [[1, 1]] * 3
    full = builders.full(LENGTH)
    assert run_ranks(3, calls_of_kernels, full, strategy="contiguous", num_stages=3) == [[3, 3]] * 3


def with_lse_and_softcap(mask, inputs, dlse, **options):
    """On one rank: its rows, out, lse and the gradients of a loss on both, of scores capped at 1.5."""
    rank = dist.get_rank()
    plan = ShardPlan.build(mask, dist.get_world_size(), **options)
    context = ContextParallel(dist.group.WORLD, plan, mask)
    q, k, v, dout = (plan.shard(x, rank, 1) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = context_parallel_attention(q, k, v, context, softcap=1.5, return_lse=True)
    torch.autograd.backward([out, lse.where(lse.isfinite(), 0)], [dout, plan.shard(dlse, rank, 2)])
    return plan.rows(rank), out.detach(), lse.detach().transpose(1, 2), q.grad, k.grad, v.grad


@pytest.mark.parametrize("world_size, head_parallel", [(3, 1), (4, 2)])
def test_lse_and_softcap(world_size, head_parallel):
    n = 47
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    visible[20:30] = False
    inputs = make_inputs(n=n, batch=2, heads=4, kv_heads=2, d=8)
    dlse = torch.randn(2, 4, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = FlashMask.from_dense(visible)
    by_rank = run_ranks(world_size, with_lse_and_softcap, mask, inputs, dlse, head_parallel=head_parallel)
    q, k, v, dout = inputs

    def dense(q, k, v):
        return dense_attention(q, k, v, visible[None, None], 1 / math.sqrt(8), softcap=1.5)

    want = gradients(dense, q, k, v, dout, dlse)
    for part, whole in enumerate((want.out, want.lse.transpose(1, 2), want.dq, want.dk, want.dv), start=1):
        got = torch.full_like(whole, torch.nan)
        for shard in by_rank:
            got[:, shard[0]] = shard[part]
        torch.testing.assert_close(got, whole, rtol=1e-11, atol=1e-11)


def through_the_host(mask, inputs):
    """As on a GPU whose group has gloo only: every exchange through a host copy."""
    original, exchange.needs_host = exchange.needs_host, lambda device, group: True
    try:
        return run_attention([mask], inputs)
    finally:
        exchange.needs_host = original


def test_exchanges_staged_through_the_host_are_the_same():
    inputs = make_inputs(heads=2, kv_heads=1, d=8)
    mask = builders.causal_document([50, 51])
    (staged,) = assembled(run_ranks(2, through_the_host, mask, inputs))
    assert_equal_to_dense(staged, inputs, mask.to_dense())


def which_need_the_host():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    return exchange.needs_host(cpu, dist.group.WORLD), exchange.needs_host(cuda, dist.group.WORLD)


def test_gloo_needs_the_host_for_a_gpu():
    assert run_ranks(1, which_need_the_host) == [(False, True)]


def count_keys(mask):
    """Keys that this rank receives and gradients that it sends, by watching the collectives."""
    counts = []
    exchange = dist.all_to_all_single

    def watched(output, input, *args, **kwargs):
        counts.append((output.shape[0], input.shape[0]))
        return exchange(output, input, *args, **kwargs)

    dist.all_to_all_single = watched
    try:
        run_attention([mask], make_inputs(heads=1, d=8), own_stage=0)
    finally:
        dist.all_to_all_single = exchange
    return counts


def test_only_keys_that_are_seen_travel():
    mask = builders.sliding_window(LENGTH, 5)
    plan = ShardPlan.build(mask, 3, own_stage=0)
    (forward, backward), *others = run_ranks(3, count_keys, mask)
    received = [forward[0], *(counts[0][0] for counts in others)]
    seen = [set(mask.to_dense()[0, 0, plan.rows(r)].any(0).nonzero().flatten().tolist()) for r in range(3)]
    assert received == [len(seen[r] - set(plan.rows(r).tolist())) for r in range(3)]
    assert backward == forward[::-1]
    assert 0 < sum(received) < LENGTH / 5


def only_some_gradients():
    group, mask = dist.group.WORLD, builders.causal(20)
    plan = ShardPlan.build(mask, 2)
    q, k, v = (torch.randn(1, 10, 2, 8, requires_grad=i == 1) for i in range(3))
    context_parallel_attention(q, k, v, ContextParallel(group, plan, mask)).sum().backward()
    return q.grad is None and v.grad is None and bool(k.grad.isfinite().all())


def test_gradients_of_keys_alone():
    assert run_ranks(2, only_some_gradients) == [True, True]


def under_autocast():
    group, mask = dist.group.WORLD, builders.causal(20)
    context = ContextParallel(group, ShardPlan.build(mask, 2), mask)
    q = torch.randn(1, 10, 2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = context_parallel_attention(q, q, q, context)
    out.sum().backward()
    return out.dtype, q.grad.dtype


def test_autocast():
    assert run_ranks(2, under_autocast) == [(torch.bfloat16, torch.float32)] * 2


def compiled():
    group, mask = dist.group.WORLD, builders.causal(20)
    plan = ShardPlan.build(mask, 2)
    context = ContextParallel(group, plan, mask)
    q = torch.randn(1, 10, 2, 8)

    def layer(q, context):
        return context_parallel_attention(q * 2, q, q, context) + 1

    return bool(torch.compile(layer, backend="eager")(q, context).equal(layer(q, context)))


def test_a_compiled_layer_breaks_only_at_the_op():
    assert run_ranks(2, compiled, timeout=120) == [True, True]
