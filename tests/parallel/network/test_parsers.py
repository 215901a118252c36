"""The parsers of /sys, /proc, lspci and NCCL's variables."""

import pytest

from parallel.network.formats import FormatError, assignments, path_values
from parallel.network.host import (
    parse_acs,
    parse_driver,
    parse_gpus,
    parse_interfaces,
    parse_iommu,
    parse_kernel,
    parse_locked_memory,
    parse_may_lock,
    parse_modules,
    parse_virtual,
)
from parallel.network.nccl_variables import matches, read_settings
from parallel.network.nics import parse_ports
from tests.parallel.network.recorded import recorded

BRIDGE = "17:00.0 PCI bridge: Broadcom / LSI PEX890xx PCIe Gen 5 Switch (rev b0)\n"


def test_ports():
    ports = parse_ports(recorded("rail_down").texts["infiniband.txt"])
    assert len(ports) == 10
    assert str(ports["mlx5_0"]) == "400 Gb/s InfiniBand up"
    assert str(ports["mlx5_6"]) == "InfiniBand down"
    assert ports["mlx5_6"].physical == "Polling"
    assert ports["mlx5_9"].numa == 1
    assert (ports["mlx5_4"].kind, ports["mlx5_4"].rate, ports["mlx5_4"].roce_v2) == ("RoCE", 25, (1, 3))
    assert parse_ports("# /sys/class/infiniband does not exist\n") == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/sys/class/infiniband/mlx5_0/ports/1/state:4: ACTIVE", "ports/1/rate is not there"),
        ("/sys/class/infiniband/mlx5_0/device/numa_node:0", "mlx5_0 has no ports"),
        ("/sys/class/infiniband/mlx5_0/ports/1/rate:fast", "rate is 'fast'"),
        ("/sys/class/net/eth0/operstate:up", "expected paths under"),
        ("4: ACTIVE", "expected /path:value"),
    ],
)
def test_ports_that_are_damaged(line, message):
    with pytest.raises(FormatError, match=message):
        parse_ports(line + "\n")


def test_a_state_without_number():
    text = recorded("hgx_h20_healthy").texts["infiniband.txt"]
    with pytest.raises(FormatError, match="state is 'ACTIVE'"):
        parse_ports(text.replace("mlx5_3/ports/1/state:4: ACTIVE", "mlx5_3/ports/1/state:ACTIVE"))


def test_gpus():
    gpus = parse_gpus("0, NVIDIA H20, 00000000:0F:00.0\n1, NVIDIA H20, 00000001:D7:00.0\n")
    assert [(gpu.index, gpu.name) for gpu in gpus] == [(0, "NVIDIA H20"), (1, "NVIDIA H20")]
    assert [f"{gpu.bus:x}" for gpu in gpus] == ["f000", "1d7000"]
    with pytest.raises(FormatError, match="no PCI address"):
        parse_gpus("0, NVIDIA H20, 0F\n")


def test_modules_as_proc_and_as_lsmod_print_them():
    assert "nvidia_peermem" in parse_modules(recorded("hgx_h20_healthy").texts["modules.txt"])
    assert "nvidia_peermem" not in parse_modules(recorded("peermem_missing").texts["modules.txt"]), "a user of nvidia"
    with pytest.raises(FormatError, match="line 1"):
        parse_modules("modules: permission denied\n")


def test_driver_and_kernel():
    closed = parse_driver(recorded("hgx_h20_healthy").texts["driver.txt"])
    assert (closed.version, closed.major, closed.open) == ("550.54.15", 550, False)
    opened = parse_driver(recorded("roce_dma_buf").texts["driver.txt"])
    assert (opened.version, opened.open) == ("570.86.15", True)
    assert parse_kernel("5.14.0-362.8.1.el9_3.x86_64\n") == (5, 14)
    with pytest.raises(FormatError):
        parse_kernel("Linux\n")


@pytest.mark.parametrize(
    ("control", "redirecting"),
    [
        ("SrcValid+ TransBlk- ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans-", ("17:00.0",)),
        ("SrcValid+ TransBlk- ReqRedir- CmpltRedir- UpstreamFwd+ EgressCtrl- DirectTrans-", ()),
        ("SrcValid- TransBlk- ReqRedir- CmpltRedir+ UpstreamFwd- EgressCtrl- DirectTrans-", ("17:00.0",)),
    ],
)
def test_acs(control, redirecting):
    capability = "\t\tACSCap:\tSrcValid+ TransBlk+ ReqRedir+ CmpltRedir+ UpstreamFwd+ EgressCtrl- DirectTrans+\n"
    acs = parse_acs(BRIDGE + capability + f"\t\tACSCtl:\t{control}\n")
    assert acs is not None
    assert (acs.bridges, acs.redirecting) == (1, redirecting)


