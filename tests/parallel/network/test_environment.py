import os
import subprocess
import sys

import pytest

from parallel.network.__main__ import main
from parallel.network.cluster import Cluster, ClusterError
from parallel.network.environment import Setting, combine_threshold, nccl_variables, shell, xla_flags

CARDS = tuple(f"mlx5_{i}" for i in range(8))
CLUSTERS = {
    "one node": Cluster(),
    "one node over PCIe": Cluster(gpu_link="pcie"),
    "InfiniBand": Cluster(nodes=64, nic_names=CARDS, interface="eno1"),
    "RoCE": Cluster(nodes=4, nics_per_node=4, nic_rate=200, fabric="roce"),
    "staged": Cluster(nodes=2, gpudirect=False),
    "one card, PCIe": Cluster(nodes=2, nics_per_node=1, gpu_link="pcie"),
    "Ethernet": Cluster(nodes=2, nics_per_node=1, nic_rate=25, fabric="ethernet", gpudirect=False),
}


def values(settings: tuple[Setting, ...]) -> dict[str, str]:
    assert len({each.name for each in settings}) == len(settings)
    assert all(len(each.reason) > 10 for each in settings)
    return {each.name: each.value for each in settings}


def start_jax(flags: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, text=True
    )


def as_flags(settings: tuple[Setting, ...]) -> str:
    return " ".join(f"--{each.name}={each.value}" for each in settings)


@pytest.mark.parametrize("cluster", [CLUSTERS["one node"], CLUSTERS["RoCE"]], ids=["node", "roce"])
def test_jaxlib_accepts_every_flag(cluster):
    done = start_jax(as_flags(xla_flags(cluster)))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", ["--xla_gpu_enable_gpudirect=true", "--xla_gpu_enable_latency_hiding_scheduler=maybe"])
def test_jaxlib_refuses_others(flag):
    done = start_jax(as_flags(xla_flags(CLUSTERS["one node"])) + " " + flag)
    assert done.returncode != 0, "else the test above proves nothing"


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_shell_takes_every_line(name):
    cluster = CLUSTERS[name]
    done = subprocess.run(
        ["bash", "-euc", shell(cluster) + "\nenv"], env={}, capture_output=True, text=True, check=True
    )
    got = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert {key: value for key, value in got.items() if key.startswith("NCCL_")} == values(nccl_variables(cluster))
    assert got["XLA_FLAGS"].split() == as_flags(xla_flags(cluster)).split()


def test_what_is_chosen():
    assert nccl_variables(CLUSTERS["one node"]) == ()
    infiniband = values(nccl_variables(CLUSTERS["InfiniBand"]))
    assert infiniband["NCCL_IB_HCA"] == "=" + ",".join(CARDS)
    assert infiniband["NCCL_SOCKET_IFNAME"] == "=eno1"
    assert (infiniband["NCCL_NET_GDR_LEVEL"], infiniband["NCCL_CROSS_NIC"]) == ("PXB", "0")
    roce = values(nccl_variables(CLUSTERS["RoCE"]))
    assert roce["NCCL_IB_ROCE_VERSION_NUM"] == "2"
    assert "NCCL_CROSS_NIC" not in roce, "two GPUs share a card"
    assert values(nccl_variables(CLUSTERS["staged"]))["NCCL_NET_GDR_LEVEL"] == "LOC"
    assert values(nccl_variables(CLUSTERS["one card, PCIe"]))["NCCL_PXN_DISABLE"] == "1"
    assert values(nccl_variables(CLUSTERS["Ethernet"])) == {"NCCL_IB_DISABLE": "1"}


def test_combine_threshold():
    # 20 µs · 50 GB/s / 2% = 50 MB, and the nearest power of two is 64 MiB.
    assert combine_threshold(CLUSTERS["InfiniBand"]) == 64 << 20
    # A quarter of the rate a GPU (4 x 200 for 8): 12.5 MB.
    assert combine_threshold(CLUSTERS["RoCE"]) == 16 << 20
    assert combine_threshold(CLUSTERS["Ethernet"]) == 1 << 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nodes": 0}, "nodes=0: give a whole number"),
        ({"gpus_per_node": 8.0}, "gpus_per_node=8.0"),
        ({"nic_rate": 0}, "nic_rate=0: give Gb/s"),
        ({"fabric": "wifi"}, "fabric='wifi': give one of infiniband, roce, ethernet"),
        ({"gpu_link": "cable"}, "gpu_link='cable': give one of nvlink, pcie"),
        ({"fabric": "ethernet"}, "gpudirect=True with fabric='ethernet'"),
        ({"nic_names": ("mlx5_0",)}, "1 for nics_per_node=8"),
    ],
)
def test_descriptions_that_are_none(fields, message):
    with pytest.raises(ClusterError, match=message):
        Cluster(**fields)


def test_command(capsys):
    assert main(["env", "--nodes", "2", "--cards", ",".join(CARDS)]) == 0
    assert 'export NCCL_IB_HCA="=mlx5_0,' in capsys.readouterr().out
    assert main(["env", "--nodes", "2", "--fabric", "ethernet"]) == 2
    assert "TCP has no RDMA" in capsys.readouterr().err
