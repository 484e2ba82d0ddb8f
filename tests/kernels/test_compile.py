"""A kernel that spills, serialises wgmma, loses its overlap or outgrows shared memory fails here, on any machine."""

import json
import os
import subprocess
import sys

import pytest

# Bytes a block may have: sm_80, sm_90 and sm_100 (CUDA programming guide, compute capabilities).
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
# D, intervals, causal; and of the backward: with dQ, 16-bit gradients.
FORWARD = [f"hopper_forward-{d}" for d in ("64-1-1", "128-0-1", "128-2-0", "128-3-0", "256-1-1")]
BACKWARD = [f"hopper_backward-{d}-1-1-1-1" for d in (64, 128)]
BACKWARD += [f"hopper_backward-{d}-3-0-{rest}" for d in (64, 128) for rest in ("1-1", "1-0", "0-1")]
HOPPER = FORWARD + BACKWARD
# Every block in kernels/blocks.py: kernel, dtype, capability, D, intervals.
PORTABLE = [
    f"{kind}-{dtype}-{capability}-{d}-1"
    for dtype in ("bf16", "fp32")
    for capability in SHARED
    for d in (64, 128, 256)
    for kind in ("forward", "query", "key")
]
# Bytes that a thread may spill: a few scalars outside the loop. More only where it was measured to be worth it: 64x64
# with 4 warps was the fastest dK, dV block.
SPILLS, KNOWN_SPILLS = 64, {"key-bf16-90-128-1": 512}


@pytest.fixture(scope="module")
def reports():
    pytest.importorskip("triton.experimental.gluon")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    names = [*HOPPER, *PORTABLE]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compile_report", *names[i::2]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    found = {}
    for process in processes:
        out, error = process.communicate()
        assert process.returncode == 0, error[-3000:]
        found |= {report["name"]: report for report in map(json.loads, out.splitlines())}
    return found


@pytest.mark.timeout(900)  # the first of them waits for all to be compiled
@pytest.mark.parametrize("name", HOPPER + PORTABLE)
def test_resources(name, reports):
    report = reports[name]
    capability = 90 if name in HOPPER else int(name.split("-")[2])
    assert report["spilled"] <= KNOWN_SPILLS.get(name, SPILLS)
    assert report["warnings"] == []  # C7511, C7512, C7515: wgmma is serialised
    assert report["shared"] <= SHARED[capability]


@pytest.mark.parametrize("name", HOPPER)
def test_softmax_overlaps_the_second_product(name, reports):
    """Between the wait for S and the wait for P V lie the exponentials of a whole tile, in the main loop."""
    order = [step.replace("WARPGROUP.DEPBAR.LE gsb0, ", "wait ") for step in reports[name]["order"]]
    waits = [i for i, step in enumerate(order) if step == "wait 0x1"]
    assert len(waits) == 2  # one main loop in each consumer
    for wait in waits:
        following = order[wait + 1 : order.index("wait 0x0", wait)]
        # A thread has 64 x BLOCK_N / 128 scores: 32 at the least.
        assert following.count("MUFU.EX2") >= 32, following
