"""Train a language model on long packed sequences.

    torchrun --nproc-per-node 2 launch/train.py --config configs/demo_cpu.yaml
    torchrun --nproc-per-node 2 launch/train.py --config configs/demo_cpu.yaml --train.steps 20 --optimizer.lr 1e-3
    python launch/train.py --config configs/llama70b_128k.yaml --dry-run

Defaults < the YAML file < the command line. --dry-run validates a config and builds its model without storage, for any
number of ranks, in one process. --help lists every key.
"""

import sys

from fm_longctx.train.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], usage=__doc__))
