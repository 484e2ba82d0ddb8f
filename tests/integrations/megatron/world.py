"""A small Megatron GPT on gloo ranks, trained by Megatron's own schedules and optimizer.

    run_ranks(4, train, Run(tp=2, cp=2, ...))      # per rank: the losses and gradient norms of each step

Weights are a function of their names and data of (step, micro-batch, data-parallel rank), so that runs with different
parallelism train the same model on the same batches. `Run(oracle=True)` is Megatron's own `DotProductAttention` on one
rank, with a dense mask written from the words.
"""

import warnings
import zlib
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist

from tests.integrations.megatron.batches import VOCABULARY, Batch
from tests.integrations.megatron.cpu import megatron_on_cpu


@dataclass(frozen=True)
class Run:
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
    dp: int = 1
    mask: str = "documents"
    length: int = 72
    steps: int = 3
    micro_batches: int = 2
    batch: int = 2
    route: str = "plan"
    """How masks reach the layers: "plan", "zigzag" (both FlashMaskParams), "dense" (attention_mask), "thd", "none"."""
    oracle: bool = False
    use_distributed_optimizer: bool = False
    window: tuple | None = None
    config: dict = field(default_factory=dict)
    mla: bool = False
    engine: bool = False
    """Start from TransformerEngine's spec, with Megatron's own modules in the place of its modules."""
    sequence_parallel: bool = False

    def on_one_rank(self):
        """The same training by Megatron alone."""
        config = {k: v for k, v in self.config.items() if not k.startswith("recompute")}
        return replace(
            self,
            tp=1,
            pp=1,
            vp=None,
            cp=1,
            dp=1,
            oracle=True,
            micro_batches=self.micro_batches * self.dp,
            config=config,
            use_distributed_optimizer=False,
            engine=False,
            sequence_parallel=False,
        )


# The model


def make_config(run):
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    options = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        virtual_pipeline_model_parallel_size=run.vp,
        context_parallel_size=run.cp,
        sequence_parallel=run.sequence_parallel,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        add_bias_linear=False,
        layernorm_epsilon=1e-5,
    )
    kind = TransformerConfig
    if run.mla:
        kind = MLATransformerConfig
        options |= dict(
            multi_latent_attention=True,
            num_query_groups=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_head_dim=128,
            qk_pos_emb_head_dim=64,
            v_head_dim=128,
            rope_type="rope",
        )
    window = None if run.oracle else run.window
    config = kind(**options | run.config, window_size=window)
    from megatron.core.distributed import finalize_model_grads

    config.finalize_model_grads_func = finalize_model_grads
    return config


class Norm(torch.nn.LayerNorm):
    """Megatron's torch norm refuses sequence parallelism; the parameters need no more than this mark."""

    def __init__(self, config, hidden_size, eps=1e-5, **kwargs):
        super().__init__(hidden_size, eps=eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class OracleRope(torch.nn.Module):
    """Angles of given positions, looked up in Megatron's own table."""

    def __init__(self, rope):
        super().__init__()
        self.rope, self.positions = rope, None

    def get_rotary_seq_len(self, *args, **kwargs):
        return len(self.positions)

    def forward(self, length, **kwargs):
        return self.rope.get_emb(length)[self.positions]


class DenseAttention(torch.nn.Module):
    """What MLA's core attention computes, in plain torch: Megatron's own `DotProductAttention` does not take MLA."""

    def __init__(self, softmax_scale=None, **kwargs):
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, **kwargs):
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * self.scale
        weights = scores.masked_fill(attention_mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def roll_by_the_words(batch, tensor, **kwargs):
    """Multi-token prediction's shift: the next token of the document, 0 after its last."""
    result = torch.zeros_like(tensor)
    bounds = batch.bounds.tolist()
    for i in range(tensor.shape[-1] - 1):
        if i + 1 not in bounds:
            result[..., i] = tensor[..., i + 1]
    return result, result.sum()


def make_model(run, config, vp_stage=None):
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from fm_longctx.integrations.megatron import use_flashmask, use_position_ids
    from tests.integrations.megatron.engine_modules import engine_modules

    if run.engine:
        with engine_modules():
            layer = get_gpt_layer_with_transformer_engine_spec()
    else:
        layer = get_gpt_layer_local_spec(multi_latent_attention=run.mla)
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    spec = TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=Norm)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    mtp = None
    if config.mtp_num_layers and last:
        mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        for block in mtp.layer_specs:
            block.submodules.enorm = block.submodules.hnorm = block.submodules.layer_norm = Norm
    if run.oracle and run.mla:
        layer.submodules.self_attention.submodules.core_attention = DenseAttention
    if not run.oracle:
        options = {} if run.route == "plan" else {"sharding": "zigzag"}
        options |= {"without_mask": "causal"} if run.route == "none" else {}
        spec, mtp = (s and use_flashmask(s, **options) for s in (spec, mtp))
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=run.length,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        mtp_block_spec=mtp,
        vp_stage=vp_stage,
    )
    if run.oracle:
        for module in model.modules():
            if hasattr(module, "rotary_pos_emb") and not isinstance(module, OracleRope):
                module.rotary_pos_emb = OracleRope(module.rotary_pos_emb)
    elif run.route == "plan":
        use_position_ids(model)
    set_weights(model, config, vp_stage)
    return model


