"""Train a language model on long packed sequences.

    torchrun --nproc-per-node 2 launch/train.py --config configs/demo_cpu.yaml
    torchrun --nproc-per-node 2 launch/train.py --config configs/demo_cpu.yaml --train.steps 20 --optimizer.lr 1e-3
    python launch/train.py --config configs/llama70b_128k.yaml --dry-run --gpu h200

Defaults < the YAML file < the command line. --dry-run validates a config for any number of ranks in one process without
a GPU, builds its model without storage, plans some of its batches, and estimates memory and step time on a GPU (--gpu
h100, h200, a100 or b200; h100 if not given). --help lists every key.
"""

import sys

from fm_longctx.train.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], usage=__doc__))
