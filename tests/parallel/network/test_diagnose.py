"""The verdict on each recording, what changes it, and that nothing missing or damaged ever counts as good."""

import re

import pytest

from parallel.network.diagnose import diagnose
from parallel.network.findings import Diagnosis, Finding
from parallel.network.recording import FILES
from tests.parallel.network.recorded import changed, recorded, replaced

RAILS = ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3", "mlx5_6", "mlx5_7", "mlx5_8", "mlx5_9"]
DECISIVE = (
    "nvidia-smi-gpus.txt", "nvidia-smi-topo.txt", "infiniband.txt", "modules.txt", "variables.txt", "limits.txt",
)  # fmt: skip


def finding(diagnosis: Diagnosis, topic: str, severity: str = "problem") -> Finding:
    found = [each for each in diagnosis.findings if (each.topic, each.severity) == (topic, severity)]
    assert len(found) == 1, diagnosis.findings
    return found[0]


def verdicts(diagnosis: Diagnosis) -> list[str]:
    return [rail.verdict for rail in diagnosis.rails]


def test_healthy_h20s():
    diagnosis = diagnose(recorded("hgx_h20_healthy"))
    assert diagnosis.verdict == "yes"
    assert [(rail.nic, rail.distance, rail.verdict, rail.proven) for rail in diagnosis.rails] == [
        (nic, "PIX", "yes", True) for nic in RAILS
    ]
    assert {each.severity for each in diagnosis.findings} == {"ok"}


def test_module_missing():
    diagnosis = diagnose(recorded("peermem_missing"))
    assert verdicts(diagnosis) == ["no"] * 8
    assert "nvidia_peermem is not loaded, and the closed NVIDIA driver 550.54.15" in diagnosis.sentence
    assert "modprobe nvidia_peermem" in finding(diagnosis, "GPU memory").remedy


def test_card_on_the_other_socket():
    diagnosis = diagnose(recorded("nic_on_other_socket"))
    assert (diagnosis.verdict, verdicts(diagnosis)) == ("partly", ["no"] * 4 + ["yes"] * 4)
    assert not any(rail.proven for rail in diagnosis.rails)
    assert "GPU0, GPU1, GPU2, GPU3 is SYS away" in finding(diagnosis, "distance").text
    assert finding(diagnosis, "distance").text.endswith("(NUMA node 0 to 1)")
    assert finding(diagnosis, "ACS", "warning").text.startswith("ACS redirects peer-to-peer traffic at 12 PCI bridges")
    assert "intel_iommu=on" in finding(diagnosis, "IOMMU", "warning").text


def test_rdma_disabled_by_a_configuration_file():
    diagnosis = diagnose(recorded("rdma_disabled"))
    assert verdicts(diagnosis) == ["no"] * 8
    assert "NCCL_IB_DISABLE=1 turns RDMA off" in diagnosis.sentence
    assert finding(diagnosis, "variables").remedy == "unset NCCL_IB_DISABLE, or take it out of nccl.conf"


def test_one_rail_down():
    diagnosis = diagnose(recorded("rail_down"))
    assert (diagnosis.verdict, verdicts(diagnosis)) == ("partly", ["yes"] * 4 + ["no"] + ["yes"] * 3)
    assert diagnosis.rails[4].reason == "mlx5_6's link is down"
    assert "mlx5_6 is down (physical state Polling)" in finding(diagnosis, "link").text
    assert "GPU4 is connected over mlx5_7" in finding(diagnosis, "NCCL", "warning").text


def test_virtual_machine():
    diagnosis = diagnose(recorded("cloud_vm"))
    assert verdicts(diagnosis) == ["no"] * 8
    assert [rail.nic for rail in diagnosis.rails] == [f"mlx5_{i}" for i in range(8)], "equally near: shared out evenly"
    assert "NCCL_TOPO_FILE" in finding(diagnosis, "distance").remedy
    assert "QEMU" in finding(diagnosis, "machine", "warning").text
    assert finding(diagnosis, "ACS", "ok")


def test_roce_by_dma_buf():
    diagnosis = diagnose(recorded("roce_dma_buf"))
    assert (diagnosis.verdict, verdicts(diagnosis)) == ("yes", ["yes"] * 8)
    assert "DMA-BUF" in finding(diagnosis, "GPU memory", "ok").text
    assert "CAP_IPC_LOCK" in finding(diagnosis, "locked memory", "ok").text


