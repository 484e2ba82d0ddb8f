"""Counts the bytes of tensors while they live: what a GPU's allocator would have to hold."""

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
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if hasattr(t, "untyped_storage")}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if hasattr(tensor, "untyped_storage"):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        """Bytes that live."""
        self.storages = {key: found for key, found in self.storages.items() if not found[0].expired()}
        return sum(size for _, size in self.storages.values())
