import subprocess
import sys

import pytest

TELL = "import os, sys; from parallel.large_pages import use_large_pages; print('begun', flush=True); "
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
