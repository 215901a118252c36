"""Prefill and decode over a fixed number of slots, each holding one growing text.

A slot's tokens do not depend on what stands in the other slots: routing is dropless, a row attends to itself alone,
and draws are seeded by the request.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe.model.cache import KVCache, empty_cache, placed_cache
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import QUANTIZED_KINDS, ParameterSpec, SelectionBias, specs_of, stored
from moe.model.precision import Precision
from moe.model.transformer import Transformer
from moe.ops.bits import as_bits
from moe.serve.sampling import Sampling, SamplingRows, choose_tokens, sampling_rows
from parallel.layout import BATCH_AXES, Layout
from parallel.platform import platform

SHORTEST_BUCKET = 16
"""Prompts are padded to a power of two of at least so many tokens, so that few shapes are compiled."""


@dataclass(frozen=True)
class Served:
    """The model as it serves, without its arrays: what programs are compiled for. They are told this and not the graph
    that NNX makes of a model: the hash of one, taken at every call, takes a millisecond.

    execution: of which only the backends matter. unrolled: of arrays of its own for each group of layers
    (moe/model/transformer.py).
    """

    config: ModelConfig
    precision: Precision
    layout: Layout
    execution: Execution = field(default_factory=Execution)
    unrolled: bool = False

    @property
    def abstract(self) -> Transformer:
        """The model, of shapes: without capacities, and with products in the compute format."""
        model = nnx.eval_shape(
            lambda: Transformer(self.config.dropless, self.precision.wide, self.execution, rngs=nnx.Rngs(0))
        )
        if self.unrolled:
            model.unroll()
        return model

    def model(self, params: dict[str, Any], balance: dict[str, Any]) -> Any:
        """The `Transformer` with these arrays."""
        return nnx.merge(nnx.graphdef(self.abstract), params, balance)

    def empty_cache(self, batch: int, num_slots: int) -> KVCache:
        """See `moe.model.cache.empty_cache`."""
        dtype, format = self.precision.compute_dtype, self.precision.cache
        return empty_cache(self.config, batch, num_slots, dtype, self.layout, format, self.unrolled)


class Weights(NamedTuple):
    """Everything that computes: what programs are compiled for, and parameters and selection biases as nested dicts, on
    its layout."""

    served: Served
    params: dict[str, Any]
    balance: dict[str, Any]

    def narrow(self) -> None:
        """Has the layers' matrices in the compute format from now on, one array after the other, where they are stored
        in a wider one: each token would round all of them anew, to the same values."""
        dtype = jnp.dtype(self.served.precision.compute_dtype)

        def narrowed(spec: ParameterSpec, x: Any) -> Any:
            wider = spec.kind in QUANTIZED_KINDS and isinstance(x, jax.Array) and x.dtype.itemsize > dtype.itemsize
            return x.astype(dtype) if wider else x

        _replace(self.params, specs_of(self.served.abstract), narrowed)

    def move_as_bits(self) -> None:
        """On CPU has the layers' bfloat16 as its bits from now on, one array after the other: a loop over layers would
        widen all of them for each token (moe/ops/bits.py)."""
        stacks = self.params["stacks"]
        _replace(stacks, stacks, lambda _, x: jax.tree.map(as_bits, x))

    @classmethod
    def abstract(cls, served: Served) -> "Weights":
        """Shapes, formats and, on a mesh, shardings, for compiling without an array.

        Raises:
            LayoutError: a parameter does not divide over the mesh.
        """
        model, layout = served.abstract, served.layout
        params, balance = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, SelectionBias))
        if layout.mesh is not None:
            where = stored(params, specs_of(model), layout), jax.tree.map(lambda _: layout.whole(), balance)
            params, balance = jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (params, balance), where
            )
        return cls(served, params, balance)


def _replace(params: dict[Any, Any], specs: dict[Any, Any], change: Callable[[Any, Any], Any]) -> None:
    """Puts `change` of each parameter, given its spec, in its place; the old one is not kept."""
    for name, value in params.items():
        if isinstance(value, dict):
            _replace(value, specs[name], change)
        else:
            params[name] = change(specs[name], value)


class Texts(NamedTuple):
    """What a step knows of the slots' texts, and leaves for the next one.

    tokens_B: i32, the newest token of each, which is not in the cache yet. lengths_B: i32, tokens in the cache.
    active_B: bool, which slots are in use. settings: None where each text goes on with its likeliest token.
    """

    tokens_B: jax.Array
    lengths_B: jax.Array
    active_B: jax.Array
    settings: SamplingRows | None


class ContextError(ValueError):
    """A text that does not fit: says how long it is and how much room there is."""


@dataclass
class _Slot:
    sampling: Sampling
    length: int
    """Tokens in the cache."""
    last: int
    """The newest token, which is not in the cache yet."""
    generated: int


class _Started(NamedTuple):
    """A step that a device was told to take. slots: whose texts it makes longer; one that ends is taken out."""

    tokens_B: jax.Array
    slots: set[int]


class Engine:
    """Up to `slots` texts at once, of up to `max_length` tokens each, prompt and answer together."""

    def __init__(self, weights: Weights, *, slots: int, max_length: int) -> None:
        """
        Args:
            slots: rounded up to a multiple of the mesh's parts of a batch; on GPUs to two for each of these, since of
                one row XLA makes products by writing the factors' products down and adding them up (lab book).
        """
        self.weights = weights
        layout, on_gpu = weights.served.layout, platform() == "gpu"
        shards = layout.batch_shards
        self.num_slots = max(-(-slots // shards), 2 if on_gpu else 1) * shards
        self.max_length = max_length
        self._slots: dict[int, _Slot] = {}
        # Where the weights are: left open, each program would be compiled a second time for arrays that have a place.
        self._place = layout.activation("B") or jax.tree.leaves(weights.params)[0].sharding
        # On the devices; None where a text came or went since the last step.
        self._texts: Texts | None = None
        # A GPU would be idle while the host reads a step's tokens and asks for the next. On CPU the two share cores.
        self._ahead = on_gpu
        self._started: _Started | None = None
        cache: KVCache = jax.jit(partial(weights.served.empty_cache, self.num_slots, max_length))()
        self._cache = cache if layout.mesh else jax.device_put(cache, self._place)

    @property
    def bytes_per_token(self) -> int:
        """That the cache takes for one token of one text, over all layers."""
        return self._cache.bytes_per_token

    @property
    def free(self) -> list[int]:
        """Numbers of the free slots."""
        return [slot for slot in range(self.num_slots) if slot not in self._slots]

    def warm_up(self) -> None:
        """Compiles the step and the prefill of one short prompt, with and without draws, so that the first client does
        not wait for it."""
        for temperature in (0.0, 1.0):
            ((slot, _),) = self.admit([([0], Sampling(max_tokens=1, temperature=temperature))])
            self.step()
            self.release(slot)

    def check(self, prompt: list[int], sampling: Sampling) -> None:
        """
        Raises:
            ContextError: no tokens, tokens that the model does not have, or too many of them.
        """
        vocab = self.weights.served.config.vocab_size
        if not prompt:
            raise ContextError("the prompt has no tokens: give some text to go on from")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ContextError(f"the prompt's tokens go from {min(prompt)} to {max(prompt)}: give 0 to {vocab - 1}")
        if len(prompt) + sampling.max_tokens > self.max_length:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens and max_tokens={sampling.max_tokens}: "
                f"together they may be at most {self.max_length}"
            )

    def admit(self, requests: list[tuple[list[int], Sampling]]) -> list[tuple[int, int]]:
        """Prefills prompts into free slots, as many as there are requests.

        Returns:
            for each request its slot and its first token.
        """
        for prompt, sampling in requests:
            self.check(prompt, sampling)
        slots, rows, num_rows = self._places(len(requests))
        longest = max(len(prompt) for prompt, _ in requests)
        bucket = min(max(SHORTEST_BUCKET, _power_of_two(longest)), self.max_length)
        tokens_BT = np.zeros((num_rows, bucket), np.int32)
        lengths_B, places_B = np.zeros(num_rows, np.int32), np.full(num_rows, self.num_slots, np.int32)
        samplings = [Sampling()] * num_rows
        for (prompt, sampling), slot, row in zip(requests, slots, rows, strict=True):
            tokens_BT[row, : len(prompt)], lengths_B[row], places_B[row] = prompt, len(prompt), slot
            samplings[row] = sampling
        settings = sampling_rows(samplings, [0] * num_rows)
        first_B, self._cache = prefill(*self.weights, self._cache, tokens_BT, lengths_B, places_B, settings)
        found = list(zip(slots, np.asarray(first_B)[rows].tolist(), strict=True))
        for (prompt, sampling), (slot, token) in zip(requests, found, strict=True):
            self._slots[slot] = _Slot(sampling, len(prompt), token, generated=1)
        self._texts = None
        return found

    def _places(self, count: int) -> tuple[list[int], list[int], int]:
        """(free slots, the rows of a prefill that compute for them, how many rows it has), for so many prompts. A row
        and its slot are on the same device; of these each takes as many as another, if it is free."""
        shards = self.weights.served.layout.batch_shards
        slots_of_one = self.num_slots // shards
        taken = [0] * shards
        ranked = []
        for slot in self.free:
            shard = slot // slots_of_one
            ranked.append((taken[shard], slot))
            taken[shard] += 1
        assert count <= len(ranked), "more requests than free slots"
        chosen = sorted(ranked)[:count]
        rows_of_one = _power_of_two(chosen[-1][0] + 1)
        rows = [slot // slots_of_one * rows_of_one + rank for rank, slot in chosen]
        return [slot for _, slot in chosen], rows, shards * rows_of_one

    def step(self) -> list[tuple[int, int]]:
        """One token more for the texts: (slot, token). On a GPU the step after it begins before its tokens are read, so
        that a text which comes then is part of the one after that."""
        if not self._slots:
            return []
        started = self._started if self._started is not None and self._started.slots else self._begun()
        self._started = self._begun() if self._ahead and self._texts is not None else None
        found = []
        for slot, token in enumerate(np.asarray(started.tokens_B).tolist()):
            if slot in started.slots:
                row = self._slots[slot]
                row.length, row.last, row.generated = row.length + 1, token, row.generated + 1
                found.append((slot, token))
        return found

    def _begun(self) -> _Started:
        if self._texts is None:
            self._texts = self._told()
        self._texts, self._cache = decode(*self.weights, self._cache, self._texts)
        return _Started(self._texts.tokens_B, set(self._slots))

    def _told(self) -> Texts:
        """The texts of all slots, on the device."""
        idle = _Slot(Sampling(), 0, 0, 0)
        rows = [self._slots.get(slot, idle) for slot in range(self.num_slots)]
        texts = (
            np.array([row.last for row in rows], np.int32),
            np.array([row.length for row in rows], np.int32),
            np.array([slot in self._slots for slot in range(self.num_slots)]),
            sampling_rows([row.sampling for row in rows], [row.generated for row in rows]),
        )
        return Texts(*jax.device_put(texts, self._place))

    def release(self, slot: int) -> None:
        """Frees a slot; what its cache holds is overwritten by the next text."""
        self._slots.pop(slot, None)
        self._texts = None
        if self._started is not None:
            self._started.slots.discard(slot)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def prefill(
    served: Served,
    params: dict[str, Any],
    balance: dict[str, Any],
    cache: KVCache,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    places_B: jax.Array,
    settings: SamplingRows | None,
) -> tuple[jax.Array, KVCache]:
    """The first token of each row, and the cache with row b's keys and values in slot places_B[b], which must be on
    the device that computes row b; a row of padding has a place beyond the last slot."""
    model, layout = served.model(params, balance), served.layout
    B, T = tokens_BT.shape
    valid_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
    output = model(tokens_BT, None, valid_BT, cache=served.empty_cache(B, T), layout=layout)
    last_B11 = jnp.maximum(lengths_B - 1, 0)[:, None, None]
    hidden_B1D = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)
    first_B = choose_tokens(model.logits(hidden_B1D, layout)[:, 0], settings)
    return first_B, _written(cache, output.cache, places_B, layout)


def _written(cache: KVCache, new: KVCache, places_B: jax.Array, layout: Layout) -> KVCache:
    """The cache with rows of new texts in their slots, from its first tokens on. None leaves its device."""

    def write(cache: KVCache, new: KVCache, places_B: jax.Array) -> KVCache:
        places_B = places_B - layout.first_over(BATCH_AXES, cache.num_rows)
        # A negative place would count from the end.
        return cache.with_rows(new, jnp.where(places_B < 0, cache.num_rows, places_B))

    if layout.mesh is None:
        return write(cache, new, places_B)
    where = placed_cache(cache, lambda x, axes: layout.activation_spec(axes))
    return layout.shard_map(write, (where, where, layout.activation_spec("B")), where)(cache, new, places_B)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode(
    served: Served,
    params: dict[str, Any],
    balance: dict[str, Any],
    cache: KVCache,
    texts: Texts,
) -> tuple[Texts, KVCache]:
    """Each text one token longer, and the cache with what had been its newest one."""
    model, layout = served.model(params, balance), served.layout
    step_B, settings = texts.active_B.astype(jnp.int32), texts.settings
    output = model(texts.tokens_B[:, None], texts.lengths_B[:, None], step_B[:, None], cache=cache, layout=layout)
    next_B = choose_tokens(model.logits(output.hidden_BTD, layout)[:, 0], settings)
    if settings is not None:
        settings = settings._replace(count_B=settings.count_B + step_B)
    longer = Texts(next_B, texts.lengths_B + step_B, texts.active_B, settings)
    return jax.tree.map(lambda x_B: layout.constrain(x_B, "B"), longer), output.cache


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
