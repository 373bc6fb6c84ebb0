"""How the process holds its memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h's names for mallopt


def keep_freed_memory() -> bool:
    """Ask the C library to reuse freed tensors' memory instead of returning it to the system.

    A chain allocates the same few tensors at every step; given back and fetched anew, they cost a
    fifth of a CPU chain's time in page faults. It concerns the whole process, so programs call it
    at their start and the library never does. Returns whether it took effect (glibc only).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    options = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20}
    return all(mallopt(option, value) for option, value in options.items())
