"""Compile shipped kernels for a GPU that need not be there, and report what ptxas says of each, as JSON lines.

A process of its own: where the suite interprets kernels, they cannot be compiled. Arguments are names from KERNELS.
Gluon's and Triton's compilers come with their wheels, and so do ptxas and nvdisasm.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from fm_longctx.kernels import schedule
from fm_longctx.kernels.backward import backward_kv_kernel, backward_q_kernel
from fm_longctx.kernels.blocks import Block, choose
from fm_longctx.kernels.delta import delta_kernel
from fm_longctx.kernels.forward import forward_kernel
from fm_longctx.kernels.hopper import backward as hopper_backward_kernels
from fm_longctx.kernels.hopper import forward as hopper_forward_kernels
from fm_longctx.kernels.hopper import launch
from fm_longctx.kernels.hopper import query_gradient as hopper_query_kernels
from fm_longctx.kernels.hopper.scaling import scale_kernel
from fm_longctx.kernels.merge import add_rows_kernel, merge_kernel
from fm_longctx.kernels.schedule_kernels import order_kernel, runs_kernel, summary_kernel
from fm_longctx.kernels.statistics import statistics_kernel

EVEN = False
FLOATS = {"scale", "softcap"}
PORTABLE = {"forward": forward_kernel, "query": backward_q_kernel, "key": backward_kv_kernel}
# Two schedules by row and one by column, with blocks of rows that are no power of two too.
KEYS = ((192, 128, 1), (128, 64, 1), (64, 128, 0))
TABLES = {"p_table": "*i32", "p_temporary": "*i32"}
# What runs around them, with its constants and the types that differ from what names tell.
SMALL = {
    "summary": (summary_kernel, dict(BOUNDS=True, PADDED_TO=128, UNIT=64, SPAN=schedule._SPAN), TABLES),
    "runs": (
        runs_kernel,
        dict(
            KEYS=KEYS,
            CAUSAL=True,
            UNIT=64,
            CHUNK=schedule._CHUNK,
            AT_ONCE=schedule._AT_ONCE,
            PARTIAL=1,
            FULL=2,
        ),
        TABLES,
    ),
    "order": (order_kernel, dict(KEYS=KEYS, OWN=schedule._OWN, CHUNK=schedule._COMPARED), TABLES),
    "delta": (delta_kernel, dict(HAS_DLSE=True, D_V=128, BLOCK_DV=128, BLOCK=32), {"p_dlse": "*fp32"}),
    "merge": (
        merge_kernel,
        dict(IN_PLACE=True, D_V=128, BLOCK_DV=128, BLOCK=16),
        {"p_out": "*fp32", "p_part": "*fp32", "p_result": "*fp32", "p_part_lse": "*fp32"},
    ),
    "merge_last": (
        merge_kernel,
        dict(IN_PLACE=False, D_V=128, BLOCK_DV=128, BLOCK=16),
        {"p_out": "*fp32", "p_part": "*fp32", "p_part_lse": "*fp32"},
    ),
    "add_rows": (
        add_rows_kernel,
        dict(BLOCK=1024),
        {"p_total": "*fp32", "p_returned": "*fp32", "p_rows": "*i64", "p_order": "*i64"},
    ),
    "statistics": (statistics_kernel, dict(BLOCK_M=64, ROWS=1024), {}),
    "scaling": (scale_kernel, dict(D=128), {"p_sum": "*fp32"}),
}
OPTIONS = {"runs": dict(num_warps=schedule._WARPS, maxnreg=schedule._REGISTERS)}


def main() -> None:
    for name in sys.argv[1:]:
        kind, *parts = name.split("-")
        if kind in HOPPER:
            report = HOPPER[kind](*map(int, parts))
        elif kind in SMALL:
            kernel, constants, types = SMALL[kind]
            report = resources(kernel, types, constants, int(parts[0]), OPTIONS.get(kind, {}))
        else:
            report = portable(kind, parts[0], *map(int, parts[1:]))
        print(json.dumps({"name": name} | report), flush=True)


def block_of(
    kind: str, dtype: str, capability: int, d: int, intervals: int, causal: int = 1, columns: int = 8192
) -> Block:
    """The shipped block of a kernel: `forward`, `query` or `key`."""
    blocks = choose(
        divmod(capability, 10), 4 if dtype == "fp32" else 2, d, intervals, bool(causal), columns, dtype == "bf16"
    )
    return getattr(blocks, kind)


def portable(
    kind: str, dtype: str, capability: int, d: int, intervals: int, causal: int = 1, columns: int = 8192
) -> dict[str, Any]:
    block = block_of(kind, dtype, capability, d, intervals, causal, columns)
    constants = dict(KV_SHARE=4, INTERVALS=intervals, SOFTCAP=False, D=d, D_V=d, BLOCK_D=d, BLOCK_DV=d)
    constants |= dict(CAUSAL=bool(causal))
    constants |= dict(BLOCK_M=block.m, BLOCK_N=block.n, EVEN=EVEN or block.tma, UPCAST=False, TMA=block.tma)
    if kind != "key":
        constants |= dict(LATE=block.late)
    if kind == "forward":
        constants |= dict(STEADY=block.steady)
    options: dict[str, Any] = dict(num_warps=block.warps, num_stages=block.stages, maxnreg=block.registers)
    names = ("p_q", "q", "p_k", "k", "p_v", "v", "p_out", "p_dout", "dout", "p_dq", "p_dk", "p_dv")
    types = {name: f"*{dtype}" for name in names} | {"stats": "*fp32"}
    if block.tma and kind != "key":
        types |= dict.fromkeys(("k", "v"), f"tensordesc<{dtype}[1, {block.n}, 1, {d}]>")
    if block.tma and kind == "key":
        types |= dict.fromkeys(("q", "dout"), f"tensordesc<{dtype}[1, {block.m}, 1, {d}]>")
        types["stats"] = f"tensordesc<fp32[1, {block.m}]>"
    return resources(PORTABLE[kind], types, constants, capability, options)


def hopper_forward(d: int, intervals: int, causal: int, fp16: int = 0) -> dict[str, Any]:
    config = launch.forward_config(d, intervals)
    dtype = "fp16" if fp16 else "bf16"
    rows = max(2, triton.next_power_of_2(2 * intervals))
    types = {
        "q_desc": descriptor(dtype, 1, 64, 1, d),
        "k_desc": descriptor(dtype, 1, config.block_n, 1, d),
        "v_desc": descriptor(dtype, 1, config.block_n, 1, d),
        "out_desc": descriptor(dtype, 1, 64, 1, d),
        "bounds_desc": descriptor("i32", rows, config.block_n),
    }
    constants = dict(KV_SHARE=4, BLOCK_N=config.block_n, D=d, D_V=d, STAGES=config.stages, INTERVALS=intervals)
    constants |= dict(CAUSAL=bool(causal), TMA_STORE=True)
    constants |= dict(Q_IN_REGISTERS=config.q_in_registers, OUT_BUFFER=config.out_buffer)
    steady = launch.steady(config, torch.float16 if fp16 else torch.bfloat16)
    constants |= dict(STEADY=steady, LAZY=steady or intervals <= config.lazy_up_to, CONSUMERS=config.consumers)
    constants |= dict(CONSUMER_REGISTERS=config.consumer_registers)
    return resources(hopper_forward_kernels.forward_kernel, types, constants, 90, dict(num_warps=4))


def hopper_backward(d: int, intervals: int, causal: int, dq: int, tma_store: int) -> dict[str, Any]:
    config = launch.BACKWARD[d]
    types = {
        "q_desc": descriptor("bf16", 1, config.block_m, 1, d),
        "k_desc": descriptor("bf16", 1, 64, 1, d),
        "v_desc": descriptor("bf16", 1, 64, 1, d),
        "dout_desc": descriptor("bf16", 1, config.block_m, 1, d),
        "stats_desc": descriptor("fp32", 2, config.block_m),
        "dq_desc": descriptor("fp32", 1, 64, 1, 64, swizzle=0) if dq else descriptor("bf16", 1, 64, 1, 64),
        "dk_desc": descriptor("bf16", 1, 64, 1, d),
        "dv_desc": descriptor("bf16", 1, 64, 1, d),
    }
    if not tma_store:
        types |= {"p_dk": "*fp32", "p_dv": "*fp32"}
    constants = dict(KV_SHARE=4, BLOCK_M=config.block_m, D=d, STAGES=config.stages, INTERVALS=intervals)
    constants |= dict(
        CAUSAL=bool(causal),
        TMA_STORE=bool(tma_store),
        DQ=bool(dq),
        ONE_LIST=True,
        AHEAD=config.fused_ahead if dq else config.ahead,
    )
    constants |= dict(CONSUMER_REGISTERS=config.consumer_registers)
    return resources(hopper_backward_kernels.backward_kernel, types, constants, 90, dict(num_warps=4))


def hopper_query(d: int, intervals: int, causal: int, tma_store: int) -> dict[str, Any]:
    config = launch.FORWARD[d]
    rows = max(2, triton.next_power_of_2(2 * intervals))
    types = {
        "q_desc": descriptor("bf16", 1, 64, 1, d),
        "k_desc": descriptor("bf16", 1, config.block_n, 1, d),
        "v_desc": descriptor("bf16", 1, config.block_n, 1, d),
        "dout_desc": descriptor("bf16", 1, 64, 1, d),
        "dq_desc": descriptor("bf16", 1, 64, 1, d),
        "bounds_desc": descriptor("i32", rows, config.block_n),
    }
    if not tma_store:
        types |= {"p_dq": "*fp32"}
    constants = dict(KV_SHARE=4, BLOCK_N=config.block_n, D=d, STAGES=config.stages, INTERVALS=intervals)
    constants |= dict(CAUSAL=bool(causal), TMA_STORE=bool(tma_store), CONSUMER_REGISTERS=config.consumer_registers)
    return resources(hopper_query_kernels.query_gradient_kernel, types, constants, 90, dict(num_warps=4))


def descriptor(dtype: str, *box: int, swizzle: int | None = None) -> str:
    """Type of the TMA descriptors that the launch makes: swizzled if of `[B, N, H, D]`, plain if a table or a sum."""
    bits = 16 if dtype in ("bf16", "fp16") else 32
    swizzle = (128 if len(box) == 4 else 0) if swizzle is None else swizzle
    layout = f"swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank={len(box)}, transposed=False"
    return f"tensordesc<{dtype}{list(box)},NVMMASharedLayout({layout}, fp4_padded=False, cga_layout=[])>"


HOPPER = {"hopper_forward": hopper_forward, "hopper_backward": hopper_backward, "hopper_query": hopper_query}


def resources(
    kernel: JITFunction, types: dict[str, str], constants: dict[str, Any], capability: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory, ptxas's warnings, selects of PTX, for sm_90 accesses of spilled values
    between the first product and the last, 16-byte stores to shared memory, and, of Gluon's, the barriers in each loop
    over tiles and the order of wgmma waits and exponentials."""
    signature: dict[str, str] = {}
    divisible = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
            if types[name][0] == "*":
                divisible[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = _type(name)
            if signature[name][0] == "*" or name.startswith("stride"):
                divisible[(index,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, values, divisible)
    # ptxas runs once, as for a launch, and what it says of the kernel is printed; from a cache nothing would be.
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as printed:
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    log = printed.getvalue()
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills and registers, log
    sass = disassembled(compiled.asm["cubin"]) if capability == 90 else ""
    return {
        "registers": int(registers[1]),
        "spilled": int(spills[1]) + int(spills[2]),
        "shared": compiled.metadata.shared,
        "warnings": [line for line in log.splitlines() if "C75" in line],
        "selects": compiled.asm["ptx"].count("selp.f32"),
        "spilled_in_loop": len(re.findall(r"LDL|STL", "".join(sass.partition("HGMMA")[1:]).rpartition("HGMMA")[0])),
        "vector_stores": sass.count("STS.128"),
        "barriers": [sum("BAR.SYNC" in line for line in loop) for loop in innermost(sass)] if kernel.is_gluon() else [],
        "order": re.findall(r"HGMMA|WARPGROUP\.DEPBAR\.LE gsb0, 0x\d|MUFU\.EX2", sass) if kernel.is_gluon() else [],
    }


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def innermost(sass: str) -> list[list[str]]:
    """The lines of each loop that has exponentials and no such loop within."""
    lines = sass.splitlines()
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if line.startswith(".L_x_")}
    loops = set()
    for end, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels[target[1]] < end and "MUFU.EX2" in "".join(lines[labels[target[1]] : end]):
            loops.add((labels[target[1]], end))
    return [
        lines[start:end]
        for start, end in sorted(loops)
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in loops)
    ]


def _type(name: str) -> str:
    if name in ("p_lse", "p_delta", "p_stats"):
        return "*fp32"
    if name in ("p_starts", "p_ends", "p_bounds", "p_runs", "p_first", "p_tiles", "p_count", "p_order", "p_counter"):
        return "*i32"
    if name.startswith("p_"):
        return "*bf16"
    return "fp32" if name in FLOATS else "i32"


if __name__ == "__main__":
    main()
