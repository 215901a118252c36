"""How glibc's malloc serves a process whose arrays are on CPU; without glibc nothing here does anything."""

import ctypes
import os
import sys

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def use_large_pages() -> None:
    """Begins this process anew with malloc asking for transparent huge pages, which it must be told before it starts
    (glibc 2.35, "Memory Allocation Tunables"). Returns where that is told already.

    A step's temporaries are fresh memory, which the kernel hands out and clears a page at a time, and in pages of 4 KiB
    a fifth of a small model's step goes into that (experiments/LOG.md).

    For a command's entrance only: whatever was done before is done again.
    """
    told = os.environ.get(_VARIABLE, "")
    if sys.platform != "linux" or _TUNABLE in told:
        return
    os.environ[_VARIABLE] = ":".join(filter(None, (told, f"{_TUNABLE}=1")))
    os.execv(sys.executable, sys.orig_argv)


def give_back() -> None:
    """Returns to the system the pages of freed memory that malloc keeps for what may come.

    For after compiling: what that leaves, some hundreds of MB of small pieces, no array takes, so a step's temporaries
    would come on top of it.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
