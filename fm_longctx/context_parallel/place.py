"""Which rings share a host: those that exchange most, since links within a host are faster than between hosts."""

from __future__ import annotations

import numpy as np

from fm_longctx.context_parallel.coverage import Floats, Ints


def place(keys: Ints, a_host: int) -> Ints:
    """A new number for each ring, `[rings]`: ring r of the new numbers is on host r // a_host.

    Hosts are filled one after the other, from the ring that exchanges most, with the ring that exchanges most with
    those on the host. The old numbers stay unless what the busiest ring sends to other hosts, or receives from them,
    gets less: who owns what is the same, so balance and traffic are too.

    Args:
        keys: `[destination, source]`, that travel; the diagonal does not count.

    >>> place(np.array([[0, 0, 5, 0], [0, 0, 0, 5], [5, 0, 0, 0], [0, 5, 0, 0]]), 2).tolist()
    [0, 2, 1, 3]
    """
    rings = len(keys)
    same = np.arange(rings)
    if a_host == 1 or rings <= a_host:
        return same
    # Both directions, to which a link gives a bandwidth each.
    ties = (keys + keys.T).astype(np.float64)
    np.fill_diagonal(ties, 0)
    order: list[int] = []
    free = np.ones(rings, dtype=bool)
    for _ in range(0, rings, a_host):
        with_host = ties.sum(1)
        for _ in range(min(a_host, int(free.sum()))):
            ring = int(np.where(free, with_host, -1.0).argmax())
            with_host = ties[ring] if not order or len(order) % a_host == 0 else with_host + ties[ring]
            order.append(ring)
            free[ring] = False
    number = np.empty(rings, dtype=np.int64)
    number[order] = same
    return number if busiest(keys, number // a_host) < busiest(keys, same // a_host) else same


def busiest(keys: Ints, hosts: Ints) -> float:
    """Keys that the busiest ring sends to other hosts or receives from them, whichever are more.

    Args:
        keys: `[destination, source]`.
        hosts: `[rings]`: the host of each.
    """
    over: Floats = np.where(hosts[:, None] != hosts, keys, 0).astype(np.float64)
    return float(max(over.sum(0).max(), over.sum(1).max()))
