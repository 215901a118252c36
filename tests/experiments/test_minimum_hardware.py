from rich.console import Console

from experiments.minimum_hardware import ROOM, ROWS, Found, table, values
from moe.planner.chips import H20
from moe.planner.compile import Facts


def facts(allocated: float, host: float = 0) -> Facts:
    return Facts(
        arguments=int(allocated), outputs=0, aliased=0, temporaries=0, peak=0, host=int(host), seconds=1.0, resident=0,
        jax="0",
    )  # fmt: skip


def found(allocated: float, host: float = 0) -> Found:
    return Found(ROWS[0], ROWS[0].steps[0], facts(allocated, host))


def test_a_step_fits_in_what_is_left_beside_cuda_and_nccl():
    usable = H20.memory - ROOM
    assert found(usable - 2e9).verdict(H20) == "yes, 2.0 left"
    assert found(usable + 1.5e9).verdict(H20) == "no, by 1.5"
    assert Found(ROWS[0], ROWS[0].steps[0], None, "out of ideas").verdict(H20) == "out of ideas"


def test_a_host_has_what_its_eight_gpus_put_there():
    each = found(50e9, 340e9)
    assert each.host == 8 * 340e9
    console = Console(width=160)
    with console.capture() as shown:
        console.print(table([each], H20))
    assert "2,720" in shown.get()
    assert "expert=16" in shown.get()
    (value,) = values([each], H20)
    assert (value["gpus"], value["asked"], value["host_of_node"]) == (16, 32, 8 * 340e9)


def test_every_row_asks_for_fewer_gpus_than_tencent_and_fills_them():
    for row in ROWS:
        assert row.asked is None or row.gpus < row.asked
        assert {step.mesh.num_devices for step in row.steps} == {row.gpus}
