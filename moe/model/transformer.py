"""The whole model: embedding, stacks of layers under lax.scan, final norm and head."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from moe.model.adapter import LoraConfig
from moe.model.attention import Sight
from moe.model.block import Group, in_turn
from moe.model.cache import KVCache, StackCache
from moe.model.config import ModelConfig
from moe.model.execution import Execution, check_execution
from moe.model.in_stack import Stacks, landings_after, put_back, taken_out
from moe.model.landing import land
from moe.model.moe_layer import MoELayer, MoEStats
from moe.model.parameter import matrix, norm_scale
from moe.model.precision import Precision
from moe.model.products import Products, product
from moe.model.remat import rematerialise
from moe.ops.bits import from_bits
from moe.ops.matmul import wide_einsum
from moe.ops.norm import rms_norm
from moe.ops.rope import rope_tables
from parallel.layout import SINGLE_DEVICE, Layout


class Output(NamedTuple):
    """
    hidden_BTD: after the final norm, in the compute format.
    stats: of the MoE layers, stacked over L; None without any.
    cache: with these tokens in it; None where none was given.
    layer_inputs_LBTD: the residual stream before each layer; None unless asked for.
    """

    hidden_BTD: jax.Array
    stats: MoEStats | None
    cache: KVCache | None = None
    layer_inputs_LBTD: jax.Array | None = None


class Transformer(nnx.Module):
    """A Hunyuan-shaped decoder (arXiv 2411.02265 §2.1). Parameters are created in the stored format.

    Layers of one kind stand stacked, one stack for each run of equal cross-layer groups, and are scanned: a model of
    64 layers compiles as fast as one of 2.
    """

    def __init__(self, config: ModelConfig, precision: Precision, execution: Execution, *, rngs: nnx.Rngs) -> None:
        check_execution(execution, precision)
        self.config = config
        self.precision = precision
        self.execution = execution
        self.unrolled = False
        shape = (config.vocab_size, config.d_model)
        self.embedding_VD = matrix("VD", shape, "embedding", config.init_std, precision, rngs)
        self.stacks = nnx.List(
            _stacked_groups(dense, repeat, config, precision, execution, rngs) for dense, repeat in self.layer_groups
        )
        self.norm_D = norm_scale("D", config.d_model, precision)
        if not config.tie_embeddings:
            self.head_VD = matrix("VD", shape, "head", config.init_std, precision, rngs)
        # Of a logit, whose gradient is a probability or one less (moe/train/loss.py).
        self.products = Products(precision, ("head",), largest_gradient=1.0)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
        layout: Layout = SINGLE_DEVICE,
        keep_layer_inputs: bool = False,
        landing: dict[int, Any] | None = None,
    ) -> Output:
        """
        Args:
            tokens_BT: i32.
            positions_BT: i32, restarting in each document; by default 0 … T-1.
            segments_BT: i32, the document of each token, 0 for padding; by default one document.
            cache: of the tokens before these, one document a row; `positions_BT` then are the slots that these tokens
                take in it, one after the other from the row's first.
            key: the step's random key; needed where routing draws at random (router.overflow='recycle').
            layout: where arrays live.
            keep_layer_inputs: whether to return the residual stream before each layer.
            landing: by number of the stack, what its weights' gradients are to be those of (moe/model/landing.py).
        """
        layout = layout.for_length(tokens_BT.shape[1])
        sight = self.sight(tokens_BT, positions_BT, segments_BT)
        x_BTD = self.embed(tokens_BT, layout)
        found, inputs, caches, before_BTD = [], [], [], x_BTD
        for number, scan in enumerate(self.scans(key, layout, keep_layer_inputs)):
            where = None if landing is None else landing[number]
            own = None if cache is None else cache.stacks[number]
            stack, given = self.stacks[number], (x_BTD, sight, own, where)
            if self.unrolled and layout.mesh is not None:
                # Gathered while the group before computes, and no sooner.
                _, stack = in_turn(before_BTD, stack)
            before_BTD = x_BTD
            x_BTD, own, stats, inputs_LBTD = _traced_once(scan, stack, *given) if self.unrolled else scan(stack, *given)
            if own is not None:
                caches.append(own)
            if inputs_LBTD is not None:
                inputs.append(inputs_LBTD)
            if stats is not None:
                found.append(stats)
        return Output(
            self.final_norm(x_BTD),
            jax.tree.map(lambda *each: jnp.concatenate(each), *found) if found else None,
            KVCache(tuple(caches)) if caches else None,
            jnp.concatenate(inputs) if keep_layer_inputs else None,
        )

    def adapt(self, config: LoraConfig, *, rngs: nnx.Rngs) -> None:
        """Sets low-rank adapters beside the weights of every layer that `config` names."""
        for stack in self.stacks:
            for block in stack.blocks:
                block.adapt(config, self.precision, rngs=rngs)

    def unroll(self) -> None:
        """Has each group in a stack of its own from now on, and so no loop over layers in the program.

        XLA copies what a loop's turn reads of a stack, whole, before a product reads it: where few tokens meet each
        weight, as in decoding, that takes longer than the product.
        """
        groups = [
            group for (_, n), stack in zip(self.layer_groups, self.stacks, strict=True) for group in _split_up(stack, n)
        ]
        self.stacks, self.unrolled = nnx.List(groups), True

    def watch(self) -> None:
        """Has every product note the largest magnitudes of what goes into it (moe/model/products.py)."""
        self.products.watch(())
        for (_, repeat), stack in zip(self.layer_groups, self.stacks, strict=True):
            for _, module in nnx.iter_modules(stack):
                if isinstance(module, Products):
                    module.watch((repeat,))

    def sight(self, tokens_BT: jax.Array, positions_BT: jax.Array | None, segments_BT: jax.Array | None) -> Sight:
        """What each token may look at; None as in `__call__`."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
        if segments_BT is None:
            segments_BT = jnp.ones_like(tokens_BT)
        rope = self.config.rope
        tables = rope_tables(
            positions_BT,
            self.config.head_dim,
            theta=rope.theta,
            ntk_alpha=rope.ntk_alpha,
            frequencies=rope.frequencies,
        )
        return Sight(positions_BT, segments_BT, tables)

    def embed(self, tokens_BT: jax.Array, layout: Layout) -> jax.Array:
        """x_BTD, in the compute format."""
        with jax.named_scope("embedding"):
            # Gathered as stored, so that the gradients of a token seen often are summed in the stored format.
            embedding_VD = layout.gather(self.embedding_VD[...], "VD")
            x_BTD = embedding_VD[tokens_BT]
            if self.config.padding_id is not None:
                is_padding_BT1 = (tokens_BT == self.config.padding_id)[..., None]
                x_BTD = jnp.where(is_padding_BT1, jax.lax.stop_gradient(x_BTD), x_BTD)
            return layout.constrain(x_BTD.astype(self.precision.compute_dtype), "BTD")

    def scans(self, key: jax.Array | None, layout: Layout, keep_layer_inputs: bool = False) -> list["GroupScan"]:
        """One for each stack."""
        found, first_layer = [], 0
        for dense, repeat in self.layer_groups:
            found.append(GroupScan(self.execution, first_layer, len(dense), repeat, key, layout, keep_layer_inputs))
            first_layer += len(dense) * repeat
        return found

    @property
    def layer_groups(self) -> list[tuple[tuple[bool, ...], int]]:
        """Those of each stack, as of `ModelConfig.layer_groups`."""
        return self.config.layer_groups(unrolled=self.unrolled)

    def final_norm(self, x_BTD: jax.Array) -> jax.Array:
        with jax.named_scope("final_norm"):
            return rms_norm(x_BTD, self.norm_D[...].astype(x_BTD.dtype), self.config.norm_eps)

    @property
    def head_weight_VD(self) -> jax.Array:
        """The output projection, as stored: the embedding itself where they are tied."""
        return self.embedding_VD[...] if self.config.tie_embeddings else self.head_VD[...]

    def logits(self, hidden_BTD: jax.Array, layout: Layout = SINGLE_DEVICE) -> jax.Array:
        """logits_BTV f32 of all positions at once. Training uses moe.train.loss, which never holds them all."""
        with jax.named_scope("head"):
            w_VD = layout.gather(self.head_weight_VD.astype(self.precision.compute_dtype), "VD")
            if self.products.recipe is None:
                return wide_einsum("BTD,VD->BTV", hidden_BTD, w_VD)
            hidden_BTD, w_VD = (x.astype(jnp.float32) for x in (hidden_BTD, w_VD))
            return product("BTD,VD->BTV", hidden_BTD, w_VD, self.products.recipe, self.products.history("head"))

    def move_biases(self, load_LE: jax.Array) -> None:
        """Moves the routers' selection biases in place, for router.balance "bias".

        Args:
            load_LE: f32, share of the choices that fell on each expert, by MoE layer.
        """
        first = 0
        for stack in self.stacks:
            layers = [block.feed_forward for block in stack.blocks if isinstance(block.feed_forward, MoELayer)]
            if layers:
                repeat = layers[0].router.bias_E[...].shape[0]
                load_GPE = load_LE[first : first + repeat * len(layers)].reshape(repeat, len(layers), -1)
                for place, layer in enumerate(layers):
                    layer.router.move_bias(load_GPE[:, place])
                first += repeat * len(layers)


