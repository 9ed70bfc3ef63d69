"""Counts the bytes of the tensors that are alive, on any device and without an allocator's help."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, follows the storages that ops make. `now`: bytes of those that are alive; `peak`: most of them at once.

    What was made before, and what an op makes for itself alone, is not counted. A storage that is resized, as FSDP's are, counts
    with the size that it has at the time.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        return sum(storage.nbytes() for of in list(self._alive.values()) if (storage := of()) is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = function(*args, **(kwargs or {}))
        for storage in _storages(made):
            key = storage._cdata
            if key not in given and key not in self._alive:
                self._alive[key] = weakref.ref(storage)
                weakref.finalize(storage, self._alive.pop, key, None)
        self.peak = max(self.peak, self.now)
        return made


def _storages(tree) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