def set_weights(model, config, vp_stage):
    """Each weight from its global name and shape: the same model, however it is cut."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from tests.integrations.megatron.engine_modules import LOCAL_NAMES

    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    first = get_transformer_layer_offset(config, vp_stage)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + first)
            name = ".".join(parts)
            for fused, alone in LOCAL_NAMES.items():
                name = name.replace(fused, alone)
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            shape = list(parameter.shape)
            cut_along = (
                getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", 0) else -1
            )
            if cut_along >= 0:
                shape[cut_along] *= size
            whole = torch.randn(shape, generator=generator)
            whole = 1 + 0.1 * whole if "norm" in name and name.endswith("weight") else 0.3 * whole
            parameter.copy_(whole.chunk(size, cut_along)[rank] if cut_along >= 0 else whole)


# Training


def thd_rows(bounds, cp, rank):
    """Each document's chunks `rank` and `2 cp - 1 - rank`, as Megatron's thd batches are cut."""
    rows = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        size = (end - start) // (2 * cp)
        for chunk in (rank, 2 * cp - 1 - rank):
            rows += range(start + chunk * size, start + (chunk + 1) * size)
    return torch.tensor(rows) if cp > 1 else torch.arange(int(bounds[-1]))


def prepare(run, batch, model):
    """Sharded tensors, attention_mask and packed_seq_params for the model's call."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_model
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer import multi_token_prediction
    from megatron.core.utils import get_batch_on_this_cp_rank

    from fm_longctx.integrations.megatron import FlashMaskParams

    tensors = dict(batch.tensors)
    if run.oracle:
        if run.config.get("mtp_num_layers"):
            gpt_model.roll_tensor = multi_token_prediction.roll_tensor = partial(roll_by_the_words, batch)
        for module in model.modules():
            if isinstance(module, OracleRope):
                module.positions = batch.positions
        return tensors, ~batch.visible[None, None], None
    if run.route == "plan":
        params = FlashMaskParams.build(
            batch.mask, position_ids=batch.positions, cu_seqlens=batch.bounds, window_size=batch.window
        )
        return params.shard_batch(tensors), None, params
    if run.route == "zigzag":
        params = FlashMaskParams.from_cu_seqlens(batch.bounds, sharding="zigzag", window_size=batch.window)
        return get_batch_on_this_cp_rank(tensors), None, params
    if run.route == "none":
        return get_batch_on_this_cp_rank(tensors), None, None
    if run.route == "dense":
        tensors = get_batch_on_this_cp_rank(tensors | {"attention_mask": ~batch.visible[None, None]})
        return tensors, tensors.pop("attention_mask"), None
    assert run.route == "thd" and run.batch == 1
    bounds = batch.bounds.int()
    longest = int(bounds.diff().max())
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    rows = thd_rows(bounds, run.cp, parallel_state.get_context_parallel_rank())
    return {name: x[:, rows] for name, x in tensors.items()}, None, params


def train(run):
    """On one rank: [(loss, gradient norm) of each step], the loss being the mean over the step's labels."""
    warnings.filterwarnings("ignore")
    from megatron.core.models.gpt import gpt_model
    from megatron.core.transformer import multi_token_prediction

    roll = multi_token_prediction.roll_tensor
    try:
        with megatron_on_cpu():
            return _train(run)
    finally:
        gpt_model.roll_tensor = multi_token_prediction.roll_tensor = roll


def start(run):
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=run.tp,
        pipeline_model_parallel_size=run.pp,
        virtual_pipeline_model_parallel_size=run.vp,
        context_parallel_size=run.cp,
    )
    assert parallel_state.get_data_parallel_world_size() == run.dp
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _train(run):
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from fm_longctx.integrations.megatron import per_token_loss

    start(run)
    config = make_config(run)
    bare = [make_model(run, config, vp_stage) for vp_stage in (range(run.vp) if run.vp else [None])]
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=run.use_distributed_optimizer)
    chunks = [DistributedDataParallel(config, ddp, chunk) for chunk in bare]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.01,
            clip_grad=1.0,
            use_distributed_optimizer=run.use_distributed_optimizer,
        ),
        chunks,
    )
    dp_rank = parallel_state.get_data_parallel_rank()

    def forward_step(batches, model):
        tensors, attention_mask, params = prepare(run, next(batches), model)
        output = model(
            tensors["tokens"],
            tensors["position_ids"],
            attention_mask,
            labels=tensors["labels"],
            loss_mask=tensors["loss_mask"],
            packed_seq_params=params,
        )
        return output, partial(per_token_loss, tensors["loss_mask"])

    history = []
    for step in range(run.steps):
        mine = range(dp_rank * run.micro_batches, (dp_rank + 1) * run.micro_batches)
        batches = [Batch(run, 1000 * step + i) for i in mine]
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks],
            model=chunks,
            num_microbatches=run.micro_batches,
            seq_length=run.length,
            micro_batch_size=run.batch,
        )
        _, norm, _ = optimizer.step()
        total = sum((r["lm loss"] for r in reports), torch.zeros(2))
        dist.all_reduce(total)
        history.append((float(total[0] / total[1]), float(norm)))
    return history
