"""Tokens travel to the devices that own the buckets they chose, and results come back: the contract and its backends.

All functions run inside `jax.shard_map`, on one device's part. The E buckets (for a mixture of experts: the experts)
are shared out evenly over one mesh axis, or over several as one, in order: device p of P owns buckets p·E/P onwards.

    exchange = make_exchange(name, ...)
    arrived = exchange.send(x_AD, buckets_AK, weights_AK)    tokens → rows of this device's own buckets, by bucket
    y_AD = exchange.bring_back(y_SD, arrived)                results → y[a] = Σ_k weights[a, k] · result of (a, k)

`buckets_AK` is i32, E for a choice that was dropped; a token names no bucket twice. `weights_AK` is f32. `y_SD` must be
zero after the last bucket's rows. Every backend gives the same sums and the same gradients, of x and of the weights,
whatever the routing: all tokens for one bucket, none for a device. None ever drops a row: buffers hold the most that
can come, S = P · min(A·K, limit · E/P) rows, at which the experts' own buffers are sized too.

| backend             | how | rows that a device sends, one way |
|---|---|---|
| padded              | one all-to-all of blocks as large as the fullest could be | (P-1) · min(A·K, limit · E/P) |
| gathered            | every device receives all rows, keeps its own; for checking | (P-1) · A·K |
| ragged              | one all-to-all of the rows that exist (emulated on CPU) | its choices owned elsewhere |
| hierarchical        | padded along the rail to each node, then padded inside it | across (N-1) · min(A, limit · E/N) |
| ragged_hierarchical | the same two steps, both ragged | each token once to each node, and in it to each device |

Rows may travel in 8 bits (parallel/blocks.py): in each step there, and the gradients of each step back, they are only
copied, and the second step's rounding changes nothing; what comes back is summed in each step, and rounded anew.

Each tells the bytes that it sends inside the node and across its border, tables and all, in `Arrived`. The least that
any exchange can send is computed in `minimum.py`; `python -m parallel.exchange` sets them side by side.
"""

from typing import Literal, get_args

from parallel.exchange import alone, gathered, padded, ragged
from parallel.exchange.flat import Arrived, Flat
from parallel.exchange.group import Axis, Group, Traffic, along_rail, inside_node, node_size, whole
from parallel.exchange.route import LayRoute
from parallel.exchange.stepwise import Stepwise
from parallel.exchange.wire import WIRE_FORMATS, WireFormat

__all__ = ["BACKENDS", "Arrived", "Axis", "Backend", "Exchange", "Traffic", "WireFormat", "make_exchange", "node_size"]

Backend = Literal["padded", "gathered", "ragged", "hierarchical", "ragged_hierarchical"]
Exchange = Flat | Stepwise

BACKENDS: tuple[Backend, ...] = get_args(Backend)
_FLAT = ("padded", "gathered", "ragged")
_TRANSPORTS: dict[str, LayRoute] = {
    "padded": padded.lay_route,
    "gathered": gathered.lay_route,
    "ragged": ragged.lay_route,
    "hierarchical": padded.lay_route,
    "ragged_hierarchical": ragged.lay_route,
}


def make_exchange(
    name: str,
    axis: Axis,
    num_devices: int,
    node_size: int,
    num_buckets: int,
    limit: int,
    wire: WireFormat,
    *,
    weighs_before: bool = False,
) -> Exchange:
    """
    Args:
        name: of the backend.
        axis: the mesh axis over which the buckets are shared out, or several, the last varying fastest.
        num_devices: P, devices along it; with 1 every backend is a sort and no axis is needed.
        node_size: how many consecutive ones share a node; divides P. See `group.node_size`.
        num_buckets: E, a multiple of P.
        limit: no bucket counts more rows than this on any one device.
        wire: format of the rows while they travel. Those of a group of one device stay, and keep theirs.
        weighs_before: whether results are multiplied by their weights before `bring_back` (`Arrived.gates_S`), for
            which the weights travel with the rows.

    Raises:
        ValueError: there is no backend or format of that name.
    """
    if wire not in WIRE_FORMATS:
        raise ValueError(f"precision.exchange={wire!r}: give one of {', '.join(WIRE_FORMATS)}")
    if name not in BACKENDS:
        raise ValueError(f"execution.exchange={name!r}: give one of {', '.join(BACKENDS)}")
    if name in _FLAT or num_devices == 1:
        return _flat(name, whole(axis, num_devices, node_size), num_buckets, limit, wire, weighs_before)
    rail, inside = along_rail(axis, num_devices, node_size), inside_node(axis, num_devices, node_size)
    # What a device holds after a step came from all members, from each with at most the limit before it.
    on_device = _flat(name, whole(axis, 1, 1), num_buckets // num_devices, limit * num_devices, wire, weighs_before)
    buckets, most = num_buckets // rail.size, limit * rail.size
    within = Stepwise(_transport(name, inside), inside, on_device, buckets, most, _on(inside, wire))
    return Stepwise(_transport(name, rail), rail, within, num_buckets, limit, _on(rail, wire))


def _flat(name: str, group: Group, num_buckets: int, limit: int, wire: WireFormat, weighs_before: bool) -> Flat:
    return Flat(_transport(name, group), group, num_buckets, limit, _on(group, wire), weighs_before)


def _transport(name: str, group: Group) -> LayRoute:
    return _TRANSPORTS[name] if group.size > 1 else alone.lay_route


def _on(group: Group, wire: WireFormat) -> WireFormat | None:
    return wire if group.size > 1 else None
