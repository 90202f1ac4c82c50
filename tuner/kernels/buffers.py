"""Output buffers that are used again: fresh pages cost several times what writing to them costs."""

import itertools
import math
import operator
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from tuner.allocator import Malloc

_SMALLEST_BYTES = 128 << 10  # malloc may give larger ones back to the system, page by page
_MOST_BYTES = 256 << 20
_MOST_OF_A_SIZE = 32  # training holds more, and looking through them all takes longer than malloc
_OWN_REFERENCES = 2  # the buffer's own, and the argument of getrefcount itself


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """A storage of the pool, where it lies, and its address in C++."""

    storage: torch.UntypedStorage
    address: int
    impl: int

    @classmethod
    def of(cls, nbytes: int) -> "_Buffer":
        storage = torch.empty(nbytes, dtype=torch.uint8, device="cpu").untyped_storage()
        return cls(storage, storage.data_ptr(), storage._cdata)

    def is_free(self, nbytes: int) -> bool:
        """Whether only the pool holds the storage; one that other processes may see never is."""
        if sys.getrefcount(self.storage) > _OWN_REFERENCES:
            return False  # somebody asked a tensor for its storage, and keeps that
        if torch._C._storage_Use_Count(self.impl) != 1:
            return False
        # what was resized or moved to shared memory lies elsewhere
        return self.storage.data_ptr() == self.address and self.storage.nbytes() == nbytes


class BufferPool:
    """Storages that are lent to output tensors, and lent again once nobody holds them.

    Of one size the first free one is lent: it is the most likely to be in the cache. What malloc
    keeps is left to malloc, which gives the block that was freed last, of any size.
    """

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._storages: dict[int, list[_Buffer]] = {}  # the last used size is last
        self._bytes = 0
        self._most_bytes = most_bytes
        self._lock = threading.Lock()

    def empty_like(self, x: Tensor) -> Tensor:
        """Return an uninitialised tensor of the shape, dtype and memory format of a tensor."""
        if torch.compiler.is_compiling() or not x.is_cpu or not self._takes(x.nbytes):
            return torch.empty_like(x)
        same = x if x.is_contiguous() else torch.empty_like(x, device="meta")
        return self._lent(x.shape, same.stride(), x.dtype, x.nbytes)

    def empty_as(self, x: Tensor) -> Tensor:
        """Return `empty_like(x)` of a contiguous tensor on the CPU, where nothing is compiled."""
        nbytes = x.nbytes
        if self._takes(nbytes):
            return self._lent(x.shape, x.stride(), x.dtype, nbytes)
        return torch.empty_like(x)

    def empty_rows(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised contiguous tensor on the CPU."""
        nbytes = math.prod(shape) * dtype.itemsize
        if torch.compiler.is_compiling() or not self._takes(nbytes):
            return torch.empty(shape, dtype=dtype, device="cpu")
        steps = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)
        return self._lent(shape, tuple(steps)[::-1], dtype, nbytes)

    def _takes(self, nbytes: int) -> bool:
        return max(_SMALLEST_BYTES, Malloc.kept_bytes) <= nbytes <= self._most_bytes

    def _lent(
        self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, nbytes: int
    ) -> Tensor:
        tensor = _nothing(dtype).data  # a tensor of its own, in less time than any function takes
        with self._lock:
            return tensor.set_(self._storage(nbytes), 0, tuple(shape), tuple(strides))

    def _storage(self, nbytes: int) -> torch.UntypedStorage:
        """Return a free storage; the lock is held until a tensor holds it."""
        found = self._storages[nbytes] = self._storages.pop(nbytes, [])
        for buffer in found:
            if buffer.is_free(nbytes):
                return buffer.storage
        fresh = _Buffer.of(nbytes)
        if len(found) < _MOST_OF_A_SIZE:
            self._keep(fresh, nbytes)
        return fresh.storage

    def _keep(self, buffer: _Buffer, nbytes: int) -> None:
        """Add a buffer, and let go of those longest unused while there are too many bytes."""
        self._storages[nbytes].append(buffer)
        self._bytes += nbytes
        while self._bytes > self._most_bytes:
            size, oldest = next(iter(self._storages.items()))
            if oldest:
                del oldest[0]
                self._bytes -= size
            if not oldest:
                del self._storages[size]


@cache
def _nothing(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode would be of no use outside
        return torch.empty(0, dtype=dtype, device="cpu")


POOL = BufferPool()
