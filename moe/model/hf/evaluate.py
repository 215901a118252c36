"""What a checkpoint computes for given tokens, with every gradient, under Hugging Face's names: for comparison with
another implementation."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from moe.model.cache import empty_cache
from moe.model.execution import Execution
from moe.model.hf.checkpoint import HfCheckpoint, model_specs
from moe.model.hf.peft import with_adapters
from moe.model.pieces import load
from moe.model.precision import FULL
from moe.model.tensor_files import NewTensor, WeightsError, write_file
from moe.model.transformer import Transformer
from parallel.layout import Layout

PROMPT, NEW = 8, 16
"""Tokens of the greedy continuation: given, and generated."""


def evaluate(folder: Path, inputs: Path, output: Path, layout: Layout, adapters: Path | None = None) -> None:
    """Writes `output`, a safetensors file, all of it float32 but the token ids:

    logits (B, T, V); loss (1,), the mean cross-entropy of the T-1 next tokens, nats; hidden_states.k (B, T, D), the
    input of layer k, and at last what follows the final norm; grad.NAME, of the loss, for every parameter;
    greedy_ids (B, 24) int64, 8 tokens of the input and 16 that follow, through the key-value cache.

    Args:
        folder: the checkpoint.
        adapters: a folder that PEFT wrote, to merge into the weights; gradients are then of what was merged.
        inputs: a safetensors file with input_ids (B, T), whole numbers.

    Raises:
        ConfigError, WeightsError, LayoutError: see HfCheckpoint and load.
    """
    layout.refuse_stages("evaluation of a checkpoint")
    checkpoint = HfCheckpoint(folder)
    tokens_BT = read_tokens(inputs, checkpoint.config.vocab_size)
    # Rows of padding fill the batch up until it divides over the mesh; they go to no expert and weigh nothing.
    batch = tokens_BT.shape[0]
    padded_BT = np.pad(tokens_BT, ((0, -batch % layout.batch_shards), (0, 0)))
    segments_BT = np.zeros(padded_BT.shape, np.int32)
    segments_BT[:batch] = 1

    params = load(
        with_adapters(checkpoint, adapters),
        checkpoint.config,
        model_specs(checkpoint.config, FULL),
        layout,
        jnp.float32,
    )
    graph = nnx.graphdef(nnx.eval_shape(lambda: Transformer(checkpoint.config, FULL, Execution(), rngs=nnx.Rngs(0))))
    # GPUs would round the inputs of float32 products to fewer bits.
    with jax.default_matmul_precision("highest"):
        found, gradients = jax.jit(partial(_forward_and_gradients, graph, layout))(params, padded_BT, segments_BT)
        found["greedy_ids"] = _greedy(graph, layout, params, padded_BT[:, :PROMPT], segments_BT)
    values = {name: np.asarray(value)[:batch] for name, value in found.items()}

    tensors = [NewTensor(name, value.dtype, value.shape) for name, value in values.items()]
    tensors += [NewTensor(f"grad.{tensor.name}", np.dtype(np.float32), tensor.shape) for tensor in checkpoint.tensors]

    def contents() -> Iterator[np.ndarray]:
        yield from values.values()
        for tensor in checkpoint.tensors:
            stacked: Any = gradients
            for key in tensor.piece.path:
                stacked = stacked[key]
            yield tensor.from_piece(np.asarray(stacked[tensor.piece.index]))

    aside = output.with_name(output.name + ".writing")
    try:
        write_file(aside, tensors, contents())
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)


def read_tokens(inputs: Path, vocab_size: int) -> np.ndarray:
    """input_ids (B, T) i32 of a safetensors file.

    Raises:
        WeightsError: no such file or tensor, or ids that the model does not have.
    """
    try:
        tokens = load_file(inputs)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{inputs}: cannot be read ({error}); give a safetensors file") from error
    if "input_ids" not in tokens:
        raise WeightsError(f"{inputs}: has no input_ids, but {', '.join(sorted(tokens)) or 'nothing'}")
    ids = tokens["input_ids"]
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise WeightsError(
            f"{inputs}: input_ids is {ids.dtype} of shape {ids.shape}; give whole numbers (batch, at least 2 tokens)"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise WeightsError(f"{inputs}: input_ids go from {ids.min()} to {ids.max()}; give 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


def _forward_and_gradients(
    graph: nnx.GraphDef, layout: Layout, params: dict[str, Any], tokens_BT: jax.Array, segments_BT: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Everything but the continuation, by name, and the gradients as nested dicts."""

    def loss(params: dict[str, Any]) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, params, {})
        output = model(tokens_BT, None, segments_BT, layout=layout, keep_layer_inputs=True)
        logits_BTV = model.logits(output.hidden_BTD, layout)
        log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        losses_BT = -jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
        weights_BT = (segments_BT[:, 1:] > 0).astype(jnp.float32)
        mean = (losses_BT * weights_BT).sum() / weights_BT.sum()
        states = [*output.layer_inputs_LBTD, output.hidden_BTD]
        found = {"logits": logits_BTV, "loss": mean[None]}
        return mean, found | {f"hidden_states.{k}": state for k, state in enumerate(states)}

    gradients, found = jax.grad(loss, has_aux=True)(params)
    return found, gradients


def _greedy(
    graph: nnx.GraphDef, layout: Layout, params: dict[str, Any], prompt_BT: np.ndarray, segments_BT: np.ndarray
) -> np.ndarray:
    """The prompt and the likeliest tokens after it, i64 [B, prompt + NEW]."""
    config = nnx.merge(graph, jax.eval_shape(lambda: params), {}).config
    B, T = prompt_BT.shape

    @jax.jit
    def step(params, cache, tokens_BT, first_slot):
        model = nnx.merge(graph, params, {})
        slots_BT = jnp.broadcast_to(first_slot + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        valid_BT = segments_BT[:, : tokens_BT.shape[1]]
        output = model(tokens_BT, slots_BT, valid_BT, cache=cache, layout=layout)
        return model.logits(output.hidden_BTD[:, -1:], layout).argmax(-1), output.cache

    cache = jax.jit(lambda: empty_cache(config, B, T + NEW, jnp.float32, layout))()
    tokens, new_B1 = [prompt_BT], prompt_BT
    for slot in [0, *range(T, T + NEW - 1)]:
        new_B1, cache = step(params, cache, new_B1, slot)
        tokens.append(np.asarray(new_B1))
    return np.concatenate(tokens, axis=1).astype(np.int64)
