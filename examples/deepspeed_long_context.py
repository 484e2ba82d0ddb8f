"""Train with DeepSpeed ZeRO on packed documents, each sequence spread over ranks by a section of the config.

    torchrun --nproc-per-node 2 examples/deepspeed_long_context.py                  # tiny, on a CPU or GPUs
    deepspeed --num_gpus 8 examples/deepspeed_long_context.py --model path/to/model --context-parallel-size 8

Against a script that calls deepspeed.initialize, four lines differ: those marked below.
"""

import argparse
import random

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

from fm_longctx.integrations import deepspeed as flashmask


def documents(vocabulary: int, count: int) -> list[dict]:
    """Made-up documents: counting sequences of many lengths."""
    rng = random.Random(0)
    starts = [(rng.randrange(vocabulary), rng.randrange(3, 90)) for _ in range(count)]
    return [{"input_ids": [(first + i) % vocabulary for i in range(n)]} for first, n in starts]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub name; a tiny random Llama if not given")
    parser.add_argument("--context-parallel-size", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the deepspeed launcher")
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": options.zero_stage},
        "optimizer": {"type": "Adam", "params": {"lr": 3e-3, "torch_adam": not torch.cuda.is_available()}},
        "steps_per_print": 1000,
        "flashmask": {"context_parallel_size": options.context_parallel_size},  # 1
    }
    engine, *_ = flashmask.initialize(model=model, model_parameters=model.parameters(), config=config)  # 2
    run = engine.flashmask
    data = documents(model.config.vocab_size, 8 * options.steps * run.ranks.data_size)
    loader = DataLoader(data, batch_size=4, sampler=run.sampler(data), collate_fn=run.collator())  # 3

    losses = []
    for batches in run.steps(loader):
        labels = run.num_items(batches)
        share = torch.zeros((), device=engine.device)
        for batch in batches:
            loss = engine(**run.prepare(batch), use_cache=False, num_items_in_batch=labels).loss  # 4
            engine.backward(loss)
            engine.step()
            share += loss.detach() / len(batches)
        dist.all_reduce(share)
        losses.append(share.item() / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {len(losses)}: loss {losses[-1]:.3f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
