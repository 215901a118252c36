"""int4 by GPTQ (moe/ops/gptq.py), layer by layer, on the activations of a calibration text.

One cross-layer group's weights are in memory at a time, read from a `Source`, and the residual stream of all texts. A
matrix is calibrated on inputs that went through what is quantized already, of the same layer too (GPTQ's released code,
--true-sequential). An expert sees the tokens that the router gives it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe.model.attention import Attention, SharedKeyValue, Sight
from moe.model.block import Block, Group
from moe.model.config import ModelConfig
from moe.model.execution import Execution
from moe.model.feed_forward import FeedForward
from moe.model.hf.checkpoint import model_specs
from moe.model.moe_layer import MoELayer
from moe.model.parameter import QUANTIZED_KINDS, quantized, summed_of
from moe.model.pieces import Path, Piece, Source, parameters, pieces
from moe.model.precision import Precision
from moe.model.transformer import Transformer
from moe.ops.gptq import gptq_int4, output_error
from moe.ops.norm import rms_norm
from moe.ops.quantize import GROUPS, Quantized, QuantizedWeight, dequantize
from moe.ops.swiglu import swiglu
from parallel.layout import SINGLE_DEVICE

FEWEST_TOKENS = GROUPS["int4"]
"""With fewer, an expert's weights are rounded to the nearest: their inputs would say more of the text than of it."""
BATCH = 4
"""Texts that are computed at once."""


class Told(NamedTuple):
    """Of one matrix: its name, calibration tokens that it saw, and the squared error of its outputs by GPTQ over that
    by rounding to the nearest; None where it was rounded."""

    name: str
    tokens: int
    ratio: float | None


PieceKey = tuple[Path, tuple[int, ...]]


def calibrate(
    source: Source, config: ModelConfig, tokens_BT: np.ndarray, precision: Precision, tell: Callable[[Told], object]
) -> Iterator[dict[PieceKey, QuantizedWeight]]:
    """The quantized matrices of one cross-layer group after the other.

    Args:
        tokens_BT: i32, the calibration texts.
        precision: of the computation.
    """
    specs = model_specs(config, precision)
    all_pieces = pieces(config, specs)
    whole = nnx.eval_shape(lambda: Transformer(config, precision, Execution(), rngs=nnx.Rngs(0)))
    embedding = next(piece for piece in all_pieces if piece.path[0] == "embedding_VD")
    embedding_VD = source.read(embedding)
    batches = [
        _Texts(jnp.asarray(embedding_VD[part], precision.compute_dtype), whole.sight(jnp.asarray(part), None, None))
        for part in np.split(tokens_BT, range(BATCH, len(tokens_BT), BATCH))
    ]
    for stack, (dense, repeat) in enumerate(config.layer_groups()):
        for index in range(repeat):
            own = [p for p in all_pieces if p.path[:2] == ("stacks", stack) and p.index[0] == index]
            group = _read_group(source, own, dense, config, precision)
            calibration = _GroupCalibration(group, own, {path: spec.kind for path, spec in parameters(specs)}, tell)
            batches = calibration.run(batches)
            yield calibration.found


class _Texts(NamedTuple):
    """Some of the texts on their way through the layers."""

    x_BTD: jax.Array
    sight: Sight


def _read_group(
    source: Source, own: list[Piece], dense: tuple[bool, ...], config: ModelConfig, precision: Precision
) -> Group:
    """One cross-layer group with its weights, wide."""
    abstract = nnx.eval_shape(lambda: Group(dense, config, precision, Execution(), rngs=nnx.Rngs(0)))
    parts: Any = nnx.split(abstract, nnx.Param, ...)
    graph, params, others = parts
    filled: dict[Any, Any] = nnx.to_pure_dict(params)
    by_path: dict[Path, list[np.ndarray]] = {}
    for piece in own:
        by_path.setdefault(piece.path[2:], []).append(source.read(piece))
    for path, values in by_path.items():
        node = filled
        for key in path[:-1]:
            node = node[key]
        shape = node[path[-1]].shape
        node[path[-1]] = jnp.asarray(np.stack(values).reshape(shape), precision.stored_dtype)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nnx.to_pure_dict(others))
    return nnx.merge(graph, filled, zeros)


