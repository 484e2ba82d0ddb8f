"""Training with Megatron's schedules and optimizer equals its own dense-mask attention on one rank, step by step.

Losses and gradient norms of several Adam steps; label counts are unequal over ranks and micro-batches.
"""

import pytest

from tests.distributed import run_ranks
from tests.integrations.megatron.world import Run, train

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}

CASES = {
    # Our layout, any length: 71 divides by nothing.
    "cp2 documents, full recompute, distributed optimizer": Run(
        cp=2, length=71, config=FULL, use_distributed_optimizer=True
    ),
    "tp2 tree, selective recompute": Run(tp=2, mask="tree", config=SELECTIVE),
    "tp2 cp2 sliding window, sequence parallel": Run(
        tp=2, cp=2, window=(9, 0), config=SELECTIVE, sequence_parallel=True, use_distributed_optimizer=True
    ),
    "tp2 cp2 tree, TransformerEngine's spec": Run(tp=2, cp=2, mask="tree", engine=True, sequence_parallel=True),
    "pp2 cp2 tree, full recompute": Run(pp=2, cp=2, mask="tree", micro_batches=3, length=70, config=FULL),
    "pp2 cp2 tree, virtual stages": Run(pp=2, vp=2, cp=2, mask="tree", length=70, config={"num_layers": 4} | SELECTIVE),
    "dp2 cp2 documents": Run(dp=2, cp=2, length=71, use_distributed_optimizer=True),
    "cp2 MLA, selective recompute": Run(cp=2, length=71, mla=True, config=SELECTIVE),
    "cp2 MTP": Run(cp=2, length=71, config={"mtp_num_layers": 2}),
    # Megatron's layout.
    "cp2 zigzag, parameters": Run(cp=2, route="zigzag", config=SELECTIVE),
    "cp2 zigzag, attention_mask": Run(cp=2, route="dense", config=FULL),
    "cp2 zigzag, no mask": Run(cp=2, route="none", config=FULL),
    "cp2 zigzag, thd": Run(cp=2, route="thd", batch=1, config=FULL),
    "tp2 zigzag, thd": Run(tp=2, route="thd", batch=1, sequence_parallel=True),
    "cp2 zigzag, MTP": Run(cp=2, route="zigzag", config={"mtp_num_layers": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_rank_with_a_dense_mask(name):
    run = CASES[name]
    (expected,) = run_ranks(1, train, run.on_one_rank(), timeout=200)
    results = run_ranks(run.tp * run.pp * run.cp * run.dp, train, run, timeout=200)
    for history in results:
        assert len(history) == run.steps
        for (loss, norm), (expected_loss, expected_norm) in zip(history, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=2e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
