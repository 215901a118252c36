"""Two real processes of two devices each, and the same functions in one process."""

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from parallel.layout import SINGLE_DEVICE, Layout
from parallel.mesh import MeshConfig, make_mesh
from parallel.together import Agreement, from_first, gather_to_first, require_same, wait_for_all

ROOT = Path(__file__).parent.parent.parent

PROGRAM = """
import json, sys
import jax, numpy as np
from parallel.distributed import DistributedError, Processes, initialize
from parallel.layout import Layout
from parallel.mesh import MeshConfig, MeshError, make_mesh
from parallel.together import Agreement, from_first, gather_to_first, require_same, wait_for_all

index = int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
initialize(Processes(sys.argv[1], 2, index), mesh_devices=4)
told = {}
mesh = make_mesh(MeshConfig(data=2, expert=2))
told["process of each device"] = [[device.process_index for device in row] for row in mesh.devices.reshape(2, 2)]
layout = Layout(mesh)
told["share"] = layout.batch_share(12)
wait_for_all("here")
told["from first"] = from_first(lambda: 40 + index)
agreed = Agreement(layout)
told["agreed"] = [agreed(number) for number in ([0, 15, 0, 0] if index else [2, 0, 0, 0])]
x_DF = np.arange(8.0, dtype=np.float32).reshape(4, 2)
kept = jax.make_array_from_callback(x_DF.shape, layout.stored("DF", x_DF.shape), lambda part: x_DF[part])
gathered = gather_to_first({"w": kept}, layout)
told["gathered"] = gathered["w"] if index else gathered["w"].tolist()
require_same(text="one")
for what, ask in {
    "differs": lambda: require_same(other="same", text=f"of {index}"),
    "too small": lambda: make_mesh(MeshConfig(data=2)),
    "too large": lambda: make_mesh(MeshConfig(data=8)),
}.items():
    try:
        ask()
    except (DistributedError, MeshError) as error:
        told[what] = str(error)
wait_for_all("the end")
print("TOLD", json.dumps(told))
"""


@pytest.fixture(scope="module")
def two():
    """What each of the processes found."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{found.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), coordinator]
    processes = [
        subprocess.Popen([*command, str(i)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    return [json.loads(out.split("TOLD ")[1]) for out, _ in ends]


def both(two, what):
    return [told[what] for told in two]


def test_the_innermost_axis_stays_within_a_process(two):
    assert both(two, "process of each device") == [[[0, 0], [1, 1]]] * 2


def test_each_process_reads_its_part_of_the_batch(two):
    assert both(two, "share") == [[0, 2], [1, 2]]


def test_the_first_process_decides(two):
    assert both(two, "from first") == [40, 40]


def test_signals_of_any_process_stop_all_at_one_call(two):
    assert both(two, "agreed") == [[0, 2, 15, 0]] * 2


def test_arrays_are_gathered_in_the_first_process(two):
    assert both(two, "gathered") == [np.arange(8.0).reshape(4, 2).tolist(), None]


def test_processes_that_differ_are_named_in_all(two):
    assert (
        both(two, "differs")
        == ["process 1 has another text than process 0: start all with the same files and arguments"] * 2
    )


def test_a_mesh_of_several_processes_uses_all_their_devices(two):
    assert two[0]["too small"].startswith(
        "the mesh data=2 has 2 devices, and the 2 processes have 4: a mesh over several"
    )
    assert two[0]["too large"].endswith("needs 8 devices, and 4 cpu devices are present: lower one of the axes")


@pytest.mark.parametrize(
    "layout", [SINGLE_DEVICE, Layout(make_mesh(MeshConfig(data=2, expert=4)))], ids=["one", "eight"]
)
def test_one_process_is_answered_at_once(layout):
    wait_for_all("here")
    require_same(text="one")
    assert from_first(lambda: 7) == 7
    assert layout.batch_share(16) == (0, 1)
    assert [Agreement(layout)(number) for number in (0, 15)] == [0, 15]
    w_DF = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    placed = jax.device_put(w_DF, layout.stored("DF", w_DF.shape))
    np.testing.assert_array_equal(gather_to_first([placed], layout)[0], w_DF)
