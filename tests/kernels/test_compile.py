"""A kernel that spills, serialises wgmma, loses its overlap or outgrows shared memory fails here, on any machine."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from fm_longctx.kernels.blocks import Blocks, choose

# Bytes a block may have: sm_80, sm_90 and sm_100 (CUDA programming guide, compute capabilities).
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
# D, intervals, causal, whether float16; of the backward also: with dQ, 16-bit gradients; of dQ alone: 16-bit gradients.
FORWARD = [f"hopper_forward-{d}" for d in ("64-0-1", "64-1-1", "128-0-1", "128-1-1", "128-2-0", "128-3-0")]
FORWARD += [f"hopper_forward-{d}" for d in ("64-0-1-1", "128-0-1-1", "128-1-1-1", "256-0-1", "256-1-1")]
BACKWARD = [f"hopper_backward-{d}-{mask}-1-1" for d in (64, 128) for mask in ("1-1", "0-0")]
BACKWARD += [f"hopper_backward-{d}-3-0-{rest}" for d in (64, 128) for rest in ("1-1", "1-0", "0-1")]
QUERY = ["hopper_query-64-1-1-1", "hopper_query-128-3-0-1", "hopper_query-128-1-1-0"]
HOPPER = FORWARD + BACKWARD + QUERY


def of_every_block():
    """A kernel for every block in kernels/blocks.py, as `compile_report.portable` takes it: kind, dtype, capability, D,
    intervals, causal, columns. Blocks of float32 are the same on every architecture: once each."""
    found = {}
    for kind, (dtype, capability), d, (intervals, causal), columns in itertools.product(
        Blocks._fields,
        [*(("bf16", capability) for capability in SHARED), ("fp32", 90)],
        (64, 128, 256),
        ((1, 1), (1, 0), (2, 0), (3, 1), (0, 1), (0, 0)),
        (8192, 131072),
    ):
        blocks = choose(divmod(capability, 10), {"bf16": 2, "fp32": 4}[dtype], d, intervals, bool(causal), columns)
        name = f"{kind}-{dtype}-{capability}-{d}-{intervals}-{causal}-{columns}".removesuffix("-8192")
        # What a name leaves out: the diagonal, and few columns.
        name = name.removesuffix("-1") if columns == 8192 else name
        found.setdefault((kind, dtype, capability, d, getattr(blocks, kind)), name)
    return list(found.values())


PORTABLE = of_every_block()
# Where there is more to hold in registers than with one interval.
PORTABLE += [f"{kind}-bf16-90-{d}-3" for kind, d in (("forward", 128), ("query", 128), ("key", 128))]
# The least that a partial tile can have to do: whether it is still behind a branch.
LITTLE_TO_HIDE = [f"forward-bf16-90-{d}-1-0" for d in (64, 128)]
PORTABLE = list(dict.fromkeys([*PORTABLE, *LITTLE_TO_HIDE]))
# Left to `make nightly`: other architectures at all but the dimension that is used most, and some of the ways in which
# the backward writes its gradients.
NIGHTLY = {f"{kind}-bf16-{c}-{d}-1" for kind in ("forward", "query", "key") for c in (80, 100) for d in (64, 256)}
NIGHTLY |= {"hopper_backward-64-3-0-1-0", "hopper_backward-64-3-0-0-1", "hopper_backward-128-3-0-0-1"}
# The schedule's three kernels, and what runs before and after the backward.
SMALL_KINDS = ("summary", "runs", "order", "delta", "merge", "merge_last", "add_rows")
SMALL = [f"{kind}-{capability}" for kind in SMALL_KINDS for capability in SHARED]
SMALL += ["statistics-90", "scaling-90"]
# Bytes spilled, stores and loads together, where they are known; elsewhere none. Hopper: of all three warp groups, the
# more of Triton 3.6.0 and 3.7.1. In the backward, addresses.
SPILLS = {
    "hopper_backward-64-3-0-0-1": 24,
    "hopper_backward-64-0-0-1-1": 16,
    # Portable kernels: scalars and addresses, outside of the loop. Those of sm_90 in 16 bits are the fastest blocks by
    # measurement.
    # The most that leaves room for three blocks an SM; 36 where every query head has its own keys.
    "key-bf16-90-64-1": 152,
    "query-bf16-90-64-0": 8,
    "key-bf16-90-128-1": 8,
    "key-bf16-90-128-1-1-131072": 148,
    "key-bf16-90-128-3": 100,
    "key-bf16-100-64-1": 8,
    "forward-fp32-90-64-1": 24,
    "key-fp32-90-256-1": 152,
    # Of three schedules at once: sizes and addresses. More registers are slower. The more of Triton 3.6.0 and 3.7.1.
    "runs-80": 284,
    "runs-90": 200,
    "runs-100": 240,
    "order-100": 100,
}


def each(names):
    """As parameters, some of them slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in NIGHTLY else name for name in names]


