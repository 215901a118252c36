import pytest

from moe.planner.channels import channels, measured
from moe.planner.chips import A100, H20, H800, L20
from moe.planner.work import Transfer
from parallel.network.cluster import Cluster
from parallel.network.links import Link, Links


def test_rates_of_the_usual_node():
    found = channels(H20, Cluster(nodes=4))
    assert (found.inside.bandwidth, found.across.bandwidth, found.host.bandwidth) == (450e9, 50e9, 64e9)
    assert channels(H800, Cluster(nodes=4)).inside.bandwidth == 200e9


def test_cards_are_shared_by_the_gpus_of_a_node():
    assert channels(H20, Cluster(nodes=4, nics_per_node=4, nic_rate=200)).across.bandwidth == 12.5e9


def test_a_card_is_no_faster_than_its_slot():
    assert channels(A100, Cluster(nodes=4, nic_rate=400)).across.bandwidth == 32e9


def test_without_gpudirect_everything_is_staged():
    direct = channels(H20, Cluster(nodes=4)).across
    staged = channels(H20, Cluster(nodes=4, gpudirect=False)).across
    assert staged.bandwidth == 32e9 < direct.bandwidth
    assert staged.latency > direct.latency
    assert "modelled" in staged.how


@pytest.mark.parametrize(("chip", "link"), [(L20, "nvlink"), (L20, "pcie"), (H20, "pcie")])
def test_where_there_is_no_nvlink_pcie_is_shared(chip, link):
    assert channels(chip, Cluster(gpu_link=link)).inside.bandwidth == chip.pcie_rate / 2


def test_measured_links_take_precedence_by_collective_and_number_of_devices():
    fits = tuple(Link("all_to_all", "across_nodes", n, 1e-5, n * 1e9, 0.1) for n in (8, 64))
    links = Links("gpu", "NVIDIA H20", "0.10.2", {"expert": 64}, 64, 8, fits, ())
    transfer = Transfer("a", "exchange", "ragged-all-to-all", ("expert",), 16, 2, 1.0, 1.0)
    found = measured(links, transfer, "across_nodes")
    assert found is not None
    assert found.bandwidth == 8e9
    assert measured(links, transfer, "inside_node") is None
    assert measured(None, transfer, "across_nodes") is None