def test_acs_that_may_not_be_read():
    assert parse_acs(BRIDGE + "\tCapabilities: <access denied>\n") is None


def test_limits():
    line = "Max locked memory         {:<21}unlimited            bytes     \n"
    assert parse_locked_memory(line.format("unlimited")) == float("inf")
    assert parse_locked_memory(line.format("65536")) == 65536
    assert parse_may_lock("CapEff:\t000001ffffffffff\n")
    assert not parse_may_lock("CapEff:\t0000000000000000\n")
    with pytest.raises(FormatError):
        parse_locked_memory("Max stack size 1 2 bytes\n")


def test_machine():
    assert parse_virtual(recorded("cloud_vm").texts["machine.txt"]) == "QEMU Standard PC (Q35 + ICH9, 2009)"
    assert parse_virtual(recorded("hgx_h20_healthy").texts["machine.txt"]) == ""
    with pytest.raises(FormatError):
        parse_virtual("/sys/class/dmi/id/sys_vendor:QEMU\n")
    assert parse_iommu("# no group\n") == frozenset()
    assert parse_interfaces("/sys/class/net/eth0/operstate:up\n") == {"eth0": "up"}


def test_paths_and_assignments():
    assert path_values("# remark\n/a/b:1\n/a/b:2\n/c:x:y\n") == {"/a/b": "1\n2", "/c": "x:y"}
    assert assignments("# remark\nNCCL_A=1\n\nNCCL_A=2\nNCCL_B==x,y\n") == {"NCCL_A": "1", "NCCL_B": "=x,y"}
    with pytest.raises(FormatError, match="line 2"):
        assignments("NCCL_A=1\nNCCL B\n")


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("", {"mlx5_1", "mlx5_10", "mlx5_2"}),
        ("mlx5_1", {"mlx5_1", "mlx5_10"}),
        ("=mlx5_1", {"mlx5_1"}),
        ("=mlx5_1:1,mlx5_2:2", {"mlx5_1"}),
        ("^mlx5_1", {"mlx5_2"}),
        ("^=mlx5_1", {"mlx5_10", "mlx5_2"}),
    ],
)
def test_lists_of_devices(pattern, taken):
    assert {name for name in ("mlx5_1", "mlx5_10", "mlx5_2") if matches(pattern, name, 1)} == taken


@pytest.mark.parametrize(
    ("text", "reach"),
    [
        ("LOC", []),
        ("PIX", ["PIX"]),
        ("PXB", ["PIX", "PXB"]),
        ("PHB", ["PIX", "PXB", "PHB", "NODE"]),
        ("SYS", ["PIX", "PXB", "PHB", "NODE", "SYS"]),
        ("0", []),
        ("2", ["PIX", "PXB"]),
        ("3", ["PIX", "PXB", "PHB", "NODE"]),
        ("9", ["PIX", "PXB", "PHB", "NODE", "SYS"]),
        ("NODE", ["PIX", "PXB"]),
    ],
)
def test_levels(text, reach):
    settings = read_settings({"NCCL_NET_GDR_LEVEL": text})
    assert [distance for distance in ("PIX", "PXB", "PHB", "NODE", "SYS") if settings.near_enough(distance)] == reach


def test_switches():
    assert read_settings({}).rdma_off is None
    assert read_settings({"NCCL_IB_DISABLE": "0"}).rdma_off is None
    assert read_settings({"NCCL_IB_DISABLE": "1"}).rdma_off == "NCCL_IB_DISABLE=1"
    assert read_settings({"NCCL_NET": "IB"}).plugin is None
    assert read_settings({"NCCL_NET": "AWS Libfabric"}).plugin == "NCCL_NET=AWS Libfabric"
    assert not read_settings({"NCCL_PXN_DISABLE": "1"}).pxn
    assert read_settings({"NCCL_NET_GDR_READ": "0"}).read is False
    assert read_settings({"NCCL_NET_GDR_READ": "-2"}).read is None
