"""Write a run's model in Hugging Face's form: config.json, safetensors and, where known, the tokenizer's files.

    python launch/export.py --checkpoint runs/demo_cpu --out exported
    python launch/export.py --checkpoint runs/demo_cpu/checkpoints/step_00000120 --out exported --dtype bfloat16

One process, no GPU; of the weights one file's are in memory at a time.
"""

import sys

from fm_longctx.train.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], usage=__doc__))
