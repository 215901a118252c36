"""Large pages for a process's arrays: on CPU a step's temporaries are fresh memory, which the kernel hands out and
clears a page at a time, and in pages of 4 KiB a fifth of a small model's step goes into that (experiments/LOG.md)."""

import os
import sys

_VARIABLE, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def use_large_pages() -> None:
    """Begins this process anew with glibc's malloc asking for transparent huge pages, which it must be told before it
    starts (glibc 2.35, "Memory Allocation Tunables"). Returns where that is told already, or where there is no glibc.

    For a command's entrance only: whatever was done before is done again.
    """
    told = os.environ.get(_VARIABLE, "")
    if sys.platform != "linux" or _TUNABLE in told:
        return
    os.environ[_VARIABLE] = ":".join(filter(None, (told, f"{_TUNABLE}=1")))
    os.execv(sys.executable, sys.orig_argv)
