"""A collator that packs: documents, preference pairs, completions and token trees, with their mask and their shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from fm_longctx.context_parallel.plan import ShardPlan
from fm_longctx.data import IGNORED
from fm_longctx.data.trees import Node, Packed, answers_of, pack, windowed
from fm_longctx.mask import FlashMask

if TYPE_CHECKING:
    import torch.distributed as dist

    from fm_longctx.context_parallel import ContextParallel


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedContext:
    """What a collator can know of a sharded batch; `join` makes of it the `context=` of the model's call."""

    plan: ShardPlan
    masks: Mapping[str, FlashMask]
    """The global mask, under "full_attention", and where the model has sliding layers theirs."""

    def join(
        self, group: dist.ProcessGroup | None, *, device: torch.device | str | None = None
    ) -> Mapping[str, ContextParallel]:
        """The contexts of this batch on the ranks of the group. A collective: each of them calls it once a batch."""
        from fm_longctx.context_parallel import ContextParallel

        return {kind: ContextParallel(group, self.plan, mask, device=device) for kind, mask in self.masks.items()}


class DataCollatorForFlashMask:
    """Packs the features of a batch into one sequence of N tokens, with positions, labels and mask.

        collator = DataCollatorForFlashMask()
        trainer = Trainer(model, args, train_dataset=dataset, data_collator=collator)   # remove_unused_columns=False

    A feature is one of these, tokens as lists of integers or 1-D tensors; a batch may mix them:

    - a document: `input_ids`, and `labels` of the same length (its own tokens if not given), not shifted;
    - a preference pair: `prompt_ids`, `chosen_ids`, `rejected_ids` (as TRL's DPO), or without `prompt_ids`, where the
      prompt is what both begin with (as TRL's reward training). Labels are the answers' tokens;
    - completions: `prompt_ids`, and `completion_ids`, a list of lists. Labels are the completions' tokens;
    - a token tree: `segments`, a list of lists, `parents` (an index each, -1 for a root, depth-first), and `labels`
      like the segments if not all tokens are to be predicted.

    What branches share is computed once. Its last token is not: each branch begins with a copy of it, which predicts
    the branch's first token. So a token has one label, and the loss is that of the sequences apart from one another.

    Args:
        pad_token_id, pad_to_multiple_of: padding is a document of its own, at the end, without labels.
        max_length: a longer pack is a ValueError; None allows any.
        sliding_window: of the model's sliding layers, if it has some; the batch has a mask for each kind of layer then.
            Counted in positions, so exact for trees too. Without it a sliding layer narrows the mask of documents by
            itself and refuses that of a tree.
        return_sequence_ids: add `sequence_ids`, for `sequence_log_probs`.
        context_parallel_size: ranks that share each sequence. Above 1 all of them must be given the same features.
        context_parallel_rank: which of them this is; RANK in the environment, modulo their number, if not given.
        strategy, chunk_size, num_stages: as in `ShardPlan.build`.

    Returns:
        a batch for the model's call: `input_ids`, `position_ids`, `labels` int64 `[1, N]`, `flashmask`. With several
        ranks each tensor is this rank's part, `[1, T]`, `labels` are shifted already and also there as `shift_labels`,
        which transformers' losses prefer, and instead of `flashmask` there is `context`, a `PlannedContext`.
    """

    def __init__(
        self,
        *,
        pad_token_id: int = 0,
        pad_to_multiple_of: int = 1,
        max_length: int | None = None,
        sliding_window: int | None = None,
        return_sequence_ids: bool = False,
        context_parallel_size: int = 1,
        context_parallel_rank: int | None = None,
        strategy: str = "balanced",
        chunk_size: int | None = None,
        num_stages: int | None = None,
    ) -> None:
        for name, value in (
            ("pad_to_multiple_of", pad_to_multiple_of),
            ("context_parallel_size", context_parallel_size),
            ("max_length", 1 if max_length is None else max_length),
            ("sliding_window", 1 if sliding_window is None else sliding_window),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if context_parallel_rank is None:
            context_parallel_rank = int(os.environ.get("RANK", 0)) % context_parallel_size
        if not 0 <= context_parallel_rank < context_parallel_size:
            raise ValueError(
                f"context_parallel_rank must be in 0..{context_parallel_size - 1}, got {context_parallel_rank}."
            )
        self.pad_token_id, self.pad_to_multiple_of, self.max_length = pad_token_id, pad_to_multiple_of, max_length
        self.sliding_window, self.return_sequence_ids = sliding_window, return_sequence_ids
        self.context_parallel_size, self.context_parallel_rank = context_parallel_size, context_parallel_rank
        self.strategy, self.chunk_size, self.num_stages = strategy, chunk_size, num_stages

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not features:
            raise ValueError("a batch needs at least one feature, got none.")
        trees = [tree(feature) for feature in features]
        length = pack(trees).tokens.numel()
        missing = -length % self.pad_to_multiple_of
        if missing:
            padding = [self.pad_token_id] * missing
            trees.append([Node(parent=-1, tokens=padding, labels=[IGNORED] * missing, is_sequence=False)])
        packed = pack(trees)
        if self.max_length is not None and length + missing > self.max_length:
            raise ValueError(
                f"the {len(features)} features of this batch pack into {length + missing} tokens, above "
                f"max_length={self.max_length}. Give fewer or shorter features to a batch."
            )
        masks = {"full_attention": packed.mask}
        if self.sliding_window is not None:
            masks["sliding_attention"] = windowed(packed, self.sliding_window)
        if self.context_parallel_size == 1:
            return self._whole(packed, masks)
        return self._part(packed, masks)

    def _whole(self, packed: Packed, masks: dict[str, FlashMask]) -> dict[str, Any]:
        # Unshifted, so that what predicts them is one row before: the last row predicts nothing.
        labels = F.pad(packed.labels[:-1], (1, 0), value=IGNORED)
        batch: dict[str, Any] = {
            "input_ids": packed.tokens[None],
            "position_ids": packed.positions[None],
            "labels": labels[None],
            "flashmask": masks if len(masks) > 1 else packed.mask,
        }
        if self.return_sequence_ids:
            batch["sequence_ids"] = packed.sequence_ids[None]
        return batch

    def _part(self, packed: Packed, masks: dict[str, FlashMask]) -> dict[str, Any]:
        size, rank = self.context_parallel_size, self.context_parallel_rank
        plan = ShardPlan.build(
            list(masks.values()),
            size,
            strategy=self.strategy,
            chunk_size=self.chunk_size,
            num_stages=self.num_stages,
        )
        labels = plan.shard(packed.labels, rank, 0)[None]
        batch: dict[str, Any] = {
            "input_ids": plan.shard(packed.tokens, rank, 0)[None],
            "position_ids": plan.shard(packed.positions, rank, 0)[None],
            "labels": labels,
            "shift_labels": labels,
            "context": PlannedContext(plan=plan, masks=masks),
        }
        if self.return_sequence_ids:
            batch["sequence_ids"] = plan.shard(packed.sequence_ids, rank, 0)[None]
        return batch


def tree(feature: Mapping[str, Any]) -> list[Node]:
    """A feature as a tree of nodes; see `DataCollatorForFlashMask`."""
    keys = set(feature)
    if "input_ids" in keys:
        tokens = _tokens(feature, "input_ids")
        labels = _tokens(feature, "labels") if feature.get("labels") is not None else tokens
        _check_labels(tokens, labels)
        return [Node(parent=-1, tokens=tokens, labels=labels)]
    if "segments" in keys and "parents" in keys:
        segments = [_list("segments", part) for part in feature["segments"]]
        given = feature.get("labels")
        targets = segments if given is None else [_list("labels", part) for part in given]
        parents = [int(parent) for parent in feature["parents"]]
        if not len(segments) == len(targets) == len(parents):
            raise ValueError(
                f"segments, parents and labels must have one entry a node, got {len(segments)}, {len(parents)} and "
                f"{len(targets)}."
            )
        for tokens, labels in zip(segments, targets, strict=True):
            _check_labels(tokens, labels)
        return [Node(parent=p, tokens=t, labels=x) for p, t, x in zip(parents, segments, targets, strict=True)]
    if {"chosen_ids", "rejected_ids"} <= keys:
        answers = [_tokens(feature, "chosen_ids"), _tokens(feature, "rejected_ids")]
        if "prompt_ids" in keys:
            question = _tokens(feature, "prompt_ids")
        else:
            pairs = zip(*answers, strict=False)
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, answers)))
            question = answers[0][:shared]
            answers = [answer[len(question) :] for answer in answers]
        return answers_of(question, answers)
    if {"prompt_ids", "completion_ids"} <= keys:
        return answers_of(
            _tokens(feature, "prompt_ids"), [_list("completion_ids", part) for part in feature["completion_ids"]]
        )
    raise ValueError(
        f"a feature has the keys {sorted(keys)}, which is none of: input_ids (labels); prompt_ids, chosen_ids, "
        "rejected_ids; chosen_ids, rejected_ids; prompt_ids, completion_ids; segments, parents (labels). With a "
        "Trainer set remove_unused_columns=False, or it takes columns away."
    )


def _tokens(feature: Mapping[str, Any], key: str) -> list[int]:
    return _list(key, feature[key])


def _list(key: str, value: Any) -> list[int]:
    values = value.tolist() if hasattr(value, "tolist") else list(value)
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in values):
        raise ValueError(f"{key} must hold integers, got {values[:8]}. A list of lists belongs in another key.")
    return values


def _check_labels(tokens: list[int], labels: list[int]) -> None:
    if len(tokens) != len(labels):
        raise ValueError(f"labels must be as many as the tokens, not shifted: got {len(labels)} for {len(tokens)}.")
