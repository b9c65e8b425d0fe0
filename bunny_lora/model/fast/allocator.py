"""The memory that one training step frees is kept for the next, which glibc gives back to the system.

A step asks for the same hundreds of large blocks as the one before. Given back, each comes anew as
pages that the system has to clear first, which took 6 to 11 % of a step. No result changes, and the
peak of memory stayed where it was: LOG.md has the numbers.
"""

from __future__ import annotations

import ctypes
import os
import sys

# What `man mallopt` calls them, and their numbers in glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
NEVER_TRIM, TOP_PAD_BYTES, NO_MMAP = 2**31 - 1, 64 * 2**20, 0

SWITCH = "BUNNY_LORA_KEEP_MEMORY"
"""Set to 0, this variable of the environment leaves the allocator as it is."""


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed until the process ends; return whether it does.

    Nothing happens with another C library, or where the environment says how malloc is to behave.
    """
    users_own = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform != "linux" or users_own or os.environ.get(SWITCH) == "0":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((M_MMAP_MAX, NO_MMAP), (M_TRIM_THRESHOLD, NEVER_TRIM), (M_TOP_PAD, TOP_PAD_BYTES))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)


def give_back_freed_memory() -> None:
    """Have glibc give the system what is free now, kept or not; nothing with another C library."""
    if trim := sys.platform == "linux" and getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