@pytest.fixture(scope="module")
def reports(request):
    """Of all kernels that the chosen tests ask for, compiled in two processes."""
    pytest.importorskip("triton.experimental.gluon")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path]
    names = list(dict.fromkeys(params["name"] for params in chosen))
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
@pytest.mark.parametrize("name", each(HOPPER + PORTABLE + SMALL))
def test_resources(name, reports):
    report = reports[name]
    if name in HOPPER:
        capability = 90
    else:
        capability = int(name.split("-")[1 if name in SMALL else 2])
    assert report["spilled"] <= SPILLS.get(name, 0)
    if name in PORTABLE:
        assert report["spilled_in_loop"] == 0
    assert report["warnings"] == []  # C7511, C7512, C7515: wgmma is serialised
    # A block of float32 must fit them all.
    assert report["shared"] <= (min(SHARED.values()) if "-fp32-" in name else SHARED[capability])


@pytest.mark.parametrize("name", FORWARD)
def test_softmax_overlaps_the_second_product(name, reports):
    """Between the wait for S and the wait for P V lie the exponentials of a whole tile, in the main loop."""
    order = steps(reports[name])
    waits = [i for i, step in enumerate(order) if step == "wait 0x1"]
    assert len(waits) == (3 if name.startswith("hopper_forward-64-0") else 2)  # one main loop in each consumer
    for wait in waits:
        following = order[wait + 1 : order.index("wait 0x0", wait)]
        # A thread has 64 x BLOCK_N / 128 scores: 32 at the least.
        assert following.count("MUFU.EX2") >= 32, following


@pytest.mark.parametrize("name", each(BACKWARD + QUERY))
def test_exponentials_hide_the_product_for_dp(name, reports):
    """All exponentials of a tile lie between the wait for S and the next one, with a product in flight."""
    # Scores of a thread: 64 columns (of dQ alone: rows) x block / 128.
    scores = 32 if name.startswith("hopper_backward-128") else 64
    runs: list[list[str]] = [[]]
    for step in steps(reports[name]):
        if step.startswith("wait"):
            runs.append([step])
        else:
            runs[-1].append(step)
    loops = [run for run in runs if "MUFU.EX2" in run]
    assert len(loops) == 2  # one main loop in each consumer
    for run in loops:
        assert run.count("MUFU.EX2") == scores, run
        assert run[0] == "wait 0x1" or run.index("HGMMA") < run.index("MUFU.EX2"), run
        if name in BACKWARD:
            # P dO is on its way before dS is formed.
            assert run[-1] == "HGMMA", run


@pytest.mark.parametrize("name", [name for name in BACKWARD if name.split("-")[4] == "1"])
def test_dq_leaves_while_another_product_is_computed(name, reports):
    """The last product issued in a tile, behind dQ, is dK, or S of the next tile; and it is waited for apart."""
    order = steps(reports[name])
    exponentials = [i for i, step in enumerate(order) if step == "MUFU.EX2"]
    last = {order.index("wait 0x0", i) for i in exponentials}
    assert len(last) == 2  # one main loop in each consumer
    for wait in last:
        assert order[wait - 2 : wait] == ["HGMMA", "wait 0x1"], order[wait - 8 : wait]


@pytest.mark.parametrize("name", [name for name in BACKWARD if name.split("-")[4] == "1"])
def test_dq_is_stored_four_numbers_at_a_time(name, reports):
    """Half a tile, 32 numbers a thread, in each consumer: two at a time they would meet in the same banks."""
    assert reports[name]["vector_stores"] == 2 * 32 // 4


@pytest.mark.parametrize("name", each(BACKWARD))
def test_a_tile_has_few_barriers(name, reports):
    """At each all of a warpgroup wait: before they meet the other one for dS, there, and before dQ leaves."""
    most = 3 if name.split("-")[4] == "1" else 1
    # One main loop in each consumer; where a block that it jumps to lies behind both, there seems to be another.
    barriers = sorted(reports[name]["barriers"])
    assert len(barriers) >= 2
    assert barriers[1] <= most


@pytest.mark.parametrize("name", LITTLE_TO_HIDE)
def test_full_tiles_do_not_do_what_partial_ones_must(name, reports):
    # A select for each score of a thread hides it, and no other chooses between hidden and not: 64 a thread, in the
    # walk without maxima and in the one with them. The rest is of the softmax. And what keeps the branch may not keep
    # the loop from being pipelined.
    selects, shared = {"64": (280, 65_536), "128": (150, 114_688)}[name.split("-")[3]]
    assert reports[name]["selects"] <= selects
    assert reports[name]["shared"] >= shared


@pytest.mark.parametrize("name", [f"key-bf16-90-{d}-1" for d in (64, 128)])
def test_what_partial_tiles_hide_of_p_they_hide_once(name, reports):
    """P is the operand of dV, from registers, and a factor of dS. Hidden for each, a score takes 5 or 6 selects."""
    scores = 32  # a thread, in blocks of 64 x 64
    assert reports[name]["selects"] <= 4 * scores


def steps(report):
    return [step.replace("WARPGROUP.DEPBAR.LE gsb0, ", "wait ") for step in report["order"]]
