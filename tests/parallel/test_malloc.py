import re
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.malloc import give_back

TELL = "import os, sys; from parallel.malloc import use_large_pages; print('begun', flush=True); "
TELL += "use_large_pages(); print(os.environ['GLIBC_TUNABLES'], *sys.argv[1:])"


@pytest.mark.skipif(sys.platform != "linux", reason="there is no glibc")
@pytest.mark.parametrize(
    ("told", "begun", "expected"),
    [
        ({}, 2, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, 2, "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, 1, "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_process_begins_anew_once_with_the_same_arguments(told, begun, expected):
    command = [sys.executable, "-c", TELL, "an argument", "--another"]
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["begun"] * begun + [f"{expected} an argument --another"]


@pytest.mark.skipif(sys.platform != "linux", reason="there is no glibc")
def test_freed_memory_goes_back_to_the_system():
    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

    pieces = [bytes([1]) * 2**16 for _ in range(4096)]
    begin, between = resident(), pieces[1::2]
    del pieces
    kept = resident()
    assert begin - kept < 2**26, "pieces between those that were freed keep malloc from giving back any by itself"
    give_back()
    assert kept - resident() > 2**26
    assert len(between) == 2048
