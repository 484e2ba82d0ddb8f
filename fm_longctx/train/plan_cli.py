"""The command line of `launch/plan.py`: lay a sequence out over ranks and print what that costs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from fm_longctx.context_parallel.assign import STRATEGIES
from fm_longctx.context_parallel.cost import CostModel
from fm_longctx.context_parallel.plan import ShardPlan
from fm_longctx.mask import FlashMask, builders

MASKS = ("causal", "full")


class _Refused(ValueError):
    """argparse would print its usage and exit; one line is enough."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise _Refused(f"{message}. --help lists what there is.")


def main(arguments: Sequence[str], *, usage: str | None) -> int:
    """Run it; the exit code: 0, or 2 if the input was refused, with one `error:` line."""
    try:
        options = _parser(usage).parse_args(arguments)
        report = _plan(options).report()
        print(report)
        if options.draw is not None:
            report.draw(options.draw)
            print(f"drawn to {options.draw}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(usage: str | None) -> _Parser:
    parser = _Parser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="PATH", help="a training config: its data, ranks and model shape")
    source.add_argument("--lengths", metavar="N,N,...", help="lengths of the packed documents")
    parser.add_argument("--sequence", type=int, default=0, help="with --config: which sequence of its data (0)")
    parser.add_argument("--ranks", type=int, help="ranks that share the sequence; with --config its parallel.context")
    parser.add_argument("--mask", choices=MASKS, default="causal", help="within each document (causal)")
    parser.add_argument("--window", type=int, help="a row sees so many columns at most, itself included")
    parser.add_argument("--strategy", help=f"one of {', '.join(STRATEGIES)} (balanced, or the config's)")
    parser.add_argument("--chunk-size", type=int, help="tokens in a chunk; chosen, or the config's, if not given")
    parser.add_argument("--stages", type=int, help="stages of the exchange; chosen, or the config's, if not given")
    parser.add_argument(
        "--head-parallel",
        type=_number_or_auto,
        metavar="U",
        help="ranks that split heads instead of keys, or auto (1, or the config's)",
    )
    parser.add_argument("--draw", metavar="PATH", help="save a picture as well, .png or .svg")
    cost = parser.add_argument_group("cost model", "what the times are predicted from; with --config heads are its own")
    defaults = CostModel()
    for field in fields(CostModel):
        default = getattr(defaults, field.name)
        flag = "--" + field.name.replace("_", "-")
        cost.add_argument(flag, type=type(default), metavar="X", help=f"{field.name} of CostModel ({default:g})")
    return parser


def _plan(options: argparse.Namespace) -> ShardPlan:
    shape = {f.name: getattr(options, f.name) for f in fields(CostModel) if getattr(options, f.name) is not None}
    if options.config is not None:
        mask, ranks, layout, heads = _from_config(options.config, options.sequence, options.mask == "causal")
        shape = {**heads, **shape}
        ranks = ranks if options.ranks is None else options.ranks
    else:
        mask = FlashMask.from_lengths(_lengths(options.lengths), causal=options.mask == "causal")
        ranks, layout = options.ranks, {}
        if ranks is None:
            raise ValueError("give the number of ranks with --lengths: --ranks 8.")
    if ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {ranks}.")
    if options.window is not None:
        if options.mask != "causal":
            raise ValueError("--window looks back from each row: it needs --mask causal.")
        mask = mask & builders.sliding_window(mask.num_rows, options.window)
    given = {
        "strategy": options.strategy,
        "chunk_size": options.chunk_size,
        "num_stages": options.stages,
        "head_parallel": options.head_parallel,
    }
    layout |= {name: value for name, value in given.items() if value is not None}
    return ShardPlan.build(mask, ranks, cost=CostModel(**shape), **layout)


def _number_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--lengths must be integers with commas between them, got {text!r}.") from None
    if min(lengths) < 1:
        raise ValueError(f"--lengths must be at least 1 each, got {min(lengths)}.")
    return lengths


def _from_config(path: str, sequence: int, causal: bool) -> tuple[FlashMask, int, dict[str, Any], dict[str, int]]:
    """A sequence's mask, context ranks, layout and head counts of a config's data and model."""
    from fm_longctx.train import config_load
    from fm_longctx.train.inputs import make_stream

    config = config_load.load(path)
    if sequence < 0:
        raise ValueError(f"--sequence must be at least 0, got {sequence}.")
    packed = make_stream(config).sequence(sequence)
    heads = {}
    # A Hugging Face folder's shape is not read: name it on the command line.
    if config.model.path is None:
        heads = dict(
            heads=config.model.num_attention_heads,
            kv_heads=config.model.num_key_value_heads,
            head_dim=config.model.head_dim,
        )
    mask = packed.mask
    if not causal:
        if config.task.kind in ("dpo", "reward"):
            raise ValueError(f"--mask full is for documents, but task.kind: {config.task.kind} has shared questions.")
        # A padding token is a document of its own.
        mask = FlashMask.from_lengths((*packed.lengths, *[1] * packed.num_padding), causal=False)
    return mask, config.parallel.context, config.parallel.plan_options, heads
