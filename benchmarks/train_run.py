"""One arm of one cell: build the model as the launcher does, train a few steps, report."""

from __future__ import annotations

import gc
import random
import statistics
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks import train_arms
from benchmarks.packs import pack
from benchmarks.train_cells import SHAPES, TrainCell
from fm_longctx.data import IGNORED
from fm_longctx.train.config import Config, ModelConfig
from fm_longctx.train.engines import start
from fm_longctx.train.engines.fsdp import FsdpEngine
from fm_longctx.train.estimate import Setup, Shape, step_flops
from fm_longctx.train.estimate_memory import Memory, memory
from fm_longctx.train.memory import weights_dtype
from fm_longctx.train.model import LanguageModel, build, huggingface_config

# Dense bf16 peak by the maker's data sheet, TFLOP/s.
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}


class Refused(Exception):
    """The arm cannot run the cell here; the message says why."""


def run(cell: TrainCell, arm: str, device: str) -> dict[str, Any]:
    """The row of an arm: status, and figures if it is ok.

    Raises:
        Refused: a library is missing, or the device cannot.
        Exception: whatever failed, out of memory too.
    """
    if arm == "flex" and device == "cpu":
        raise Refused("FlexAttention has no backward on a CPU")
    if arm == "ours_nearest" and device == "cuda" and find_spec("torchao") is not None:
        raise Refused("torchao is installed: ours is the figure")
    if device == "cuda" and arm in ("ours", "dense"):
        # SDPA's keys and values, repeated for each query head, come on top.
        needed = (estimated(cell, SHAPES[cell.shape]).peak + (2 * cell.n**2 if arm == "dense" else 0)) / 2**30
        there = torch.cuda.get_device_properties(0).total_memory / 2**30
        if needed > there:
            raise Refused(f"the estimated peak is {needed:.0f} GiB, of the device's {there:.0f}")
    if cell.compile:
        _forget_other_shapes(cell)
    torch.manual_seed(0)
    config = cell.config(device)
    model, optimizer = prepare(config, arm)
    try:
        return _train(cell, arm, config, model, optimizer, torch.device(device))
    finally:
        del model, optimizer
        free()


_compiled_for: list[tuple[Any, ...]] = []


def _forget_other_shapes(cell: TrainCell) -> None:
    """Compiled code of another cell would be made general, and slower, for this one's sizes; or not made at all."""
    sizes = (cell.shape, cell.n, cell.checkpointing)
    if _compiled_for != [sizes]:
        torch._dynamo.reset()
        _compiled_for[:] = [sizes]


def prepare(config: Config, arm: str) -> tuple[LanguageModel, torch.optim.Optimizer]:
    """The model and the optimizer, sharded over this one rank as by the launcher."""
    world = start(config)
    kind = weights_dtype(config.train)
    model = build(config.model, max_length=config.data.sequence_length, loss_chunk=config.train.loss_chunk, dtype=kind)
    train_arms.use(model.causal_lm, arm)
    if arm == "ours_nearest":
        # What torch has for bfloat16 weights: small updates are lost, so this is for memory and speed alone.
        config = replace(config, train=replace(config.train, precision="bfloat16"))
    elif kind == torch.bfloat16 and find_spec("torchao") is None:
        raise Refused("train.precision: bfloat16_stochastic needs torchao, which is not installed")
    return model, FsdpEngine(config, world, model=model).optimizer


