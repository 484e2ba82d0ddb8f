"""Pretrain a GPT on packed documents with Megatron-Core and FlashMask attention.

    torchrun --nproc-per-node 8 examples/megatron_pretrain.py --context-parallel-size 4 --tensor-model-parallel-size 2

The lines that differ from any Megatron script are marked "fm_longctx". Flags have Megatron's names. For a model of 70B
parameters at 128K tokens on 128 GPUs of 80 GB, start from these (they have not been run at this size):

    torchrun --nnodes 16 --nproc-per-node 8 ... examples/megatron_pretrain.py \\
        --num-layers 80 --hidden-size 8192 --ffn-hidden-size 28672 --num-attention-heads 64 --num-query-groups 8 \\
        --vocab-size 128256 --seq-length 131072 --rotary-base 500000 --swiglu --normalization RMSNorm \\
        --tensor-model-parallel-size 8 --sequence-parallel --pipeline-model-parallel-size 4 --context-parallel-size 4 \\
        --micro-batch-size 1 --num-microbatches 16 --bf16 --use-distributed-optimizer \\
        --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --lr 1.5e-4

The data are synthetic: documents of random lengths, each counting upwards in steps of its own, so the loss falls soon.
Replace `batches` by your loader; it has to give tokens, labels, a loss mask, and the documents' bounds.
"""

import argparse
import os
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from fm_longctx.integrations.megatron import (
    FlashMaskParams,
    per_token_loss,
    use_flashmask,
    use_position_ids,
)  # fm_longctx

try:
    import transformer_engine  # noqa: F401

    HAVE_TE = True
except ImportError:
    HAVE_TE = False


def parse_arguments():
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    for name, default in {
        "num-layers": 4,
        "hidden-size": 256,
        "ffn-hidden-size": 768,
        "num-attention-heads": 8,
        "num-query-groups": 4,
        "vocab-size": 512,
        "seq-length": 4096,
        "rotary-base": 10_000,
        "micro-batch-size": 1,
        "num-microbatches": 2,
        "tensor-model-parallel-size": 1,
        "pipeline-model-parallel-size": 1,
        "context-parallel-size": 1,
        "train-iters": 20,
        "recompute-num-layers": None,
        "seed": 1,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--normalization", choices=("LayerNorm", "RMSNorm"), default="LayerNorm")
    parser.add_argument("--recompute-granularity", choices=("full", "selective"))
    parser.add_argument("--recompute-method", choices=("uniform", "block"))
    for name in ("swiglu", "sequence-parallel", "bf16", "use-distributed-optimizer"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--save", type=Path, help="folder of checkpoints")
    parser.add_argument("--save-interval", type=int, help="iterations between checkpoints; the last is always saved")
    parser.add_argument("--load", type=Path, help="one checkpoint; any parallel sizes may have written it")
    return parser.parse_args()


def initialize(args):
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)


def core_transformer_config(args):
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        normalization=args.normalization,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu if args.swiglu else torch.nn.functional.gelu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
        recompute_granularity=args.recompute_granularity,
        recompute_method=args.recompute_method,
        recompute_num_layers=args.recompute_num_layers,
        recompute_modules=["core_attn"] if args.recompute_granularity == "selective" else None,
        bf16=args.bf16,
        params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if args.bf16 else torch.float32,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # fm_longctx: ranks hold unequal numbers of labels
        finalize_model_grads_func=finalize_model_grads,
    )


def model_provider(args, config):
    if HAVE_TE:
        spec = get_gpt_layer_with_transformer_engine_spec()
    else:
        spec = get_gpt_layer_local_spec(normalization=args.normalization)
    spec = use_flashmask(spec)  # fm_longctx
    model = GPTModel(
        config,
        spec,
        vocab_size=args.vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    )
    use_position_ids(model)  # fm_longctx
    return Float16Module(config, model) if args.bf16 else model


def batches(args, iteration):
    """This data-parallel rank's micro-batches of an iteration: global tensors `[b, N]`, and the documents' bounds."""
    n, device = args.seq_length, "cuda" if torch.cuda.is_available() else "cpu"
    for i in range(args.num_microbatches):
        stream = (iteration * args.num_microbatches + i) * 65_536 + parallel_state.get_data_parallel_rank()
        generator = torch.Generator().manual_seed(args.seed + stream)
        documents, ends = [], [0]
        while ends[-1] < n:
            length = min(n - ends[-1], int(torch.randint(2, max(3, n // 3), (), generator=generator)))
            start = torch.randint(args.vocab_size, (args.micro_batch_size, 1), generator=generator)
            step = torch.randint(1, 4, (args.micro_batch_size, 1), generator=generator)
            documents.append((start + step * torch.arange(length)) % args.vocab_size)
            ends.append(ends[-1] + length)
        tokens = torch.cat(documents, dim=1)
        # Labels are shifted before any sharding, and a document's last token has none.
        loss_mask = torch.ones(args.micro_batch_size, n)
        loss_mask[:, torch.tensor(ends[1:]) - 1] = 0
        batch = {"tokens": tokens, "labels": tokens.roll(-1, dims=1), "loss_mask": loss_mask}
        yield {name: x.to(device) for name, x in batch.items()}, torch.tensor(ends)


def forward_step(data_iterator, model):
    batch, cu_seqlens = next(data_iterator)
    params = FlashMaskParams.from_cu_seqlens(cu_seqlens)  # fm_longctx: also on the middle pipeline stages
    batch = params.shard_batch(batch)  # fm_longctx: instead of get_batch_on_this_cp_rank(batch)
    output = model(
        batch["tokens"],
        params.position_ids,
        None,  # no attention_mask: the mask is in packed_seq_params
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=params,  # fm_longctx
    )
    return output, partial(per_token_loss, batch["loss_mask"])


def checkpoint_of(model, optimizer, iteration, *, is_loading=False):
    bare = model.module.module if isinstance(model.module, Float16Module) else model.module
    weights = bare.sharded_state_dict()
    # Of the distributed optimizer's formats the one that other parallel sizes can load; others take no notice of it.
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata),
        "iteration": iteration,
    }


def save(folder, model, optimizer, iteration):
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(checkpoint_of(model, optimizer, iteration), str(path))


def load(path, model, optimizer):
    state = dist_checkpointing.load(checkpoint_of(model, optimizer, 0, is_loading=True), str(path))
    bare = model.module.module if isinstance(model.module, Float16Module) else model.module
    bare.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["iteration"]


def main():
    args = parse_arguments()
    initialize(args)
    config = core_transformer_config(args)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=args.use_distributed_optimizer, grad_reduce_in_fp32=True
    )
    model = DistributedDataParallel(config, ddp_config, model_provider(args, config))
    model.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=args.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=args.use_distributed_optimizer,
        ),
        [model],
    )
    first = load(args.load, model, optimizer) if args.load else 0

    for iteration in range(first, args.train_iters):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches(args, iteration),
            model=[model],
            num_microbatches=args.num_microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
        )
        _, grad_norm, _ = optimizer.step()

        if parallel_state.is_pipeline_last_stage():
            total = torch.stack([report["lm loss"] for report in reports]).sum(0)
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            if dist.get_rank() == dist.get_world_size() - 1:
                loss, labels = total[0] / total[1], int(total[1])
                print(
                    f"iteration {iteration + 1:6d} | lm loss {loss:.5f} | grad norm {grad_norm:.4f} | labels {labels}",
                    flush=True,
                )
        done = iteration + 1
        if args.save and (done == args.train_iters or (args.save_interval and done % args.save_interval == 0)):
            save(args.save, model, optimizer, done)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
