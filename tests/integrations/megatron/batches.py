"""Micro-batches for `world.train`: a FlashMask, and the same mask as a dense boolean written from the words."""

import torch

from fm_longctx import FlashMask
from fm_longctx.mask import builders
from tests.mask.oracle import index_of_part

VOCABULARY = 32


def cut(length, seed, parts=4):
    """Lengths of random documents, none of them divisible by 4 on purpose, that fill the sequence."""
    generator = torch.Generator().manual_seed(seed)
    cuts = (torch.randperm((length - 1) // 2, generator=generator)[: parts - 1] * 2 + 1).sort().values.tolist()
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


class Batch:
    """One micro-batch of all ranks."""

    def __init__(self, run, seed):
        generator = torch.Generator().manual_seed(seed)
        n = run.length
        self.window = run.window
        if run.mask == "tree":
            lengths = [n // 3, n // 6, n // 9, n // 6]
            lengths.append(n - sum(lengths))
            parents = [-1, 0, 1, 0, -1]
            if seed % 2:
                lengths = lengths[::-1]
            self.mask = builders.prefix_tree(parents, lengths)
            node = index_of_part(lengths)
            ancestors = [{0}, {0, 1}, {0, 1, 2}, {0, 3}, {4}]
            start = [sum(lengths[:i]) for i in range(5)]
            depth = [0, lengths[0], lengths[0] + lengths[1], lengths[0], 0]
            self.positions = torch.tensor([depth[node[i]] + i - start[node[i]] for i in range(n)])
            self.bounds = None
            sees = [[node[c] in ancestors[node[r]] and c <= r for c in range(n)] for r in range(n)]
            last = torch.tensor([i + 1 == n or node[i] != node[i + 1] for i in range(n)])
        else:
            lengths = cut(n, seed) if run.route != "none" else [n]
            if run.route == "thd":
                lengths = [4 * max(1, length // 4) for length in lengths]
                lengths[-1] += n - sum(lengths)
            self.bounds = torch.tensor([0, *lengths]).cumsum(0)
            self.mask = FlashMask.from_cu_seqlens(self.bounds)
            part = index_of_part(lengths)
            self.positions = torch.tensor([i - int(self.bounds[part[i]]) for i in range(n)])
            left = n if self.window is None else self.window[0]
            sees = [[part[r] == part[c] and r - left <= c <= r for c in range(n)] for r in range(n)]
            last = torch.tensor([i + 1 == n or part[i] != part[i + 1] for i in range(n)])
        self.visible = torch.tensor(sees)
        tokens = torch.randint(VOCABULARY, (run.batch, n), generator=generator)
        # Labels thin out towards the end, so that ranks and micro-batches have unequal numbers of them.
        keep = torch.rand(run.batch, n, generator=generator) > torch.linspace(0.1, 0.9, n)
        self.tensors = {
            "tokens": tokens,
            "labels": torch.where(last, 0, tokens.roll(-1, 1)),
            "loss_mask": (keep & ~last).float(),
            "position_ids": self.positions.expand(run.batch, n).contiguous(),
        }
