"""What the processes of one run do together. With one process each of these is the identity, and costs nothing."""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from parallel.distributed import DistributedError
from parallel.layout import Layout


def wait_for_all(place: str) -> None:
    """Returns when every process has come to this `place` in the program."""
    multihost_utils.sync_global_devices(place)


def from_first(number: Callable[[], int]) -> int:
    """What `number` says in process 0, which alone calls it, in all processes. An i32."""
    mine = number() if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(mine)))


def require_same(**texts: str) -> None:
    """
    Raises:
        DistributedError: a text differs between processes; in all of them, naming the text and who differs from
            process 0.
    """
    if jax.process_count() == 1:
        return
    digests = [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in texts.values()]
    all_PN = np.asarray(multihost_utils.process_allgather(np.stack(digests)))
    differs_PN = (all_PN != all_PN[0]).any(-1)
    for n, name in enumerate(texts):
        if differs_PN[:, n].any():
            others = ", ".join(str(p) for p in np.flatnonzero(differs_PN[:, n]))
            raise DistributedError(
                f"process {others} has another {name} than process 0: start all with the same files and arguments"
            )


def gather_to_first(tree: Any, layout: Layout) -> Any:
    """A tree of sharded arrays as numpy arrays in process 0, and as None in the others.

    One array after the other is gathered on every device, so beside what is there a device needs room for the largest,
    and process 0's machine for all of them.
    """
    whole = jax.jit(lambda x: x, out_shardings=layout.whole())

    def gather(x: jax.Array) -> np.ndarray | None:
        gathered = whole(x).addressable_data(0)
        return np.asarray(gathered) if jax.process_index() == 0 else None

    return jax.tree.map(gather, tree)


class Agreement:
    """The greatest of the numbers that the processes bring to one call, in all of them, at the next call.

    A signal reaches the processes in different steps; they must stop after the same one. Reading the answer a call
    late leaves the devices no reason to wait for the host. One process is answered at once.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._asked: jax.Array | None = None
        self._greatest = jax.jit(jnp.max, out_shardings=layout.whole())

    def __call__(self, number: int) -> int:
        """`number` is an i32 of at least 0; the first call of several processes answers 0."""
        sharding = self._layout.each_device()
        if jax.process_count() == 1 or sharding is None:
            return number
        before = self._asked
        mine = np.full(len(sharding.addressable_devices), number, np.int32)
        self._asked = self._greatest(jax.make_array_from_process_local_data(sharding, mine))
        return 0 if before is None else int(before)
