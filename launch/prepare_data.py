"""Tokenize a config's data once, for many runs.

    python launch/prepare_data.py --config configs/llama70b_128k.yaml --out /data/books --workers 16
    python launch/prepare_data.py --config my.yaml --out /data/books --data.source jsonl --data.path books.jsonl

Writes /data/books.bin, .idx (Megatron's form) and .json (which tokenizer, which source). Runs then read them with
--data.source tokens --data.path /data/books and the same data.tokenizer. Keys of the config can be set here as well.
"""

import sys

from fm_longctx.train.prepare_cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], usage=__doc__))
