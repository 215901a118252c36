import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.network.collectives import COLLECTIVES
from parallel.network.links import Links, LinksError, Measurement, fit_line, fit_links, read_links, write_links

SIZES = (1 << 14, 1 << 18, 1 << 22, 1 << 26)


def measured(collective="all_to_all", link="inside_node", devices=4, latency=2e-5, bandwidth=5e10) -> list[Measurement]:
    found = []
    for size in SIZES:
        sent = COLLECTIVES[collective].bytes_sent(size, devices)
        time = latency + sent / bandwidth
        found.append(Measurement(collective, "expert", devices, link, size, sent, time, time, time))
    return found


def links() -> Links:
    everything = measured() + measured("all_reduce", "across_nodes", 16, 3e-5, 4e10) + measured(devices=8, latency=4e-5)
    return Links(
        "gpu", "NVIDIA H20", "0.10.2", {"data": 2, "expert": 8}, 2, 2, fit_links(everything)[0], tuple(everything)
    )


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e-2), st.floats(1e6, 1e12))
def test_a_line_is_found_again(latency, bandwidth):
    got_latency, got_bandwidth = fit_line(SIZES, [latency + size / bandwidth for size in SIZES])
    times = [got_latency + size / got_bandwidth for size in SIZES]
    np.testing.assert_allclose(times, [latency + size / bandwidth for size in SIZES], rtol=1e-4)


def test_the_fit_is_of_least_squared_relative_error():
    rng = np.random.default_rng(0)
    times = np.array([(2e-5 + size / 5e10) * rng.uniform(0.8, 1.2) for size in SIZES])
    latency, bandwidth = fit_line(SIZES, times)

    def cost(latency: float, slope: float) -> float:
        return float(np.sum(((latency + np.array(SIZES) * slope - times) / times) ** 2))

    best = cost(latency, 1 / bandwidth)
    for a in np.linspace(0.5, 1.5, 21):
        for b in np.linspace(0.5, 1.5, 21):
            assert cost(latency * a, b / bandwidth) >= best * (1 - 1e-9)


def test_a_latency_is_never_negative():
    latency, bandwidth = fit_line([1, 2, 4], [1.0, 3.0, 7.0])
    assert latency == 0
    assert bandwidth > 0


@pytest.mark.parametrize(
    ("sizes", "times", "message"),
    [([5, 5], [1.0, 1.0], "two sizes"), ([1, 2, 4], [3.0, 2.0, 1.0], "times do not grow from 1 to 4 bytes")],
)
def test_what_gives_no_line(sizes, times, message):
    with pytest.raises(LinksError, match=message):
        fit_line(sizes, times)


def test_one_fit_for_each_collective_link_and_number_of_devices():
    found = {(link.collective, link.link, link.devices): link for link in links().links}
    assert set(found) == {
        ("all_to_all", "inside_node", 4),
        ("all_to_all", "inside_node", 8),
        ("all_reduce", "across_nodes", 16),
    }
    fit = found["all_reduce", "across_nodes", 16]
    assert (fit.latency, fit.bandwidth) == (pytest.approx(3e-5, rel=1e-6), pytest.approx(4e10, rel=1e-6))
    assert fit.worst_error < 1e-6


def test_the_worst_error_is_told():
    off = measured()
    first = off[0]
    off[0] = Measurement(**(first.__dict__ | {"seconds": first.seconds * 2}))
    ((fit,), failures) = fit_links(off)
    assert failures == ()
    errors = [abs(fit.latency + each.sent_bytes / fit.bandwidth - each.seconds) / each.seconds for each in off]
    assert fit.worst_error == pytest.approx(max(errors))
    assert fit.worst_error > 0.1


def test_a_collective_without_a_fit_does_not_spoil_the_others():
    flat = [Measurement(**(each.__dict__ | {"seconds": 1 / each.sent_bytes})) for each in measured("all_reduce")]
    found, failures = fit_links(flat + measured())
    assert [link.collective for link in found] == ["all_to_all"]
    assert failures[0].startswith("all_reduce over 4 devices, inside node: times do not grow")


def test_modelled_seconds():
    model = links()
    assert model.seconds("all_to_all", "inside_node", 4, 1 << 20) == pytest.approx(2e-5 + 0.75 * (1 << 20) / 5e10)
    assert model.seconds("all_to_all", "inside_node", 32, 1024) == pytest.approx(4e-5 + 31 / 32 * 1024 / 5e10, rel=1e-6)
    assert model.seconds("all_reduce", "across_nodes", 2, 1024) == pytest.approx(3e-5 + 1024 / 4e10, rel=1e-6)
    with pytest.raises(LinksError, match="all_to_all across_nodes was not measured; there are all_reduce across_nodes"):
        model.seconds("all_to_all", "across_nodes", 4, 1024)


def test_written_and_read_again(tmp_path):
    write_links(links(), tmp_path / "links.json")
    assert read_links(tmp_path / "links.json") == links()
    assert [file.name for file in tmp_path.iterdir()] == ["links.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version: this program reads 1"),
        (lambda c: c.pop("version"), "version: this program reads 1"),
        (lambda c: c.pop("links"), r"links file\.links: is missing"),
        (lambda c: c.update(links=3), r"links file\.links=3: expected a list"),
        (lambda c: c["links"].insert(0, 3), r"links\[0\]: expected an object"),
        (lambda c: c["links"][1].pop("bandwidth"), r"links\[1\]\.bandwidth: is missing"),
        (lambda c: c["links"][1].update(bandwidth=0), r"links\[1\]\.bandwidth=0: expected a number above 0"),
        (lambda c: c["links"][1].update(latency=-1e-6), r"links\[1\]\.latency=-1e-06"),
        (lambda c: c["links"][1].update(bandwidth="fast"), r"bandwidth='fast': expected a number above 0"),
        (lambda c: c["links"][1].update(bandwidth=float("inf")), r"bandwidth=inf"),
        (lambda c: c["links"][1].update(devices=2.5), r"devices=2\.5: expected a whole number above 0"),
        (
            lambda c: c["links"][2].update(link="far"),
            r"links\[2\]\.link='far': expected one of inside_node, across_nodes",
        ),
        (lambda c: c["links"][0].update(collective="broadcast"), r"collective='broadcast': expected one of all_to_all"),
        (lambda c: c["measurements"][0].update(speed=1), r"measurements\[0\]\.speed: no such field"),
        (lambda c: c.update(mesh={"data": 0}), r"mesh=\{'data': 0\}: expected devices by axis"),
        (lambda c: c.update(platform=None), "platform=None: expected a text"),
    ],
)
def test_damage_names_the_field(tmp_path, change, message):
    path = tmp_path / "links.json"
    write_links(links(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(LinksError, match=message):
        read_links(path)


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(LinksError, match="bench --output"):
        read_links(tmp_path / "links.json")
    (tmp_path / "links.json").write_text('{"version": 1')
    with pytest.raises(LinksError, match="links.json"):
        read_links(tmp_path / "links.json")
    (tmp_path / "links.json").write_text("[]")
    with pytest.raises(LinksError, match="version"):
        read_links(tmp_path / "links.json")
