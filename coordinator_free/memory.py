"""Where long vectors live.

A fresh page costs several times what it takes to fill it. On two cores of a virtual machine 64 MB
from torch's allocator were filled for the first time in 20 ms, on huge pages in 4 ms, and once the
pages were there in 2 ms; with four peers in one exchange, clearing pages was a fifth of all work.
So whatever is as long as the model comes from here, on huge pages where the system has them, and
goes back here: memory that nobody refers to any more is lent again. Meanwhile it is marked as free,
so that the kernel takes it when it needs it, and leaves it where it is otherwise.

Guarantees: memory is lent to one at a time, until its last reference, a tensor, an array or a
memoryview, is gone. Not guaranteed: what is in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import weakref
from collections import defaultdict, deque

import numpy as np
import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; less is the C library's business
ALIGN = 1 << 21  # a huge page
KEPT = 6  # pieces of one size
_MALLOPT = {-1: 64 << 20, -3: 8 << 20}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD <malloc.h>

# Without a lock: a piece may come back in the middle of anything, wherever the collector runs.
_free: defaultdict[int, deque[mmap.mmap]] = defaultdict(lambda: deque(maxlen=KEPT))


class _Lent(np.ndarray):
    """Its end is the end of all references to a piece: every view of it leads back here."""


def empty_vector(numel: int) -> Tensor:
    """(numel,) float32 on the CPU, of any values."""
    return torch.from_numpy(_lend(4 * numel).view(np.float32))


def empty_bytes(size: int) -> memoryview:
    """Writable memory of any values."""
    return _lend(size).data


def bytes_of(vector_N: Tensor) -> memoryview:
    """The memory of a float32 vector on the CPU, shared."""
    return vector_N.numpy().view(np.uint8).data


def keep_freed() -> None:
    """Have the C library keep what messages of a megabyte free, instead of the kernel.

    It gives back all above 128 kB at the end of its heap and gets it again, page by page, for the
    next message: a tenth of an exchange's work.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # another library than glibc
            for option, value in _MALLOPT.items():
                ctypes.CDLL(None).mallopt(option, value)


def _lend(size: int) -> np.ndarray:
    if size < SMALLEST:
        return np.empty(size, np.uint8)
    whole = -(-size // ALIGN) * ALIGN
    try:
        piece = _free[whole].pop()
    except IndexError:
        try:
            piece = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"{size} bytes are not to be had") from error
        _advise(piece, "MADV_HUGEPAGE")
    lent = np.frombuffer(piece, np.uint8, size).view(_Lent)
    weakref.finalize(lent, _take_back, piece).atexit = False
    return lent


def _take_back(piece: mmap.mmap) -> None:
    _advise(piece, "MADV_FREE")
    _free[len(piece)].append(piece)


def _advise(piece: mmap.mmap, advice: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # a kernel or a system without it
        piece.madvise(getattr(mmap, advice))