def test_no_gpu():
    diagnosis = diagnose(recorded("no_gpu"))
    assert not diagnosis.gpus
    assert diagnosis.sentence.startswith("There is no GPU here: nvidia-smi is not installed")
    assert not diagnose(changed("hgx_h20_healthy", nvidia_smi_gpus="No devices were found\n")).gpus


@pytest.mark.parametrize("file", [name for name in FILES if name != "about.txt"])
@pytest.mark.parametrize("damage", ["absent", "empty", "garbage"])
def test_what_is_missing_or_damaged_is_unknown(file, damage):
    key = "nccl_log" if file == "nccl.log" else file.removesuffix(".txt").replace("-", "_")
    text = {"absent": None, "empty": "", "garbage": "?\n? ? ?\n"}[damage]
    # Without the log, which is proof, the settings have to tell.
    diagnosis = diagnose(changed("hgx_h20_healthy", **({"nccl_log": None} | {key: text})))
    assert diagnosis.gpus
    if file == "cmdline.txt" and damage != "absent":
        return  # any text may be a command line
    assert any(each.severity == "unknown" and each.evidence == file for each in diagnosis.findings)
    assert diagnosis.verdict == ("unknown" if file in DECISIVE else "yes")


def test_without_a_log_the_settings_tell():
    diagnosis = diagnose(changed("hgx_h20_healthy", nccl_log=None))
    assert verdicts(diagnosis) == ["yes"] * 8
    assert "no log proves it" in diagnosis.sentence


def test_relayed_connections_are_told():
    log = recorded("hgx_h20_healthy").texts["nccl.log"]
    relayed = log.replace("0[0] -> 8[0] [send] via NET/IB/0/", "0[0] -> 8[0] [send] via NET/IB/1(1)/")
    found = finding(diagnose(changed("hgx_h20_healthy", nccl_log=relayed)), "NCCL", "ok")
    assert "all direct (GDRDMA), 2 through a neighbour GPU's card (PXN)" in found.text
    assert "2.21.5" in found.evidence


def test_the_log_outweighs_the_settings():
    log = recorded("peermem_missing").texts["nccl.log"]
    diagnosis = diagnose(changed("hgx_h20_healthy", nccl_log=log.replace("gpu-a07", "gpu-a01")))
    assert verdicts(diagnosis) == ["no"] * 8
    assert "staged through the host" in diagnosis.sentence


def test_sends_staged_and_receives_direct():
    log = recorded("hgx_h20_healthy").texts["nccl.log"]
    staged = "\n".join(
        line.replace("/GDRDMA", "") if "0[0] -> 8[0] [send]" in line else line for line in log.splitlines()
    )
    diagnosis = diagnose(changed("hgx_h20_healthy", nccl_log=staged))
    assert verdicts(diagnosis) == ["partly"] + ["yes"] * 7
    assert "sends staged" in diagnosis.rails[0].reason


@pytest.mark.parametrize(
    ("variables", "verdict", "reason"),
    [
        ("NCCL_NET=Socket", "no", "NCCL_NET=Socket turns RDMA off"),
        ("NCCL_NET_GDR_LEVEL=LOC", "no", "PIX is farther than NCCL's limit LOC"),
        ("NCCL_NET_GDR_LEVEL=PIX", "yes", "near enough"),
        ("NCCL_NET_GDR_LEVEL=NEAR", "yes", "near enough"),
        ("NCCL_IB_HCA=^mlx5_0", "no", "NCCL_IB_HCA=^mlx5_0 leaves mlx5_0 out"),
        ("NCCL_NET_PLUGIN=aws-ofi", "unknown", "a plugin decides"),
        ("NCCL_NET_GDR_READ=0", "partly", "what the GPU sends is staged"),
        ("NCCL_DMABUF_ENABLE=0", "yes", "nvidia_peermem is loaded"),
    ],
)
def test_variables(variables, verdict, reason):
    diagnosis = diagnose(changed("hgx_h20_healthy", nccl_log=None, variables=variables + "\n"))
    assert diagnosis.rails[0].verdict == verdict
    assert reason in diagnosis.rails[0].reason
    assert any(each.topic == "variables" and each.severity != "ok" for each in diagnosis.findings)


def test_dma_buf_needs_driver_kernel_and_permission():
    def first(**texts: str | None) -> tuple[str, str]:
        rail = diagnose(changed("roce_dma_buf", nccl_log=None, **texts)).rails[0]
        return rail.verdict, rail.reason

    closed = recorded("hgx_h20_healthy").texts["driver.txt"]
    assert first()[0] == "yes"
    assert first(driver=closed)[0] == "no"
    assert first(kernel="5.4.0-150-generic\n") == (
        "no",
        "nvidia_peermem is not loaded, and the kernel 5.4 is older than 5.12, the first with DMA-BUF for RDMA",
    )
    assert first(variables="NCCL_DMABUF_ENABLE=0\n")[0] == "no"
    assert first(driver=None)[0] == "unknown"
    assert first(kernel=None)[0] == "unknown"


