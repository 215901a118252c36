import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from parallel.exchange.group import along_rail, inside_node, node_size, whole
from parallel.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("group", "inside", "across"),
    [(whole("expert", 8, 2), 1, 6), (inside_node("expert", 8, 2), 1, 0), (along_rail("expert", 8, 2), 0, 3)],
    ids=["whole", "inside", "rail"],
)
def test_traffic_by_the_nodes_border(group, inside, across):
    def on_device(amounts_1P):
        return jax.tree.map(lambda x: x[None], (group.traffic(amounts_1P[0]), group.evenly(5), group.position()))

    spec, mesh = PartitionSpec("expert"), make_mesh(MeshConfig(expert=8))
    call = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    by_amounts, evenly, position = call(np.full((8, group.size), 5, np.int32))
    np.testing.assert_array_equal(by_amounts.inside, 5 * inside)
    np.testing.assert_array_equal(by_amounts.across, 5 * across)
    np.testing.assert_array_equal(evenly.inside, 5 * inside)
    np.testing.assert_array_equal(evenly.across, 5 * across)
    for members in group.index_groups or (range(8),):
        np.testing.assert_array_equal(position[np.array(members)], range(group.size))


@pytest.mark.parametrize(
    ("mesh", "axis", "per_node", "expected"),
    [
        (MeshConfig(expert=8), "expert", 8, 8),
        (MeshConfig(expert=8), "expert", 2, 2),
        (MeshConfig(expert=8), "expert", 3, 1),
        (MeshConfig(data=2, expert=4), "expert", 4, 4),
        (MeshConfig(data=4, expert=2), "data", 4, 2),
        (MeshConfig(data=4, expert=2), "data", 2, 1),
        (MeshConfig(data=4, expert=2), ("data", "expert"), 4, 4),
        (MeshConfig(data=2, expert=3), "expert", 4, 1),
        (MeshConfig(data=2, expert=3), "expert", 3, 3),
    ],
    ids=str,
)
def test_node_size_is_the_largest_that_holds_everywhere(mesh, axis, per_node, expected):
    assert node_size(make_mesh(mesh), axis, per_node) == expected
