"""Print how a sequence would be laid out over ranks, and what that costs. Needs no GPU and starts no ranks.

python launch/plan.py --lengths 30000,20000,500,500 --ranks 8
python launch/plan.py --lengths 65536 --mask full --ranks 8 --strategy zigzag --draw plan.png
python launch/plan.py --config configs/demo_cpu.yaml --sequence 0
"""

import sys

from fm_longctx.train.plan_cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], usage=__doc__))
