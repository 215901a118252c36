from jax.sharding import AbstractMesh, AxisType


def mesh_of(c):
    s = c.sizes
    return AbstractMesh(tuple(s.values()), tuple(s), axis_types=(AxisType.Auto,) * len(s))
