"""The core attention by itself: what it computes from each kind of batch, and everything that it refuses."""

import functools
import math
import warnings

import pytest
import torch

from fm_longctx import FlashMask, ShardPlan
from fm_longctx.mask import builders
from tests.distributed import run_ranks
from tests.integrations.megatron.cpu import megatron_on_cpu
from tests.integrations.megatron.world import Run, make_config, start

H, H_KV, D = 4, 2, 8


def make(config=None, *, mask_type="causal", run=None, **options):
    """The module in a configuration; the other keywords are its own."""
    from megatron.core.transformer.enums import AttnMaskType

    from fm_longctx.integrations.megatron import FlashMaskCoreAttention

    base = make_config(run or Run())
    for name, value in (config or {}).items():
        setattr(base, name, value)
    options = {"layer_number": 1, "attn_mask_type": AttnMaskType[mask_type], "attention_type": "self"} | options
    return FlashMaskCoreAttention(base, **options)


def inputs(n, batch=1, heads=(H, H_KV)):
    generator = torch.Generator().manual_seed(n)
    h, h_kv = heads
    return [torch.randn(n, batch, x, D, generator=generator) for x in (h, h_kv, h_kv)]


def dense(q, k, v, visible):
    """Megatron's layout, float64; `visible` broadcasts to [b, h, N, N]. Rows that see nothing give 0."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,kbhd->qbhd", weights, v).flatten(2)


def assert_close(out, expected):
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-6)


def on_one_rank(check):
    @functools.wraps(check)
    def run():
        warnings.filterwarnings("ignore")
        with megatron_on_cpu():
            start(Run())
            return check()

    return run


def documents(lengths, *, causal=True):
    n = sum(lengths)
    part = [i for i, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([[part[r] == part[c] and (c <= r or not causal) for c in range(n)] for r in range(n)])


def thd(bounds, padded=None, **changes):
    from megatron.core.packed_seq_params import PackedSeqParams

    bounds = torch.tensor(bounds, dtype=torch.int32)
    padded = None if padded is None else torch.tensor(padded, dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=8,
        max_seqlen_kv=8,
    )
    for name, value in changes.items():
        setattr(params, name, value)
    return params


@on_one_rank
def batches_of_every_kind():
    from megatron.core.transformer.enums import AttnMaskType

    from fm_longctx.integrations.megatron import FlashMaskParams

    # A mask a sample, a row that sees nothing, and a window on every second layer.
    visible = torch.rand(2, 1, 13, 13, generator=torch.Generator().manual_seed(0)) > 0.5
    visible[:, :, 4] = False
    q, k, v = inputs(13, batch=2)
    params = FlashMaskParams.build(FlashMask.from_dense(visible, max_intervals=8), window_size=(3, 1))
    assert_close(make()(q, k, v, None, packed_seq_params=params), dense(q, k, v, visible))
    index = torch.arange(13)
    inside = (index[None] >= index[:, None] - 3) & (index[None] <= index[:, None] + 1)
    layered = {"window_size": (3, 1), "window_attn_skip_freq": 2}
    for layer_number, seen in ((1, visible & inside), (2, visible)):
        out = make(layered, layer_number=layer_number)(q, k, v, None, packed_seq_params=params)
        assert_close(out, dense(q, k, v, seen))

    # MLA: other value channels, a scale of its own; gradients arrive.
    q, k, _ = (x.requires_grad_() for x in inputs(9, heads=(H, H)))
    v = torch.randn(9, 1, H, 5)
    core = make(softmax_scale=0.11, k_channels=D, v_channels=5)
    out = core(q, k, v, None, packed_seq_params=FlashMaskParams.build(builders.causal(9)))
    assert out.shape == (9, 1, H * 5)
    assert_close(out, dense(q * 0.11 * math.sqrt(D), k, v, documents([9])))
    out.sum().backward()
    assert q.grad.abs().sum() > 0 and k.grad.abs().sum() > 0

    # thd: causal or whole documents, and padding that nobody sees.
    core = make(sharding="zigzag")
    q, k, v = inputs(11)
    for bounds, mask_type in (([0, 4, 4, 11], AttnMaskType.causal), ([[0, 4, 11]], AttnMaskType.padding_causal)):
        params = thd(bounds)
        out = core(q[:, 0], k[:, 0], v[:, 0], None, attn_mask_type=mask_type, packed_seq_params=params)
        assert_close(out[:, None], dense(q, k, v, documents([4, 7])))
    params = thd([0, 3, 8], padded=[0, 5, 11])
    out = core(q[:, 0], k[:, 0], v[:, 0], None, attn_mask_type=AttnMaskType.padding, packed_seq_params=params)
    assert_close(out[:, None], dense(q, k, v, documents([3, 2, 5, 1], causal=False)))

    # A dense mask is read once for all layers; written to, it is read again.
    from fm_longctx.integrations.megatron import megatron_batches

    q, k, v = inputs(10, batch=2)
    masked = ~documents([6, 4]).expand(2, 1, 10, 10).clone()
    reads = []
    from_dense = FlashMask.from_dense
    FlashMask.from_dense = lambda visible: (reads.append(1), from_dense(visible))[1]
    try:
        for layer in (core, make(sharding="zigzag")):
            assert_close(layer(q, k, v, masked.detach()), dense(q, k, v, ~masked))
        assert len(reads) == 1
        masked[1] = ~documents([2, 8])
        assert_close(core(q, k, v, masked), dense(q, k, v, ~masked))
        assert len(reads) == 2
    finally:
        FlashMask.from_dense = from_dense
    assert len(megatron_batches._of_dense) == 1
    alone = [x[:, :1] for x in (q, k, v)]
    assert_close(core(*alone, masked[:1]), dense(*alone, ~masked[:1]))
    windowed = make({"window_size": (2, 0)}, sharding="zigzag")
    index = torch.arange(10)
    assert_close(windowed(q, k, v, masked), dense(q, k, v, ~masked & (index >= index[:, None] - 2)))

    # No mask, if that is what is meant.
    core = make(sharding="zigzag", without_mask="causal")
    assert_close(core(q, k, v), dense(q, k, v, documents([10])))


def test_batches_of_every_kind():
    run_ranks(1, batches_of_every_kind, timeout=200)


def heads_of_a_mask():
    """Tensor-parallel ranks take their own heads of a mask that has several."""
    warnings.filterwarnings("ignore")
    with megatron_on_cpu():
        run = Run(tp=2)
        start(run)
        from megatron.core import parallel_state

        from fm_longctx.integrations.megatron import FlashMaskParams

        rank = parallel_state.get_tensor_model_parallel_rank()
        visible = torch.rand(1, H, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.5
        mask = FlashMask.from_dense(visible, max_intervals=8)
        q, k, v = inputs(9)
        local = [x.chunk(2, dim=2)[rank] for x in (q, k, v)]
        out = make(run=run)(*local, None, packed_seq_params=FlashMaskParams.build(mask))
        assert_close(out, dense(q, k, v, visible).chunk(2, dim=2)[rank])
        with pytest.raises(ValueError, match="2 tensor-parallel ranks cannot share the mask's 3 heads"):
            FlashMaskParams.build(builders.random_eviction(8, heads=3))


def parameters_on_three_ranks():
    warnings.filterwarnings("ignore")
    with megatron_on_cpu():
        run = Run(cp=3)
        start(run)
        from megatron.core import parallel_state

        from fm_longctx.integrations.megatron import FlashMaskParams, mtp

        rank, n = parallel_state.get_context_parallel_rank(), 71
        bounds = torch.tensor([0, 13, 13, 40, n])
        params = FlashMaskParams.from_cu_seqlens(bounds)
        rows = params.context.rows
        assert len(rows) in (23, 24)
        # Everything follows the rows; positions restart with each document.
        tokens = torch.arange(2 * n).view(2, n)
        local = params.shard_batch({"tokens": tokens, "labels": None, "features": tokens[..., None].expand(2, n, 4)})
        assert local["tokens"].equal(tokens[:, rows]) and local["labels"] is None
        assert local["features"].shape == (2, len(rows), 4)
        start_of = torch.tensor([int(bounds[bounds <= i].max()) for i in range(n)])
        assert params.position_ids.equal((torch.arange(n) - start_of)[rows][None])
        # The next token of the document, whoever holds it.
        rolled, total = mtp.roll_tensor(local["tokens"], packed_seq_params=params)
        expected = torch.where(torch.isin(torch.arange(n) + 1, bounds), 0, tokens.roll(-1, 1))[:, rows]
        assert rolled.equal(expected) and total == expected.sum()
        assert "71 positions" in repr(params) and params != FlashMaskParams.from_cu_seqlens(bounds)

        # A rank that brings another mask is found out, on every rank.
        with pytest.raises(ValueError, match="the ranks disagree about mask or plan"):
            FlashMaskParams.build(builders.sliding_window(n, 5 + (rank == 1)))
        with pytest.raises(ValueError, match="cuts the sequence into 2 x 3 equal chunks"):
            FlashMaskParams.from_cu_seqlens(bounds, sharding="zigzag")
        with pytest.raises(ValueError, match="shared unevenly by 3 ranks, and pipeline stages expect equal parts"):
            core = make({"pipeline_model_parallel_size": 2}, run=run)
            core(*inputs(len(rows)), None, packed_seq_params=params)
        return True


def test_tensor_and_context_parallel_parameters():
    run_ranks(2, heads_of_a_mask, timeout=200)
    assert run_ranks(3, parameters_on_three_ranks, timeout=200) == [True] * 3


@on_one_rank
def refusals():
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType

    from fm_longctx.integrations.megatron import FlashMaskParams, mtp

    for config, words in (
        ({"attention_dropout": 0.1}, "attention dropout 0.1 is not supported"),
        ({"softmax_type": "off-by-one"}, "softmax_type='off-by-one' is not supported"),
        ({"softmax_type": "learnable"}, "softmax_type='learnable' is not supported"),
        ({"qk_clip": True}, "qk_clip=True is not supported"),
        ({"log_max_attention_logit": True}, "log_max_attention_logit=True"),
        ({"fp8_dot_product_attention": True}, "fp8_dot_product_attention=True"),
        ({"fp8_multi_head_attention": True}, "fp8_multi_head_attention=True"),
        ({"experimental_attention_variant": "dsa"}, "experimental_attention_variant='dsa'"),
        ({"cuda_graph_impl": "local"}, "cuda_graph_impl='local'"),
        ({"hybrid_context_parallel": True}, "hybrid_context_parallel=True"),
        ({"batch_invariant_mode": True}, "batch_invariant_mode=True"),
        ({"fine_grained_activation_offloading": True, "offload_modules": ["core_attn"]}, "offload_modules="),
    ):
        with pytest.raises(ValueError, match=words):
            make(config)
    with pytest.raises(ValueError, match=r"attention dropout 0\.2"):
        make(attention_dropout=0.2)
    for stages in ({"pipeline_model_parallel_size": 4}, {"virtual_pipeline_model_parallel_size": 2}):
        with pytest.raises(ValueError, match="the others would silently attend causally"):
            make(stages, sharding="zigzag", without_mask="causal")
    with pytest.raises(ValueError, match="is self-attention, got attention_type='cross'"):
        make(attention_type="cross")

    n = 8
    q, k, v = inputs(n)
    params = FlashMaskParams.build(builders.causal(n))
    plan, zigzag, windowed = make(), make(sharding="zigzag"), make({"window_size": (3, 0)})
    unmasked = make(mask_type="no_mask", sharding="zigzag", without_mask="causal")
    some_mask = torch.zeros(1, 1, n, n, dtype=torch.bool)
    hybrid = PackedSeqParams(qkv_format="sbhd", local_cp_size=2)
    for core, arguments, words in (
        (plan, {"attention_bias": torch.zeros(1)}, "attention_bias is not supported"),
        (plan, {"packed_seq_params": params, "attention_mask": some_mask}, "and one of them would be dropped"),
        (plan, {}, r"every pipeline stage, got none\. For"),
        (plan, {"attention_mask": some_mask}, "got none and an attention_mask"),
        (plan, {"packed_seq_params": thd([0, n])}, r"got a PackedSeqParams\. For"),
        (
            windowed,
            {"packed_seq_params": params},
            r"window_size=\(3, 0\), but the FlashMaskParams",
        ),
        (zigzag, {}, r"brings no mask \(attn_mask_type=causal\)"),
        (
            unmasked,
            {},
            r"brings no mask \(attn_mask_type=no",
        ),
        (zigzag, {"packed_seq_params": hybrid}, "a context-parallel group of its own"),
        (zigzag, {"packed_seq_params": thd([0, n], local_cp_size=1)}, "a context-parallel group of its own"),
        (zigzag, {"packed_seq_params": thd([0, 4])}, r"this thd batch has 8 tokens.* ending at 4"),
        (zigzag, {"packed_seq_params": thd([0, n], cu_seqlens_kv=torch.tensor([0, 4, n]))}, "cu_seqlens_kv differ"),
        (zigzag, {"packed_seq_params": thd([0, n], cu_seqlens_q=None)}, "cu_seqlens_q and cu_seqlens_kv differ"),
        (
            zigzag,
            {"packed_seq_params": thd([0, n], cu_seqlens_q=None, cu_seqlens_kv=None)},
            "must bring cu_seqlens_q",
        ),
        (zigzag, {"packed_seq_params": thd([0, 6, 8], padded=[0, 4, 8])}, "longer than cu_seqlens_q_padded"),
        (
            zigzag,
            {"packed_seq_params": thd([0, n]), "attn_mask_type": AttnMaskType.no_mask},
            "attn_mask_type=no_mask does not say",
        ),
        (zigzag, {"attention_mask": some_mask[..., :4]}, r"attention_mask must be bool \[1 or 1, 1, 8, 8\]"),
        (zigzag, {"attention_mask": some_mask.float()}, "attention_mask must be bool"),
    ):
        with pytest.raises(ValueError, match=words):
            core(q, k, v, **{"attention_mask": None} | arguments)
    with pytest.raises(ValueError, match="1 queries meet 8 keys"):
        plan(q[-1:], k, v, None, packed_seq_params=params)

    with pytest.raises(ValueError, match="the batch holds an attention_mask beside the FlashMask"):
        params.shard_batch({"attention_mask": some_mask})
    with pytest.raises(ValueError, match=r"batch\['tokens'\] must be \[B, 8, \.\.\.\], got \[1, 4\]"):
        params.shard_batch({"tokens": torch.zeros(1, 4)})
    for options, words in (
        ({"plan": ShardPlan.build(builders.causal(n), 1), "num_stages": 1}, "the plan that was given has its own"),
        ({"sharding": "ring"}, 'sharding must be "plan" or "zigzag"'),
        ({"position_ids": torch.arange(n), "sharding": "zigzag"}, "position_ids have no effect"),
        ({"position_ids": torch.arange(4)}, r"position_ids must be integers \[8\] or \[B, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens end at 4 but the mask has 8 positions"),
    ):
        with pytest.raises(ValueError, match=words):
            FlashMaskParams.build(builders.causal(n), **options)

    # Multi-token prediction: a spec that was not swapped, and a mask that does not say what follows what.
    with pytest.raises(ValueError, match="Pass the MTP block's spec through use_flashmask"):
        mtp._megatron_roll(torch.zeros(1, n), packed_seq_params=params)
    with pytest.raises(ValueError, match="needs to know which token follows which"):
        mtp.roll_tensor(torch.zeros(1, n), packed_seq_params=params)


def refusals_of_two_ranks():
    """What only context parallelism makes wrong."""
    with megatron_on_cpu():
        run = Run(cp=2)
        start(run)
        with pytest.raises(ValueError, match="Set it, and return per_token_loss's three values"):
            make({"calculate_per_token_loss": False}, run=run)
        with pytest.warns(UserWarning, match="This is as it was before the spec was changed"):
            make({"calculate_per_token_loss": False}, run=run, sharding="zigzag")
        with pytest.raises(ValueError, match="cp_comm_type='a2a' chooses among TransformerEngine's exchanges"):
            make(run=run, cp_comm_type="a2a")
        make(run=run, cp_comm_type="p2p")
        from megatron.core.process_groups_config import ProcessGroupCollection

        from fm_longctx import ContextParallel
        from fm_longctx.integrations.megatron import FlashMaskParams

        mask = builders.causal(8)
        alone = FlashMaskParams(ContextParallel(None, ShardPlan.build(mask, 1), mask))
        with pytest.raises(ValueError, match="are for 1 context-parallel ranks, but the layer has 2"):
            make(run=run)(*inputs(8), None, packed_seq_params=alone)
        with pytest.raises(ValueError, match="the plan's layout is not Megatron's"):
            FlashMaskParams.build(mask, sharding="zigzag", plan=ShardPlan.build(builders.full(8), 2, chunk_size=4))
        groups = ProcessGroupCollection.use_mpu_process_groups()
        zigzag = ShardPlan.from_owners(mask, torch.tensor([0, 0, 1, 1, 1, 1, 0, 0]), 2)
        params = FlashMaskParams.build(mask, sharding="zigzag", plan=zigzag, pg_collection=groups)
        assert params.context.group is groups.cp and params.max_seqlen_q == 8
        core = make(run=run, sharding="zigzag")
        q, k, v = (x[:, 0] for x in inputs(6))
        with pytest.raises(ValueError, match=r"document 0, positions 0\.\.5, into 2 x 2 equal chunks"):
            core(q, k, v, None, packed_seq_params=thd([0, 5, 12]))


def test_refusals():
    run_ranks(1, refusals, timeout=200)
    run_ranks(2, refusals_of_two_ranks, timeout=200)


@on_one_rank
def determinism_asked_for():
    from fm_longctx.integrations.megatron import FlashMaskParams, core_attention

    asked = []
    original = core_attention.context_parallel_attention

    def watched(*args, deterministic, **options):
        asked.append(deterministic)
        return original(*args, deterministic=deterministic, **options)

    core_attention.context_parallel_attention = watched
    try:
        q, k, v = inputs(9)
        params = FlashMaskParams.build(builders.causal(9))
        for mode in (False, True):
            make({"deterministic_mode": mode})(q, k, v, None, packed_seq_params=params)
    finally:
        core_attention.context_parallel_attention = original
    return asked


def test_deterministic_mode_reaches_the_kernels():
    assert run_ranks(1, determinism_asked_for, timeout=200) == [[False, True]]