class GroupScan(NamedTuple):
    """One stack of equal groups, one after the other. first_layer: how many come before."""

    execution: Execution
    first_layer: int | jax.Array
    layers_per_group: int
    repeat: int
    key: jax.Array | None
    layout: Layout
    keep_inputs: bool

    def __call__(
        self,
        stack: Group,
        x_BTD: jax.Array,
        sight: Sight,
        cache: StackCache | None,
        landing: dict[str, Any] | None = None,
    ) -> tuple[jax.Array, StackCache | None, MoEStats | None, jax.Array | None]:
        parts: Any = nnx.split(stack, nnx.LoRAParam, nnx.Param, ...)
        graph, adapters, weights, others = parts
        # Beside frozen weights gradients are the adapters'.
        stacks, weights = taken_out(stack, weights, self.layout, trained=not adapters)

        def group(carry, of_group):
            x_BTD, cache, landings = carry
            (adapters, weights, others), matrices, landing, place = of_group
            weights = jax.tree.map(lambda w: from_bits(w, jnp.bfloat16), weights)
            weights = put_back(weights, Stacks(matrices, landings), place)
            if landing is not None and adapters:
                adapters = land(adapters, landing, self.layout)
            elif landing is not None:
                weights = land(weights, landing, self.layout)
            layer = self.first_layer + self.layers_per_group * place
            group_cache = None if cache is None else cache.group(place)
            layers = nnx.merge(graph, adapters, weights, others)
            output = layers(x_BTD, sight, layer, self.key, self.layout, group_cache)
            if output.cache is not None:
                cache = output.cache.cache
            inputs_PBTD = jnp.stack(output.inputs) if self.keep_inputs else None
            return (output.x_BTD, cache, landings_after(layers)), (output.stats, inputs_PBTD)

        # Forward and backward pass are loops of their own, for which XLA computes nothing once. But it takes one of a
        # single turn apart, and where weights are gathered a turn ahead one of two. On one device that keeps all, what
        # is then computed once is the weights' cast, which is welcome.
        apart = self.repeat <= 2 or not self.execution.scan_layers
        all_kept = self.execution.remat == "none" and self.layout.mesh is None and not adapters
        step = rematerialise(group, self.execution.remat, barrier=apart and not all_kept)

        def turn(carry, of_group):
            parts, *others = of_group
            return step(carry, (parts, stacks.matrices, *others))

        of_groups = ((adapters, weights, others), landing, jnp.arange(self.repeat))
        (x_BTD, cache, _), found = jax.lax.scan(
            turn, (x_BTD, cache, stacks.landings), of_groups, unroll=not self.execution.scan_layers
        )
        stats, inputs_LBTD = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
        return x_BTD, cache, stats, inputs_LBTD


