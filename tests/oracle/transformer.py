"""The whole model in float64, token by token, in the order of the released code: each layer of a cross-layer group
takes the raw keys and values of the group's first layer, turns them again and applies its own key norm."""

import numpy as np

from moe.model.config import ModelConfig
from tests.oracle.moe import routed, swiglu
from tests.oracle.router import choose


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + eps) * weight


def rope(x_H: np.ndarray, position: int, base: float) -> np.ndarray:
    half = len(x_H) // 2
    out = np.empty(len(x_H))
    for i in range(half):
        angle = position * base ** (-i / half)
        out[i] = x_H[i] * np.cos(angle) - x_H[i + half] * np.sin(angle)
        out[i + half] = x_H[i + half] * np.cos(angle) + x_H[i] * np.sin(angle)
    return out


def attention(x_TD, kv_from, weights, config: ModelConfig, positions_T, segments_T):
    """The attention's output, and the raw keys and values (T, M, H) that the group's next layers take."""
    base = config.rope.theta
    if config.rope.ntk_alpha is not None:
        base *= config.rope.ntk_alpha ** (config.head_dim / (config.head_dim - 2))
    T = len(x_TD)
    q_TNH = np.einsum("TD,DNH->TNH", x_TD, weights["w_q_DNH"])
    if kv_from is None:
        kv_from = (
            np.einsum("TD,DMH->TMH", x_TD, weights["w_k_DMH"]),
            np.einsum("TD,DMH->TMH", x_TD, weights["w_v_DMH"]),
        )
    k_TMH, v_TMH = kv_from

    def turned(x_H, t, norm):
        if config.qk_norm == "before_rope":
            x_H = rms_norm(x_H, weights[norm], config.norm_eps)
        x_H = rope(x_H, positions_T[t], base)
        return rms_norm(x_H, weights[norm], config.norm_eps) if config.qk_norm == "after_rope" else x_H

    y_TNH = np.zeros(q_TNH.shape)
    for n in range(config.num_heads):
        m = n // (config.num_heads // config.num_kv_heads)
        keys = [turned(k_TMH[s, m], s, "k_norm_H") for s in range(T)]
        for t in range(T):
            if segments_T[t] == 0:
                continue
            seen = [s for s in range(t + 1) if segments_T[s] == segments_T[t]]
            q_H = turned(q_TNH[t, n], t, "q_norm_H")
            scores = np.array([q_H @ keys[s] for s in seen]) * config.head_dim**-0.5
            probs = np.exp(scores - scores.max())
            probs /= probs.sum()
            y_TNH[t, n] = sum(p * v_TMH[s, m] for p, s in zip(probs, seen, strict=True))
    return np.einsum("TNH,NHD->TD", y_TNH, weights["w_o_NHD"]), kv_from


def moe(x_TD, weights, config: ModelConfig, segments_T):
    """Shared experts and routed ones, dropless."""
    experts_TK, weights_TK = choose(x_TD @ weights["router"]["w_DE"], config.router.top_k, config.router.renormalizes)
    experts_TK = np.where(segments_T[:, None] > 0, experts_TK, config.num_experts)
    names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")
    y_TD = routed(x_TD, experts_TK, weights_TK, *(weights["experts"][name] for name in names))
    if config.num_shared_experts:
        y_TD += dense(x_TD, weights["shared"])
    return y_TD


def dense(x_TD, weights):
    return np.stack([swiglu(x_D, weights["w_gate_DF"], weights["w_up_DF"], weights["w_down_FD"]) for x_D in x_TD])


def layers_of(params: dict, config: ModelConfig) -> list[dict]:
    """The stacked parameters as one dict a layer, in the order of the layers."""
    layers = []
    for stack in (params["stacks"][i] for i in sorted(params["stacks"])):
        blocks = [stack["blocks"][i] for i in sorted(stack["blocks"])]
        for group in range(len(blocks[0]["attention_norm_D"])):
            layers += [_at(block, group) for block in blocks]
    assert len(layers) == config.num_layers
    return layers


def _at(tree: dict, index: int) -> dict:
    return {k: _at(v, index) if isinstance(v, dict) else np.asarray(v[index], np.float64) for k, v in tree.items()}


def logits(params: dict, config: ModelConfig, tokens_T, positions_T, segments_T) -> np.ndarray:
    """logits_TV of one sequence."""

    def norm(x_TD, weight):
        return np.stack([rms_norm(x_D, np.asarray(weight, np.float64), config.norm_eps) for x_D in x_TD])

    embedding_VD = np.asarray(params["embedding_VD"], np.float64)
    x_TD = embedding_VD[tokens_T]
    kv = None
    for number, layer in enumerate(layers_of(params, config)):
        kv = kv if number % config.cla_factor else None
        y_TD, kv = attention(
            norm(x_TD, layer["attention_norm_D"]), kv, layer["attention"], config, positions_T, segments_T
        )
        x_TD = x_TD + y_TD
        normed_TD = norm(x_TD, layer["feed_forward_norm_D"])
        if config.is_dense(number):
            x_TD = x_TD + dense(normed_TD, layer["feed_forward"])
        else:
            x_TD = x_TD + moe(normed_TD, layer["feed_forward"], config, segments_T)
    head_VD = embedding_VD if config.tie_embeddings else np.asarray(params["head_VD"], np.float64)
    return norm(x_TD, params["norm_D"]) @ head_VD.T
