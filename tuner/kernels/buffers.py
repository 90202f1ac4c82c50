"""Output buffers that are used again: fresh pages cost several times what writing to them costs."""

import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST_BYTES = 4 << 20  # below, malloc itself keeps the pages
_MOST_BYTES = 256 << 20
_OWN_REFERENCES = 2  # the pool's list, and the argument of getrefcount itself


class BufferPool:
    """Storages that are lent to output tensors, and lent again once nobody holds them."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._storages: list[torch.UntypedStorage] = []
        self._most_bytes = most_bytes
        self._lock = threading.Lock()

    def empty_like(self, x: Tensor) -> Tensor:
        """Return an uninitialised tensor of the shape, dtype and memory format of a tensor."""
        nbytes = x.nbytes
        if torch.compiler.is_compiling() or not x.is_cpu:
            return torch.empty_like(x)
        if not _SMALLEST_BYTES <= nbytes <= self._most_bytes:
            return torch.empty_like(x)
        with self._lock:
            for position in range(len(self._storages)):
                if self._is_free(position, nbytes):
                    storage = self._storages.pop(position)
                    self._storages.append(storage)
                    return _over(storage, x)
            fresh = torch.empty_like(x)
            self._keep(fresh.untyped_storage())
            return fresh

    def _is_free(self, position: int, nbytes: int) -> bool:
        """Whether only the pool holds a storage; one that other processes may see is never free."""
        if sys.getrefcount(self._storages[position]) > _OWN_REFERENCES:
            return False  # somebody asked a tensor for its storage, and keeps that
        storage = self._storages[position]
        alone = torch._C._storage_Use_Count(storage._cdata) == 1
        return alone and storage.nbytes() == nbytes and not storage.is_shared()

    def _keep(self, storage: torch.UntypedStorage) -> None:
        """Add a storage, and let go of those longest unused while there are too many bytes."""
        self._storages.append(storage)
        while sum(kept.nbytes() for kept in self._storages) > self._most_bytes:
            del self._storages[0]


def _over(storage: torch.UntypedStorage, like: Tensor) -> Tensor:
    shape: Sequence[int] = like.shape
    strides = torch.empty_like(like, device="meta").stride()
    return torch.empty(0, dtype=like.dtype, device=like.device).set_(
        storage, 0, tuple(shape), strides
    )


POOL = BufferPool()
