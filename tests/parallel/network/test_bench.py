import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from parallel.mesh import MeshConfig, make_mesh
from parallel.network.__main__ import main
from parallel.network.bench import hosts_of_processes, link_class, measure
from parallel.network.bench_report import parse_sizes, size_in_words
from parallel.network.collectives import COLLECTIVES
from parallel.network.links import read_links

ROOT = Path(__file__).parents[3]


def mesh_of(process_of_device: list[list[int]]) -> SimpleNamespace:
    """A mesh data x expert whose devices belong to these processes."""
    devices = np.array([[SimpleNamespace(process_index=p) for p in row] for row in process_of_device])
    return SimpleNamespace(
        devices=devices, axis_names=("data", "expert"), shape=dict(zip(("data", "expert"), devices.shape, strict=True))
    )


def test_class_of_a_link():
    two_nodes = mesh_of([[0, 0], [1, 1]])
    hosts = {0: "a", 1: "b"}
    assert link_class(two_nodes, "expert", hosts) == "inside_node"
    assert link_class(two_nodes, "data", hosts) == "across_nodes"
    assert link_class(two_nodes, "data", {0: "a", 1: "a"}) == "inside_node", "two processes of one node"
    assert link_class(mesh_of([[0, 0], [0, 1]]), "expert", hosts) == "across_nodes", "one group is enough"


def test_hosts_of_a_single_process():
    assert hosts_of_processes() == {0: socket.gethostname()}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_measurement(name):
    mesh = make_mesh(MeshConfig(data=2, expert=3))
    found = measure(mesh, "expert", "inside_node", COLLECTIVES[name], 1000, repeats=2)
    assert found.message_bytes == 996, "the nearest multiple of 3 devices x 4 bytes"
    assert found.sent_bytes == COLLECTIVES[name].bytes_sent(996, 3)
    assert 0 < found.fastest <= found.seconds <= found.slowest


def test_sizes():
    assert parse_sizes("64K,1M,2G,100") == [100, 64 << 10, 1 << 20, 2 << 30]
    for text in ("", "1", "1M,1M", "1M,x", "0,1K", "1.5M,3M", "K,1M"):
        with pytest.raises(ValueError, match="--sizes"):
            parse_sizes(text)
    assert [size_in_words(size) for size in (512, 64 << 10, 3 << 20)] == ["0.5 KiB", "64 KiB", "3 MiB"]


def test_command(tmp_path, capsys):
    path = tmp_path / "links.json"
    arguments = ["--mesh", "data=2,expert=2", "--axis", "expert", "--sizes", "4K,4M", "--repeats", "2"]
    assert main(["bench", *arguments, "--output", str(path)]) == 0
    links = read_links(path)
    assert {link.collective for link in links.links} == set(COLLECTIVES)
    assert {(link.devices, link.link) for link in links.links} == {(2, "inside_node")}
    assert (links.platform, links.processes, links.hosts, links.mesh["expert"]) == ("cpu", 1, 1, 2)
    assert len(links.measurements) == 8
    captured = capsys.readouterr()
    assert "all_to_all" in captured.out
    assert "measured 8/8" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=1"], "no axis has more than one device"),
        (["--mesh", "experts=2"], "no axis is called 'experts'"),
        (["--mesh", "data=2", "--axis", "expert"], "--axis expert: give an axis of more than one device (data)"),
        (["--mesh", "data=2", "--sizes", "big"], "'big' is no size"),
        (["--mesh", "data=64"], "needs 64 devices"),
        (["--mesh", "data=2", "--coordinator", "node0"], "give all of --coordinator, --processes, --process"),
        (["--mesh", "data=2", "--coordinator", "node0", "--processes", "2", "--process", "1"], "a free port there"),
        (["--mesh", "data=2", "--coordinator", "node0:1", "--processes", "2", "--process", "2"], "give 0 to 1"),
        (["--mesh", "data=2", "--processes", "2", "--process", "1"], "without --coordinator"),
        (
            ["--mesh", "data=3", "--coordinator", "node0:1", "--processes", "2", "--process", "1"],
            "3 devices do not divide",
        ),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_over_gloo(tmp_path):
    """Data across the processes, experts within: each collective runs over both, and process 0 alone writes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "parallel.network", "bench", "--mesh", "data=2,expert=2", "--sizes", "4K,16M",
        "--repeats", "2", "--output", str(tmp_path / "links.json"),
        "--coordinator", f"localhost:{port}", "--processes", "2", "--process",
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [*command, str(i)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    links = read_links(tmp_path / "links.json")
    assert (links.processes, links.hosts) == (2, 1)
    assert {(each.axis, each.devices) for each in links.measurements} == {("data", 2), ("expert", 2)}
    assert {each.link for each in links.links} == {"inside_node"}, "two processes, but one node"
    assert "reduce_scatter" in said[0][0]
    assert "reduce_scatter" not in said[1][0]
