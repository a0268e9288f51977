"""Let the C library keep freed memory, so that CPU training does not fault it in again at every
step."""

from __future__ import annotations

import ctypes

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_ONE_GIB = 1 << 30


def keep_freed_memory() -> bool:
    """Serve blocks up to 1 GiB from the heap and never shrink it; True if this C library can.

    By default glibc maps every large block afresh and gives it back when freed: each step then
    touches gigabytes of new pages, a fifth of its time on two cores (kernels on a GPU have torch's
    own caching allocator). The price is that the process keeps its peak until it ends. Measured:
    docs/experiments.md.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _ONE_GIB) and mallopt(_M_TRIM_THRESHOLD, 2 * _ONE_GIB - 1)
    )
