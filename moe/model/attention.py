"""Grouped-query attention with RoPE, per-head QK-norm and keys and values shared between layers."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.adapter import Adapter, LoraConfig, Projection
from moe.model.cache import GroupCache
from moe.model.config import ConfigError, ModelConfig
from moe.model.execution import Execution
from moe.model.parameter import matrix, norm_scale
from moe.model.precision import Precision
from moe.model.products import Products
from moe.ops.attention import attention
from moe.ops.attention.ring import ring_attention
from moe.ops.norm import rms_norm
from moe.ops.rope import apply_rope
from parallel.layout import SEQUENCE_AXIS, Layout


class Sight(NamedTuple):
    """What a token may look at, the same for all layers.

    positions_BT: i32, from 0 in each document.
    segments_BT: i32, the document of each token; 0 is padding.
    rope: tables of cos and sin for `positions_BT`.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array
    rope: tuple[jax.Array, jax.Array]


class SharedKeyValue(NamedTuple):
    """Keys and values of one cross-layer group, as its queries meet them.

    k_BSMH: with RoPE; with a norm after RoPE, normalised but not yet scaled.
    cache: from which earlier tokens' keys and values came, with the new ones in it; None without a cache.
    """

    k_BSMH: jax.Array
    v_BSMH: jax.Array
    cache: GroupCache | None = None


