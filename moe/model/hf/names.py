"""Which tensor of a checkpoint is which piece of the parameters, by family."""

import math
from typing import NamedTuple

import numpy as np

from moe.model.hf.config import Family
from moe.model.pieces import Piece


class HfTensor(NamedTuple):
    """One tensor of a checkpoint: its name, its shape there, and the piece that it is here."""

    name: str
    shape: tuple[int, ...]
    piece: Piece

    def to_piece(self, values: np.ndarray) -> np.ndarray:
        """Linear layers are stored (out, in) and used (in, out), with heads and their width apart. A view."""
        return values.T.reshape(self.piece.shape) if _is_linear(self.piece) else values

    def from_piece(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `to_piece`."""
        return values.reshape(self.shape[::-1]).T if _is_linear(self.piece) else values


def hf_tensor(piece: Piece, family: Family) -> HfTensor:
    """The tensor that holds `piece` in a checkpoint of `family`."""
    name = _outer_name(piece) if piece.layer is None else f"model.layers.{piece.layer}.{_name_in_layer(piece, family)}"
    return HfTensor(f"{name}.weight", _shape(piece), piece)


def _shape(piece: Piece) -> tuple[int, ...]:
    if not _is_linear(piece):
        return piece.shape
    # D is the width that comes in, unless it ends the letters: then it is what goes out.
    split = 1 if piece.axes.startswith("D") else len(piece.shape) - 1
    return math.prod(piece.shape[split:]), math.prod(piece.shape[:split])


def _is_linear(piece: Piece) -> bool:
    return len(piece.shape) > 1 and piece.axes != "VD"


def _outer_name(piece: Piece) -> str:
    return {"embedding_VD": "model.embed_tokens", "norm_D": "model.norm", "head_VD": "lm_head"}[str(piece.path[0])]


_PROJECTIONS = {"w_gate": "gate_proj", "w_up": "up_proj", "w_down": "down_proj"}
_MIXTRAL = {"w_gate": "w1", "w_up": "w3", "w_down": "w2"}


def _name_in_layer(piece: Piece, family: Family) -> str:
    *_, module, last = (str(key) for key in piece.path)
    if last == "attention_norm_D":
        return "input_layernorm"
    if last == "feed_forward_norm_D":
        return "post_attention_layernorm"
    word = last.rsplit("_", 1)[0]
    if module == "attention":
        norms = ("q_norm", "k_norm") if family == "qwen3_moe" else ("query_layernorm", "key_layernorm")
        known = {"w_q": "q_proj", "w_k": "k_proj", "w_v": "v_proj", "w_o": "o_proj"}
        return f"self_attn.{(known | dict(zip(('q_norm', 'k_norm'), norms, strict=True)))[word]}"
    moe = "block_sparse_moe" if family == "mixtral" else "mlp"
    if module == "router":
        return f"{moe}.gate.wg" if family.startswith("hunyuan") else f"{moe}.gate"
    if module == "experts":
        return f"{moe}.experts.{piece.index[1]}.{(_MIXTRAL if family == 'mixtral' else _PROJECTIONS)[word]}"
    return f"mlp.shared_mlp.{_PROJECTIONS[word]}" if module == "shared" else f"mlp.{_PROJECTIONS[word]}"
