"""What a plan costs, rank by rank: as text for a terminal and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import numpy as np

from fm_longctx.context_parallel.cost import Prediction, Work, predict_backward, predict_forward
from fm_longctx.context_parallel.coverage import Floats, chunk_needs, longest_lists, segments
from fm_longctx.context_parallel.overlap import stage_tables
from fm_longctx.context_parallel.problem import merging_rows
from fm_longctx.mask.draw import MAX_CELLS, cell_colours, palette, rank_of_block, visible_share

if TYPE_CHECKING:
    from fm_longctx.context_parallel.plan import ShardPlan

# Ranks that the text lists; of more it lists the ones that say most.
_MOST_LISTED = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanReport:
    """Counts are exact; times are predictions of the plan's `CostModel` for one attention layer.

    With several masks everything is the mean over them by their weights: one layer of the average kind. Areas are those
    of one query head, keys and bytes those of the whole batch. With head parallelism a row is a ring: the numbers are
    those of each of its members, and times include trading rows for heads, which nothing hides.
    """

    plan: ShardPlan
    scores: Floats
    """`[rings, stages]`: unmasked scores of one query head, over the members that split the heads; exact for a rank,
    while within it those of a pair of ranks are taken to be spread over its keys evenly."""
    received: Floats
    """`[rings, stages]`: bytes of keys and values that arrive."""
    sent: Floats
    """`[rings, stages]`: bytes of keys and values that leave. Gradients travel the other way, wider."""
    far: Floats
    """`[rings, stages]`: of those that arrive or leave, whichever are more, the bytes between hosts."""
    forward: Prediction
    backward: Prediction

    @classmethod
    def of(cls, plan: ShardPlan) -> PlanReport:
        """The report of a plan: `plan.report()`."""
        ranks, cost, heads = plan.rings, plan.cost, plan.head_parallel
        total = sum(plan.weights)
        scores, received, sent, far, near = (np.zeros((ranks, plan.num_stages)) for _ in range(5))
        merging, longest = np.zeros(ranks), np.zeros((ranks, plan.num_stages))
        bounds, owners = plan.bounds.numpy(), plan.owners.numpy()
        for mask, weight, (area, seen) in zip(plan.masks, plan.weights, plan.tables, strict=True):
            parts = segments(mask)
            needs, lists = chunk_needs(parts, bounds), longest_lists(parts, bounds, owners, ranks)
            tables = stage_tables(area, seen, lists, plan.staging, cost.rings_a_host(heads))
            longest += tables.longest * (weight / total)
            share = weight / total / heads
            # Where there are fewer key/value heads than members, several hold the same one.
            of_keys = weight / total * mask.batch * max(1 / heads, 1 / cost.kv_heads)
            merging += merging_rows(needs, np.diff(bounds), owners, ranks) * share * mask.batch
            scores += tables.scores * (share / mask.heads)
            for sums, keys in (
                (received, tables.received),
                (sent, tables.sent),
                (far, tables.far),
                (near, tables.near),
            ):
                sums += keys * of_keys
        entries = float(np.average([mask.batch for mask in plan.masks], weights=plan.weights))
        rows = entries * np.bincount(owners, np.diff(bounds), ranks)
        trade = cost.trade_heads(rows / heads, heads)
        work = Work(scores, far, near, rows / heads, merging, longest)
        forward, backward = predict_forward(cost, work), predict_backward(cost, work)
        return cls(
            plan=plan,
            scores=scores,
            received=received * cost.forward_key_bytes,
            sent=sent * cost.forward_key_bytes,
            far=far * cost.forward_key_bytes,
            forward=forward._replace(total=forward.total + trade),
            backward=backward._replace(total=backward.total + trade),
        )

    @cached_property
    def floor(self) -> float:
        """Keys that any layout of equal shares with at most 2% imbalance must receive, over an all-gather's."""
        return self.plan.floor()

    @property
    def ideal(self) -> tuple[float, float]:
        """Seconds of forward and backward if the same scores were spread evenly and nothing were waited for."""
        mean = np.array(self.scores.sum() / len(self.scores))
        return float(self.plan.cost.forward_compute(mean)), float(self.plan.cost.backward_compute(mean))

    def __str__(self) -> str:
        plan, ideal = self.plan, self.ideal
        rows = np.bincount(plan.owners.numpy(), np.diff(plan.bounds.numpy()), plan.rings).astype(np.int64)
        chunks = np.bincount(plan.owners.numpy(), minlength=plan.rings)
        what = "rank" if plan.head_parallel == 1 else "ring"
        shared = "" if plan.head_parallel == 1 else f" in rings of {plan.head_parallel} that split the heads"
        lines = [
            f"{plan.num_tokens:,} tokens over {plan.world_size} ranks{shared}, strategy {plan.strategy}, "
            f"{plan.num_stages} stages"
            + (f", each {plan.growth:g} times the one before" if plan.growth != 1 else "")
            + (", own keys with the first that come" if plan.own_stage else ""),
            f"imbalance (max/mean area)      {plan.imbalance:.3f}",
            f"keys received, of all-gather   {plan.received_fraction:.3f} on average "
            f"(no even layout below {self.floor:.3f})",
            f"bytes received, forward        {_bytes(self.received.sum(1).mean())} on average, "
            f"{_bytes(self.received.sum(1).max())} at most, a rank and layer",
            f"of it between hosts             {_bytes(self.far.sum(1).mean())} on average, "
            f"{_bytes(self.far.sum(1).max())} at most",
            _times("forward", self.forward, ideal[0]),
            _times("backward", self.backward, ideal[1]),
            "",
            f"{what:>6} {'rows':>9} {'runs':>5} {'area':>7}  {'received by stage':<26} {'sent by stage':<26} "
            f"{'forward':>9} {'waits':>9}",
        ]
        mean = max(1e-30, self.scores.sum() / plan.rings)
        for rank in self._listed():
            lines.append(
                f"{rank:>6} {rows[rank]:>9,} {chunks[rank]:>5} {self.scores[rank].sum() / mean:>7.3f}  "
                f"{_stages(self.received[rank, 1:]):<26} {_stages(self.sent[rank, 1:]):<26} "
                f"{_ms(self.forward.total[rank]):>9} {_ms(self.forward.exposed[rank]):>9}"
            )
        if plan.rings > _MOST_LISTED:
            lines.append(f"(of {plan.rings} {what}s: the largest, the median and the smallest by time)")
        lines.append("Counts are exact; times are modelled, one layer, by " + str(plan.cost))
        return "\n".join(lines)

    def draw(self, path: str | PathLike[str]) -> None:
        """Save a picture (PNG or SVG): the first mask in its ranks' colours, and the load and traffic of each rank.

        Raises:
            ValueError: another suffix.
        """
        suffix = fspath(path).rpartition(".")[2].lower()
        if suffix not in ("png", "svg"):
            raise ValueError(f"path must end in .png or .svg, got {fspath(path)!r}.")
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        figure = self._figure()
        canvas: Any = FigureCanvasAgg(figure) if suffix == "png" else FigureCanvasSVG(figure)
        canvas.print_figure(fspath(path), format=suffix, metadata={"Date": None} if suffix == "svg" else None)

    def _figure(self) -> Any:
        from matplotlib.figure import Figure

        plan = self.plan
        ranks = np.arange(plan.rings)
        colours = palette(plan.rings)
        owner = np.repeat(plan.owners.numpy(), np.diff(plan.bounds.numpy()))
        block = 1 << max(0, math.ceil(math.log2(max(1, plan.num_tokens) / MAX_CELLS)))
        image = cell_colours(visible_share(plan.masks[0], block), colours[rank_of_block(owner, block)])
        figure = Figure(figsize=(11.5, 5.4), dpi=140, facecolor="white", layout="constrained")
        mask_axes, load_axes, traffic_axes = figure.subplots(1, 3, width_ratios=[2.2, 1, 1])
        n = max(1, plan.num_tokens)
        if image.size:
            mask_axes.imshow(image, extent=(0, n, n, 0), interpolation="nearest", aspect="auto")
        mask_axes.set(xlabel="column (key)", ylabel="row (query), in its rank's colour")
        mask_axes.set_title(f"{plan.num_tokens:,} tokens, {plan.world_size} ranks, {plan.strategy}", fontsize=10)
        mean = max(1e-30, self.scores.sum() / plan.rings)
        load_axes.barh(ranks, self.scores.sum(1) / mean, color=colours)
        load_axes.axvline(1.0, color="#444444", linewidth=0.8, linestyle="--")
        load_axes.set_title(f"area / mean, at most {plan.imbalance:.3f}", fontsize=10)
        traffic_axes.barh(ranks, self.received.sum(1) / 2**20, color=colours)
        traffic_axes.set_title("MiB received, forward", fontsize=10)
        for axes in (load_axes, traffic_axes):
            axes.set_ylim(plan.rings - 0.4, -0.6)
            axes.set_ylabel("rank" if plan.head_parallel == 1 else "ring")
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        return figure

    def _listed(self) -> Sequence[int]:
        order = np.argsort(-self.forward.total, kind="stable")
        if len(order) <= _MOST_LISTED:
            return list(range(len(order)))
        third = _MOST_LISTED // 3
        middle = len(order) // 2 - third // 2
        return [*order[:third].tolist(), *order[middle : middle + third].tolist(), *order[-third:].tolist()]


def _times(name: str, prediction: Prediction, ideal: float) -> str:
    slowest, waits = float(prediction.total.max()), prediction.exposed[int(prediction.total.argmax())]
    share = f"{ideal / slowest:.1%} of ideal" if slowest > 0 else "nothing to do"
    return (
        f"predicted {name:<9}            {_ms(slowest)} for the slowest rank, of which it waits {_ms(waits)}; "
        f"ideal {_ms(ideal)}: {share}"
    )


def _stages(values: Floats) -> str:
    shown = " ".join(_bytes(v) for v in values[:3])
    return shown + (" ..." if len(values) > 3 else "") if len(values) else "-"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _bytes(value: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}B"
