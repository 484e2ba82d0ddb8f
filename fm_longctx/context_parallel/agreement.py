"""Whether ranks that will work together hold the same: compared on the CPU, where it waits for no kernel."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from fm_longctx.context_parallel.exchange import backends_of


def compare(identity: str, group: dist.ProcessGroup, what: str) -> None:
    """Raise on every rank unless all ranks of the group call this with the same identity. A collective.

    One all-gather of 16 bytes a rank in host memory; the words themselves travel only if they differ. It waits for the
    other ranks' hosts but not for any device. The group's own gloo backend carries it; a group of NCCL alone gets a
    gloo group of the same ranks beside it, once.

    Args:
        identity: what must be the same, in words that a reader of the error can tell apart.
        what: what is compared, for the error.

    Raises:
        ValueError: the ranks differ; names those that hold another than most.
        RuntimeError: a rank is gone, or did not come within the group's timeout.
    """
    host = host_group(group)
    digest = hashlib.blake2b(identity.encode(), digest_size=16).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.int64)
    digests = torch.empty(dist.get_world_size(group), 2, dtype=torch.int64)
    dist.all_gather(list(digests), mine, group=host)  # into the rows
    if bool((digests == mine).all()):
        return
    # Not all digests are equal, so no rank has found them so, and all come here.
    everyone: list[str] = [""] * len(digests)
    dist.all_gather_object(everyone, identity, group=host)
    # What most ranks hold is taken as right; of equally many what the first of them holds.
    usual = max(everyone, key=everyone.count)
    differing = [rank for rank, other in enumerate(everyone) if other != usual]
    reference = everyone.index(usual)
    told = "; ".join(f"rank {rank}: {everyone[rank]}" for rank in [reference, *differing])
    raise ValueError(
        f"the ranks disagree about {what}: {differing} hold another than rank {reference} ({told}). Make both "
        "from the same batch and config on every rank of the group."
    )


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that moves CPU tensors: the group itself where it can."""
    backends = backends_of(group)
    if "cpu" in backends:
        return group
    name = group.group_name
    if name not in _beside or _beside[name][0] is not group:
        backend = group._get_backend(torch.device(next(iter(backends))))
        # The ranks of other groups need not take part; nor do they know that this one is made.
        other = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=getattr(getattr(backend, "options", None), "_timeout", None),
            backend="gloo",
            use_local_synchronization=True,
        )
        assert isinstance(other, dist.ProcessGroup)
        _beside[name] = (group, other)
    return _beside[name][1]


_beside: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}
