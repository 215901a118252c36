"""Who takes part in a collective, and the bytes it sends, against loops over the devices."""

import itertools

import pytest

from moe.planner.hlo import HloError, parse_instruction
from moe.planner.transfers import Fabric, collective, groups_of, sent
from parallel.mesh import MeshConfig


def instruction(groups: str):
    return parse_instruction(f"  %x = f32[8]{{0}} all-reduce(%y), channel_id=1, {groups}, to_apply=%add")


def by_loop(sizes: list[int], order: list[int], split: set[int]) -> set[frozenset[int]]:
    """Devices 0, 1, … stand in a grid of `sizes`, seen with its axes in `order`: those that differ along axes in
    `split` alone, in a grid so seen, belong together."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for device, place in enumerate(itertools.product(*(range(size) for size in sizes))):
        seen = [place[axis] for axis in order]
        rest = tuple(each for axis, each in enumerate(seen) if axis not in split)
        groups.setdefault(rest, set()).add(device)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", {frozenset({0, 1}), frozenset({2, 3})}),
        ("replica_groups={}", by_loop([12], [0], {0})),
        ("replica_groups=[4,3]<=[12]", by_loop([4, 3], [0, 1], {1})),
        ("replica_groups=[3,4]<=[4,3]T(1,0)", by_loop([4, 3], [1, 0], {1})),
        ("replica_groups=[2,6]<=[3,2,2]T(1,0,2)", by_loop([3, 2, 2], [1, 0, 2], {1, 2})),
        ("replica_groups=mesh['a'=3,'b'=4] {'b'}", by_loop([3, 4], [0, 1], {1})),
        ("replica_groups=mesh['a'=3,'b'=4] {'a'}", by_loop([3, 4], [0, 1], {0})),
        ("replica_groups=mesh['a'=3,'b'=2,'c'=2] {'a','c'}", by_loop([3, 2, 2], [0, 1, 2], {0, 2})),
        # The mesh's devices are in another order than their numbers.
        ("replica_groups=mesh['a'=4,'b'=3], device_ids=([3,4]T(1,0)) {'a'}", by_loop([3, 4], [1, 0], {0})),
        # The inner half of an axis of 4, and the outer one.
        ("replica_groups=mesh['a'=3,'b'=4] {'b':(2)2}", by_loop([3, 2, 2], [0, 1, 2], {2})),
        ("replica_groups=mesh['a'=3,'b'=4] {'b':(1)2,'a'}", by_loop([3, 2, 2], [0, 1, 2], {0, 1})),
    ],
)
def test_groups_in_all_ways_of_writing_them(text, expected):
    assert {frozenset(group) for group in groups_of(instruction(text), 12)} == expected


def test_groups_in_an_unknown_way_are_refused():
    with pytest.raises(HloError, match="x: the groups"):
        groups_of(instruction("replica_groups=whoever"), 8)


@pytest.mark.parametrize("devices_per_node", [2, 4, 8])
def test_axes_are_those_along_which_members_differ(devices_per_node):
    mesh = MeshConfig(replica=2, data=3, expert=4)
    fabric = Fabric(mesh, devices_per_node)
    for number in range(1, 4):
        for axes in itertools.combinations(("replica", "data", "expert"), number):
            strides = {"replica": 12, "data": 4, "expert": 1}
            ways = [[strides[axis] * i for i in range(mesh.sizes[axis])] for axis in axes]
            members = [sum(each) for each in itertools.product(*ways)]
            assert fabric.axes(members) == axes
            assert fabric.nodes(members) == len({member // devices_per_node for member in members})
    # Two of four are no whole axis.
    assert fabric.axes([0, 1]) == ()


def by_hand(kind: str, size: float, devices: int, near: int) -> tuple[float, float]:
    """What device 0 sends, step by step; `near` consecutive devices share a node."""
    part = size / devices
    inside = across = 0.0
    if kind == "all-to-all":
        for other in range(1, devices):
            inside, across = (inside + part, across) if other < near else (inside, across + part)
        return inside, across
    # A ring through all devices: each but the last of a node hands a part on inside. What a node sends on, it sends
    # once on each of `near` cards, a share on each.
    steps = (devices - 1) * (2 if kind == "all-reduce" else 1)
    nodes_crossed = (devices - near) * (2 if kind == "all-reduce" else 1)
    return (steps * part if near > 1 else 0.0), nodes_crossed * part / near


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all"])
@pytest.mark.parametrize(("devices", "nodes"), [(8, 1), (8, 8), (16, 2), (512, 64), (6, 3)])
def test_bytes_inside_and_across(kind, devices, nodes):
    assert sent(kind, 1024.0, devices, nodes) == pytest.approx(by_hand(kind, 1024.0, devices, devices // nodes))


def test_a_collective_over_nodes_and_within():
    fabric = Fabric(MeshConfig(data=4, expert=4), 4)
    within = collective(instruction("replica_groups=[4,4]<=[16]"), "all-gather", 64.0, fabric)
    assert (within.axes, within.devices, within.nodes, within.inside, within.across) == (("expert",), 4, 1, 48.0, 0.0)
    over = collective(instruction("replica_groups=[4,4]<=[4,4]T(1,0)"), "all-gather", 64.0, fabric)
    assert (over.axes, over.devices, over.nodes, over.inside, over.across) == (("data",), 4, 4, 0.0, 48.0)


@pytest.mark.parametrize(
    ("pairs", "axes", "inside", "across"),
    [
        ("{{0,1},{1,0},{2,3},{3,2}}", ("sequence",), 64.0, 0.0),
        ("{{0,2},{1,3},{2,0},{3,1}}", ("stage",), 0.0, 64.0),
        ("{{0,0},{1,1}}", (), 0.0, 0.0),
    ],
)
def test_a_permutation_goes_as_far_as_its_farthest_pair(pairs, axes, inside, across):
    text = f"  %x = f32[16]{{0}} collective-permute(%y), source_target_pairs={pairs}"
    found = collective(parse_instruction(text), "collective-permute", 64.0, Fabric(MeshConfig(stage=2, sequence=2), 2))
    assert (found.axes, found.inside, found.across) == (axes, inside, across)
