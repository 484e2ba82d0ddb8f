"""Fine-tune a Hugging Face model on packed documents, preference pairs and completions with the Trainer.

    python examples/transformers_packing.py                                     # a tiny model, a few steps, any machine
    torchrun --nproc-per-node 2 examples/transformers_packing.py --ranks-per-sequence 2
    python examples/transformers_packing.py --model path/to/model --steps 100

With --ranks-per-sequence above 1 each packed sequence is spread over that many ranks.
"""

import argparse
import random
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from fm_longctx.integrations.transformers import (
    NAME,
    ContextParallelTrainerMixin,
    DataCollatorForFlashMask,
    register,
)


class LongTrainer(ContextParallelTrainerMixin, Trainer):
    """The Trainer, for sequences that several ranks share."""


def features(vocabulary: int) -> list[dict]:
    """Made-up data of three kinds; counting sequences, which a model learns quickly."""
    rng = random.Random(0)

    def words(n: int) -> list[int]:
        first = rng.randrange(vocabulary)
        return [(first + i) % vocabulary for i in range(n)]

    kinds = [
        lambda: {"input_ids": words(rng.randrange(20, 60))},
        lambda: {"prompt_ids": words(20), "chosen_ids": words(12), "rejected_ids": words(9)},
        lambda: {"prompt_ids": words(15), "completion_ids": [words(rng.randrange(5, 15)) for _ in range(4)]},
    ]
    return [kinds[i % 3]() for i in range(96)]


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub name; a tiny random Llama if not given")
    parser.add_argument("--ranks-per-sequence", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(argv)

    register()
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=NAME)
    else:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    collator = DataCollatorForFlashMask(
        context_parallel_size=options.ranks_per_sequence,
        sliding_window=getattr(model.config, "sliding_window", None),
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=6,  # features that are packed into one sequence
            max_steps=options.steps,
            learning_rate=3e-3,
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            # Said where there is no GPU, too: otherwise transformers does not take several ranks for distributed.
            use_cpu=options.cpu or not torch.cuda.is_available(),
        )
        trainer = LongTrainer(model, arguments, train_dataset=features(model.config.vocab_size), data_collator=collator)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
