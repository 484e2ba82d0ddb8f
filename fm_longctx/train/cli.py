"""The command line of the launcher, and how a job of many ranks ends with one message."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from fm_longctx.train import config_load
from fm_longctx.train.config import Config
from fm_longctx.train.ranks import ranks_started, this_rank

# What is wrong on one rank is mostly wrong on all. The others hold their message back this long: by then torchrun has
# ended them because rank 0 is gone, and only rank 0 was heard. If rank 0 waits for them, they speak after all.
_PATIENCE_SECONDS = 3.0

_PACKAGE = Path(__file__).parents[1]


def main(arguments: Sequence[str], *, usage: str | None) -> int:
    """Run the launcher; the exit code: 0, 1 if the run failed, 2 if the input was refused."""
    rank = this_rank()
    if not arguments or "--help" in arguments or "-h" in arguments:
        if rank == 0:
            print(f"{usage}\n{config_load.help_text()}")
        return 0 if arguments else 2
    try:
        path, dry_run, gpu, overrides = _split(arguments)
        config = config_load.load(path, overrides)
        if dry_run:
            if rank == 0:
                from fm_longctx.train.dry_run import describe

                print(describe(config, gpu))
            return 0
        from fm_longctx.train.start import prepare

        resume = prepare(config, ranks_started())
    except ValueError as error:
        return _refuse(error, rank)
    return _run(config, resume, rank)


def _split(arguments: Sequence[str]) -> tuple[str, bool, str, list[str]]:
    """`--config PATH`, `--dry-run` and `--gpu NAME` taken out of the arguments; the rest are overrides."""
    path, dry_run, gpu, rest = None, False, None, list(arguments)
    overrides: list[str] = []
    while rest:
        argument = rest.pop(0)
        if argument == "--dry-run":
            dry_run = True
        elif argument == "--config" and rest:
            path = rest.pop(0)
        elif argument == "--gpu" and rest:
            gpu = rest.pop(0)
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        elif argument.startswith("--gpu="):
            gpu = argument.partition("=")[2]
        else:
            overrides.append(argument)
    if path is None:
        raise ValueError("give the config: --config configs/demo_cpu.yaml.")
    if gpu is not None and not dry_run:
        raise ValueError("--gpu says for which GPU --dry-run estimates; give both, or leave it out.")
    return path, dry_run, gpu or "h100", overrides


def _refuse(error: ValueError, rank: int) -> int:
    """The input is wrong, on every rank alike, and no process group exists: rank 0 says so."""
    if rank == 0:
        _say(f"error: {error}")
    else:
        time.sleep(_PATIENCE_SECONDS)
    return 2


def _run(config: Config, resume: object, rank: int) -> int:
    from fm_longctx.train.faults import StopSignal
    from fm_longctx.train.loop import run
    from fm_longctx.train.start import Resume
    from fm_longctx.train.step import TrainingError

    assert resume is None or isinstance(resume, Resume)
    try:
        run(config, resume)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        message = traceback.format_exc()
        if isinstance(error, TrainingError) or (isinstance(error, ValueError) and _is_ours(error)):
            message = f"error: {error}"
        elsewhere = _comes_from_another_rank(error)
        if elsewhere:
            if StopSignal.seen:
                # torchrun has ended this rank because of another's failure, which it reports.
                return 1
            message = f"another rank is gone, or did not come in time: {str(error).strip().splitlines()[0]}"
        if rank != 0 or elsewhere:
            # On one host torchrun soon ends whoever only lost another rank.
            time.sleep(5 * _PATIENCE_SECONDS if elsewhere else _PATIENCE_SECONDS)
            message = f"rank {rank}: {message}"
        _say(message)
        return 1
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


def _say(message: str) -> None:
    """Print it, and leave it where torchrun's closing summary shows the cause of a failure."""
    print(message, file=sys.stderr, flush=True)
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary is not None:
        content = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
        Path(summary).write_text(json.dumps(content))


def _is_ours(error: BaseException) -> bool:
    """Raised by this package, hence with a message for the user; from anywhere else the traceback matters."""
    trace = traceback.extract_tb(error.__traceback__)
    return bool(trace) and _PACKAGE in Path(trace[-1].filename).parents


def _comes_from_another_rank(error: BaseException) -> bool:
    """A collective that failed because another rank is gone: that rank has the message that matters."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(w in text for w in ("connection closed", "connection reset", "gloo"))
