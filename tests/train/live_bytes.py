"""Counts the bytes of tensors while they live: what a GPU's allocator would have to hold."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, every storage that an operation makes is counted until it is freed. What an op does within is not seen.

    with LiveBytes() as bytes_:
        loss = model(x)
        kept = bytes_.now()
        loss.backward()
    bytes_.peak
    """

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        made = False
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                # A sharded tensor's own storage is a stand-in.
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                known = self.storages.get(storage._cdata)
                # A place of memory may be taken again.
                if storage._cdata not in given and (known is None or known.expired()):
                    self.storages[storage._cdata] = StorageWeakRef(storage)
                    made = True
        # Views make nothing.
        if made:
            self.peak = max(self.peak, self.now())
        return out

    def now(self):
        """Bytes that live."""
        total = 0
        for key, reference in list(self.storages.items()):
            # Asked anew each time: sharding frees and fills a storage that lives on.
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.storages[key]
            else:
                total += storage.nbytes()
        return total
