"""Does the Hugging Face plug compute each model family rightly in low precision? Logits and gradients, on a GPU.

    python -m benchmarks.plugs_check --out benchmarks/results

Tiny models with random weights, packed documents given by position_ids (mask "documents"), one padded batch
("padding"), and one token decoded from a cache ("decode"). Exact is the same model in float32 with eager attention and
a dense mask from the words of the definition. The error, the 2-norm of the difference over that of the exact, of the
logits and of the gradient of each parameter may be at most twice that of eager attention in the tested dtype, plus one
unit of that dtype and 64 of float32.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.environment import environment
from fm_longctx.attention.passes import resolve_backend
from fm_longctx.integrations.transformers import NAME, register

WINDOW = 300
HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
# Config class, changes, and the window of each layer. All experts are used, or rounding would choose among them.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int | None, int | None]]] = {
    "llama": ("LlamaConfig", {}, (None, None)),
    "qwen3": ("Qwen3Config", {}, (None, None)),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}, (WINDOW, WINDOW)),
    "gemma2": (
        "Gemma2Config",
        {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64, **HYBRID},
        (WINDOW, None),
    ),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 64, **HYBRID}, (WINDOW, None)),
    "gpt-oss": ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 2, **HYBRID}, (WINDOW, None)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=1500)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="folder for a dated .jsonl; printed only if not given")
    parser.add_argument("--commit", help="the commit to record where there is no git")
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, (os.cpu_count() or 2) // 2),
        help="families at once, each in a process of its own: most of the time goes into compiling their kernels",
    )
    options = parser.parse_args()

    rows = []
    check_one = functools.partial(check_family, options=options)
    if options.jobs == 1 or len(options.families) == 1:
        results = map(check_one, options.families)
    else:
        workers = min(options.jobs, len(options.families))
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        results = pool.map(check_one, options.families)
    for of_family in results:
        for row in of_family:
            rows.append(row)
            print(
                f"{'ok  ' if row['ok'] else 'FAIL'} {row['family']:8} {row['case']:9} {row['backend']:9} worst error / "
                f"budget {row['worst']:.2f} ({row['worst_part']}, {row['seconds']:.1f} s)",
                flush=True,
            )
    failed = [row for row in rows if not row["ok"]]
    print(f"{len(rows) - len(failed)} of {len(rows)} within budget")
    if options.out:
        about = {**environment(options.commit), "transformers": transformers.__version__}
        path = options.out / f"{about['date']}-plugs_check-{options.dtype}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in [about, *rows]))
    raise SystemExit(1 if failed else 0)


def check_family(family: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    register()
    return [check(family, case, options) for case in (documents, padding, decode)]


def make(family: str, implementation: str, dtype: torch.dtype, device: str) -> Any:
    name, changes, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    # Plain loops over experts: a grouped product may not exist in float32.
    options = {"experts_implementation": "eager"} if family == "gpt-oss" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation, **options)
    return model.to(device, dtype)


def dense(family: str, visible: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Additive masks of bool `[B, N, N]`, one for each kind of layer where there are two."""
    windows = FAMILIES[family][2]
    rows = torch.arange(visible.shape[-1], device=visible.device)
    near = rows[:, None] - rows < WINDOW

    def additive(mask: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=dtype, device=mask.device)
        return torch.where(mask, zero, torch.finfo(dtype).min)[:, None]

    if windows[0] == windows[1]:
        return additive(visible if windows[0] is None else visible & near)
    return {"full_attention": additive(visible), "sliding_attention": additive(visible & near)}


def tokens(options: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 512, (2, options.length), generator=generator).to(options.device)


def documents(family: str, model: Any, options: argparse.Namespace, *, ours: bool) -> dict[str, Tensor]:
    n = options.length
    cuts = [0, n // 7, n // 7 + 1, n // 2 + 13, n]
    owner = torch.bucketize(torch.arange(n), torch.tensor(cuts[1:]), right=True)
    rows = torch.arange(n)
    visible = ((rows[:, None] >= rows) & (owner[:, None] == owner))[None].to(options.device)
    positions = (rows - torch.tensor(cuts)[owner])[None].to(options.device)
    mask = {} if ours else {"attention_mask": dense(family, visible, model.dtype)}
    logits = model(tokens(options), position_ids=positions, use_cache=False, **mask).logits
    return gradients(model, logits, torch.ones(2, n, dtype=torch.bool, device=options.device))


def padding(family: str, model: Any, options: argparse.Namespace, *, ours: bool) -> dict[str, Tensor]:
    n = options.length
    real = torch.ones(2, n, dtype=torch.bool, device=options.device)
    real[1, : n // 3] = False
    rows = torch.arange(n, device=options.device)
    visible = (rows[:, None] >= rows)[None] & real[:, None, :]
    mask = real.long() if ours else dense(family, visible, model.dtype)
    return gradients(model, model(tokens(options), attention_mask=mask, use_cache=False).logits, real)


@torch.no_grad()
def decode(family: str, model: Any, options: argparse.Namespace, *, ours: bool) -> dict[str, Tensor]:
    """The last logits: of the whole for eager, of a prefill and one step for ours."""
    whole = tokens(options)
    if not ours:
        rows = torch.arange(options.length, device=options.device)
        visible = (rows[:, None] >= rows)[None]
        logits = model(whole, attention_mask=dense(family, visible, model.dtype), use_cache=False).logits
    else:
        past = model(whole[:, :-1], use_cache=True).past_key_values
        logits = model(whole[:, -1:], past_key_values=past, use_cache=True).logits
    return {"logits": logits[:, -1].float()}


def gradients(model: Any, logits: Tensor, counted: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)).to(logits.device)
    (logits.float().log_softmax(-1) * weight)[counted].sum().backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters()}
    return {"logits": logits.detach()[counted].float(), **grads}


def check(family: str, case: Callable[..., dict[str, Tensor]], options: argparse.Namespace) -> dict[str, Any]:
    begin = time.monotonic()
    dtype = getattr(torch, options.dtype)
    # Weights rounded to the tested dtype, so that all three have the same.
    source = make(family, "eager", dtype, options.device).state_dict()

    def run(implementation: str, precision: torch.dtype) -> dict[str, Tensor]:
        model = make(family, implementation, precision, options.device)
        model.load_state_dict(source)
        return case(family, model, options, ours=implementation == NAME)

    exact, cheap, got = run("eager", torch.float32), run("eager", dtype), run(NAME, dtype)
    unit = torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
    worst, part = 0.0, "logits"
    for name, want in exact.items():
        error, other = ((x[name] - want).norm() / want.norm() for x in (got, cheap))
        ratio = float(error / (2 * other + unit))
        if not ratio <= worst:  # a NaN too
            worst, part = ratio, name
    q = torch.empty(1, 1, 4, 64, dtype=dtype, device=options.device)
    softcap = FAMILIES[family][1].get("attn_logit_softcapping")
    return {
        "family": family,
        "case": case.__name__,
        "length": options.length,
        "dtype": options.dtype,
        "backend": resolve_backend(None, q, q, 2, softcap),
        "ok": worst <= 1,
        "worst": worst,
        "worst_part": part,
        "seconds": round(time.monotonic() - begin, 2),
    }


if __name__ == "__main__":
    main()
