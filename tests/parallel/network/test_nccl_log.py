import pytest

from parallel.network.formats import FormatError
from parallel.network.host import parse_gpus
from parallel.network.nccl_log import parse_nccl_log
from tests.parallel.network.recorded import recorded

GPUS = parse_gpus(recorded("hgx_h20_healthy").texts["nvidia-smi-gpus.txt"])


def line(message: str, host: str = "a:1:2 ", kind: str = "INFO") -> str:
    return f"{host}[0] NCCL {kind} {message}\n"


USING = line("NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_3:1/RoCE [RO]; OOB eno1:10.0.0.1<0>")


def test_the_recorded_log():
    log = parse_nccl_log(recorded("hgx_h20_healthy").texts["nccl.log"], GPUS, "gpu-a01")
    assert (log.version, log.network) == ("2.21.5+cuda12.4", "IB")
    assert log.devices == dict(enumerate(f"mlx5_{i}" for i in (0, 1, 2, 3, 6, 7, 8, 9)))
    assert len(log.connections) == 32, "the other node's lines do not count"
    assert all(connection.direct for connection in log.connections)
    assert set(log.supported.values()) == {True}


@pytest.mark.parametrize(
    ("text", "gpu", "sends", "device", "direct", "relay"),
    [
        ("Channel 00/0 : 3[3] -> 11[3] [send] via NET/IB/1/GDRDMA", 3, True, 1, True, False),
        ("Channel 00/0 : 11[3] -> 5[5] [receive] via NET/IB/1/GDRDMA", 5, False, 1, True, False),
        ("Channel 01/0 : 3[3] -> 11[3] [send] via NET/IB/0", 3, True, 0, False, False),
        ("Channel 01/0 : 3[3] -> 11[3] [send] via NET/IB/0(5)/GDRDMA/Shared", 3, True, 0, True, True),
        ("Channel 02/0 : 0[0] -> 1[0] [send] via NET/IB/0/GDRDMA(PCI)", 0, True, 0, True, False),
        ("Channel 02 : 13[d7000] -> 2[48000] [receive] via NET/IB/0/GDRDMA", 2, False, 0, True, False),
        ("Channel 00/0 : 0[0] -> 8[0] [send] via NET/AWS-Libfabric/0/GDRDMA", 0, True, 0, True, False),
        ("Channel 00/0 : 0[0] -> 8[0] [send] via NET/Socket/0", 0, True, 0, False, False),
    ],
)
def test_connections(text, gpu, sends, device, direct, relay):
    (found,) = parse_nccl_log(line(text), GPUS).connections
    assert (found.gpu, found.sends, found.device, found.direct, found.relay) == (gpu, sends, device, direct, relay)


def test_other_lines_are_no_connections():
    text = line("Channel 00/0 : 0[0] -> 7[7] via P2P/CUMEM") + line("Channel 00/16 : 0 1 2 3")
    assert parse_nccl_log(text).connections == ()


def test_devices_by_number():
    log = parse_nccl_log(USING + line("Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/1/GDRDMA"))
    assert log.devices_of(0) == {"mlx5_3"}
    assert len(log.between(0, "mlx5_3")) == 1
    assert log.between(0, "mlx5_0") == ()


def test_lines_of_this_node_only():
    text = USING + "".join(
        line(f"Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0{direct}", f"{host}:7:8 ")
        for host, direct in (("a", "/GDRDMA"), ("b", ""))
    )
    assert [c.direct for c in parse_nccl_log(text, host="a").connections] == [True]
    assert [c.direct for c in parse_nccl_log(text, host="b").connections] == [False]
    assert len(parse_nccl_log(text, host="c").connections) == 2, "an unknown host: every line counts"


def test_a_log_of_a_launcher_that_puts_something_before():
    text = "0: a:1:2 [0] NCCL INFO Using network IB\n"
    assert parse_nccl_log(text).network == "IB"


def test_warnings_once_each():
    text = line("x.cc:1 NCCL", kind="WARN") * 3
    assert parse_nccl_log(text).warnings == ("x.cc:1 NCCL",)


def test_no_log_at_all():
    with pytest.raises(FormatError, match="NCCL_DEBUG=INFO"):
        parse_nccl_log("step 1 loss 3.4\n")