def test_dma_buf_that_the_card_lacks():
    log = recorded("roce_dma_buf").texts["nccl.log"].replace("GPU Direct RDMA Enabled", "GPU Direct RDMA Disabled")
    diagnosis = diagnose(changed("roce_dma_buf", nccl_log=log.replace("/GDRDMA", "")))
    assert verdicts(diagnosis) == ["no"] * 8
    assert "a newer driver of the network card" in finding(diagnosis, "GPU memory").remedy


def test_too_little_locked_memory():
    limits = recorded("hgx_h20_healthy").texts["limits.txt"]
    limits = re.sub(r"(Max locked memory\s+)unlimited", r"\g<1>65536", limits)
    diagnosis = diagnose(changed("hgx_h20_healthy", nccl_log=None, limits=limits))
    assert verdicts(diagnosis) == ["no"] * 8
    assert "only 64 KiB" in finding(diagnosis, "locked memory").text


def test_geforce_cards_do_not_offer_it():
    diagnosis = diagnose(replaced("nic_on_other_socket", "nvidia_smi_gpus", "NVIDIA L20", "NVIDIA GeForce RTX 4090"))
    assert verdicts(diagnosis) == ["no"] * 8
    assert finding(diagnosis, "GPUs")


def test_grace_is_left_to_the_log():
    diagnosis = diagnose(replaced("nic_on_other_socket", "nvidia_smi_gpus", "NVIDIA L20", "NVIDIA GH200 480GB"))
    assert verdicts(diagnosis) == ["unknown"] * 4 + ["yes"] * 4
    assert diagnosis.verdict == "unknown"


def test_no_network_card():
    topology = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tNV18\t0-9\t0\nGPU1\tNV18\t X \t0-9\t0\n"
    none = changed("hgx_h20_healthy", nvidia_smi_topo=topology, infiniband="# none\n", nccl_log=None)
    assert [(rail.verdict, rail.nic) for rail in diagnose(none).rails] == [("no", None)] * 2
    hidden = changed("hgx_h20_healthy", nvidia_smi_topo=topology, nccl_log=None)
    assert verdicts(diagnose(hidden)) == ["unknown"] * 2, "cards are there, nvidia-smi does not show them"


def test_topology_file_in_a_virtual_machine():
    diagnosis = diagnose(changed("cloud_vm", nccl_log=None, variables="NCCL_TOPO_FILE=/opt/h20.xml\n"))
    assert verdicts(diagnosis) == ["unknown"] * 8
    assert "NCCL_TOPO_FILE may place it nearer" in diagnosis.sentence


def test_management_cards_are_told_apart():
    diagnosis = diagnose(changed("hgx_h20_healthy", variables="NCCL_SOCKET_IFNAME=eno1\n"))
    found = finding(diagnosis, "variables", "warning")
    assert "mlx5_4, mlx5_5" in found.text
    assert found.remedy == "NCCL_IB_HCA==" + ",".join(RAILS)


def test_interface_that_is_not_there():
    diagnosis = diagnose(replaced("hgx_h20_healthy", "variables", "IFNAME=eno1", "IFNAME=eth0"))
    assert "NCCL_SOCKET_IFNAME=eth0 fits no interface" in finding(diagnosis, "variables").text


def test_slower_rail():
    rate = "mlx5_7/ports/1/rate:{} Gb/sec"
    recording = replaced("hgx_h20_healthy", "infiniband", rate.format(400), rate.format(200))
    assert "mlx5_7 runs at 200 Gb/s, others at 400" in finding(diagnose(recording), "link rate", "warning").text


def test_roce_addresses():
    recording = replaced("roce_dma_buf", "variables", "# environment", "NCCL_IB_GID_INDEX=2")
    assert sum("NCCL_IB_GID_INDEX=2 is no RoCE v2 GID" in each.text for each in diagnose(recording).findings) == 8
    text = recorded("roce_dma_buf").texts["infiniband.txt"]
    text = re.sub(r"(mlx5_3/ports/1/gid_attrs/types/\d):RoCE v2", r"\1:IB/RoCE v1", text)
    assert finding(diagnose(changed("roce_dma_buf", infiniband=text)), "RoCE").text.startswith("mlx5_3 has no GID")
