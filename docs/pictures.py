"""Draw the pictures of the README into this folder.

python docs/pictures.py
"""

from pathlib import Path

import torch

from fm_longctx import ShardPlan
from fm_longctx.mask import causal_document, shared_question

HERE = Path(__file__).parent


def main() -> None:
    # A preference pair, a question with four answers, and two plain documents.
    tiles = shared_question([[500, 300, 260], [420, 180, 240, 150, 210], [700], [1136]])
    tiles.draw(HERE / "tiles.png", block=64, title="4,096 packed tokens: a row sees its question and its own answer")

    packed = causal_document([700, 2300, 90, 400, 3100, 1602])
    plan = ShardPlan.build(packed, world_size=4)
    owner = torch.empty(packed.num_rows, dtype=torch.int64)
    for rank in range(plan.world_size):
        owner[plan.rows(rank)] = rank
    packed.draw(HERE / "ranks.png", rank_of_row=owner, title="8,192 tokens of 6 documents, rows shared by 4 ranks")


if __name__ == "__main__":
    main()