class _GroupCalibration:
    """Quantizes a group's matrices in the order in which they are used, and puts each in the place of the wide one."""

    def __init__(self, group: Group, own: list[Piece], kinds: dict[Path, str], tell: Callable[[Told], object]) -> None:
        self.group, self.tell = group, tell
        matrices = [piece for piece in own if kinds[piece.path] in QUANTIZED_KINDS]
        self.pieces = {(piece.path[2:], piece.index[1:]): piece for piece in matrices}
        self.found: dict[PieceKey, QuantizedWeight] = {}

    def run(self, batches: list[_Texts]) -> list[_Texts]:
        """The texts behind the group."""
        shared: list[SharedKeyValue | None] = [None] * len(batches)
        for place, block in enumerate(self.group.blocks):
            batches, shared = self._attention(place, block, batches, shared)
            batches = self._feed_forward(place, block, batches)
        return batches

    def _attention(
        self, place: int, block: Block, batches: list[_Texts], shared: list[SharedKeyValue | None]
    ) -> tuple[list[_Texts], list[SharedKeyValue | None]]:
        attention, path = block.attention, ("blocks", place, "attention")
        inputs = [_normed(texts.x_BTD, block.attention_norm_D, block.eps) for texts in batches]
        hessian = _Hessian.of(inputs)
        for name in ("w_q_DNH", "w_k_DMH", "w_v_DMH"):
            if hasattr(attention, name):
                self._quantize(getattr(attention, name), (*path, name), hessian)
        # With the identity as its output projection attention gives what goes into that.
        output = attention.w_o_NHD.get_value()
        width = output.shape[0] * output.shape[1]
        attention.w_o_NHD.set_value(jnp.eye(width, dtype=output.dtype).reshape(*output.shape[:2], width))
        given = list(zip(inputs, batches, shared, strict=True))
        heads = [_attend(*nnx.split(attention), x, texts.sight, kv)[0] for x, texts, kv in given]
        attention.w_o_NHD.set_value(output)
        self._quantize(attention.w_o_NHD, (*path, "w_o_NHD"), _Hessian.of(heads))
        outputs = [_attend(*nnx.split(attention), x, texts.sight, kv) for x, texts, kv in given]
        moved = [texts._replace(x_BTD=texts.x_BTD + y) for texts, (y, _) in zip(batches, outputs, strict=True)]
        return moved, [kv for _, kv in outputs]

    def _feed_forward(self, place: int, block: Block, batches: list[_Texts]) -> list[_Texts]:
        layer, path = block.feed_forward, ("blocks", place, "feed_forward")
        inputs = [_normed(texts.x_BTD, block.feed_forward_norm_D, block.eps) for texts in batches]
        if isinstance(layer, MoELayer):
            self._experts(layer, (*path, "experts"), inputs)
            if hasattr(layer, "shared"):
                self._dense(layer.shared, (*path, "shared"), inputs)
        else:
            self._dense(layer, path, inputs)
        outputs = [_layer(*nnx.split(layer), x) for x in inputs]
        return [texts._replace(x_BTD=texts.x_BTD + y) for texts, y in zip(batches, outputs, strict=True)]

    def _dense(self, layer: FeedForward, path: Path, inputs: list[jax.Array]) -> None:
        hessian = _Hessian.of(inputs)
        for name in ("w_gate_DF", "w_up_DF"):
            self._quantize(getattr(layer, name), (*path, name), hessian)
        gate_DF, up_DF = (w[...].astype(inputs[0].dtype) for w in (layer.w_gate_DF, layer.w_up_DF))
        hidden = [_hidden(x, gate_DF, up_DF) for x in inputs]
        self._quantize(layer.w_down_FD, (*path, "w_down_FD"), _Hessian.of(hidden))

    def _experts(self, layer: MoELayer, path: Path, inputs: list[jax.Array]) -> None:
        chosen = [_chosen(*nnx.split(layer.router), x) for x in inputs]
        experts = layer.experts
        for e in range(experts.w_gate_EDF.get_value().shape[0]):
            mine = [(experts_BTK == e).any(-1) for experts_BTK in chosen]
            hessian = _Hessian.of(inputs, mine)
            for name in ("w_gate_EDF", "w_up_EDF"):
                self._quantize(getattr(experts, name), (*path, name), hessian, e)
            gate_DF, up_DF = (w[...][e].astype(inputs[0].dtype) for w in (experts.w_gate_EDF, experts.w_up_EDF))
            hidden = [_hidden(x, gate_DF, up_DF) for x in inputs]
            self._quantize(experts.w_down_EFD, (*path, "w_down_EFD"), _Hessian.of(hidden, mine), e)

    def _quantize(self, param: nnx.Param, path: Path, hessian: "_Hessian", expert: int | None = None) -> None:
        """Quantizes one matrix, keeps it, and has what follows computed with it."""
        at = () if expert is None else (expert,)
        piece = self.pieces[path, at]
        wide = param.get_value()
        w = wide if expert is None else wide[expert]
        kept, ratio = _best(w, piece.axes, hessian)
        self.found[piece.path, piece.index] = jax.tree.map(np.asarray, kept)
        self.tell(Told(f"layer {piece.layer} {path[-1]}" + ("" if expert is None else f" of expert {expert}"),
                       hessian.tokens, ratio))  # fmt: skip
        widened = dequantize(kept, wide.dtype)
        param.set_value(widened if expert is None else wide.at[expert].set(widened))


