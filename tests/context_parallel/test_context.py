"""ContextParallel: what fits together, and loud failure on every rank where it does not."""

import datetime
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from fm_longctx import ContextParallel, ShardPlan, context_parallel_attention
from fm_longctx.context_parallel import agreement, exchange
from fm_longctx.mask import builders
from tests.distributed import RankError, run_ranks


def failure_of(make):
    """The ValueError's message on this rank, or None. A later collective shows that the group is still usable."""
    message = None
    try:
        make()
    except ValueError as error:
        message = str(error)
    dist.barrier()
    return message


def hold_other_masks(differing):
    lengths = [30, 21] if dist.get_rank() in differing else [21, 30]
    mask = builders.causal_document(lengths)
    plan = ShardPlan.build(mask, dist.get_world_size())
    return failure_of(lambda: ContextParallel(dist.group.WORLD, plan, mask))


@pytest.mark.parametrize("differing", [[1], [2], [0, 1]])
def test_ranks_with_different_masks_all_raise(differing):
    messages = run_ranks(3, hold_other_masks, differing, timeout=120)
    named = [2] if differing == [0, 1] else differing
    assert all(f"disagree about mask or plan: {named} hold another than rank 0" in message for message in messages)


def hold_other_plans():
    mask = builders.causal(51)
    plan = ShardPlan.build(mask, 2, strategy=("zigzag", "contiguous")[dist.get_rank()])
    return failure_of(lambda: ContextParallel(dist.group.WORLD, plan, mask))


def test_ranks_with_different_plans_all_raise():
    assert all("disagree" in message for message in run_ranks(2, hold_other_plans, timeout=120))


def fail_on_one_rank():
    """Rank 1 is handed rank 0's part: only it can know, but all must hear of it."""
    mask = builders.causal(51)
    part = ShardPlan.build(mask, 2).local(0)
    return failure_of(lambda: ContextParallel(dist.group.WORLD, part))


def test_an_error_of_one_rank_is_an_error_of_all():
    messages = run_ranks(2, fail_on_one_rank, timeout=120)
    assert all("rank 1" in message and "rank 0's part" in message for message in messages)


def attend_in_other_dtypes(check):
    mask = builders.causal(20)
    context = ContextParallel(dist.group.WORLD, ShardPlan.build(mask, 3), mask, check=check)
    q = torch.randn(1, len(context.rows), 2, 8, dtype=torch.float64 if dist.get_rank() == 0 else torch.float32)
    return failure_of(lambda: context_parallel_attention(q, q, q, context))


def test_ranks_with_different_dtypes_all_raise_and_name_the_odd_one():
    """Rank 0 is the odd one: what most hold is taken as right."""
    for message in run_ranks(3, attend_in_other_dtypes, True, timeout=120):
        assert "disagree about the inputs of attention: [0] hold another than rank 1" in message
        assert "float64" in message and "float32" in message


def count_comparisons():
    calls = []
    gather = dist.all_gather

    def watched(outputs, input, **kwargs):
        assert input.device.type == "cpu" and input.numel() == 2
        calls.append(outputs)
        gather(outputs, input, **kwargs)

    dist.all_gather = watched
    try:
        mask = builders.causal(20)
        context = ContextParallel(dist.group.WORLD, ShardPlan.build(mask, 2), mask)
        q = torch.randn(1, 10, 2, 8)
        for _ in range(3):
            context_parallel_attention(q, q, q, context)
    finally:
        dist.all_gather = gather
    return len(calls)


def test_comparing_is_once_a_batch_not_once_a_layer():
    assert run_ranks(2, count_comparisons) == [2, 2]


def plan_for_three_on_two():
    mask = builders.causal(51)
    plan = ShardPlan.build(mask, 3)
    return failure_of(lambda: ContextParallel(dist.group.WORLD, plan, mask, check=False))


def test_group_and_plan_of_different_sizes():
    assert all("for 3 ranks but the group has 2" in message for message in run_ranks(2, plan_for_three_on_two))


def skip_the_check():
    mask = builders.causal_document([21, 30])
    plan = ShardPlan.build(mask, 2)
    calls = []
    gather, dist.all_gather = dist.all_gather, lambda *args, **kwargs: calls.append(args)
    try:
        ContextParallel(dist.group.WORLD, plan, mask, check=False)
    finally:
        dist.all_gather = gather
    return len(calls)


def test_the_check_can_be_turned_off():
    assert run_ranks(2, skip_the_check) == [0, 0]


def hold_a_sub_group():
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    mask = builders.causal(20 + dist.get_rank() % 2)
    context = ContextParallel(mine, ShardPlan.build(mask, 2), mask)
    return context.rank, context.world_size, context.num_tokens


def test_sub_groups_compare_among_themselves():
    assert run_ranks(4, hold_a_sub_group) == [(0, 2, 20), (0, 2, 21), (1, 2, 20), (1, 2, 21)]