def _split_up(stack: Group, repeat: int) -> list[Group]:
    """The groups of a stack, of arrays or shapes, each as a stack of one."""
    graph, weights = nnx.split(stack)

    def group(i: int, x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
        return x[i : i + 1]

    return [nnx.merge(graph, jax.tree.map(partial(group, i), weights)) for i in range(repeat)]


def _traced_once(scan: GroupScan, stack: Group, *given: Any) -> Any:
    """As `scan`, traced for the first of the stacks that are alike."""
    graph, weights = nnx.split(stack)
    alike = scan._replace(first_layer=0, key=None)
    return _computed(alike, graph, weights, scan.first_layer, scan.key, *given)


@partial(jax.jit, static_argnums=(0, 1))
def _computed(
    scan: GroupScan, graph: nnx.GraphDef, weights: nnx.State, first_layer: jax.Array, key: jax.Array | None, *given: Any
) -> Any:
    return scan._replace(first_layer=first_layer, key=key)(nnx.merge(graph, weights), *given)


def _stacked_groups(
    dense: tuple[bool, ...],
    repeat: int,
    config: ModelConfig,
    precision: Precision,
    execution: Execution,
    rngs: nnx.Rngs,
) -> Group:
    """`repeat` groups as one, each parameter with an axis more in front."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: jax.Array) -> Group:
        return Group(dense, config, precision, execution, rngs=nnx.Rngs(params=key))

    return make(jax.random.split(rngs.params(), repeat))