class Attention(nnx.Module):
    """Attention of one layer (released code, HunYuanAttention): RoPE first, then RMSNorm of each head's q and k; or,
    with qk_norm "before_rope", the other way round (Qwen3, arXiv 2505.09388).

    In a cross-layer group the first layer projects k and v, and the others take them, each with its own key norm.
    RoPE and the norm's division are the same for all of them, so they are done once, and each layer's key-norm weight
    w is folded into its query: q · (w∘k) = (w∘q) · k.
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, execution: Execution, *, projects_kv: bool, rngs: nnx.Rngs
    ) -> None:
        self.eps = config.norm_eps
        self.dtype = precision.compute_dtype
        self.backend, self.softmax = execution.attention, jnp.dtype(precision.softmax)
        D, N, M, H, std = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim, config.init_std
        self.w_q_DNH = matrix("DNH", (D, N, H), "attention", std, precision, rngs)
        self.w_o_NHD = matrix("NHD", (N, H, D), "attention", std, precision, rngs)
        self.projects_kv = projects_kv
        if projects_kv:
            self.w_k_DMH = matrix("DMH", (D, M, H), "attention", std, precision, rngs)
            self.w_v_DMH = matrix("DMH", (D, M, H), "attention", std, precision, rngs)
        self.products = Products(precision, ("q", "k", "v", "o") if projects_kv else ("q", "o"))
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            self.q_norm_H = norm_scale("H", H, precision)
            self.k_norm_H = norm_scale("H", H, precision)
        self.adapters: nnx.Dict = nnx.Dict()

    def adapt(self, config: LoraConfig, precision: Precision, *, rngs: nnx.Rngs) -> None:
        """Sets adapters beside the projections."""
        weights = {"q": self.w_q_DNH, "o": self.w_o_NHD}
        if self.projects_kv:
            weights |= {"k": self.w_k_DMH, "v": self.w_v_DMH}
        for name, weight in weights.items():
            self.adapters[name] = Adapter(weight, config, precision, rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        sight: Sight,
        shared: SharedKeyValue | None,
        layout: Layout,
        cache: GroupCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, SharedKeyValue]:
        """
        Args:
            shared: keys and values of the group's first layer; None in the first layer itself.
            cache: of the group, for its first layer: x_BTD goes on from the tokens in it, and a token's position is
                its slot. None where x_BTD is all there is to see.
            key: of this layer in this step, for the adapters' dropout.

        Returns:
            y_BTD in the compute format, and the keys and values for the layers that follow in the group.
        """
        kv = self._project_kv(x_BTD, sight, layout, key) if self.projects_kv else shared
        assert kv is not None, "a layer without its own k and v follows the first of its group"
        if cache is not None and self.projects_kv:
            kv = SharedKeyValue(*cache.append(kv.k_BSMH, kv.v_BSMH, sight.positions_BT[:, 0]))
        q_BTNH = self._queries(x_BTD, sight, layout, key)
        if layout.rings and kv.cache is None:
            y_BTNH = self._round_the_ring(q_BTNH, kv, sight, layout)
        else:
            y_BTNH = self._over_whole_sequences(q_BTNH, kv, sight, layout)
        y_BTNH = layout.constrain(y_BTNH, "BTNH")
        y_BTD = self.products("o", "BTNH,NHD->BTD", y_BTNH, self.w_o_NHD, layout)
        return layout.constrain(self._adapted(Projection.o, y_BTNH, y_BTD, layout, key), "BTD"), kv

    def _adapted(
        self, which: Projection, x: jax.Array, y: jax.Array, layout: Layout, key: jax.Array | None
    ) -> jax.Array:
        """y, the product of x, with what its adapter adds, where it has one."""
        if which.name not in self.adapters:
            return y
        own_key = None if key is None else jax.random.fold_in(key, int(which))
        return y + self.adapters[which.name](x, own_key, layout)

    def _over_whole_sequences(self, q_BTNH: jax.Array, kv: SharedKeyValue, sight: Sight, layout: Layout) -> jax.Array:
        # In a cache a row is one document, and what lies behind a query's slot is hidden by causality.
        # Where the queries are before the mask is made of them: that is larger.
        told_BT = layout.constrain(sight.segments_BT if kv.cache is None else sight.positions_BT, "BS")
        slots_BT, segments_BT = (None, told_BT) if kv.cache is None else (told_BT, None)
        if kv.cache is not None and q_BTNH.shape[1] == kv.k_BSMH.shape[1]:
            # They fill the cache, so each stands at its own place, and no mask is needed.
            slots_BT = None
        q_BSNH = layout.constrain(q_BTNH, "BSNH")
        if kv.cache is None and layout.mesh is not None:
            # cuDNN's call cannot be partitioned inside a pipeline's shard_map, nor where `sequence` has the queries:
            # each device is given its own part.
            heads, keys, tokens = (layout.activation_spec(axes) for axes in ("BSNH", "BSMH", "BS"))

            def attend(q_BSNH, k_BSMH, v_BSMH, segments_BS):
                segments = {"segments_BT": segments_BS, "segments_BS": segments_BS}
                return attention(q_BSNH, k_BSMH, v_BSMH, **segments, softmax=self.softmax, backend=self.backend)

            on_each_device = layout.shard_map(attend, (heads, keys, keys, tokens), heads)
            return on_each_device(q_BSNH, kv.k_BSMH, kv.v_BSMH, segments_BT)
        return attention(
            q_BSNH,
            kv.k_BSMH,
            kv.v_BSMH,
            query_positions_BT=slots_BT,
            segments_BT=segments_BT,
            segments_BS=segments_BT,
            softmax=self.softmax,
            backend=self.backend,
        )

    def _round_the_ring(self, q_BTNH: jax.Array, kv: SharedKeyValue, sight: Sight, layout: Layout) -> jax.Array:
        if self.backend not in ("auto", "chunked"):
            raise ConfigError(
                f"execution.attention={self.backend!r} with layout.sequence='ring': the ring computes in chunks; "
                "set 'auto' or 'chunked', or layout.sequence='heads'"
            )
        q, k, tokens = (layout.activation_spec(axes) for axes in ("BTNH", "BTMH", "BT"))
        ring = layout.shard_map(partial(ring_attention, axis=SEQUENCE_AXIS), (q, k, k, tokens), q)
        return ring(q_BTNH, kv.k_BSMH, kv.v_BSMH, sight.segments_BT)

    def _queries(self, x_BTD: jax.Array, sight: Sight, layout: Layout, key: jax.Array | None) -> jax.Array:
        q_BTNH = self.products("q", "BTD,DNH->BTNH", x_BTD, self.w_q_DNH, layout)
        q_BTNH = layout.constrain(self._adapted(Projection.q, x_BTD, q_BTNH, layout, key), "BTNH")
        if self.qk_norm == "before_rope":
            q_BTNH = rms_norm(q_BTNH, self.q_norm_H[...].astype(self.dtype), self.eps)
        q_BTNH = apply_rope(q_BTNH, sight.rope)
        if self.qk_norm == "after_rope":
            q_BTNH = rms_norm(q_BTNH, self.q_norm_H[...].astype(self.dtype), self.eps)
            q_BTNH *= self.k_norm_H[...].astype(self.dtype)
        return q_BTNH

    def _project_kv(self, x_BTD: jax.Array, sight: Sight, layout: Layout, key: jax.Array | None) -> SharedKeyValue:
        k_BTMH, v_BTMH = (
            self.products(name, "BTD,DMH->BTMH", x_BTD, w, layout)
            for name, w in (("k", self.w_k_DMH), ("v", self.w_v_DMH))
        )
        k_BTMH, v_BTMH = (
            layout.constrain(self._adapted(which, x_BTD, y_BTMH, layout, key), "BTMH")
            for which, y_BTMH in ((Projection.k, k_BTMH), (Projection.v, v_BTMH))
        )
        if self.qk_norm == "before_rope":
            k_BTMH = rms_norm(k_BTMH, self.k_norm_H[...].astype(self.dtype), self.eps)
        k_BTMH = apply_rope(k_BTMH, sight.rope)
        if self.qk_norm == "after_rope":
            k_BTMH = rms_norm(k_BTMH, None, self.eps)
        seen = "BTMH" if layout.rings else "BSMH"
        return SharedKeyValue(layout.constrain(k_BTMH, seen), layout.constrain(v_BTMH, seen))
