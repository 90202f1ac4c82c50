"""Output buffers that are used again: fresh pages cost several times what writing to them costs."""

import itertools
import math
import operator
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST_BYTES = 128 << 10  # malloc may give larger ones back to the system, page by page
_MOST_BYTES = 256 << 20
_MOST_OF_A_SIZE = 32  # training holds more, and looking through them all takes longer than malloc
_OWN_REFERENCES = 2  # the pool's list, and the argument of getrefcount itself


class BufferPool:
    """Storages that are lent to output tensors, and lent again once nobody holds them.

    Of one size the first free one is lent: it is the most likely to be in the cache.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._storages: dict[int, list[torch.UntypedStorage]] = {}  # the last used size is last
        self._bytes = 0
        self._most_bytes = most_bytes
        self._lock = threading.Lock()

    def empty_like(self, x: Tensor) -> Tensor:
        """Return an uninitialised tensor of the shape, dtype and memory format of a tensor."""
        if torch.compiler.is_compiling() or not x.is_cpu or not self._takes(x.nbytes):
            return torch.empty_like(x)
        same = x if x.is_contiguous() else torch.empty_like(x, device="meta")
        return self._lent(x.shape, same.stride(), x.dtype, x.nbytes)

    def empty_rows(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised contiguous tensor on the CPU."""
        nbytes = math.prod(shape) * dtype.itemsize
        if torch.compiler.is_compiling() or not self._takes(nbytes):
            return torch.empty(shape, dtype=dtype, device="cpu")
        steps = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)
        return self._lent(shape, tuple(steps)[::-1], dtype, nbytes)

    def _takes(self, nbytes: int) -> bool:
        return _SMALLEST_BYTES <= nbytes <= self._most_bytes

    def _lent(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, nbytes: int
    ) -> Tensor:
        with self._lock:
            tensor = torch.empty(0, dtype=dtype, device="cpu")
            return tensor.set_(self._storage(nbytes), 0, tuple(shape), tuple(strides))

    def _storage(self, nbytes: int) -> torch.UntypedStorage:
        """Return a free storage; the lock is held until a tensor holds it."""
        storages = self._storages[nbytes] = self._storages.pop(nbytes, [])
        for position in range(len(storages)):
            if _is_free(storages, position, nbytes):
                return storages[position]
        fresh = torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
        if len(storages) < _MOST_OF_A_SIZE:
            self._keep(fresh)
        return fresh

    def _keep(self, storage: torch.UntypedStorage) -> None:
        """Add a storage, and let go of those longest unused while there are too many bytes."""
        self._storages[storage.nbytes()].append(storage)
        self._bytes += storage.nbytes()
        while self._bytes > self._most_bytes:
            size, oldest = next(iter(self._storages.items()))
            if oldest:
                del oldest[0]
                self._bytes -= size
            if not oldest:
                del self._storages[size]


def _is_free(storages: list[torch.UntypedStorage], position: int, nbytes: int) -> bool:
    """Whether only the pool holds a storage; one that other processes may see is never free."""
    if sys.getrefcount(storages[position]) > _OWN_REFERENCES:
        return False  # somebody asked a tensor for its storage, and keeps that
    storage = storages[position]
    alone = torch._C._storage_Use_Count(storage._cdata) == 1
    return alone and storage.nbytes() == nbytes and not storage.is_shared()


POOL = BufferPool()
