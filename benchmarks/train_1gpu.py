"""Train the 1B model at 128K tokens on one GPU for a few steps, and write down what it did.

    python benchmarks/train_1gpu.py
    python benchmarks/train_1gpu.py --steps 30 --limit 220 --commit <hash> --out <folder> -- --optimizer.lr 1e-4

Runs `torchrun --nproc-per-node 1 launch/train.py --config configs/llama1b_128k_1gpu.yaml` and writes
<out>/train_1gpu_<date>.json and .md: loss, tokens/s, TFLOP/s by the mask's real area, peak memory, hardware, versions,
command and commit. They are rewritten every few seconds, so a run that is cut off leaves the steps it has done; --limit
ends the training in time, in seconds. What follows -- goes to the launcher.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
# Steps that compile kernels and fill the allocator: shown, but not in the medians.
WARMUP = 3
# Dense bf16 peak by the maker's data sheet, TFLOP/s.
PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/llama1b_128k_1gpu.yaml")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--limit", type=float, default=225.0, help="seconds after which the training is ended")
    parser.add_argument("--commit", default=None, help="default: git rev-parse HEAD, if there is a repository")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("overrides", nargs="*", help="after --: overrides for the launcher")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="train_1gpu_"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    arguments = ["launch/train.py", "--config", options.config, "--train.steps", str(options.steps)]
    arguments += ["--checkpoint.at_end", "false", "--train.if_exists", "replace", *options.overrides]
    command = [*torchrun, *arguments, "--train.folder", str(folder)]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["torchrun", "--nproc-per-node", "1", *arguments]),
        "commit": options.commit or _commit(),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("torch", "triton", "transformers", "fm_longctx")},
        "warmup_steps": WARMUP,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"train_1gpu_{result['date'].replace(':', '')[:15]}"

    # The package may lie here without being installed.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    training = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, start_new_session=True)
    # A time limit from outside arrives as SIGTERM: leave through the same door.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    deadline = time.monotonic() + options.limit
    try:
        while training.poll() is None and time.monotonic() < deadline:
            time.sleep(3)
            _write(target, result, folder, ended="still running when this was written")
        ended = f"exit code {training.returncode}" if training.poll() is not None else "ended by --limit"
    except (SystemExit, KeyboardInterrupt):
        ended = "cut off from outside"
    finally:
        if training.poll() is None:
            os.killpg(training.pid, signal.SIGTERM)
    _write(target, result, folder, ended=ended)
    print(target.with_suffix(".md").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    return 0 if training.poll() in (0, None, -signal.SIGTERM) else 1


def _write(target: Path, result: dict[str, Any], folder: Path, *, ended: str) -> None:
    metrics = folder / "metrics.jsonl"
    steps = []
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    resolved = folder / "config.yaml"
    config = yaml.safe_load(resolved.read_text()) if resolved.exists() else None
    result = result | {"ended": ended, "summary": _summary(steps, config, result["hardware"])}
    result |= {"steps": steps, "config": config}
    for suffix, text in ((".json", json.dumps(result, indent=1)), (".md", _markdown(result))):
        beside = target.with_suffix(suffix + ".partial")
        beside.write_text(text)
        os.replace(beside, target.with_suffix(suffix))


def _summary(steps: list[dict[str, Any]], config: dict[str, Any] | None, hardware: dict[str, Any]) -> dict[str, Any]:
    measured = steps[WARMUP:]
    if not measured or config is None:
        return {"steps": len(steps), "note": f"no figures: {len(steps)} steps done, the first {WARMUP} are warm-up"}
    seconds = statistics.median(s["seconds"] for s in measured)
    # The median of each step's own rate: the masks, so the work, differ from step to step.
    tflops = statistics.median(_flops(s, config) / s["seconds"] / 1e12 for s in measured)
    summary = {
        "steps": len(steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "median_seconds_per_step": seconds,
        "median_tokens_per_second": statistics.median(s["tokens_per_second"] for s in measured),
        "median_visible_fraction": statistics.median(s["visible_fraction"] for s in measured),
        "median_tflops": tflops,
        "peak_memory_gib": steps[-1]["peak_memory_gib"],
    }
    peak = next((p for name, p in PEAK.items() if name in str(hardware.get("gpu"))), None)
    if peak is not None and config["train"]["precision"] == "bfloat16":
        summary["mfu"] = tflops / peak
    return summary


def _flops(step: dict[str, Any], config: dict[str, Any]) -> float:
    """Three forwards, nothing for recomputation: 2 a weight and token, 2 (D + D_v) a visible score and head."""
    m, d = config["model"], config["data"]
    q, kv = m["num_attention_heads"] * m["head_dim"], m["num_key_value_heads"] * m["head_dim"]
    layer = m["hidden_size"] * (2 * q + 2 * kv + 3 * m["intermediate_size"])
    weights = m["num_hidden_layers"] * layer + m["vocab_size"] * m["hidden_size"]
    sequences = d["batch_size"] * config["train"]["gradient_accumulation"]
    area = step["visible_fraction"] * d["sequence_length"] ** 2 * sequences
    tokens = d["sequence_length"] * sequences
    return 3.0 * (2 * weights * tokens + 4 * m["head_dim"] * m["num_attention_heads"] * m["num_hidden_layers"] * area)


def _markdown(result: dict[str, Any]) -> str:
    lines = [f"# One-GPU training, {result['date'][:10]}", "", "```", result["command"], "```", ""]
    for name in ("commit", "hardware", "versions", "ended"):
        lines.append(f"- {name}: {result[name]}")
    lines += ["", "| | |", "|---|---|"]
    for name, value in result["summary"].items():
        lines.append(f"| {name.replace('_', ' ')} | {f'{value:,.3f}' if isinstance(value, float) else value} |")
    lines += [
        "",
        f"Medians leave out the first {WARMUP} steps. TFLOP/s and MFU count three forwards, over the real area and "
        "without recomputation.",
        "",
        "| step | loss | tokens/s | visible | grad norm |",
        "|---|---|---|---|---|",
    ]
    for s in result["steps"]:
        lines.append(
            f"| {s['step']} | {s['loss']:.4f} | {s['tokens_per_second']:,.0f} | {s['visible_fraction']:.1%} | "
            f"{s['grad_norm']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _commit() -> str:
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return asked.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _hardware() -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, check=True)
        gpu = asked.stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        gpu = None
    return {"gpu": gpu, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}


if __name__ == "__main__":
    sys.exit(main())