class _Hessian(NamedTuple):
    """Σ x xᵀ over a matrix's inputs, and how many these are."""

    sum_II: jax.Array
    tokens: int

    @classmethod
    def of(cls, inputs: list[jax.Array], mine: list[jax.Array] | None = None) -> "_Hessian":
        """inputs: [B, T, ...]. mine: bool [B, T], which of them count."""
        masks = mine or [jnp.ones(x.shape[:2], bool) for x in inputs]
        sums = [_outer(x, mask) for x, mask in zip(inputs, masks, strict=True)]
        return cls(sum(sums[1:], sums[0]), int(sum(mask.sum() for mask in masks)))


def _best(w: jax.Array, axes: str, hessian: _Hessian) -> tuple[QuantizedWeight, float | None]:
    """By GPTQ, or rounded to the nearest where there were too few tokens or it does not help."""
    nearest = rounded(w, axes, "int4")
    if hessian.tokens < FEWEST_TOKENS:
        return nearest, None
    calibrated = gptq_int4(w, hessian.sum_II, summed_of(axes))
    ours, theirs = (output_error(w, dequantize(x, jnp.float32), hessian.sum_II) for x in (calibrated, nearest))
    ratio = float(ours / theirs)
    # A matrix that is not finite is not less either.
    return (calibrated, ratio) if ratio < 1 else (nearest, None)


@partial(jax.jit, static_argnums=(1, 2))
def rounded(w: Any, axes: str, format: Quantized) -> QuantizedWeight:
    """To the nearest."""
    return quantized(w, axes, format)


@jax.jit
def _outer(x: jax.Array, mine_BT: jax.Array) -> jax.Array:
    x_BTI = x.reshape(*x.shape[:2], -1).astype(jnp.float32) * mine_BT[..., None]
    return jnp.einsum("BTI,BTJ->IJ", x_BTI, x_BTI)


@jax.jit
def _hidden(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array) -> jax.Array:
    return swiglu(x_BTD @ gate_DF, x_BTD @ up_DF)


@partial(jax.jit, static_argnums=2)
def _rms(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    return rms_norm(x_BTD, scale_D.astype(x_BTD.dtype), eps)


def _normed(x_BTD: jax.Array, scale_D: nnx.Param, eps: float) -> jax.Array:
    return _rms(x_BTD, scale_D[...], eps)


@partial(jax.jit, static_argnums=0)
def _attend(graph: Any, state: Any, x_BTD: jax.Array, sight: Sight, shared: SharedKeyValue | None) -> Any:
    attention: Attention = nnx.merge(graph, state)
    return attention(x_BTD, sight, shared, SINGLE_DEVICE)


@partial(jax.jit, static_argnums=0)
def _chosen(graph: Any, state: Any, x_BTD: jax.Array) -> jax.Array:
    """experts_BTK of each token."""
    return nnx.merge(graph, state)(x_BTD, jnp.ones(x_BTD.shape[:2], bool), SINGLE_DEVICE).experts_BTK


@partial(jax.jit, static_argnums=0)
def _layer(graph: Any, state: Any, x_BTD: jax.Array) -> jax.Array:
    """y_BTD of a dense or a MoE layer."""
    layer: FeedForward | MoELayer = nnx.merge(graph, state)
    if isinstance(layer, FeedForward):
        return layer(x_BTD, SINGLE_DEVICE)
    return layer(x_BTD, jnp.ones(x_BTD.shape[:2], bool), jnp.int32(0), None, SINGLE_DEVICE)[0]
