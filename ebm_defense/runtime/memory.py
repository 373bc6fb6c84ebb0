"""How the process holds its memory, and how devices say that theirs is full."""

from __future__ import annotations

import ctypes
import re
import sys

FULL = re.compile(
    r"out of memory"  # CUDA, ROCm and MPS, whichever of their errors it is
    r"|(CUDNN|CUBLAS|CUSOLVER|HIPBLAS)_STATUS_(ALLOC|[A-Z_]*ALLOCATION)_FAILED"
    r"|miopenStatusAllocFailed|rocblas_status_memory_error"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory",
    re.IGNORECASE,
)
"""What torch and the libraries under it say when memory is full; only torch's own allocator raises
an error of a type of its own."""

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


def is_full(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the host's, is full."""
    # By its name, since torch is imported by nobody who does not compute.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and FULL.search(str(error)) is not None