def free() -> None:
    """Give back what the arm before has held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache() if hasattr(torch._C, "_host_emptyCache") else None


def _train(
    cell: TrainCell,
    arm: str,
    config: Config,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> dict[str, Any]:
    shape = Shape.of(model.causal_lm.config)
    on_gpu = device.type == "cuda"
    dtype = torch.float32 if cell.precision == "float32" else torch.bfloat16
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds, flops, losses, norms, queries, visible = [], [], [], [], [], []
    for step, (lengths, tokens) in enumerate(batches(cell, shape.vocabulary)):
        if step == cell.warmup + cell.steps:
            break
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        loss, norm, query = train_step(arm, model, optimizer, lengths, tokens, device, dtype)
        losses.append(float(loss))
        norms.append(float(norm))
        queries.append(float(query))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        area = sum(n * (n + 1) // 2 for n in lengths)
        flops.append(step_flops(shape, cell.n, area))
        visible.append(area / cell.n**2)
    counted = slice(cell.warmup, None)
    rate = sum(flops[counted]) / sum(seconds[counted]) / 1e12
    about = estimated(cell, config.model)
    row: dict[str, Any] = {
        "status": "ok",
        "parameters": shape.parameters,
        "tokens_per_second": cell.n * cell.steps / sum(seconds[counted]),
        "seconds_per_step": statistics.median(seconds[counted]),
        "first_seconds": seconds[0],
        "tflops": rate,
        "visible": statistics.mean(visible[counted]),
        "losses": losses,
        "grad_norms": norms,
        "query_grad_norms": queries,
        "estimated_gib": about.peak / 2**30,
        "estimated_moment": about.moment,
        "estimated_host_gib": about.host / 2**30,
    }
    if on_gpu:
        peak = next((p for name, p in PEAK.items() if name in torch.cuda.get_device_name()), None)
        row["mfu"] = rate / peak if peak else None
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return row


def train_step(
    arm: str,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    lengths: list[int],
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, gradient norm, and that of the query projections, which hangs on the mask most; of one step.

    Everything that depends on the batch is made in it.
    """
    mask = train_arms.MAKERS[arm](lengths, device, dtype)
    labels = torch.cat([tokens[1:], tokens.new_full((1,), IGNORED)])
    ends = torch.tensor(lengths).cumsum(0) - 1
    labels[ends] = IGNORED
    positions = torch.cat([torch.arange(n) for n in lengths])
    here = [x[None].to(device, non_blocking=True) for x in (tokens, labels, positions)]
    loss = model(*here, **mask) / (len(tokens) - len(lengths))
    loss.backward()
    query = nn.utils.get_total_norm([p.grad for name, p in model.named_parameters() if "q_proj" in name])
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach(), *(x.full_tensor() if isinstance(x, DTensor) else x for x in (norm, query))


def batches(cell: TrainCell, vocabulary: int) -> Iterator[tuple[list[int], Tensor]]:
    """Document lengths and tokens int64 `[n]`, step by step; the same for every arm.

    Speed needs no text: tokens are random, and lengths follow the published mix of benchmarks/packs.py. Convergence
    reads the standard library's source files as bytes.
    """
    step = 0
    while True:
        if cell.section == "convergence":
            yield _text(cell.n, step)
        else:
            lengths = _cut(pack(cell.n, step % 2), cell.longest_document)
            generator = torch.Generator().manual_seed(step)
            yield lengths, torch.randint(vocabulary, (cell.n,), generator=generator)
        step += 1


def _cut(lengths: list[int], longest: int) -> list[int]:
    return [min(longest, n - first) for n in lengths for first in range(0, n, longest)]


@cache
def _files() -> list[bytes]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_bytes() for path in sorted(folder.glob("*.py"))]


def _text(n: int, step: int) -> tuple[list[int], Tensor]:
    """A pack of `n` bytes of whole files, drawn anew each step, the last one cut off."""
    generator = random.Random(step)
    lengths: list[int] = []
    content = bytearray()
    while len(content) < n:
        file = generator.choice(_files())[: n - len(content)]
        if len(file):
            lengths.append(len(file))
            content += file
    return lengths, torch.frombuffer(content, dtype=torch.uint8).long()


def estimated(cell: TrainCell, model: ModelConfig) -> Memory:
    """What the estimator says of our arm."""
    shape = Shape.of(huggingface_config(model, max_length=cell.n))
    setup = Setup(
        tokens=cell.n,
        precision=cell.precision,
        checkpointing=cell.checkpointing,
        offload=cell.offload,
        mlp_chunk=cell.mlp_chunk,
        mlp_kept=cell.mlp_kept,
        loss_chunk=cell.loss_chunk,
        compile=cell.compile,
    )
    return memory(shape, setup)