def compare_as_if_over_nccl():
    """Two sub-groups without a backend for the CPU, one of which compares twice and finds a difference."""
    rank = dist.get_rank()
    groups = [dist.new_group(ranks, timeout=datetime.timedelta(seconds=9)) for ranks in ([0, 2, 4], [1, 3])]
    group = groups[rank % 2]
    agreement.backends_of = lambda group: {"cpu:0": "nccl"}
    try:
        if rank % 2 == 0:
            agreement.compare("alike", group, "words")
        beside = [agreement.host_group(group) for _ in range(2)]
        timeout = beside[0]._get_backend(torch.device("cpu")).options._timeout
        message = failure_of(lambda: agreement.compare(f"rank {rank // 4}", group, "words"))
        return beside[0] is beside[1] and beside[0] is not group, timeout.seconds, message
    finally:
        agreement.backends_of = exchange.backends_of


def test_a_group_without_the_cpu_gets_one_beside_it_once():
    results = run_ranks(5, compare_as_if_over_nccl, timeout=120)
    assert [result[:2] for result in results] == [(True, 9)] * 5
    for message in (results[0][2], results[2][2], results[4][2]):
        assert "disagree about words: [2] hold another than rank 0 (rank 0: rank 0; rank 2: rank 1)" in message
    assert results[1][2] is results[3][2] is None


def test_one_rank_needs_no_group():
    mask = builders.causal(9)
    context = ContextParallel(None, ShardPlan.build(mask, 1), mask)
    assert context.rank == 0 and context.rows.tolist() == list(range(9)) and len(context.stages) == 1
    with pytest.raises(ValueError, match=r"for 2 ranks but the group has 1. None is one rank; pass dist.group.WORLD"):
        ContextParallel(None, ShardPlan.build(mask, 2), mask)


def test_what_does_not_fit():
    mask = builders.causal(9)
    plan = ShardPlan.build(mask, 1)
    with pytest.raises(ValueError, match="leave mask out"):
        ContextParallel(None, plan.local(0), mask)
    with pytest.raises(ValueError, match="must be a ShardPlan or a RankPlan, got FlashMask"):
        ContextParallel(None, mask)
    with pytest.raises(ValueError, match="8 positions but the plan was built for 9"):
        ContextParallel(None, plan, builders.causal(8))


def heads_that_do_not_divide():
    mask = builders.causal(9)
    context = ContextParallel(dist.group.WORLD, ShardPlan.build(mask, 3, head_parallel=3), mask)
    messages = []
    for heads, kv_heads in ((4, 2), (6, 2), (6, 3)):
        q, k = torch.randn(1, 3, heads, 8), torch.randn(1, 3, kv_heads, 8)
        messages.append(failure_of(lambda q=q, k=k: context_parallel_attention(q, k, k, context)))
    return messages


def test_heads_that_a_ring_cannot_split_are_refused():
    for messages in run_ranks(3, heads_that_do_not_divide):
        assert "head_parallel=3 must divide the 4 query heads" in messages[0]
        assert "head_parallel=3 must divide the 2 key/value heads, or be a multiple of them" in messages[1]
        assert messages[2] is None


def test_attention_refuses_what_does_not_fit():
    mask = builders.causal(9)
    context = ContextParallel(None, ShardPlan.build(mask, 1), mask)
    q = torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match=r"owns 9 of 9 positions but q has 8.*plan.shard"):
        context_parallel_attention(q[:, :8], q, q, context)
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        context_parallel_attention(q, q[:, :, :1].expand(1, 9, 3, 8), q[:, :, :1].expand(1, 9, 3, 8), context)
    with pytest.raises(ValueError, match="scale"):
        context_parallel_attention(q, q, q, context, scale=0.0)
    with pytest.raises(ValueError, match="softcap must be positive"):
        context_parallel_attention(q, q, q, context, softcap=-1.0)
    with pytest.raises(ValueError, match="backend"):
        context_parallel_attention(q, q, q, context, backend="no such")


# What ends the processes comes last: new ones take their time to start.


def die_before(what):
    mask = builders.causal(20)
    context = ContextParallel(dist.group.WORLD, ShardPlan.build(mask, 3), mask, check=what == "check")
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    q = torch.randn(1, len(context.rows), 2, 8)
    context_parallel_attention(q, q, q, context)


@pytest.mark.parametrize("what", ["check", "exchange"])
def test_a_rank_that_is_killed_is_an_error_of_the_others(what):
    with pytest.raises(RankError) as error:
        run_ranks(3, die_before, what, timeout=120)
    said = str(error.value).split("--- rank ")[1:]
    assert [part[0] for part in said] == ["0", "1", "2"] and "the process died" in said[1]
    assert all("Error" in part and "no answer in time" not in part for part in (said[0], said[2]))


def come_late():
    """Rank 1 never starts the exchange."""
    mask = builders.causal(20)
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    context = ContextParallel(group, ShardPlan.build(mask, 2), mask, check=False)
    if dist.get_rank() == 1:
        return time.sleep(4)
    q = torch.randn(1, 10, 2, 8)
    return context_parallel_attention(q, q, q, context)


def test_a_rank_that_does_not_come_is_an_error_after_the_timeout():
    with pytest.raises(RankError, match=r"(?s)^\n--- rank 0 of 2.*Timed out waiting 2000ms"):
        run_ranks(2, come_late, timeout=120)
