"""Tencent's released model written anew in PyTorch, from what its code does (models/modeling_hunyuan.py, eager
attention, eval): a second opinion, with autograd, on configurations for which there is no golden result."""

import math

import torch
import torch.nn.functional as F


class Released:
    """`settings` as in config.json; `weights` by their names in a checkpoint."""

    def __init__(self, settings: dict, weights: dict[str, torch.Tensor]) -> None:
        self.settings, self.weights = settings, weights
        self.heads = settings["num_attention_heads"]
        self.kv_heads = settings["num_key_value_heads"]
        self.width = settings["hidden_size"] // self.heads

    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Logits (B, T, V), the mean next-token loss, and hidden states as transformers lists them."""
        embedding = self.weights["model.embed_tokens.weight"]
        x = F.embedding(ids, embedding, padding_idx=self.settings["pad_token_id"])
        states, shared = [], None
        for layer in range(self.settings["num_hidden_layers"]):
            states.append(x)
            name = f"model.layers.{layer}"
            attended, projected = self.attention(self.norm(x, f"{name}.input_layernorm"), layer, shared)
            if self.settings["use_cla"] and layer % self.settings["cla_share_factor"] == 0:
                shared = projected
            x = x + attended
            x = x + self.feed_forward(self.norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        x = self.norm(x, "model.norm")
        head = embedding if self.settings["tie_word_embeddings"] else self.weights["lm_head.weight"]
        logits = x @ head.T
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return logits, loss, [*states, x]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weights[f"{name}.weight"] * (x * torch.rsqrt(variance + self.settings["rms_norm_eps"]))

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        base, scaling = self.settings["rope_theta"], self.settings["rope_scaling"]
        exponents = torch.arange(0, self.width, 2).float() / self.width
        if scaling is None:
            frequencies = (1.0 / base**exponents).bfloat16().float()
        else:
            frequencies = 1.0 / (base * scaling["alpha"] ** (self.width / (self.width - 2))) ** exponents
        angles = torch.outer(torch.arange(x.shape[-2]).float(), frequencies)
        cos, sin = (torch.cat((f, f), -1) for f in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def attention(self, x: torch.Tensor, layer: int, shared: tuple | None) -> tuple[torch.Tensor, tuple]:
        """What the layer adds, and its raw k and v projections, from which the next layers may start."""
        B, T, D = x.shape
        name = f"model.layers.{layer}.self_attn"
        crosses = self.settings["use_cla"] and layer % self.settings["cla_share_factor"] != 0
        k, v = shared if crosses else (self.linear(x, f"{name}.k_proj"), self.linear(x, f"{name}.v_proj"))
        projected = (k, v)
        q = self.linear(x, f"{name}.q_proj").view(B, T, self.heads, self.width).transpose(1, 2)
        k, v = (y.view(B, T, self.kv_heads, self.width).transpose(1, 2) for y in (k, v))
        q, k = self.rope(q), self.rope(k)
        if self.settings["use_qk_norm"]:
            q, k = self.norm(q, f"{name}.query_layernorm"), self.norm(k, f"{name}.key_layernorm")
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, 1) for y in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.width)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)
        return self.linear(y, f"{name}.o_proj"), projected

    def feed_forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.settings["num_experts"] == 1:
            return self.mlp(x, name)
        probs = self.linear(x, f"{name}.gate.wg").softmax(-1)
        weights, chosen = probs.topk(self.settings["moe_topk"], -1)
        if self.settings["moe_topk"] > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for expert in range(self.settings["num_experts"]):
            weight = (weights * (chosen == expert)).sum(-1, keepdim=True)
            y = y + weight * self.mlp(x, f"{name}.experts.{expert}")
        return y + self.mlp(x, f"{name}.shared_mlp") if self.settings["use_mixed_mlp_moe"] else y

    def mlp(self, x: torch.Tensor, name: str) -> torch.Tensor:
        hidden = F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj")
        return self.linear(hidden, f"{name}.down_proj")
