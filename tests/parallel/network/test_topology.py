import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.network.formats import FormatError
from parallel.network.topology import DISTANCES, parse_topology
from tests.parallel.network.recorded import recorded

TEXT = recorded("hgx_h20_healthy").texts["nvidia-smi-topo.txt"]


def matrix(columns: list[str], cells: dict[tuple[str, str], str], rows: list[str], legend: dict[str, str]) -> str:
    text = "\t" + "\t".join(columns) + "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    for row in rows:
        text += row + "\t" + "\t".join(cells[row, column] for column in columns) + "\t0-47,96-143\t0\t\tN/A\n"
    return text + "\nNIC Legend:\n\n" + "".join(f"  {nic}: {name}\n" for nic, name in legend.items())


def test_the_recorded_matrix():
    topology = parse_topology(TEXT)
    assert topology.gpus == tuple(range(8))
    assert topology.nics == tuple(f"mlx5_{i}" for i in range(10))
    assert topology.distances[4, "mlx5_6"] == "PIX"
    assert topology.distances[4, "mlx5_4"] == "SYS"
    assert topology.distances[0, "mlx5_4"] == "NODE"
    assert topology.numa == {gpu: int(gpu >= 4) for gpu in range(8)}
    assert topology.nvlink
    assert not parse_topology(recorded("nic_on_other_socket").texts["nvidia-smi-topo.txt"]).nvlink


def test_terminal_codes_and_spaces_for_tabs():
    assert "\x1b[4m" in TEXT, "nvidia-smi underlines its header"
    spaces = (
        "\n".join(line.replace("\t", "   ") for line in TEXT.splitlines()).replace("\x1b[4m", "").replace("\x1b[0m", "")
    )
    assert parse_topology(spaces).distances == parse_topology(TEXT).distances
    assert parse_topology(TEXT.replace("\n", "\r\n")).distances == parse_topology(TEXT).distances


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.randoms(use_true_random=False))
def test_any_order_of_columns_and_rows(num_gpus, num_nics, draw: random.Random):
    gpus, nics = [f"GPU{i}" for i in range(num_gpus)], [f"NIC{i}" for i in range(num_nics)]
    legend = {nic: f"mlx5_{draw.randrange(100)}_{i}" for i, nic in enumerate(nics)}
    columns, rows = gpus + nics, gpus + nics
    draw.shuffle(columns)
    draw.shuffle(rows)
    cells = {
        (a, b): " X " if a == b else "NV8" if a[0] == b[0] == "G" else draw.choice(DISTANCES)
        for a in rows
        for b in columns
    }
    topology = parse_topology(matrix(columns, cells, rows, legend))
    assert set(topology.gpus) == set(range(num_gpus))
    assert topology.distances == {(int(gpu[3:]), legend[nic]): cells[gpu, nic] for gpu in gpus for nic in nics}


def test_columns_named_by_older_drivers():
    text = "\tGPU0\tmlx5_0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \tPHB\t0-9\t0\nmlx5_0\tPHB\t X \n"
    assert parse_topology(text).distances == {(0, "mlx5_0"): "PHB"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("nvidia-smi: command not found\n", "holds no matrix"),
        (TEXT[: TEXT.index("\nGPU5\t")], "names GPU5, and no row does"),
        (TEXT[: TEXT.index("GPU5\tNV18\tNV18\tNV18") + 30], "GPU5 has .* entries for 18 columns"),
        (TEXT.replace("NIC3: mlx5_3", ""), "legend does not name NIC3"),
        (TEXT.replace("GPU0\t X \tNV18", "GPU0\t X \t????"), "entry '.*'; expected X"),
        (TEXT.replace("\tGPU1\t", "\tGPU0\t", 1), "names GPU0 twice"),
    ],
)  # fmt: skip
def test_damage_is_named(text, message):
    with pytest.raises(FormatError, match=message):
        parse_topology(text)


@pytest.mark.parametrize("length", range(0, TEXT.index("NIC9: mlx5_9"), 97))
def test_no_beginning_of_the_output_passes_for_the_whole(length):
    with pytest.raises(FormatError):
        parse_topology(TEXT[:length])
